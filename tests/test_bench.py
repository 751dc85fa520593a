"""The benchmark: how it measures, what it writes, and what it says when there is nothing to measure with."""

import json
import time

import pytest
import torch

from course_lib import __main__
from course_lib.course import bench


@pytest.fixture
def peers(monkeypatch):
    """A benchmark of one quick row, with stand-ins for the peers, which are not installed everywhere."""

    class Peer:
        setNumThreads = staticmethod(lambda threads: None)

    def quick():
        """counting to three"""
        return {"ours": lambda: sum(range(3)), "theirs": lambda: time.sleep(0)}

    monkeypatch.setattr(bench, "ROWS", {"quick": quick})
    monkeypatch.setattr(bench, "importlib", type("", (), {"import_module": staticmethod(lambda name: Peer)}))
    monkeypatch.setattr(bench, "version", lambda package: "9.9")


def test_a_missing_peer_is_named_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(bench, "PEERS", {"no-such": "no_such_package"})
    assert __main__.main(["bench"]) == 1
    said = capsys.readouterr().err
    assert "no_such_package is missing" in said and 'pip install -e ".[bench]"' in said


def test_missing_photographs_are_named_with_what_to_do(peers, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    bench._model_and_photographs.cache_clear()
    monkeypatch.setitem(bench.ROWS, "max_box_acc", bench.row_max_box_acc)
    assert __main__.main(["bench", "max_box_acc"]) == 1
    assert "python -m course_lib data" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_an_unknown_row_is_refused(capsys):
    assert __main__.main(["bench", "speed"]) == 1
    assert "There is no row speed; choose from cam, " in capsys.readouterr().err


def test_the_table_and_the_file_say_the_same(peers, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path))
    monkeypatch.setattr(bench, "_measure", lambda contestants, repeats: {"ours": 0.002, "theirs": 0.025})
    assert __main__.main(["bench", "quick", "--repeats", "1"]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert set(written) == {"commit", "repeats", "threads", "versions", "minimum", "rows"}
    assert set(written["versions"]) == set(written["minimum"]) == {"torch", "timm", "numpy", *bench.PEERS}
    assert (written["repeats"], written["threads"]) == (1, 1)
    assert written["rows"] == [
        {"row": "quick", "task": "counting to three", "contestant": "ours", "seconds": 0.002, "ratio": 1.0},
        {"row": "quick", "task": "counting to three", "contestant": "theirs", "seconds": 0.025, "ratio": 12.5},
    ]
    assert "| counting to three | theirs | 25.0 ms | 12.5 |" in capsys.readouterr().out


def test_contestants_take_turns_and_the_median_counts(monkeypatch):
    clock = [0.0]
    turns = []

    def contestant(name, seconds):
        def run():
            turns.append(name)
            clock[0] += seconds.pop(0)

        return run

    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    spent = bench._measure({"ours": contestant("ours", [2, 3, 10]), "theirs": contestant("theirs", [7, 5, 6])}, 3)
    assert turns == ["ours", "theirs"] * 3
    assert spent == {"ours": 3, "theirs": 6}


def test_the_opencv_curves_are_ours():
    pytest.importorskip("cv2")
    heatmap = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(0))
    heatmap = heatmap / heatmap.amax((1, 2), keepdim=True)
    assert next(iter(bench._box_curves(heatmap, [torch.tensor([[2, 2, 8, 9]])] * 2))) == "ours"  # it compares them


def test_a_contestant_that_computes_something_else_is_refused():
    ours = {"ours": lambda: torch.zeros(2)}
    assert bench._agreed(ours | {"theirs": lambda: torch.full((2,), 0.1)}, atol=0.2)["ours"] is ours["ours"]
    with pytest.raises(AssertionError):
        bench._agreed(ours | {"theirs": lambda: torch.ones(2)}, atol=0.2)
