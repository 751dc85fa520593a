"""pyproject.toml is the list of dependencies: conda, Colab, CI, containers and this machine must agree with it.

As a script it writes constraints.txt: the versions that are installed here.
"""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONSTRAINTS = ROOT / "constraints.txt"
# conda-forge splits matplotlib and seaborn; the -base packages are what pip calls by the plain name.
PIP_NAME = {"pytorch": "torch", "matplotlib-base": "matplotlib", "seaborn-base": "seaborn"}


def specifiers(requirements):
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, requirements)}


def installed():
    """Versions here of all that the extras course and dev ask for, and of all that those need in turn."""
    versions, waiting = {}, [Requirement(line).name for extra in ("course", "dev") for line in EXTRAS[extra]]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in versions:
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # needed on other systems only
            versions[name] = Version(distribution.version).public
            needs = map(Requirement, distribution.requires or ())
            waiting += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return versions


def test_conda_and_pip_ask_for_the_same():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = specifiers(entry for entry in listed if isinstance(entry, str))
    pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    assert conda.pop("python") == PROJECT["requires-python"]
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


def test_constraints_hold_all_that_is_asked_for_within_its_bounds():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    kept = dict(line.split("==") for line in lines)
    assert len(kept) == len(lines) and list(kept) == sorted(kept)
    for extra in ("course", "dev"):
        for name, versions in specifiers(EXTRAS[extra]).items():
            assert kept.get(canonicalize_name(name)) in Requirement(name + versions).specifier, name


def test_constraints_are_written_with_what_is_needed_in_turn():
    versions = installed()
    assert {"torch", "numpy", "wadler-lindig", "huggingface-hub"} <= set(versions)  # two are asked for by others only
    assert not any("+" in version for version in versions.values())  # 2.6+cpu is 2.6 in another index


def test_nothing_is_a_hard_dependency_and_colab_keeps_its_torch():
    assert PROJECT["dependencies"] == []
    assert not {"torch", "torchvision", "numpy"} & set(SETTINGS["tool"]["course"]["colab"])


def workflow():
    return yaml.load((ROOT / ".github" / "workflows" / "course.yml").read_text(), yaml.BaseLoader)


def test_ci_runs_every_week_on_all_pythons_from_the_oldest_on():
    course = workflow()
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", course["on"]["schedule"][0]["cron"])
    pythons = course["jobs"]["course"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == f">={pythons[0]}"
    assert any(step.get("run") == "bash .ci/run" for step in course["jobs"]["course"]["steps"])


def test_the_container_has_a_python_that_ci_tries_and_a_target_of_make():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    python = re.fullmatch(r"python:(3\.\d+)-\w+", container["image"])[1]
    assert python in workflow()["jobs"]["course"]["strategy"]["matrix"]["python"]
    target = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{target}: \$\(STAMP\)", (ROOT / "Makefile").read_text(), re.M)


def test_the_citation_is_of_this_version_and_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == PROJECT["version"] and citation["title"] == PROJECT["description"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert " AND ".join(citation["license"]) == PROJECT["license"]
    first = {paper["authors"][0]["family-names"]: paper for paper in citation["references"]}
    assert set(first) == {"Shen", "Du"}  # the names by which the code calls the papers' equations
    for paper in first.values():
        assert paper["type"] == "conference-paper" and paper["title"] and paper["year"] > 2020
        assert paper.get("doi", "10.").startswith("10.") and ("doi" in paper or "identifiers" in paper)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CITATION.cff", "constraints.txt", ".devcontainer"])
def test_what_a_visitor_looks_for_stands_at_the_top(name):
    assert (ROOT / name).exists()


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for path in re.findall(
        r"(?<![\w/])(?:tests|notebooks|data|\.ci)/[\w/.]*\w(?![\w*])", text.replace("NN_name", "00_tour")
    ):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, re.M), target


if __name__ == "__main__":
    lines = (f"{name}=={version}\n" for name, version in sorted(installed().items()))
    CONSTRAINTS.write_text("# The versions that CI last passed with; see CONTRIBUTING.md.\n" + "".join(lines))
