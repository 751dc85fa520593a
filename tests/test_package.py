"""What is installed (on Colab, say) is the whole library, with the manifest on its shelf."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from course_lib import paths

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_installed():
    found = {".".join(init.parent.relative_to(ROOT).parts) for init in (ROOT / "course_lib").rglob("__init__.py")}
    assert found | {"course_lib.shelf"} == set(SETTINGS["tool"]["setuptools"]["packages"])


def test_every_package_folder_has_an_init():
    folders = {file.parent for file in (ROOT / "course_lib").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_manifest_and_evidence_are_on_the_shelf(monkeypatch, tmp_path):
    tool = SETTINGS["tool"]["setuptools"]
    assert tool["package-dir"]["course_lib.shelf"] == "data" and paths.shelf() == ROOT / "data"
    for file in ("photographs.json", "evidence/table.json"):
        assert any(fnmatch(file, pattern) for pattern in tool["package-data"]["course_lib.shelf"]), file
    monkeypatch.setattr(paths, "HERE", tmp_path / "site-packages" / "course_lib")
    assert paths.checkout() is None and paths.shelf() == tmp_path / "site-packages" / "course_lib" / "shelf"


def test_colab_list_is_part_of_the_dependencies():
    names = {line.split(">")[0] for line in SETTINGS["project"]["optional-dependencies"]["course"]}
    needed_by_others = {"wadler-lindig"}  # jaxtyping needs it, and --no-deps leaves it out
    assert set(SETTINGS["tool"]["course"]["colab"]) <= names | needed_by_others
    assert not {"torch", "torchvision", "numpy"} & set(SETTINGS["tool"]["course"]["colab"])
