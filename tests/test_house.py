"""The house: arrows go down only, the library stays compact, one name has one meaning, the form is ruff's."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "course_lib"
WINGS = ("worlds", "experiments", "course")
# Python tokens without comments and docstrings: neither documentation nor a shorter line is punished.
# The library had 48,000 of them and all 92,000 when the wings were told apart. Since then came, in the library, readers
# that take any input, checks that lend copies, claims, controls and figures of the fields; in the wings, photographs of
# any distribution, packs, working copies, checks of options, chimeras, assignments and their grading. What refines
# seeds and segments is counted apart (LATER), and so is the cache.
LATER = {
    *("cache.py", "data/own.py", "metric_learning/explain.py"),
    *(
        f"wsss/{name}.py"
        for name in "affinity affinity_learner crf deeplab irn permutohedral pipeline psa submission".split()
    ),
}
LIBRARY, LATER_PARTS, ALL = 56_000, 28_000, 165_000
LAYOUT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted((ROOT / "notebooks" / "src").glob("*.py"))


def part(file: Path) -> str:
    """Which part of the house a file belongs to."""
    first = file.relative_to(PACKAGE).parts[0]
    return first if first in WINGS else "library"


def size(source: str) -> int:
    """Tokens that are neither layout, comment nor docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(
        token.type not in LAYOUT and not (token.type == tokenize.STRING and token.start in docstrings)
        for token in tokens
    )


def test_size_counts_neither_documentation_nor_layout():
    assert size("x = 1\n") == 3
    assert size('"""Doc."""\n\n\ndef f(a):  # why\n    """Doc."""\n    return (\n        a\n    )\n') == 10
    assert size('x = "no docstring"\n') == 3


def test_the_library_is_compact(capsys):
    tokens, lines = Counter(), Counter()
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        tokens[part(file)] += size(source)
        lines[part(file)] += source.count("\n")
    with capsys.disabled():
        print("\n| part | tokens | lines |\n|---|---:|---:|")
        for name in ("library", *WINGS):
            print(f"| {name} | {tokens[name]:,} | {lines[name]:,} |")
        print(f"| all | {tokens.total():,} | {lines.total():,} |")
    later = sum(size((PACKAGE / name).read_text(encoding="utf-8")) for name in LATER)
    assert tokens["library"] - later <= LIBRARY
    assert later <= LATER_PARTS
    assert tokens.total() <= ALL


def test_arrows_go_down_only():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_lessons_import_the_library_and_its_worlds_only(source):
    text = source.read_text(encoding="utf-8")
    assert not re.findall(r"course_lib(?:\.| import )(?:course|experiments)\b", text)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_form_is_ruffs(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "course_lib", "tests"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# Names that commands and modules have by agreement, each in its own file; CHUNK is numbers in work at a time.
AGREED = {
    "main",
    "CHUNK",
    "Array",
    "train",
    "evaluate",
    "table",
    "create",
    "read",
    "write",
    "load",
    "show",
    "build",
} | {f"{verb}_command" for verb in ("train", "evaluate", "ablate")}


def test_one_name_has_one_meaning():
    """Public classes, functions and constants at the top of a file are defined once in the package."""
    where = defaultdict(set)
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names = [node.name]
            for name in names:
                if not name.startswith("_") and name not in AGREED:
                    where[name].add(str(file.relative_to(ROOT)))
    assert not {name: files for name, files in where.items() if len(files) > 1}


@pytest.mark.parametrize("paper, count", [("Shen", 7), ("Du", 9)])
def test_every_equation_stands_on_its_code_line(paper, count):
    code = "\n".join(file.read_text(encoding="utf-8") for file in FILES if part(file) == "library")
    found = {
        int(number)
        for comment in re.findall(rf"#[^\n]*Eq\. ([\d, and-]+) \({paper} et al\.\)", code)
        for number in re.findall(r"\d+", comment)
    }
    assert found >= set(range(1, count + 1))
