"""The course on a bare machine: no git, no apt, no network, no HOME, another locale, an odd path, root or not.

Each test starts a process of its own in a copy of the checkout, with all of that at once. A process takes seconds
before it does anything, so what can be asked in one is asked in one.
"""

import compileall
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Keeps the owner of files but none of root's powers: read-only is read-only there. The second has no network either.
STRANGER = ["unshare", "--user"]
ALONE = [*STRANGER, "--net"]
# Where namespaces are not permitted, Python itself has no network but its own loopback.
NO_NETWORK = """
import socket
def connect(self, address, real=socket.socket.connect):
    if self.family == socket.AF_INET6 or isinstance(address, tuple) and not address[0].startswith("127."):
        raise OSError("the network is unreachable")
    return real(self, address)
socket.socket.connect = connect
"""


def permitted(command):
    return bool(shutil.which("unshare")) and not subprocess.run([*command, "true"], capture_output=True).returncode


class Bare:
    """A copy of the checkout in an odd folder of a bare machine."""

    def __init__(self, home: Path):
        self.home, self.course = home, home / "Käse & Brot" / "der kurs"
        (home / "empty").mkdir()
        (home / "offline").mkdir()
        (home / "offline" / "sitecustomize.py").write_text(NO_NETWORK)

    def python(self, *arguments, prefix=None, **environment):
        """The process that ran Python in the copy. HOME cannot be made, and PATH has no program."""
        if prefix is None:
            prefix = ALONE if permitted(ALONE) else []
            environment.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())  # it knows the fonts, which take seconds
        bare = {
            "PATH": str(self.home / "empty"),
            "HOME": "/dev/null/home",
            "LC_ALL": "C",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(self.home / "offline"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if prefix:
            prefix = [shutil.which("unshare"), *prefix[1:]]
        command = [*prefix, sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=self.course, capture_output=True, text=True, env=bare | environment)


@pytest.fixture
def bare(tmp_path, installable):
    machine = Bare(tmp_path)
    shutil.copytree(installable, machine.course)
    shutil.copytree(ROOT / "notebooks", machine.course / "notebooks")
    (machine.course / ".git").mkdir()  # a checkout, as far as one sees without git
    yield machine
    for folder in [machine.course, *machine.course.rglob("*")]:
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o755)


@pytest.fixture(scope="module", autouse=True)
def compiled(installable):
    """The bytecode of what is copied, once: machines differ in many ways, but not in that."""
    compileall.compile_dir(installable / "course_lib", quiet=1)


FRAME = """
from course_lib import backbones
from course_lib.lesson import commit, start
from course_lib.show import plots
import torch
lesson = start("00", "smoke")
network = backbones.create(backbones.LITE0)
image = torch.rand(1, 3, 64, 64)
plots.show(plots.grid([image[0]], ["noise"]), alt="A picture of noise.")
lesson.record("channels", network.features(image).shape[1])
assert commit() is None
lesson.finish()
"""


@pytest.mark.parametrize("prefix", [ALONE, []], ids=["stranger", "oneself"])
def test_a_lesson_starts_computes_and_writes_its_results(bare, prefix):
    if prefix and not permitted(prefix):
        pytest.skip("user namespaces are not permitted here (unshare --user --net)")
    ran = bare.python("-c", FRAME, prefix=prefix)
    assert ran.returncode == 0, ran.stderr
    path = bare.course / "work" / "results" / "00.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["commit"] is None and result["figures"][0]["value"] == 1280
    assert f"data {bare.course / 'data'} ·" in ran.stdout and f"written to {path}" in ran.stdout


@pytest.mark.skipif(not permitted(STRANGER), reason="user namespaces are not permitted here (unshare --user)")
def test_a_read_only_course_is_used_and_results_go_where_one_may_write(bare):
    for folder in [bare.course, *bare.course.rglob("*")]:
        if folder.is_dir():
            folder.chmod(0o555)
    own = bare.home / "eigene Ergebnisse"
    code = """
import os, sys
from course_lib.lesson import start
for folder in (None, sys.argv[1]):
    if folder:
        os.environ["COURSE_RESULTS"] = folder
    lesson = start("00", "smoke")
    lesson.record("n", 7)
    lesson.finish()
    print("then")
"""
    ran = bare.python("-c", code, own)
    assert ran.returncode == 0, ran.stderr
    refused = ran.stdout.partition("then")[0]
    assert "not written: [Errno 13] Permission denied" in refused and "set COURSE_RESULTS" in refused
    assert "n         7" in refused  # what was measured is still shown
    assert json.loads((own / "00.json").read_text())["figures"][0]["value"] == 7


COMMANDS = """
import io, json
from contextlib import redirect_stderr, redirect_stdout
from course_lib.__main__ import main
said = {}
for line in ("--help", "build", "data --root leer"):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(line.split())
    said[line] = code, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""


def test_commands_say_what_there_is_build_notebooks_and_miss_photographs(bare):
    built = sorted((bare.course / "notebooks").glob("*.ipynb"))
    for path in built:
        path.unlink()
    ran = bare.python("-c", COMMANDS)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["--help"][0] == 0 and "evaluate seeds" in said["--help"][1]
    assert said["build"][0] == 0 and sorted((bare.course / "notebooks").glob("*.ipynb")) == built
    code, _, missing = said["data --root leer"]
    assert code == 1 and "Traceback" not in missing
    assert f"not in {bare.course / 'leer' / 'photographs'}" in missing and 'source="creatures"' in missing


def test_the_procedural_world_is_written_and_read(bare):
    few = """
import sys
from dataclasses import replace
from course_lib.worlds import minis, tagged
from course_lib.__main__ import main
minis.PER_ITEM["creatures"] = {"train": 2, "val": 1}
minis.SCORED = 2
recipe = tagged.RECIPES["creatures"]
tagged.RECIPES["creatures"] = replace(recipe, images={"trainaug": 3, "val": 2})
sys.exit(main(["data", "--source", "creatures", "--root", "Daten für alle"]))
"""
    ran = bare.python("-c", few)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    folder = bare.course / "Daten für alle"
    assert len(list((folder / "mini-voc-creatures" / "JPEGImages").iterdir())) == 5
    assert str(folder / "mini-ilsvrc-creatures") in ran.stdout


def test_a_notebook_runs_in_a_kernel(bare):
    """Jupyter has no HOME for its connection files, IPython none for its history, matplotlib none for its fonts."""
    shutil.copytree(ROOT / "tests" / "lessons" / "miniature", bare.course / "lessons")
    code = """
from pathlib import Path
from course_lib.course import build, kernels
here = Path.cwd()
[notebook, _] = build.build_solved(here / "lessons", here / "solved")
kernels.execute(notebook, here / "run" / "lesson.ipynb", "smoke",
            {"COURSE_STRICT": "1", "COURSE_RESULTS": str(here / "Ergebnisse")})
"""
    ran = bare.python("-c", code, prefix=STRANGER if permitted(STRANGER) else [])  # kernels need the loopback
    assert ran.returncode == 0, ran.stderr
    assert json.loads((bare.course / "Ergebnisse" / "00.json").read_text())["exercises"] == {"00.1": "PASS"}
