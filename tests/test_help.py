"""HELP.md: every sentence with which the library stops is on it, and what it says by hand is what the course says."""

import re
from pathlib import Path

import pytest

from course_lib.course import help as helping
from course_lib.course.build import course_root

ROOT = course_root()
PAGE = (ROOT / "HELP.md").read_text("utf-8")
FOREIGN = [
    "ModuleNotFoundError",
    "NameError",
    "Kernel died",
    "kernel appears to have died",
    "torch.OutOfMemoryError",
    "No space left on device",
    "Address already in use",
]


def test_the_page_is_that_of_the_code():
    assert helping.help_page() == PAGE, "run `make notebooks` and commit HELP.md"


def test_parts_of_the_library_are_all_there():
    """Whatever a lesson can import is in one group; what is for those who run the course is in none."""
    named = [part for parts in helping.HELP_PARTS.values() for part in parts]
    there = {
        path.stem for path in helping.paths.HERE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    quiet = {"__init__", "__main__", "__pycache__", "course", "experiments", "published"}
    assert len(named) == len(set(named)) and {*named} == there - quiet


def test_sentences_are_found_with_what_varies_left_out(tmp_path):
    code = """
def f(x):
    if x: raise ValueError(f"Expected {x!r} apples, got {len(x)}; " "take more.")
    raise TypeError("A pear came" + (" twice." if x else " once, which is odd."))
    raise RuntimeError(x)
    raise
"""
    path = tmp_path / "part.py"
    path.write_text(code)
    assert [*helping.messages(path)] == [
        ("ValueError", "Expected … apples, got …; take more."),
        ("TypeError", "A pear came twice."),
        ("TypeError", "A pear came once, which is odd."),
    ]


@pytest.mark.parametrize("seen", [words for row in helping.BY_HAND for words in re.findall("`([^`]+)`", row)])
def test_what_is_written_by_hand_is_said_somewhere(seen):
    """The longest piece of a message without its variable parts stands in the code of the course, or is foreign."""
    sources = [path.read_text("utf-8") for path in (ROOT / "course_lib").rglob("*.py") if path.name != "help.py"]
    said = re.sub(r'"\s*f?"', "", "".join(sources))
    piece = max((piece.strip(" .,:[]") for piece in re.split("…|:", seen)), key=len)
    assert any(words in seen for words in FOREIGN) or piece in said


def test_readme_leads_there():
    assert "(HELP.md)" in Path(ROOT / "README.md").read_text("utf-8")
