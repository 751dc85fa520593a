"""`lab`: the student's copies in a JupyterLab of its own, anywhere, with a token, without the tools of instructors."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest

from course_lib import paths
from course_lib.course import lab

ROOT = Path(__file__).resolve().parents[1]
NAMES = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.fixture
def student(monkeypatch, tmp_path):
    """A machine without git and with a HOME that cannot be; the folder of working copies."""
    (tmp_path / "bin").mkdir()
    for name, value in {"HOME": "/dev/null/home", "PATH": str(tmp_path / "bin"), "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, value)
    for name in [name for name in os.environ if name.startswith(("JUPYTER", "IPYTHON", "COURSE_RESULTS"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "Übung der Müllers" / "work"
    monkeypatch.setenv("COURSE_WORK", str(folder))
    return folder


@pytest.fixture
def started(student):
    """A function that starts the real command; ends what it started."""
    servers = []

    def start(*options, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "course_lib", "lab", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
        log = open(student.parent.parent / "lab.log", "w+")
        server = subprocess.Popen(
            [*command, *options], cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
        )
        servers.append(server)
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{address}/api", timeout=10)
                return address
            except OSError:
                log.seek(0)
                assert server.poll() is None and time.monotonic() < deadline, log.read()[-3000:]
                time.sleep(0.2)

    yield start
    for server in servers:
        server.terminate()
        server.wait(300)


def asked(address, token):
    request = urllib.request.Request(address, headers={"Authorization": f"token {token}"} if token else {})
    return urllib.request.urlopen(request, timeout=300).read().decode()


def test_lab_shows_the_copies_and_nothing_of_instructors_under_a_token_of_its_own(started, student):
    address = started()
    [server] = (student / ".jupyter" / "runtime").glob("jpserver-*.json")
    server = json.loads(server.read_text())
    assert len(server["token"]) >= 32 and server["url"].startswith("http://127.0.0.1:")
    ask = partial(asked, token=server["token"])
    listed = {entry["name"] for entry in json.loads(ask(f"{address}/api/contents"))["content"]}
    assert listed == NAMES  # neither src nor .jupyter
    for path in ("../notebooks/src", "src", ".jupyter"):
        with pytest.raises(urllib.error.HTTPError):
            ask(f"{address}/api/contents/{path}")
    for token in ("", "wrong"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            asked(f"{address}/api/contents", token)
    page = ask(f"{address}/lab")
    config = json.loads(page.split('id="jupyter-config-data" type="application/json">')[1].split("</script>")[0])
    assert "@jupyter/nbgrader" in config["disabledExtensions"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(f"{address}/formgrader")
    assert not Path("/dev/null/home").exists()


def test_root_is_allowed_on_loopback_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    chosen = lab.arguments(tmp_path, ["--port=1"])
    assert "--allow-root" in chosen and "--ServerApp.ip=127.0.0.1" in chosen and chosen[-1] == "--port=1"
    for elsewhere in ("--ip=0.0.0.0", "--ServerApp.ip=0.0.0.0", "--ip"):
        assert "--allow-root" not in lab.arguments(tmp_path, [elsewhere, "0.0.0.0"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert "--allow-root" not in lab.arguments(tmp_path, [])
    assert not any("token" in option.lower() for option in lab.arguments(tmp_path, []))


def test_lessons_know_the_folder_and_commands_of_a_terminal_keep_their_own(tmp_path):
    """COURSE_RESULTS would send what `run` measures in a terminal of the page among a student's results."""
    said = lab.surroundings(tmp_path)
    assert said["COURSE_WORK"] == str(tmp_path) and "COURSE_RESULTS" not in said


def test_settings_of_the_course_go_before_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/theirs")
    assert lab.surroundings(tmp_path)["JUPYTER_CONFIG_PATH"] == f"{tmp_path / '.jupyter'}{os.pathsep}/theirs"


def test_a_read_only_course_asks_for_a_folder(tmp_path):
    """In a copy of the checkout that nobody may write, the command says what to set, and takes it."""
    course = tmp_path / "der Kurs"
    shutil.copytree(ROOT / "course_lib", course / "course_lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", course / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", course)
    course.chmod(0o555)
    # keeps the owner of files but none of root's powers, where there are namespaces
    stranger = ["unshare", "--user"]
    if not shutil.which("unshare") or subprocess.run([*stranger, "true"], capture_output=True).returncode:
        stranger = []
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere, and user namespaces are not permitted here")
    bare = {name: value for name, value in os.environ.items() if name != "COURSE_WORK"}
    bare |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(course)}
    for command in ("lab", "update"):
        done = subprocess.run(
            [*stranger, sys.executable, "-m", "course_lib", command],
            cwd=course,
            env=bare,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.startswith(f"{course / 'work'}: expected a folder that you may write"), done.stderr
        assert "set COURSE_WORK to a folder of your own" in done.stderr
    course.chmod(0o755)


def test_places_of_results(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_WORK", raising=False)
    assert paths.work() == ROOT / "work"
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    assert paths.work() == tmp_path
