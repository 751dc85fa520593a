"""What tests of lessons share: where the sources are, and how a notebook is executed for a test."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_lib.course import build, kernels

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
# No network but a loopback of its own, which kernels need.
ALONE = ["unshare", "--user", "--map-root-user", "--net"]
SCRIPT = """
import json, subprocess, sys
from pathlib import Path
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
from course_lib.course import kernels
path, output, environment = sys.argv[1:]
kernels.execute(Path(path), Path(output), "smoke", json.loads(environment))
"""


@functools.cache
def permitted():
    """Whether a process may have no network here."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    return not subprocess.run([*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """A function that executes a notebook strictly in the smoke profile and returns it with its outputs.

    All is computed, nothing comes from the cache. Alone: without a network, where that is permitted.
    """
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)

    def run_it(notebook, *, alone=False):
        path, output = tmp_path / "lesson.ipynb", tmp_path / "run" / "lesson.ipynb"
        nbformat.write(notebook, path)
        environment = {"COURSE_STRICT": "1", "COURSE_DEVICE": "cpu", "COURSE_RESULTS": str(tmp_path / "results")}
        environment |= {"COURSE_CACHE": "off"} | OTHER_PROCESSOR
        if alone and permitted():
            command = [*ALONE, sys.executable, "-c", SCRIPT, path, output, json.dumps(environment)]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr[-6000:]
        else:
            kernels.execute(path, output, "smoke", environment)
        return nbformat.read(output, 4)

    return run_it
