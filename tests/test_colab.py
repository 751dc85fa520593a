"""Lessons start on Colab and Kaggle as handed out: a rehearsal with what Colab brings, and nothing of the course.

The first lesson is run, of the others the set-up cells, which import all that they use.

The rehearsal installs this checkout from a local address, so it needs git and a package registry; with CI=true it does
not skip.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course_lib import paths
from course_lib.course import build

ROOT = Path(__file__).resolve().parents[1]
WHERE = build.address(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
# Of what Colab brings, all that the lessons and the course's own packages lean on. (It has some of ours too, today.)
BRINGS = (
    "torch torchvision numpy scipy pillow matplotlib seaborn scikit-image scikit-learn filelock tqdm jinja2 ipywidgets "
    "ipykernel requests platformdirs packaging psutil pyyaml huggingface-hub"
).split()

# ------------------------------------------------------------------------------------------ the set-up cell


def setup_lines():
    """The lines that `# {{setup}}` stands for."""
    notebook = build.solved(ROOT / "tests" / "lessons" / "miniature" / "00_shapes.py", WHERE)
    source = next(cell.source for cell in notebook.cells if "google.colab" in cell.source)
    return source[: source.index("[cloud])") + len("[cloud])")]


def start(monkeypatch, cloud, installed):
    """Execute the set-up lines, twice, in a pretended Colab or Kaggle; returns what pip was asked for."""
    asked, present = [], installed
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    if cloud == "Colab":
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    if cloud == "Kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")

    def magic(name, line):
        nonlocal present
        asked.append((name, line))
        present = installed is not None  # None: pip fails

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if present else None)
    shell = types.SimpleNamespace(run_line_magic=magic)
    for _ in range(2):  # the cell may be run again
        exec(compile(setup_lines(), "setup", "exec"), {"get_ipython": lambda: shell})
    return asked


@pytest.mark.parametrize("cloud", ["Colab", "Kaggle"])
def test_a_cloud_installs_exactly_what_pyproject_says_once_and_keeps_its_torch(monkeypatch, cloud):
    [(magic, line)] = start(monkeypatch, cloud, installed=False)
    assert magic == "pip"
    assert line.split() == ["install", "-q", "--no-deps", f"git+{WHERE.repository}@{WHERE.revision}", *WHERE.colab]
    assert not {"torch", "torchvision", "numpy"} & set(line.split())


@pytest.mark.parametrize("cloud", ["Colab", "Kaggle", ""])
def test_nothing_is_installed_where_the_library_is(monkeypatch, cloud):
    assert start(monkeypatch, cloud, installed=True) == []


@pytest.mark.parametrize(
    "cloud, advice, not_said",
    [
        ("Colab", "Runtime > Restart session", "make lab|Internet"),
        ("Kaggle", "switch Internet on", "make lab|Runtime"),
        ("", "run `make lab` there", "Runtime|Internet|pip"),
    ],
)
def test_without_the_library_the_cell_says_what_to_do_where_it_runs(monkeypatch, cloud, advice, not_said):
    with pytest.raises(Exception, match=re.escape(advice)) as stop:
        start(monkeypatch, cloud, installed=None)
    said = str(stop.value)
    assert stop.value._render_traceback_() == [said] and WHERE.repository in said
    assert not re.search(not_said, said)


def test_the_set_up_cell_fits_a_narrow_screen():
    long = [line for line in setup_lines().splitlines() if len(line) > 88 and WHERE.repository not in line]
    assert not long


# ------------------------------------------------------------------------------------------ the rehearsal

rehearsal = [pytest.mark.xdist_group("colab"), pytest.mark.timeout(1200)]


def closure(names):
    """Distributions that are installed here and needed by `names`, without extras."""
    found, waiting = {}, list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            try:
                found[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                assert name not in BRINGS, f"{name} is not installed; run `make test`, which sets the course up"
                continue  # for other systems
            needs = map(Requirement, found[name].requires or ())
            waiting += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return found


def unreachable(reason):
    """The rehearsal cannot be held: a failure in CI, a skip elsewhere."""
    said = f"{reason}: the rehearsal of Colab needs it."
    if os.environ.get("CI"):
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A fresh Python that sees what Colab brings and pretends to be Colab; nothing of the course is in it.

    Colab's packages are links in a folder beside it, so pip treats them as it treats Colab's: as somebody else's.
    """
    home = tmp_path_factory.mktemp("colab")
    brought, environment = home / "brought", home / "environment"
    (brought / "google" / "colab").mkdir(parents=True)
    (brought / "google" / "colab" / "__init__.py").touch()
    for distribution in closure(BRINGS).values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (brought / top).exists():
                (brought / top).symlink_to(Path(distribution.locate_file(top)).resolve())
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    (packages / "colab.pth").write_text(f"{brought}\nimport google.colab\n")
    kernel = home / "kernels" / "colab"
    kernel.mkdir(parents=True)
    argv = [str(environment / "bin" / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    return home


@pytest.fixture(scope="module")
def repository(tmp_path_factory, installable):
    """This checkout, uncommitted changes included, as the address that pip clones."""
    if not shutil.which("git"):
        unreachable("git is missing")
    home = shutil.copytree(installable, tmp_path_factory.mktemp("address") / "course")
    git = ["git", "-c", "user.name=course", "-c", "user.email=course@localhost", "-C", str(home)]
    for command in (["init", "-q", "-b", WHERE.revision], ["add", "."], ["commit", "-q", "-m", "rehearsal"]):
        subprocess.run([*git, *command], check=True)
    return home.as_uri()


def python(colab, *arguments):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [colab / "environment" / "bin" / "python", *arguments]
    return subprocess.run(command, cwd=colab, capture_output=True, text=True, env=clean)


def seen(colab):
    """Name, version and place of all packages that this Python sees."""
    code = """
import importlib.metadata as m, json
print(json.dumps({d.name: [d.version, str(d.locate_file(""))] for d in m.distributions()}))
"""
    found = json.loads(python(colab, "-c", code).stdout)
    return {canonicalize_name(name): what for name, what in found.items()}


def execute(colab, path, repository, monkeypatch):
    """Run a notebook of notebooks/ as Colab does, with `repository` for its address; returns it and what stopped it."""
    content = colab / "content"
    content.mkdir(exist_ok=True)
    for name in [name for name in os.environ if name.startswith("COURSE_") or name == "PYTHONPATH"]:
        monkeypatch.delenv(name)
    for name, value in {"JUPYTER_PATH": str(colab), "COURSE_PROFILE": "smoke", "COURSE_DATA": DATA}.items():
        monkeypatch.setenv(name, value)
    text = path.read_text(encoding="utf-8")
    assert f"git+{WHERE.repository}@{WHERE.revision}" in text
    notebook = nbformat.reads(text.replace(WHERE.repository, repository), 4)
    client = NotebookClient(
        notebook, kernel_name="colab", timeout=900, resources={"metadata": {"path": str(content)}}, record_timing=False
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return notebook, error
    return notebook, None


DATA = str(paths.data_root())


def set_ups(folder):
    """A notebook of the first cells of all lessons up to the one that sets it up: all imports of the course."""
    together = nbformat.read(NOTEBOOKS[0], 4)
    together.cells = []
    for path in NOTEBOOKS:
        code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        last = next(i for i, cell in enumerate(code) if "setup" in cell.metadata.get("tags", []))
        together.cells += code[: last + 1]
    for number, cell in enumerate(together.cells):
        cell["id"] = f"cell-{number}"
    path = folder / "set_ups.ipynb"
    nbformat.write(together, path)
    return path


class TestRehearsal:
    pytestmark = rehearsal

    def test_an_address_that_cannot_be_reached_stops_the_lesson_with_a_sentence(self, colab, monkeypatch, tmp_path):
        notebook, stop = execute(colab, NOTEBOOKS[0], (tmp_path / "nowhere").as_uri(), monkeypatch)
        assert stop is not None and stop.ename == "Stop"
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [bool(cell.execution_count) for cell in code] == [True, True] + [False] * (len(code) - 2)
        [error] = [output for output in code[1].outputs if output.output_type == "error"]
        assert error.traceback == [error.evalue] and "could not be installed" in error.evalue
        assert "Runtime > Restart session" in error.evalue

    def test_lesson_00_installs_and_runs_as_handed_out_and_the_others_find_all_that_they_import(
        self, colab, repository, monkeypatch, tmp_path
    ):
        tried = python(colab, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path, "wadler-lindig")
        if tried.returncode:
            unreachable("The package registry cannot be reached")
        before = seen(colab)
        assert "torch" in before and not {"course-lib", *WHERE.colab} & set(before)
        for path in (NOTEBOOKS[0], set_ups(tmp_path)):
            notebook, stop = execute(colab, path, repository, monkeypatch)
            assert stop is None, stop
            said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
            assert "ERROR" not in said
            if path == NOTEBOOKS[0]:
                assert f"Lesson {path.stem[:2]} · profile smoke" in said
        assert re.findall(r"^Lesson (\d\d) · profile smoke", said, re.M) == [path.stem[:2] for path in NOTEBOOKS]
        result = json.loads((colab / "content" / "work" / "results" / f"{NOTEBOOKS[0].stem[:2]}.json").read_text())
        assert result["figures"] and set(result["exercises"].values()) <= {"TODO"}
        after = seen(colab)
        assert {name: after[name] for name in before} == before  # torch and numpy among them
        assert set(after) - set(before) == {"course-lib", *WHERE.colab}
