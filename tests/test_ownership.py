"""A run owns its folder: one at a time writes there, other settings are refused by name, a failed start leaves it."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from course_lib.experiments import shared


@dataclass(frozen=True)
class Config:
    data: str
    weights: str = "random"
    checkpoint: str = ""
    epochs: int = 1
    workers: int = 0
    backbone: str = "small"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "miniature.json").write_text('{"world": "one"}')
    return tmp_path / "mini"


@shared.owner("train it", "limit", free=["backbone"])
def work(config, folder, limit=None, fails=False):
    if fails:
        raise ValueError("no")
    (folder / "model").touch()
    return limit


def test_the_same_settings_go_on_and_others_are_named(data, tmp_path):
    folder = tmp_path / "run"
    assert work(Config(str(data)), folder, 3) == 3
    assert work(Config(str(data), workers=4, backbone="other"), folder, limit=3) == 3
    with pytest.raises(
        ValueError, match=r"run holds `train it` with .*: epochs was 1 and is 2; limit was 3 and is 4. N"
    ):
        work(Config(str(data), epochs=2), folder, 4)
    (data / "miniature.json").write_text('{"world": "two"}')
    with pytest.raises(ValueError, match=r"data was mini \(one\) and is mini \(two\). Name another --folder, such as"):
        work(Config(str(data)), folder, 3)
    assert json.loads((folder / "settings.json").read_text())["train it"]["limit"] == 3


def test_another_command_may_use_the_folder(data, tmp_path):
    other = shared.owner("evaluate it")(lambda config, folder: (folder / "result").touch())
    work(Config(str(data)), tmp_path / "run")
    other(Config(str(data), epochs=5), tmp_path / "run")
    assert set(json.loads((tmp_path / "run" / "settings.json").read_text())) == {"train it", "evaluate it"}


def test_weights_are_what_they_are_not_where(data, tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    work(Config(str(data), checkpoint=str(tmp_path / "a")), tmp_path / "run")
    work(Config(str(data), checkpoint=str(tmp_path / "b")), tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint was"):
        work(Config(str(data), checkpoint=str(tmp_path / "c")), tmp_path / "run")


def test_what_made_nothing_binds_nobody(data, tmp_path):
    with pytest.raises(ValueError, match="^no$"):
        work(Config(str(data)), tmp_path / "run", fails=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(ValueError, match="^no$"):
        work(Config(str(data)), tmp_path / "run", fails=True)
    work(Config(str(data), epochs=2), tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").is_file()


@pytest.mark.parametrize("text", ["", '{"train it": {"epo', "[]"])
def test_damaged_settings_are_named(data, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"settings.json: expected"):
        work(Config(str(data)), tmp_path / "run")


def _hold(config, folder, ready):
    @shared.owner("train it")
    def slow(config, folder):
        ready.set()
        time.sleep(60)

    slow(config, folder)


def test_one_at_a_time_writes_and_a_kill_leaves_nothing_locked(data, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(Config(str(data)), tmp_path / "run", ready))
    other.start()
    assert ready.wait(30)
    with pytest.raises(
        RuntimeError, match=r"Another run is writing into .*run; wait until it is done, or name another"
    ):
        work(Config(str(data)), tmp_path / "run")
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    shared.owner("train it")(lambda config, folder: None)(Config(str(data)), tmp_path / "run")


def test_the_default_folder_of_other_settings_is_another_one(data, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "build" / "results"))
    config = Config(str(data))
    first = shared.build_folder("it", config, "small", "random")
    assert first == tmp_path / "build" / "it" / "small-random-mini"
    shared.owner("evaluate it")(lambda config, folder: (folder / "result").touch())(config, first)
    assert shared.build_folder("it", config, "small", "random") == first
    other = shared.build_folder("it", Config(str(data), epochs=2), "small", "random")
    assert other.parent == first.parent and other.name.startswith("small-random-mini-") and other != first


def test_only_the_first_of_several_processes_locks(data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    work(Config(str(data)), Path(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model"]
