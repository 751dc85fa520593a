"""Checks are checked: typical wrong answers fail, each with the message meant for it, and the solution passes.

Near misses of lesson NN live in near_misses/NN.py: NEAR_MISSES = {"01.1": [(name, code, fragment of its message), ...]}
"""

import importlib
import linecache

import pytest

from course_lib import checks
from course_lib.course import build

from .conftest import ROOT, SOURCES


def near_misses(source):
    name = "miniature" if source.parent.name == "miniature" else source.stem[:2]
    if not (ROOT / "tests" / "lessons" / "near_misses" / f"{name}.py").exists():
        return {}
    return importlib.import_module(f".near_misses.{name}", __package__).NEAR_MISSES


def parts(source):
    """Of a lesson: its parameters and set-up cells; for each exercise its solution, its check, and the hidden tests."""
    code = [cell for cell in build.solved(source, build.address(ROOT)).cells if cell.cell_type == "code"]
    setup = [cell.source for cell in code if {"parameters", "setup"} & set(cell.metadata.get("tags", []))]
    graded = {cell.metadata.nbgrader.grade_id: cell.source for cell in code if "nbgrader" in cell.metadata}
    numbers = [name.removeprefix("exercise-") for name in graded if name.startswith("exercise-")]
    return setup, {
        number.replace("-", "."): (
            graded[f"exercise-{number}"],
            *graded[f"check-{number}"].partition("### BEGIN HIDDEN TESTS"),
        )
        for number in numbers
    }


def execute(text, name, names):
    """Execute a cell as a notebook does: its source is in memory, there is no file of its name."""
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), names)


@pytest.fixture(scope="module")
def prepared():
    """The names of a lesson after its set-up cell and all solutions; each lesson is set up once."""
    done = {}

    def prepare(source):
        if source not in done:
            setup, exercises = parts(source)
            names = {"__name__": "lesson"}
            for text in setup:
                execute(text, f"/notebook/{source.stem}/setup", names)
            for number, (solution, *_) in exercises.items():
                execute(solution, f"/notebook/{number}/solution", names)
            done[source] = names, exercises
        return dict(done[source][0]), done[source][1]

    return prepare


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_STRICT", "1")
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path))


CASES = [
    pytest.param(source, number, code, fragment, id=f"{source.stem}-{number}-{name}")
    for source in SOURCES
    for number, misses in near_misses(source).items()
    if number.startswith(source.stem[:2])
    for name, code, fragment in misses
]


@pytest.mark.parametrize("source_of, number, answer, fragment", CASES)
def test_a_near_miss_gets_the_message_meant_for_it(source_of, number, answer, fragment, prepared, capsys):
    names, exercises = prepared(source_of)
    execute(answer, f"/notebook/{number}/answer", names)
    capsys.readouterr()
    with pytest.raises(Exception):  # noqa: B017  (whatever a wrong answer raises)
        execute(exercises[number][1], f"/notebook/{number}/check", names)
    said = capsys.readouterr().out
    assert said.startswith(f"[FAIL] {number}: ") and fragment in said, said
    for _, other_answer, other in near_misses(source_of)[number]:
        assert other == fragment or other not in said or other_answer == answer, (
            f"this is the message of another: {other!r}"
        )


def test_solutions_pass_their_checks_and_hidden_tests(source, prepared, capsys):
    names, exercises = prepared(source)
    for number, (_, visible, marker, hidden) in exercises.items():
        execute(visible, f"/notebook/{number}/check", names)
        assert capsys.readouterr().out.endswith(f"[PASS] {number}\n")
        execute(marker + hidden, f"/notebook/{number}/hidden", names)


def test_untouched_stubs_fail_when_it_counts(source, prepared):
    """A check asks for no more than the set-up cell and the answer, so the stub of each exercise is tried alone."""
    handed_out = build.student(build.solved(source, build.address(ROOT)), source.stem)
    stubs = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell.source for cell in handed_out.cells}
    _, exercises = prepared(source)
    for number, (_, visible, *_) in exercises.items():
        names, _ = prepared(source)
        execute(stubs[f"exercise-{number.replace('.', '-')}"], f"/notebook/{number}/stub", names)
        with pytest.raises(NotImplementedError):
            execute(visible, f"/notebook/{number}/check", names)
        assert checks.status[number] == "TODO"


def test_every_exercise_names_five_mistakes(source):
    _, exercises = parts(source)
    for number in exercises:
        sentences = {fragment for _, _, fragment in near_misses(source).get(number, [])}
        assert len(sentences) >= 5, f"{number} has {len(sentences)} in tests/lessons/near_misses"
    unknown = {number for number in near_misses(source) if number.startswith(source.stem[:2])} - set(exercises)
    assert not unknown, f"near misses of exercises that do not exist: {unknown}"


def test_messages_are_printed_whether_or_not_they_stop(prepared, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_STRICT", "0")
    names, exercises = prepared(SOURCES[0])
    execute("def pooled(features):\n    return features.sum((2, 3))", "/notebook/answer", names)
    execute(exercises["00.1"][1], "/notebook/check", names)
    assert "divide by their number" in capsys.readouterr().out and checks.status["00.1"] == "FAIL"
