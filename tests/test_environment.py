"""pyproject.toml is the list of dependencies: conda, Colab and this machine must agree with it."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = SETTINGS["project"]["optional-dependencies"]
# conda-forge splits matplotlib and seaborn; the -base packages are what pip calls by the plain name.
PIP_NAME = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}


def specifiers(requirements):
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, requirements)}


def test_conda_and_pip_ask_for_the_same():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = specifiers(entry for entry in listed if isinstance(entry, str))
    pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    assert conda.pop("python") == SETTINGS["project"]["requires-python"]
    assert conda.pop("pip") == ""
    assert "-e ." in pip
    asked = {PIP_NAME.get(name, name): version for name, version in conda.items()}
    assert asked | specifiers(line for line in pip if line != "-e .") == specifiers(EXTRAS["course"])


def test_this_machine_has_what_is_asked_for():
    missing = [
        name
        for extra in ("course", "dev")
        for name, versions in specifiers(EXTRAS[extra]).items()
        if importlib.metadata.version(name) not in Requirement(name + versions).specifier
    ]
    assert not missing


def test_there_are_lower_bounds_only():
    loose = [text for extra in EXTRAS.values() for text in extra if not re.fullmatch(r"[\w.-]+>=[\d.]+", text)]
    assert not loose


def test_nothing_is_a_hard_dependency_and_colab_keeps_its_torch():
    assert SETTINGS["project"]["dependencies"] == []
    assert not {"torch", "torchvision", "numpy"} & set(SETTINGS["tool"]["course"]["colab"])


def test_every_package_folder_is_installed():
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in (ROOT / "course_lib").rglob("__init__.py")
    }
    assert folders | {"course_lib.shelf"} == set(SETTINGS["tool"]["setuptools"]["packages"])
