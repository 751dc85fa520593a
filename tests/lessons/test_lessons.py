"""Every lesson runs as handed out, is solved by its solution and by nothing less, and keeps the rules of a lesson.

The miniature course stands first among the lessons: when it fails, the mechanics are broken, not a lesson.
"""

import ast
import builtins
import copy
import importlib
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest

from course_lib import paths
from course_lib.course import build, report
from course_lib.lesson import Lesson

from .conftest import ALONE, ROOT, SOURCES, permitted

pytestmark = pytest.mark.timeout(1800)  # ends what hangs; a lesson takes a minute or two, and ten on a busy machine

SECONDS = 120  # that a lesson may take in the smoke profile; more is said, and fails nothing: the machine may be busy


def text_of(notebook):
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def exercises(notebook):
    """Numbers of the exercises, such as 01.1, as they stand in the checks."""
    return [
        re.search(r'check\("([\d.]+)"', cell.source)[1]
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    ]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_student_version_passes_nbval_and_says_what_is_to_do(source, notebook, tmp_path, monkeypatch):
    """As handed out a lesson runs to its end, by nbval, with which instructors check notebooks: no cell raises."""
    path = tmp_path / "lesson" / f"{source.stem}.ipynb"
    path.parent.mkdir()
    nbformat.write(build.student(notebook, source.stem), path)
    for name, value in {
        "COURSE_PROFILE": "smoke",
        "COURSE_DEVICE": "cpu",
        "COURSE_STRICT": "0",
        "OMP_NUM_THREADS": "1",
        "COURSE_RESULTS": str(tmp_path / "results"),
        "COURSE_CACHE": str(tmp_path / "cache"),
        "COURSE_DATA": str(paths.data_root()),
        "OUTPUTS": str(tmp_path / "outputs.json"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }.items():
        monkeypatch.setenv(name, value)
    started = time.perf_counter()
    command = "-m pytest -q -p no:cacheprovider -p no:xdist -p nbval_outputs --nbval-lax --nbval-current-env".split()
    command += ["--nbval-cell-timeout", "600", "--nbval-sanitize-with", ROOT / "tests" / "sanitize.cfg"]
    command += ["--rootdir", path.parent, path]
    nbval = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    assert nbval.returncode == 0, nbval.stdout[-3000:]
    if (took := time.perf_counter() - started) > SECONDS:
        warnings.warn(f"{source.stem} took {took:.0f} s in the smoke profile, where {SECONDS} are plenty", stacklevel=1)
    said = "".join(output.get("text", "") for output in json.loads((tmp_path / "outputs.json").read_text()))
    for number in exercises(notebook):
        assert f"[TODO] {number}:" in said
    assert not re.search(r"\[(FAIL|PASS)\] \d", said)  # a demonstration of a check has a name, not a number
    result = json.loads((tmp_path / "results" / f"{source.stem[:2]}.json").read_text())
    assert result["exercises"] == dict.fromkeys(exercises(notebook), "TODO")


def test_solution_passes_and_every_picture_has_a_description(source, notebook, execute, tmp_path):
    executed = execute(slid(notebook), alone=source.stem.startswith("01_"))  # one lesson shows it for all
    said = text_of(executed)
    assert ("widgets.live(" in source.read_text("utf-8")) == ("\n0 controls were moved" not in f"\n{said}")
    for number in exercises(notebook):
        assert f"[PASS] {number}\n" in said
    assert not re.search(r"\[(FAIL|TODO)\] \d", said)
    result = json.loads((tmp_path / "results" / f"{source.stem[:2]}.json").read_text())
    assert (result["lesson"], result["profile"]) == (source.stem[:2], "smoke")
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert "image/png" not in output.get("data", {}) or output.metadata["image/png"]["alt"], (
                "plots.show gives pictures alt text"
            )
    for html, _ in report.pictures(executed):
        alternatives = re.findall(r'<img\b[^>]*?alt="([^"]*)"', html)
        assert len(alternatives) == html.count("<img") and all(len(alt) >= 10 for alt in alternatives), alternatives


SLIDE = """
import ipywidgets
moved = 0
for control in [*ipywidgets.Widget._active_widgets.values()]:
    if isinstance(control, ipywidgets.FloatSlider | ipywidgets.IntSlider):
        control.value = control.max if control.value < control.max else control.min  # what cannot be drawn raises
        moved += 1
    elif isinstance(control, ipywidgets.Dropdown | ipywidgets.SelectionSlider):
        control.index = len(control.options) - 1 if control.index < len(control.options) - 1 else 0
        moved += 1
print(moved, "controls were moved")
"""


def slid(notebook):
    """A notebook in which every control has been moved at the end."""
    moved = copy.deepcopy(notebook)
    moved.cells.append(nbformat.v4.new_code_cell(SLIDE))
    return moved


def test_an_untouched_notebook_stops_when_it_counts(execute):
    """Of every lesson the same is said of its exercises, without the rest of it, in `test_near_misses`."""
    source = SOURCES[0]
    with pytest.raises(papermill.PapermillExecutionError) as stop:
        execute(build.student(build.solved(source, build.address(ROOT)), source.stem))
    assert stop.value.ename == "NotImplementedError"


def test_no_cell_is_longer_than_a_screen(source, notebook):
    """25 lines of 88 columns; a check, which nobody has to read, lists many wrong answers in 34."""
    for version in (notebook, build.student(notebook, source.stem)):
        for cell in code(version):
            seen = re.sub("### BEGIN HIDDEN TESTS.*?### END HIDDEN TESTS", "", cell.source, flags=re.S).strip()
            lines = [line for line in seen.split("\n") if not line.strip().startswith("###")]
            limit = 34 if cell.metadata.get("nbgrader", {}).get("grade") else 25
            assert len(lines) <= limit or "setup" in cell.metadata.get("tags", []), (
                f"{len(lines)} lines:\n{cell.source}"
            )
            wide = [
                line
                for line in cell.source.split("\n")
                if len(line) > 88 and build.address(ROOT).repository not in line
            ]
            assert not wide, "over 88 columns, what a laptop shows:\n" + "\n".join(wide)


def test_every_exercise_has_points_minutes_and_three_hints(source, notebook):
    if source.parent.name == "miniature":
        return
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for number in exercises(notebook):
        section = re.search(rf"^#+ [^\n]*{re.escape(number)}(.*?)(?=^#+ |\Z)", markdown, re.M | re.S)
        assert section, f"the exercise {number} has no heading with its number"
        assert re.search(r"\d+ points?", section[0]) and re.search(r"\d+ min", section[0]), number
        assert section[0].count("<details>") >= 3, f"{number} needs three steps of hints"


def test_a_check_uses_only_the_setup_cell_and_the_answer(notebook):
    """So that a check can be run alone: by a grader, by a student who starts in the middle, by tests of near misses."""
    setup = next(cell.source for cell in code(notebook) if "setup" in cell.metadata.get("tags", []))
    parameters = code(notebook)[0].source
    known = bound(parameters + "\n" + setup) | set(dir(builtins)) | {"display", "get_ipython"}
    for cell in code(notebook):
        graded = cell.metadata.get("nbgrader", {})
        if graded.get("solution"):
            known |= bound(cell.source)
        if graded:
            loaded = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)}
            assert loaded <= known | bound(cell.source), (
                f"{graded['grade_id']}: {sorted(loaded - known - bound(cell.source))}"
            )


