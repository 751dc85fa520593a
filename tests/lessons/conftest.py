"""What tests of lessons share: where the sources are, and how a notebook is executed for a test."""

import os
from pathlib import Path

import nbformat
import pytest

from course_lib.course import build, run

ROOT = Path(__file__).resolve().parents[2]
# The miniature course goes first: it proves the mechanics in seconds, whatever the lessons are about.
SOURCES = build.sources(ROOT / "tests" / "lessons" / "miniature") + build.sources(ROOT / "notebooks" / "src")
NAMES = [f"{'miniature-' if source.parent.name == 'miniature' else ''}{source.stem}" for source in SOURCES]


def pytest_generate_tests(metafunc):
    """A test that asks for `source` runs for every lesson."""
    if "source" in metafunc.fixturenames:
        metafunc.parametrize("source", SOURCES, ids=NAMES)


@pytest.fixture
def notebook(source):
    """The solved notebook of a source, as built."""
    return build.solved(source, build.address(ROOT))


# Instructions of another processor, such as "ATEN_CPU_CAPABILITY=default", for the kernels of solved lessons.
OTHER_PROCESSOR = dict(pair.split("=", 1) for pair in os.environ.get("COURSE_OTHER_PROCESSOR", "").split())


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that executes a notebook in the smoke profile and returns it with its outputs."""
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)

    def run_it(notebook, *, strict):
        path, output = tmp_path / "lesson.ipynb", tmp_path / "run" / "lesson.ipynb"
        nbformat.write(notebook, path)
        run.execute(
            path,
            output,
            "smoke",
            {"COURSE_STRICT": str(int(strict)), "COURSE_DEVICE": "cpu", "COURSE_RESULTS": str(tmp_path / "results")}
            | (OTHER_PROCESSOR if strict else {}),
        )
        return nbformat.read(output, 4)

    return run_it
