"""Evidence: several seeds side by side, finished ones kept, and a run that disagrees is named."""

import json
from pathlib import Path

import pytest

from course_lib import __main__, paths
from course_lib.course import evidence, studies
from course_lib.evidence import over_seeds

ROOT = Path(__file__).resolve().parents[1]
TABLES = sorted((ROOT / "data" / "evidence").glob("[0-9][0-9].json"))


def result(seed, value):
    return {
        "lesson": "07",
        "profile": "mini",
        "seed": seed,
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

    monkeypatch.setattr(evidence.kernels, "execute", execute)
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
    monkeypatch.setattr(studies.lesson, "commit", lambda: "another")
    evidence.collect(Path("07_x.ipynb"), tmp_path, (0,))
    assert runs == [0, 0]


def table_of(values, unit="%", name="error"):
    return {
        "lesson": "07",
        "profile": "mini",
        "seeds": [0, 1, 2],
        "fingerprints": ["f0", "f1", "f2"],
        "figures": {name: {"unit": unit, "values": values}},
    }


def wrong(value, table, **changes):
    """What is said of a result with one figure."""
    figure = next(iter(table["figures"].items()))
    figures = [{"name": figure[0], "value": value, "unit": figure[1]["unit"]}]
    return evidence.beside_evidence(result(0, value) | {"figures": figures} | changes, table).wrong


def test_a_run_outside_the_seeds_is_named():
    table = table_of([20.0, 21.0, 22.0])
    assert wrong(20.5, table) == () and evidence.beside_evidence(result(0, 20.5), table).compared == 1
    assert wrong(24.9, table) == ()  # three standard deviations beyond the range
    assert "error: 30" in wrong(30.0, table)[0]


def test_what_rounding_on_another_processor_changes_is_no_contradiction():
    """Where the seeds agree to the last bit: one image in a hundred, or a rounding error that is a figure itself."""
    never = table_of([0.0, 0.0, 0.0])
    assert wrong(0.67, never) == () and len(wrong(1.1, never)) == 1
    rounding = table_of([9.5e-7] * 3, "", "deviation")
    assert wrong(3e-6, rounding) == () and len(wrong(1e-4, rounding)) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"figures": []}, "error: missing, but 21.0 ± 1.0 in the evidence"),
        ({"figures": [{"name": "error", "value": None, "unit": "%"}]}, "error: missing"),
        ({"failed": "ValueError: broken"}, "not comparable: expected the state ran through, got ValueError: broken"),
        ({"profile": "smoke"}, "not comparable: expected the profile mini, got smoke"),
        ({"seed": 7}, "not comparable: expected the random seed one of 0, 1, 2, got 7"),
        ({"fingerprint": "f1"}, "not comparable: expected the data f0, got f1"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)
def test_what_cannot_be_compared_or_vanished_is_wrong(changes, sentence):
    found = evidence.beside_evidence(result(0, 21.0) | changes, table_of([20.0, 21.0, 22.0]))
    assert found.compared == 0 and sentence in found.wrong[0]


@pytest.fixture
def checked(monkeypatch, tmp_path, capsys):
    """The exit code and the words of `evidence --check`, over results and committed tables by lesson."""

    def check(results, *names, tables=("07", "08")):
        shelf = tmp_path / "data" / "evidence"
        for name in tables:
            paths.write_text(shelf / f"{name}.json", json.dumps(table_of([20.0, 21.0, 22.0])))
        for name, found in results.items():
            text = found if isinstance(found, str) else json.dumps(found)
            paths.write_text(tmp_path / "results" / f"{name}.json", text)
        monkeypatch.setattr(evidence.build, "course_root", lambda: tmp_path)
        monkeypatch.setattr(paths, "shelf", lambda: tmp_path / "data")
        monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
        code = __main__.main(["evidence", *names, "--check"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return check


FAILED = {"lesson": "07", "profile": "mini", "failed": "ValueError: broken"}


def test_a_check_that_agrees_says_what_it_compared(checked):
    code, said = checked({"07": result(0, 21.0), "08": result(1, 21.0)})
    assert code == 0 and "agrees with the evidence of lessons 07, 08: 2 figures." in said
    assert [line.split() for line in said.splitlines()[1:3]] == [["07", "1", "0", "0"], ["08", "1", "0", "0"]]


@pytest.mark.parametrize(
    ("results", "sentence"),
    [
        ({}, "Nothing was compared"),
        ({"07": FAILED, "08": FAILED}, "Nothing was compared"),
        ({"07": result(0, 21.0)}, "08.json is missing"),
        ({"07": result(0, 21.0), "08": '{"lesson": "08"'}, "08.json: expected JSON"),
        ({"07": result(0, 21.0), "08": {"lesson": "08", "profile": "mini", "figures": [3]}}, "got another figures"),
        ({"07": result(0, 21.0), "08": result(0, 30.0)}, "08, error: 30, but 21.0 ± 1.0 in the evidence."),
    ],
)
def test_a_check_that_compared_nothing_or_not_all_fails(checked, results, sentence):
    code, said = checked(results)
    assert code == 1 and sentence in said and "agrees" not in said


@pytest.mark.parametrize("name", ["00", "seeds", "methods", "../07"])
def test_a_check_of_what_has_no_evidence_is_refused(checked, name):
    code, said = checked({"07": result(0, 21.0)}, name, tables=("07", "methods"))
    assert code == 1 and f"Expected lessons that have evidence, 07, got {name}." in said


def test_two_trees_of_one_commit_share_no_runs(monkeypatch, tmp_path):
    (tmp_path / "course_lib").mkdir()
    monkeypatch.setattr(studies.paths, "checkout", lambda: tmp_path)
    monkeypatch.setattr(studies.lesson, "commit", lambda: "abc-dirty")
    names = []
    for text in ("x = 1\n", "x = 2\n", "x = 1\n"):
        (tmp_path / "course_lib" / "maps.py").write_text(text)
        names.append(studies.tree())
    assert names[0] == names[2] != names[1] and all(name.startswith("abc-dirty-") for name in names)


def test_a_damaged_run_is_set_aside_and_measured_again(runs, tmp_path, capsys):
    evidence.collect(Path("07_x.ipynb"), tmp_path, (0,))
    (kept,) = tmp_path.rglob("07.json")
    kept.write_text(kept.read_text()[:-9])
    assert evidence.collect(Path("07_x.ipynb"), tmp_path, (0,))["figures"]["error"]["values"] == [20.0]
    assert runs == [0, 0] and "07.json: expected JSON" in capsys.readouterr().out
    assert kept.with_suffix(".damaged").is_file()


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