def bound(source):
    """Names that code binds anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def test_parts_of_the_library_that_a_lesson_names_exist(notebook):
    for name in set(re.findall(r"`course_lib\.([\w.]+)`", "\n".join(cell.source for cell in notebook.cells))):
        parts = name.split(".")
        for cut in range(len(parts), -1, -1):
            try:
                found = importlib.import_module(".".join(["course_lib", *parts[:cut]]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[cut:]:
                found = getattr(found, attribute)
            break


def test_a_lesson_writes_under_its_own_number(source, notebook):
    assert any(
        re.search(rf'start\("{source.stem[:2]}", PROFILE, DATA_ROOT, DEVICE, SEED\)', cell.source)
        for cell in code(notebook)
    )
    names = re.findall(r"^(\w+) = ", code(notebook)[0].source, re.M)
    assert names == ["PROFILE", "DATA_ROOT", "DEVICE", "SEED"]
    assert "lesson.finish(" in "".join(cell.source for cell in code(notebook)) and hasattr(Lesson, "finish")


def test_student_notebooks_are_what_the_sources_give():
    changed = build.build_student(ROOT / "notebooks" / "src", ROOT / "notebooks", check=True)
    assert not changed, f"run `make notebooks`, and commit {', '.join(changed)}"
    kept = {path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert kept == {path.stem for path in build.sources(ROOT / "notebooks" / "src")}, (
        "a notebook without a source is left over"
    )


def test_a_lesson_alone_has_no_network():
    """Lesson 01 runs so, from the data that is prepared, where it is permitted (see `execute`)."""
    if not permitted():
        pytest.skip("user namespaces are not permitted here (unshare --user --net)")
    code = 'import socket; socket.create_connection(("192.0.2.1", 80), 5)'
    ran = subprocess.run([*ALONE, sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode and "Network is unreachable" in ran.stderr
