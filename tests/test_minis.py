"""Folders of miniatures: only read when complete, written by one process, side by side, and nothing is ever removed."""

import errno
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
from tqdm import tqdm

from course_lib.worlds import folders, minis, tagged

ABOUT = {"world": "test", "sizes": (1, 2)}


def write(folder):
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        (folder / "images" / f"{number}.txt").write_text(f"image {number}")
    (folder / "list.txt").write_text("0 1 2")


def never(folder):
    raise AssertionError("nothing was to be written")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_once(tmp_path):
    folder = minis._once(tmp_path / "mini-x", ABOUT, write)
    before = contents(tmp_path)
    assert folder == tmp_path / "mini-x" and minis._once(folder, ABOUT, never) == folder
    assert contents(tmp_path) == before and not list(tmp_path.glob(".writing-*"))


def test_a_bar_counts_the_images_that_are_written(tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def __exit__(self, *error):
            bars.append((self.desc.rstrip(": "), self.n, self.total))
            return super().__exit__(*error)

    monkeypatch.setattr(minis, "tqdm", Bar)
    monkeypatch.setitem(minis.PER_ITEM, "creatures", {"train": 2, "val": 1})
    recipe = replace(tagged.RECIPES["creatures"], images={"trainaug": 3, "val": 2})
    monkeypatch.setitem(tagged.RECIPES, "creatures", recipe)
    monkeypatch.setattr(minis, "SCORED", 2)
    for write in (minis.mini_ilsvrc, minis.mini_voc):
        write(tmp_path, source="creatures")
    images = {name: len([*(tmp_path / name).rglob(f"{part}/**/*.[Jj][Pp]*")]) for name, part in (
        ("mini-ilsvrc-creatures", "Data"), ("mini-voc-creatures", "JPEGImages"),
    )}  # fmt: skip
    assert bars == [(f"Writing {name}", count, count) for name, count in images.items()] and min(images.values()) > 4
    minis.mini_voc(tmp_path, source="creatures")
    assert len(bars) == 2  # nothing is written


def test_an_edition_that_counted_no_files_is_read_as_it_is(tmp_path):
    (tmp_path / "mini-x").mkdir()
    (tmp_path / "mini-x" / "miniature.json").write_text(json.dumps(ABOUT))
    assert minis._once(tmp_path / "mini-x", ABOUT, never) == tmp_path / "mini-x"


def test_other_data_stay_and_the_data_set_lies_beside_them(tmp_path, capsys):
    first = minis._once(tmp_path / "mini-x", ABOUT, write)
    (first / "notes.txt").write_text("mine")
    before = contents(first)
    second = minis._once(tmp_path / "mini-x", {**ABOUT, "world": "other"}, write)
    assert second != first and second.name.startswith("mini-x-") and second.parent == tmp_path
    assert contents(first) == before and f"written to {second}" in capsys.readouterr().out
    assert minis._once(tmp_path / "mini-x", ABOUT, never) == first
    assert minis._once(tmp_path / "mini-x", {**ABOUT, "world": "other"}, never) == second


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"world": 3}', None])
def test_a_damaged_note_or_a_folder_of_the_users_own_does_not_block(tmp_path, note):
    (tmp_path / "mini-x").mkdir()
    (tmp_path / "mini-x" / "mine.txt").write_text("mine")
    if note is not None:
        (tmp_path / "mini-x" / "miniature.json").write_text(note)
    folder = minis._once(tmp_path / "mini-x", ABOUT, write)
    assert folder.name.startswith("mini-x-") and (tmp_path / "mini-x" / "mine.txt").read_text() == "mine"
    assert minis._once(tmp_path / "mini-x", ABOUT, never) == folder


def test_lost_files_are_noticed_and_written_again(tmp_path, capsys):
    folder = minis._once(tmp_path / "mini-x", ABOUT, write)
    before = contents(folder)
    (folder / "images" / "1.txt").unlink()
    (folder / "notes.txt").write_text("mine")
    assert minis._once(folder, ABOUT, write) == folder
    assert contents(folder) == {**before, "notes.txt": "mine"} and "lacks files" in capsys.readouterr().out


