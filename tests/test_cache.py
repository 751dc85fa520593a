"""What is kept is found again if nothing changed, and only then; damage and full disks cost only time."""

import errno
import multiprocessing
import os
import random
import time
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from course_lib import cache, maps, paths
from course_lib.cache import cached
from course_lib.data.voc import Voc
from course_lib.wsss import recipes


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """A function that counts its calls."""

    calls = property(lambda self: len(self.done))

    def __init__(self, value=None):
        self.value, self.done = value, deque()  # a deque is not looked into

    def __call__(self):
        self.done.append(1)
        return self.value


def in_notebook(source, **known):
    """The names that a cell of a notebook binds."""
    known["__name__"] = "__main__"
    exec(source, known)
    return known


def digest(make, **options):
    key = cache._Key()
    key.follow(make)
    for name, value in options.items():
        key.add(name, value)
    return key.digest()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and [*a] == [*b] and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_what_was_made_is_read_the_second_time(capsys, place):
    transposed = torch.arange(6.0).view(2, 3).T
    value = {
        "state": {"weight": transposed, "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0, 3)},
        "pages": [(torch.tensor(True), 1, 2.5, None, "word", False), transposed[0], transposed],
        3: {"nested": []},
    }
    make = Counted(value)
    first = cached("features of dogs", make, data="abc", settings={"side": 224}, takes="about a minute")
    said = capsys.readouterr().err
    assert "features of dogs: not kept yet, so it is computed now (about a minute)." in said and "and kept in" in said
    second = cached("features of dogs", make, data="abc", settings={"side": 224})
    assert make.calls == 1 and equal(first, value) and equal(second, value)
    assert "read from" in capsys.readouterr().err
    assert second["state"]["weight"].is_contiguous() and first["state"]["weight"].is_contiguous()  # alike in all
    first["state"]["weight"] += 1  # belongs to the lesson
    assert equal(cached("features of dogs", make, data="abc", settings={"side": 224}), value)
    assert [file.suffix for file in place.iterdir() if file.suffix != ".lock"] == [".safetensors"]


def test_a_result_without_tensors_and_one_with_numbers_of_numpy():
    for _ in range(2):
        found = cached("figures", Counted({"miou": np.float64(0.5)}), data="")
        assert found == {"miou": 0.5} and type(found["miou"]) is float


def test_generators_go_on_as_if_nothing_had_been_made():
    def make():
        return torch.rand(2), random.random(), float(np.random.rand())

    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    wanted = torch.rand(1), random.random(), np.random.rand()
    found = []
    for other in (5, 5, 6):
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        found.append(cached("draws", make, data="", seed=other))
        assert (torch.rand(1), random.random(), np.random.rand()) == wanted
    assert equal(found[0], found[1]) and not equal(found[0], found[2])
    torch.manual_seed(99)
    assert equal(found[0], cached("other draws", make, data="", seed=5))  # whatever was drawn before


@dataclass(frozen=True)
class Settings:
    side: int = 224
    rate: float = 0.1


@pytest.mark.parametrize(
    "one, other",
    [
        (1, 2),
        (1, 1.0),
        (1, True),
        (1, "1"),
        (None, "None"),
        (0.1, 0.1 + 1e-17 + 1e-16),
        ([1, [2]], [[1], 2]),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
        (Settings(), Settings(rate=0.2)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (np.zeros(3), np.ones(3)),
        (Path("a"), "a"),
        (range(3), range(4)),
        ({1, 2}, {1, 3}),
        (recipes.recipe("cam"), recipes.recipe("seam")),
    ],
    ids=lambda value: f"{value!s:.20}",
)
def test_other_settings_are_another_entry(one, other):
    assert digest(int, settings=one) == digest(int, settings=one) != digest(int, settings=other)


def test_the_order_of_a_dict_is_no_setting_and_its_words_are():
    assert digest(int, settings={"a": 1, "b": 2}) == digest(int, settings={"b": 2, "a": 1})
    assert digest(int, settings={"a": 1, "b": 2}) != digest(int, settings={"a": 2, "b": 1})


def test_name_data_and_seed_are_part_of_it():
    make = Counted(1)
    for name, data, seed in (("a", "x", 0), ("b", "x", 0), ("a", "y", 0), ("a", "x", 1), ("a", "x", 0)):
        cached(name, make, data=data, seed=seed)
    assert make.calls == 4


def test_other_weights_or_another_form_of_network_are_another_entry():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = digest(int, settings=net)
    assert digest(int, settings=net) == before
    with torch.no_grad():
        net[1].running_mean[0] = 1e-7
    changed = digest(int, settings=net)
    assert changed != before
    net.append(nn.ReLU())
    assert digest(int, settings=net) != changed


CELL = """
def scaled(x):
    return x * {factor}

class Doubled:
    times = {times}
    def __call__(self, x):
        return [y for y in (x, x)][:self.times] {comment}

def make():
    inner = lambda: scaled(side) + Doubled()(side)[0]
    return inner()
"""


@pytest.mark.parametrize(
    "change, same",
    [
        ({}, True),
        ({"comment": "# only words"}, True),
        ({"factor": "3"}, False),
        ({"times": "1"}, False),
        ({"side": 65}, False),
        ({"side": torch.tensor(64)}, False),
    ],
    ids=str,
)
def test_code_of_a_notebook_is_part_of_it_down_to_what_it_calls(change, same):
    def key(factor="2", times="2", comment="", side=64):
        names = in_notebook(CELL.format(factor=factor, times=times, comment=comment), side=side)
        return digest(names["make"])

    assert (key() == key(**change)) is same


def test_closures_defaults_and_networks_of_a_notebook_are_part_of_it():
    def key(inside=1, default=2, bias=0.0):
        net = nn.Linear(1, 1)
        nn.init.constant_(net.weight, 1.0), nn.init.constant_(net.bias, bias)
        cell = f"def outer(n):\n    def make(m={default}):\n        return n + m + net\n    return make\n"
        return digest(in_notebook(cell, net=net)["outer"](inside))

    assert len({key(), key(inside=3), key(default=3), key(bias=1.0)}) == 4 and key() == key()


class Pictures(Dataset):
    """A data set."""

    def __init__(self, split, own=None):
        self.split, self.own, self.drawn = split, own or self, torch.Generator()

    @cached_property
    def tags(self):
        return torch.zeros(3)


def test_another_split_or_other_images_of_a_data_set_are_another_entry():
    def key(data):
        return digest(in_notebook("def make():\n    return data[0]", data=data)["make"])

    train, val = Pictures("train"), Pictures("val")
    keys = [key(data) for data in (train, val, Subset(train, [0]), Subset(train, [1]), Pictures("val", train))]
    assert len({*keys}) == 5
    assert train.tags.sum() == 0 and key(train) == keys[0]  # what was computed from the rest changes nothing
    known = cache._Key()
    known.follow(lambda: Voc)
    assert "course_lib.data.voc" in known.modules


def test_code_of_the_library_is_part_of_it_with_all_that_it_imports():
    key = cache._Key()
    key.follow(in_notebook("def make():\n    return maps.cam", maps=maps)["make"])
    assert key.modules == {"course_lib.maps"}
    files = {Path(path).relative_to(paths.HERE).as_posix() for path in cache._sources(frozenset(key.modules))}
    assert {"__init__.py", "maps.py"} <= files and "wsss/learner.py" not in files
    learner = {Path(path).name for path in cache._sources(frozenset({"course_lib.wsss.learner"}))}
    assert {"learner.py", "engine.py", "contrast.py", "checkpoints.py", "dense.py"} <= learner


def test_a_change_far_below_changes_the_key(tmp_path, monkeypatch):
    for name, text in {
        "__init__": "",
        "high": "from course_lib import middle",
        "middle": "def f():\n    from course_lib.low import g",
        "low": "g = 1",
        "other": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(paths, "HERE", tmp_path)
    hashes = cache._sources.__wrapped__
    before = hashes(frozenset({"course_lib.high"}))
    assert {Path(path).stem for path in before} == {"__init__", "high", "middle", "low"}
    (tmp_path / "low.py").write_text("g = 2")
    assert hashes(frozenset({"course_lib.high"})) != before


def test_another_processor_or_version_is_another_entry(monkeypatch):
    before = digest(int)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert digest(int) != before
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert digest(int) != before
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_version", {}.get)
    assert digest(int) != before


def test_code_that_changed_after_it_was_imported_is_not_trusted(monkeypatch, capsys, place):
    monkeypatch.setitem(cache._imported, str(Path(maps.__file__)), 1)
    make = Counted(1)
    for _ in range(2):
        assert cached("figures", make, data="", code=[maps]) == 1
    assert make.calls == 2 and not place.exists()
    assert "because course_lib/maps.py changed after it was imported; restart the kernel." in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["a number", "its end", "everything", "its words"])
def test_a_damaged_entry_is_set_aside_and_made_anew(damage, place, capsys):
    make = Counted({"weight": torch.arange(100.0), "loss": 0.25})
    first = cached("training", make, data="")
    (entry,) = place.glob("*.safetensors")
    content = bytearray(entry.read_bytes())
    if damage == "a number":
        content[-5] ^= 1
    elif damage == "its end":
        del content[-40:]
    elif damage == "everything":
        content = b"nothing"
    else:
        assert content.count(b"0.25") == 1
        content = content.replace(b"0.25", b"0.75")
    entry.write_bytes(content)
    assert equal(cached("training", make, data=""), first) and make.calls == 2
    assert "is damaged; it is set aside as" in capsys.readouterr().err
    assert entry.with_suffix(".damaged").read_bytes() == content
    assert equal(cached("training", make, data=""), first) and make.calls == 2


def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    make = Counted(torch.ones(3))
    for _ in range(2):
        assert equal(cached("features", make, data=""), torch.ones(3))
    assert make.calls == 2
    assert "features: computed in 0 s, but not kept: " in capsys.readouterr().err


def test_a_full_disk_costs_only_the_cache(monkeypatch, capsys, place):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(paths, "write_bytes", full)
    assert cached("features", Counted(1), data="") == 1
    assert "but not kept: [Errno 28] No space left on device." in capsys.readouterr().err
    assert not [*place.glob("*.safetensors")]


def test_what_is_larger_than_the_cache_is_not_kept(monkeypatch, capsys, place):
    monkeypatch.setattr(cache, "CACHE_BYTES", 1000)
    cached("features", Counted(torch.zeros(1000)), data="")
    assert "not kept: its 0.0 GB are more than" in capsys.readouterr().err and not [*place.glob("*.safetensors")]


def test_what_was_not_used_for_longest_goes(monkeypatch, place):
    make = Counted(torch.zeros(1000))
    for name in ("old", "used", "newer"):
        cached(name, make, data="")
    now = time.time()
    for name, age in {"old": 30, "used": 40, "newer": 20}.items():
        (entry,) = place.glob(f"{name}-*.safetensors")
        os.utime(entry, (now - age, now - age))
    cached("used", make, data="")
    (place / f"{paths.PART}left").write_text("half")
    (place / f"{paths.PART}written").write_text("half")
    os.utime(place / f"{paths.PART}left", (now - 2 * cache.LEFTOVER_SECONDS,) * 2)
    monkeypatch.setattr(cache, "CACHE_BYTES", int(3.5 * entry.stat().st_size))
    cached("newest", make, data="")
    assert {file.name.split("-")[0] for file in place.glob("*.safetensors")} == {"used", "newer", "newest"}
    assert [file.name for file in place.glob(f"{paths.PART}*")] == [f"{paths.PART}written"]


@pytest.mark.parametrize("word", ["off", "OFF", "0"])
def test_it_can_be_switched_off(word, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COURSE_CACHE", word)
    monkeypatch.chdir(tmp_path)
    make = Counted({"x": (1,)})
    assert cached("features", make, data="") == cached("features", make, data="") == {"x": (1,)}
    assert make.calls == 2 and not [*tmp_path.iterdir()] and not capsys.readouterr().err


def test_the_folder_is_that_of_the_checkout_or_of_the_user(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "cache"
    monkeypatch.delenv("COURSE_CACHE")
    assert cache.folder() == paths.checkout() / "build" / "cache"
    monkeypatch.setattr(paths, "checkout", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine" / "course_lib"


def test_what_cannot_be_told_or_kept_is_refused():
    with pytest.raises(TypeError, match="Expected settings of numbers, .* got a Generator; name what matters of it."):
        cached("features", Counted(1), data="", settings={"drawn": torch.Generator()})
    with pytest.raises(TypeError, match="got a Linear in it; for a network return its state_dict()"):
        cached("features", Counted({"net": nn.Linear(1, 1)}), data="")


def test_an_error_keeps_nothing_and_blocks_nobody(place):
    def broken():
        raise RuntimeError("no data")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no data"):
            cached("features", broken, data="")
    assert not [*place.glob("*.safetensors")]


def slowly(calls):
    with open(calls, "a") as file:
        file.write("x")
    while not calls.with_name("waiting").exists():
        time.sleep(0.01)
    if calls.read_text() == "x" and calls.with_name("die").exists():
        os._exit(1)
    return torch.arange(4.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
@pytest.mark.parametrize("made", ["x", "xx"], ids=["waits", "takes over from a dead one"])
def test_two_processes_that_want_the_same_at_once_make_it_once(made, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    if made == "xx":
        (tmp_path / "die").touch()

    def said(sentence):
        if "another process computes it at the moment; waiting for it" in sentence:
            (tmp_path / "waiting").touch()

    monkeypatch.setattr(cache, "_say", said)

    def call():
        return cached("features", lambda: slowly(calls), data="")

    other = multiprocessing.get_context("fork").Process(target=call)
    other.start()
    while not calls.exists():
        time.sleep(0.01)
    assert torch.equal(call(), torch.arange(4.0))
    other.join()
    assert calls.read_text() == made and (tmp_path / "waiting").exists()
