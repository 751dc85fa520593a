"""What is installed (on Colab, say) is the whole library with the manifest on its shelf, licences and its command."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from course_lib import __main__, paths

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LICENCES = ("LICENSE", "LICENSE-text")
SHELF = {
    str(file.relative_to(ROOT / "data"))
    for file in (
        ROOT / "data" / "photographs.json",
        *(ROOT / "data" / "evidence").glob("*.json"),
        *(ROOT / "data" / "licences").glob("*.txt"),
    )
}


@pytest.fixture(scope="module")
def built(tmp_path_factory, installable):
    """Wheel and sdist of this checkout."""
    copy = shutil.copytree(installable, tmp_path_factory.mktemp("built") / "course")
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    (copy / "dist").mkdir()
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0 and "_Warning" not in done.stderr, done.stderr
    [sdist], [wheel] = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    return sdist, wheel


def modules():
    files = (ROOT / "course_lib").rglob("*.py")
    return {str(file.relative_to(ROOT)) for file in files}


def test_the_wheel_holds_all_modules_the_shelf_and_the_licences(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        said = message_from_bytes(wheel.read(metadata))
    assert {name for name in names if name.endswith(".py")} == modules()
    assert {name.removeprefix("course_lib/shelf/") for name in names if "/shelf/" in name} == SHELF
    assert {name.partition("/licenses/")[2] for name in names if "/licenses/" in name} == set(LICENCES)
    assert said["License-Expression"] == "MIT AND CC-BY-4.0" and said.get_all("License-File") == list(LICENCES)


def test_the_source_archive_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= modules() | {f"data/{name}" for name in SHELF} | {"pyproject.toml", "README.md", *LICENCES}


def test_an_installed_wheel_has_a_command_and_its_shelf(built, tmp_path):
    environment, away = tmp_path / "environment", tmp_path / "away"
    away.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # `site` would run the .pth of an editable install there; a plain line of a .pth does not.
    (packages / "needed.pth").write_text("\n".join(ours))
    install = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", "--force-reinstall", "--no-warn-conflicts", built[1]], check=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COURSE_DATA")}

    def run(*command):
        done = subprocess.run(command, cwd=away, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "evaluate localise" in run(environment / "bin" / "course", "--help")
    code = "from course_lib import evidence, paths; print(paths.HERE, paths.checkout(), len(evidence.table('01')))"
    assert run(environment / "bin" / "python", "-c", code).startswith(f"{packages / 'course_lib'} None ")


def test_the_command_takes_the_arguments_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["course", "tarin"])
    assert __main__.course() == 2 and "no command 'tarin'" in capsys.readouterr().err


def test_every_package_is_installed():
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "course_lib").rglob("__init__.py")}
    shelf = {"course_lib.shelf", "course_lib.shelf.evidence", "course_lib.shelf.licences"}
    assert found | shelf == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_every_package_folder_has_an_init():
    folders = {file.parent for file in (ROOT / "course_lib").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_shelf_is_found_where_there_is_no_checkout(monkeypatch, tmp_path):
    assert paths.shelf() == ROOT / "data"
    monkeypatch.setattr(paths, "HERE", tmp_path / "site-packages" / "course_lib")
    assert paths.checkout() is None and paths.shelf() == tmp_path / "site-packages" / "course_lib" / "shelf"


def test_colab_list_is_part_of_the_dependencies():
    names = {line.split(">")[0] for line in SETTINGS["project"]["optional-dependencies"]["course"]}
    needed_by_others = {"wadler-lindig"}  # jaxtyping needs it, and --no-deps leaves it out
    assert set(SETTINGS["tool"]["course"]["colab"]) <= names | needed_by_others
    assert not {"torch", "torchvision", "numpy"} & set(SETTINGS["tool"]["course"]["colab"])
