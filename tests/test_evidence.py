"""Evidence: several seeds side by side, finished ones kept, and a run that disagrees is named."""

import json
from pathlib import Path

import pytest

from course_lib import paths
from course_lib.course import evidence
from course_lib.evidence import over_seeds

ROOT = Path(__file__).resolve().parents[1]
TABLES = sorted((ROOT / "data" / "evidence").glob("[0-9][0-9].json"))


def result(seed, value):
    return {
        "lesson": "07",
        "profile": "mini",
        "versions": {"torch": "2"},
        "fingerprint": f"f{seed}",
        "figures": [{"name": "error", "value": value, "unit": "%"}, {"name": "winner", "value": "CAM", "unit": ""}],
    }


@pytest.fixture
def runs(monkeypatch, inline_pool):
    """Lessons that take no time: the seeds they were run with."""
    seeds = []

    def execute(notebook, output, profile, environment, parameters):
        seeds.append(parameters["SEED"])
        paths.write_text(
            Path(environment["COURSE_RESULTS"]) / "07.json",
            json.dumps(result(parameters["SEED"], 20.0 + parameters["SEED"])),
        )

    monkeypatch.setattr(evidence.run, "execute", execute)
    monkeypatch.setattr(evidence, "ProcessPoolExecutor", inline_pool)
    return seeds


def test_seeds_stand_side_by_side_and_are_run_once(runs, tmp_path):
    table = evidence.collect(Path("07_x.ipynb"), tmp_path, (0, 1))
    assert table["figures"] == {"error": {"unit": "%", "values": [20.0, 21.0]}} and table["fingerprints"] == [
        "f0",
        "f1",
    ]
    assert evidence.collect(Path("07_x.ipynb"), tmp_path, (0, 1, 2))["figures"]["error"]["values"] == [
        20.0,
        21.0,
        22.0,
    ]
    assert runs == [0, 1, 2], "finished seeds were run again"


def test_other_commit_other_runs(runs, tmp_path, monkeypatch):
    evidence.collect(Path("07_x.ipynb"), tmp_path, (0,))
    monkeypatch.setattr(evidence, "commit", lambda: "another")
    evidence.collect(Path("07_x.ipynb"), tmp_path, (0,))
    assert runs == [0, 0]


def test_a_run_outside_the_seeds_is_named():
    table = {"figures": {"error": {"unit": "%", "values": [20.0, 21.0, 22.0]}}}
    assert evidence.contradictions(result(0, 20.5), table) == []
    assert evidence.contradictions(result(0, 24.9), table) == []  # three standard deviations beyond the range
    assert "error: 30" in evidence.contradictions(result(0, 30.0), table)[0]


def test_what_rounding_on_another_processor_changes_is_no_contradiction():
    """Where the seeds agree to the last bit: one image in a hundred, or a rounding error that is a figure itself."""
    never = {"figures": {"error": {"unit": "%", "values": [0.0, 0.0, 0.0]}}}
    assert evidence.contradictions(result(0, 0.67), never) == []
    assert len(evidence.contradictions(result(0, 1.1), never)) == 1
    rounding = {"figures": {"deviation": {"unit": "", "values": [9.5e-7] * 3}}}

    def found(value):
        figures = [{"name": "deviation", "value": value, "unit": ""}]
        return evidence.contradictions(result(0, 0.0) | {"figures": figures}, rounding)

    assert found(3e-6) == [] and len(found(1e-4)) == 1


@pytest.mark.parametrize(
    "values, text",
    [([27.0, 28.0, 29.0], "28.0 ± 1.0"), ([5.0], "5"), ([3.0, 3.0], "3"), ([0.61, 0.63], "0.620 ± 0.014")],
)
def test_mean_and_deviation(values, text):
    assert over_seeds(values) == text


@pytest.mark.parametrize("path", TABLES, ids=[path.stem for path in TABLES])
def test_committed_tables_say_where_they_come_from(path):
    table = json.loads(path.read_text())
    assert table["lesson"] == path.stem and table["profile"] == "mini" and len(table["seeds"]) >= 3
    assert (
        table["commit"] and not table["commit"].endswith("-dirty") and len(table["fingerprints"]) == len(table["seeds"])
    )
    # A seed splits the photographs of a world anew; the creatures' world, of lesson 08, has nothing to split.
    assert len(set(table["fingerprints"])) == (1 if path.stem == "08" else len(table["seeds"]))
    assert all(len(figure["values"]) == len(table["seeds"]) for figure in table["figures"].values())
