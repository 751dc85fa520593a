"""Assignments: no solution gets out, exercises that fit a wish, variants, and nbgrader's own commands."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pytest
from grading import LESSON, MARKER, ROOT, checkout, send, students

from course_lib import __main__
from course_lib.course import build, grade, nbgrading, release, update


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A checkout of the small lesson, and its teaching folder."""
    root = checkout(tmp_path_factory.mktemp("course"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "course_root", lambda: root)
        patch.setenv("COURSE_WORK", str(root / "work"))
        yield root, grade.teaching()


@pytest.fixture(scope="module")
def lessons():
    """The lessons of the course, as they are graded."""
    return grade.graded_lessons(ROOT / "notebooks" / "src")


def make(*words):
    assert __main__.main(["release", *map(str, words)]) == 0


def archive(path):
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name).decode() for name in opened.namelist()}


def test_students_get_the_notebooks_and_a_sheet(course, capsys):
    root, place = course
    make("--lessons", "01", "--name", "hw1")
    said = capsys.readouterr().out
    assert "3 exercises of lessons 01, 7 points, 12 minutes" in said and "grade FOLDER --name hw1" in said
    files = archive(place / "assignments" / "hw1" / "hw1.zip")
    assert set(files) == {"hw1/README.md", "hw1/01_small.ipynb"}
    assert "BEGIN SOLUTION" not in "".join(files.values()) and MARKER not in "".join(files.values())
    build.build_student(root / "notebooks" / "src", root / "notebooks")
    assert files["hw1/01_small.ipynb"] == (root / "notebooks" / "01_small.ipynb").read_text()
    assert "| 01.1 | A softmax | 3 | 5 | Scores |" in files["hw1/README.md"]


def test_the_key_and_the_rubric_are_for_instructors(course):
    _, place = course
    make("--lessons", "01", "--name", "hw1")
    key = nbformat.read(place / "source" / "hw1" / "01_small.ipynb", 4)
    assert MARKER in nbformat.writes(key) and "BEGIN SOLUTION" in nbformat.writes(key)
    text = (place / "assignments" / "hw1" / "rubric.md").read_text()
    assert "7 points, 12 minutes" in text and "- soften scores with a temperature" in text
    assert "**01.1 · A softmax**: 3 points. Its check names 2 mistakes." in text


def test_the_same_assignment_is_the_same_bytes(course):
    _, place = course
    make("--lessons", "01", "--name", "hw1")
    before = (place / "assignments" / "hw1" / "hw1.zip").read_bytes()
    make("--lessons", "01", "--name", "hw1")
    assert (place / "assignments" / "hw1" / "hw1.zip").read_bytes() == before


def test_exercises_that_do_not_count_give_no_points(course):
    _, place = course
    make("--name", "part", "--exercises", "01.2")
    for step in ("source", "release"):
        notebook = nbformat.read(place / step / "part" / "01_small.ipynb", 4)
        found = {grade.number_of(one): one.metadata.nbgrader.points for one in notebook.cells
                 if grade.grade_id(one).startswith("check")}  # fmt: skip
        assert found == {"01.1": 0, "01.2": 2, "01.3": 0}
    assert json.loads((place / "assignments" / "part" / "assignment.json").read_text())["exercises"] == {"01.2": 2}


def test_the_pool_knows_every_exercise(lessons):
    found = release.pool(lessons)
    checks = [
        grade.number_of(one)
        for part in lessons.values()
        for one in part.key.cells
        if grade.grade_id(one).startswith("check")
    ]
    assert [one.number for one in found] == checks
    points = {grade.number_of(one): one.metadata.nbgrader.points for part in lessons.values() for one in part.key.cells
              if grade.grade_id(one).startswith("check")}  # fmt: skip
    assert {one.number: one.points for one in found} == points
    assert all(one.minutes and one.section and len(one.objectives) >= 2 for one in found)


def test_exercises_by_objective_minutes_and_points(course, lessons, capsys):
    found = release.pool(lessons)
    about = [one for one in found if one.about(["recall"])]
    assert "05.1" in [one.number for one in about] and len(about) < len(found)
    chosen = release.fitting(found, minutes=40, points=10)
    assert sum(one.points for one in chosen) == 10 and sum(one.minutes for one in chosen) <= 40
    assert len(release.fitting(found, minutes=20)) >= 2
    with pytest.raises(ValueError, match="got none that fit"):
        release.fitting(found, minutes=1, points=10)
    make("--about", "halving", "--minutes", "5")
    assert "| 01.2 |" in (said := capsys.readouterr().out) and "01.1" not in said


def test_more_points_in_less_time_are_preferred():
    def one(number, points, minutes):
        return release.PoolExercise(number, "", points, minutes, "", (), "")

    pool = [one("a", 2, 9), one("b", 2, 4), one("c", 1, 4), one("d", 4, 30)]
    assert [part.number for part in release.fitting(pool, minutes=8)] == ["b", "c"]
    assert [part.number for part in release.fitting(pool, points=4)] == ["a", "b"]


