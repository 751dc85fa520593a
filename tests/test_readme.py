"""The README says what is there: lessons with their badges, equations with their code and test, the two commands."""

import importlib
import json
import re
from pathlib import Path

import pytest

from course_lib.course import build, report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = build.sources(ROOT / "notebooks" / "src")


def test_every_lesson_stands_in_the_table_with_its_badge_and_its_measured_seconds():
    table = README.split("<!-- lessons:")[1].split("<!-- /lessons -->")[0]
    for source in SOURCES:
        row = next(line for line in table.splitlines() if f"(notebooks/{source.stem}.ipynb)" in line)
        assert build.badge(source, build.address(ROOT)) in row
        assert re.search(r"\| \d+ min \| \d+ s \|", row)


def test_every_row_of_the_equation_map_leads_to_code_a_lesson_and_a_test():
    rows = re.findall(r"^\|.*\| `(course_lib\.[\w.]+)` \|(?: (\d\d) \|)? `(tests/\w+\.py)` \|$", README, re.M)
    assert len(rows) >= 7
    lessons = {source.stem[:2] for source in SOURCES} | {""}  # of what no lesson is about yet
    for function, lesson, test in rows:
        module, _, name = function.rpartition(".")
        assert hasattr(importlib.import_module(module), name), function
        assert lesson in lessons and name in (ROOT / test).read_text(), (function, lesson, test)


def test_files_and_commands_that_the_readme_names_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake (\w+)", README)) - {"git"}:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_table_is_written_from_results_of_the_mini_profile(tmp_path):
    """A copy of the README, the sources and the address; results that exist only here."""
    (tmp_path / "notebooks" / "src").mkdir(parents=True)
    for source in SOURCES:
        (tmp_path / "notebooks" / "src" / source.name).write_text(source.read_text())
    for name in ("README.md", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    results = tmp_path / "results"
    results.mkdir()
    for source in SOURCES:
        result = {"lesson": source.stem[:2], "profile": "mini", "seconds": 1234.4, "peak_mb": 98765}
        (results / f"{source.stem[:2]}.json").write_text(json.dumps(result))
    report.write_readme(tmp_path, results)
    written = (tmp_path / "README.md").read_text()
    assert written.count("| 1234 s | 98.8 GB |") == len(SOURCES) and written.count("<!-- /lessons -->") == 1
    measured = r"\| \d+ s \| [\d.]+ GB \|"
    assert re.sub(measured, "", written) == re.sub(measured, "", README)
    (results / f"{SOURCES[0].stem[:2]}.json").write_text(json.dumps(result | {"profile": "smoke"}))
    with pytest.raises(ValueError, match="run `make run` first"):
        report.write_readme(tmp_path, results)
