"""Every lesson runs as handed out, is solved by its solution and by nothing less, and keeps the rules of a lesson.

The miniature course stands first among the lessons: when it fails, the mechanics are broken, not a lesson.
"""

import ast
import builtins
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
import warnings

import papermill
import pytest

from course_lib import paths
from course_lib.course import build, report
from course_lib.lesson import Lesson

from .conftest import ROOT, SOURCES

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


def test_student_version_runs_to_its_end_as_handed_out(source, notebook, execute, tmp_path):
    started = time.perf_counter()
    executed = execute(build.student(notebook, source.stem), strict=False)
    if (took := time.perf_counter() - started) > SECONDS:
        warnings.warn(f"{source.stem} took {took:.0f} s in the smoke profile, where {SECONDS} are plenty", stacklevel=1)
    said = text_of(executed)
    for number in exercises(notebook):
        assert f"[TODO] {number}:" in said
    assert not re.search(r"\[(FAIL|PASS)\] \d", said)  # a demonstration of a check has a name, not a number
    result = json.loads((tmp_path / "results" / f"{source.stem[:2]}.json").read_text())
    assert result["exercises"] == dict.fromkeys(exercises(notebook), "TODO")


def test_solution_passes_and_every_picture_has_a_description(source, notebook, execute, tmp_path):
    executed = execute(notebook, strict=True)
    said = text_of(executed)
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


def test_untouched_stubs_fail_when_it_counts(source, notebook, execute):
    if not exercises(notebook):
        return
    with pytest.raises(papermill.PapermillExecutionError) as stop:
        execute(build.student(notebook, source.stem), strict=True)
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


def test_student_version_passes_nbval(source, tmp_path, monkeypatch):
    """Instructors check notebooks with nbval: no cell of a student notebook raises there either."""
    for name, value in {
        "COURSE_PROFILE": "smoke",
        "COURSE_DEVICE": "cpu",
        "COURSE_STRICT": "0",
        "OMP_NUM_THREADS": "1",
        "COURSE_RESULTS": str(tmp_path / "results"),
        "COURSE_DATA": str(paths.data_root()),
    }.items():
        monkeypatch.setenv(name, value)
    build.build_student(source.parent, tmp_path)
    nbval = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--nbval-lax",
            "--nbval-current-env",
            "--nbval-cell-timeout",
            "600",
            "--nbval-sanitize-with",
            str(ROOT / "tests" / "sanitize.cfg"),
            str(tmp_path / f"{source.stem}.ipynb"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert nbval.returncode == 0, nbval.stdout[-3000:]


def test_a_lesson_needs_no_network(tmp_path):
    """Without any network but its own loopback, a lesson runs from the data that is prepared."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here (unshare --user --net)")
    source = next(
        (source for source in SOURCES if source.stem.startswith("01_") and source.parent.name != "miniature"),
        SOURCES[0],
    )
    script = f"""
import subprocess
from pathlib import Path
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
from course_lib.course import build, run
build.build_solved(Path({str(source.parent)!r}), Path("solved"))
here, data = Path.cwd(), {str(paths.data_root())!r}
run.execute(here / "solved/{source.stem}.ipynb", here / "run/lesson.ipynb", "smoke",
            {{"COURSE_STRICT": "1", "COURSE_RESULTS": str(here / "results"), "COURSE_DATA": data}})
"""
    ran = subprocess.run([*alone, sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "results").exists()