def test_links(tmp_path):
    real = minis._once(tmp_path / "elsewhere" / "mini-x", ABOUT, write)
    (tmp_path / "mini-x").symlink_to(real)
    assert minis._once(tmp_path / "mini-x", ABOUT, never) == tmp_path / "mini-x"
    other = minis._once(tmp_path / "mini-x", {**ABOUT, "world": "other"}, write)
    assert other.name.startswith("mini-x-") and real.is_dir() and (tmp_path / "mini-x").is_symlink()
    (tmp_path / "mini-y").symlink_to("nowhere")
    assert minis._once(tmp_path / "mini-y", ABOUT, write).name.startswith("mini-y-")


def test_prune_removes_old_generations_and_nothing_else(tmp_path):
    for world in ("a", "b", "c"):
        minis._once(tmp_path / "mini-x", {"world": world}, write)
    now = minis._once(tmp_path / "mini-x", {"world": "d"}, write)
    kept = minis._once(tmp_path / "mini-x", {"world": "b"}, never)
    (kept / "notes.txt").write_text("mine")
    others = [minis._once(tmp_path / name, ABOUT, write) for name in ("mini-x-seed1", "mini-x-creatures")]
    (tmp_path / "mini-x-my-own").mkdir()
    said = dict(minis._old_generations(now))
    assert said.pop(kept) == "it holds files that the course did not write"
    assert len(said) == 2 and not any(said.values()) and not {now, *others} & {*said}
    assert tmp_path / "mini-x" in said


def refuse_writing(monkeypatch, folder):
    opened = os.open

    def refuse(path, flags, *rest, **named):
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_a_read_only_folder(tmp_path, monkeypatch):
    folder = minis._once(tmp_path / "mini-x", ABOUT, write)
    refuse_writing(monkeypatch, tmp_path)
    assert minis._once(folder, ABOUT, never) == folder
    with pytest.raises(folders.NotWritable, match=f"{tmp_path}: expected mini-y, .*set COURSE_DATA"):
        minis._once(tmp_path / "mini-y", ABOUT, write)


def test_a_full_disk(tmp_path):
    def full(folder):
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"{tmp_path}: expected room for mini-x, got a full disk"):
        minis._once(tmp_path / "mini-x", ABOUT, full)
    assert [path.name for path in tmp_path.iterdir()] == [".mini-x.writing"]


def _write_slowly(root, started):
    def slow(folder):
        write(folder)
        started.set()
        time.sleep(60)

    minis._once(root / "mini-x", ABOUT, slow)


def test_a_writer_that_dies_is_waited_for_no_longer(tmp_path, capsys):
    (tmp_path / ".writing-mini-x-creatures.other").mkdir()  # of another data set, which may be alive
    context = multiprocessing.get_context("fork")
    started = context.Event()
    writer = context.Process(target=_write_slowly, args=(tmp_path, started))
    writer.start()
    assert started.wait(120)
    context.Process(target=_kill_later, args=(writer.pid,)).start()
    folder = minis._once(tmp_path / "mini-x", ABOUT, write)
    writer.join()
    assert len(contents(folder)) == 5
    assert "Waiting for mini-x, which another process writes" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob(".writing-*")] == [".writing-mini-x-creatures.other"]


def _kill_later(process):
    time.sleep(1)
    os.kill(process, signal.SIGKILL)


def test_what_earlier_editions_left_goes_after_a_day(tmp_path):
    for name, age in (("old", 2 * folders.DAY), ("new", 60)):
        (tmp_path / f".writing-{name}").mkdir()
        os.utime(tmp_path / f".writing-{name}", (time.time() - age,) * 2)
    minis._once(tmp_path / "mini-x", ABOUT, write)
    assert [path.name for path in tmp_path.glob(".writing-*")] == [".writing-new"]