def test_each_student_has_a_variant(course, tmp_path):
    _, place = course
    (tmp_path / "class.txt").write_text("student\nada\nbob\n")
    make("--lessons", "01", "--name", "own", "--students", tmp_path / "class.txt")
    seeds = json.loads((place / "assignments" / "own" / "assignment.json").read_text())["students"]
    assert len({*seeds.values(), 0}) == 3 and seeds["ada"] == release.seed_of("own", "ada")
    for student, seed in seeds.items():
        notebook = nbformat.reads(
            archive(place / "assignments" / "own" / f"own-{student}.zip")["own/01_small.ipynb"], 4
        )
        plain = nbformat.read(place / "release" / "own" / "01_small.ipynb", 4)
        differ = [a.source for a, b in zip(notebook.cells, plain.cells) if a.source != b.source]
        assert len(differ) == 1 and f"SEED = {seed}\n" in differ[0] + "\n"
        assert update.changed(notebook, plain) == []  # it is as handed out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--lessons", "77"], "expected lessons with exercises, got 77"),
        (["--exercises", "01.9"], "expected exercises of these lessons, got 01.9"),
        (["--name", "../x"], "expected a name of letters"),
        (["--points", "99"], "got none that fit"),
        (["--about", "zebra"], "got none that fit"),
        (["--name", "x", "--students", "twice.txt"], "none twice"),
        (["--name", "x", "--students", "odd.txt"], "expected ids of letters"),
    ],
)
def test_what_cannot_be_made_is_a_sentence(course, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    Path("twice.txt").write_text("ada\nada\n")
    Path("odd.txt").write_text("ada/..\n")
    assert __main__.main(["release", *words]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files are those that git tracks")
def test_a_public_course_holds_no_solution(lessons, tmp_path):
    count = release.write_course(ROOT, tmp_path / "course.zip", lessons)
    files = archive_names(tmp_path / "course.zip")
    assert count == len(files) and "course/notebooks/01_class_activation_maps.ipynb" in files
    assert not [name for name in files if "notebooks/src" in name or "near_misses" in name]


def archive_names(path):
    with zipfile.ZipFile(path) as opened:
        return opened.namelist()


def test_a_solution_in_another_file_is_found(course, tmp_path):
    root, _ = course
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    (copy / "notes.md").write_text(
        "as in\n" + LESSON[LESSON.index("while high") : LESSON.index("return (low")] + "return (low + high) / 2"
    )
    subprocess.run("git init -q . && git add -A", shell=True, cwd=copy, check=True)
    with pytest.raises(ValueError, match=r"notes.md holds the solution of exercise-01-2"):
        release.write_course(copy, tmp_path / "course.zip", grade.graded_lessons(copy / "notebooks" / "src"))


# nbgrader ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nbgrader(course, monkeypatch):
    """A function that runs a converter of nbgrader with the configuration of the checkout; it returns its warnings."""
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import PyFileConfigLoader
    from traitlets.log import get_logger

    monkeypatch.setenv("COURSE_SECONDS", "3")
    nbgrading._lesson.cache_clear(), nbgrading._court.cache_clear()
    config = PyFileConfigLoader("nbgrader_config.py", str(ROOT)).load_config()

    def convert(converter, name):
        place = CourseDirectory(config=config, assignment_id=name)
        said = []
        one = converter(coursedir=place, config=config, force=True)
        handler = type("Handler", (), {"level": 0, "handle": lambda self, record: said.append(record.getMessage())})()
        get_logger().addHandler(handler)
        try:
            one.start()
        except Exception as error:
            said.append(str(error))
        finally:
            get_logger().removeHandler(handler)
        return said

    return convert


def test_nbgrader_gives_the_same_files_and_the_same_scores(course, nbgrader, tmp_path):
    """generate_assignment writes what `release` wrote; autograde gives 24 students the points that `grade` gives."""
    from nbgrader.api import Gradebook
    from nbgrader.converters import Autograde, GenerateAssignment

    root, place = course
    make("--lessons", "01", "--name", "hw1")
    ours = (place / "release" / "hw1" / "01_small.ipynb").read_bytes()
    nbgrader(GenerateAssignment, "hw1")
    assert (place / "release" / "hw1" / "01_small.ipynb").read_bytes() == ours

    handed_out = nbformat.reads(ours.decode(), 4)
    sent = students(handed_out, place / "source" / "hw1" / "01_small.ipynb", place / "other.db", root / "written")
    del sent["n03_link"], sent["n10_garbage"]  # nbgrader opens what it is given
    send(place / "submitted", sent)
    said = nbgrader(Autograde, "hw1")
    assert not [line for line in said if re.search("checksum|has changed", line)], said
    with Gradebook(f"sqlite:///{place / 'gradebook.db'}") as book:
        found = {student: book.find_submission("hw1", student).score for student in sent}
    assert found == {student: points for student, (_, points) in sent.items()}
