"""Notebooks come from their sources: same bytes every time, nothing leaks, nothing is half written."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from course_lib import __main__, paths
from course_lib.course import build, commands, report, run

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ROOT / "tests" / "lessons" / "miniature"


@pytest.fixture
def course(tmp_path):
    """A course of two lessons that a test may spoil."""
    shutil.copytree(MINIATURE, tmp_path / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def spoil(course, old, new, name="00_shapes"):
    source = course / "src" / f"{name}.py"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))


def read(path):
    return nbformat.read(path, 4)


def test_same_source_same_bytes(course):
    assert build.build_student(course / "src", course) == ["00_shapes.ipynb", "01_pictures.ipynb"]
    first = [path.read_bytes() for path in sorted(course.glob("*.ipynb"))]
    assert build.build_student(course / "src", course) == []
    (course / "00_shapes.ipynb").unlink()
    assert build.build_student(course / "src", course) == ["00_shapes.ipynb"]
    assert [path.read_bytes() for path in sorted(course.glob("*.ipynb"))] == first


def test_check_compares_and_writes_nothing(course):
    assert build.build_student(course / "src", course / "out", check=True) == ["00_shapes.ipynb", "01_pictures.ipynb"]
    assert not (course / "out").exists()
    build.build_student(course / "src", course / "out")
    spoil(course, "A lesson of the tests", "A lesson of our tests")
    assert build.build_student(course / "src", course / "out", check=True) == ["00_shapes.ipynb"]


def test_cell_ids_are_unique_and_survive_a_change_elsewhere(course):
    def ids():
        return [cell.id for cell in build.solved(course / "src" / "00_shapes.py", build.address(course)).cells]

    before = ids()
    assert len(set(before)) == len(before)
    spoil(course, "features.mean((2, 3))", "features.flatten(2).mean(-1)")
    spoil(course, "# %%\nlesson.record", "# %%\n1 + 1\n\n# %%\nlesson.record")
    after = ids()
    assert set(before) <= set(after) and len(after) == len(before) + 1


def test_students_get_stubs_and_no_hidden_test(course):
    build.build_student(course / "src", course)
    text = (course / "00_shapes.ipynb").read_text()
    assert (
        "NotImplementedError" in text
        and "features.mean((2, 3))" not in text
        and "pooled(torch.ones(1, 1, 3, 1))" not in text
    )
    [path, _] = build.build_solved(course / "src", course / "solved")
    solved = path.read_text()
    assert "features.mean((2, 3))" in solved and "pooled(torch.ones(1, 1, 3, 1))" in solved
    assert "YOUR CODE HERE" not in solved


def test_short_headers_become_the_metadata_of_nbgrader(course):
    build.build_student(course / "src", course)
    graded = [cell.metadata.nbgrader for cell in read(course / "00_shapes.ipynb").cells if "nbgrader" in cell.metadata]
    exercise, check = graded
    assert (exercise.grade_id, exercise.solution, exercise.grade, exercise.locked) == (
        "exercise-00-1",
        True,
        False,
        False,
    )
    assert (check.grade_id, check.solution, check.grade, check.locked, check.points) == (
        "check-00-1",
        False,
        True,
        True,
        2,
    )
    assert all(re.fullmatch(r"[\w-]+", cell.grade_id) and cell.checksum for cell in graded)
    assert read(course / "00_shapes.ipynb").metadata.kernelspec.name == "python3"
    nbformat.validate(read(course / "00_shapes.ipynb"))


def test_badge_and_links_stand_on_the_address_of_pyproject(course):
    settings = (course / "pyproject.toml").read_text()
    settings = re.sub(r"^Repository = .*$", 'Repository = "https://github.com/someone/fork"', settings, flags=re.M)
    (course / "pyproject.toml").write_text(re.sub(r"^revision = .*$", 'revision = "v2"', settings, flags=re.M))
    build.build_student(course / "src", course)
    text = (course / "00_shapes.ipynb").read_text()
    assert "https://colab.research.google.com/github/someone/fork/blob/v2/notebooks/00_shapes.ipynb" in text
    assert "git+https://github.com/someone/fork@v2 " in text
    assert (
        "[01 · Pictures](01_pictures.ipynb)" in text
        and "blob/v2/notebooks/01_pictures.ipynb" in text
        and "Before" not in text
    )
    assert "**Before:** [00 · Shapes](00_shapes.ipynb)" in (course / "01_pictures.ipynb").read_text()
    assert not re.search(r"\{\{\w+\}\}", text) and "from-maps-to-masks" not in text


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        ("### END SOLUTION", "### THE END", "o end solution statement"),  # nbgrader's own words
        ("### BEGIN SOLUTION\n", "", "has no ### BEGIN SOLUTION"),
        ("### END HIDDEN TESTS", "### END HIDDEN TEST", "o end hidden tests statement"),
        ("### BEGIN HIDDEN TESTS", "### Begin hidden tests", "still in the student version"),
        ("{{next}}", "{{nxet}}", "'{{nxet}}' is still in the student version"),
        ('# %% check="00.1" points=2', "# %%", "every exercise needs exactly one check"),
        ('# %% exercise="00.1"', '# %% exercise="00.2"', "every exercise needs exactly one check"),
        ('# %% tags=["parameters"]', "# %%", 'must be the one with tags=["parameters"]'),
        ("# {{setup}}\n", "", "exactly one cell must start with the line `# {{setup}}`"),
        ("# # 00 · Shapes", "# 00 · Shapes", "has no title"),
    ],
)
def test_a_source_that_nobody_could_run_or_grade_is_refused(course, old, new, sentence):
    spoil(course, old, new)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(sentence)):
        build.build_student(course / "src", course / "out")


def test_two_builders_at_once_leave_whole_files(course):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: build.build_solved(course / "src", course / "solved"), range(8)))
    assert sorted(path.name for path in (course / "solved").iterdir()) == ["00_shapes.ipynb", "01_pictures.ipynb"]
    for path in (course / "solved").iterdir():
        nbformat.validate(read(path))


def test_lessons_load_nothing_of_the_build():
    """Colab has no jupytext, nbgrader or papermill, and no lesson needs them."""
    code = "import sys, course_lib.paths, json; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "numpy", "jupytext", "nbgrader", "papermill"} & set(loaded)
    code = "import sys, course_lib.lesson; print({'jupytext', 'nbgrader', 'papermill'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------ places and commands


def test_places(tmp_path, monkeypatch):
    monkeypatch.delenv("COURSE_DATA", raising=False)
    monkeypatch.delenv("COURSE_RESULTS", raising=False)
    assert paths.checkout() == ROOT
    assert (paths.data_root(), paths.results(), paths.shelf()) == (
        ROOT / "data",
        ROOT / "build" / "results",
        ROOT / "data",
    )
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    assert paths.data_root() == tmp_path and paths.data_root("/given") == Path("/given")
    monkeypatch.setattr(paths, "HERE", tmp_path / "site-packages" / "course_lib")
    monkeypatch.delenv("COURSE_DATA")
    monkeypatch.chdir(tmp_path)
    assert (paths.checkout(), paths.data_root(), paths.shelf()) == (None, tmp_path / "data", paths.HERE / "shelf")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    paths.write_text(tmp_path / "a" / "b.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        paths.write_text(tmp_path / "a" / "b.txt", "\ud800")
    assert (tmp_path / "a" / "b.txt").read_text() == "old" and len(list((tmp_path / "a").iterdir())) == 1


def test_commands_explain_themselves(capsys):
    assert __main__.main([]) == 2 and __main__.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in commands.COMMANDS)
    assert __main__.main(["tarin"]) == 2
    said = capsys.readouterr().err
    assert "no command 'tarin'" in said and all(name in said for name in commands.COMMANDS)
    for name in ("build", "run", "report", "update"):
        with pytest.raises(SystemExit) as stop:
            __main__.main([name, "--help"])
        assert stop.value.code == 0 and name in capsys.readouterr().out


@pytest.mark.parametrize("profile, folder", [("mini", "build"), ("smoke", "build/smoke"), ("paper", "build/paper")])
def test_what_run_makes_in_one_profile_never_lies_over_that_of_another(profile, folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(run.build, "build_solved", lambda *_: [Path("01_x.ipynb")])
    monkeypatch.setattr(run, "run", lambda *asked, **_: seen.extend([asked[1], os.environ["COURSE_RESULTS"]]) or [])
    monkeypatch.setattr(run.report, "write", lambda *places: seen.extend(places[:3]) or "")
    monkeypatch.setenv("COURSE_RESULTS", "")
    monkeypatch.setenv("COURSE_RUN", "")
    assert run.main(profile=profile) == 0
    place = ROOT / folder
    assert seen == [place / "run", str(place / "results"), place / "results", place / "run", place / "report.html"]
    assert re.fullmatch(r"\d{8}-\d{6}-\d+", os.environ["COURSE_RUN"])
    seen.clear()
    monkeypatch.setenv("COURSE_RESULTS", "")
    report.main(profile)
    assert seen == [place / "results", place / "run", place / "report.html"]
