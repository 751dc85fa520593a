"""Build every notebook from its reviewed source  notebooks/src/NN_name.py  (py:percent, with solutions).

    notebooks/NN_name.ipynb       for students: no solutions, no hidden tests, no outputs; committed, badges open it
    build/solved/NN_name.ipynb    with solutions and hidden tests, never published
    HELP.md                       what to do about every error, see `help`

Same source, same bytes. What a source may say in short:

    # %% exercise="01.1"             the cell of an exercise, with ### BEGIN SOLUTION ... ### END SOLUTION inside
    # %% check="01.1" points=2       its check, with ### BEGIN HIDDEN TESTS ... ### END HIDDEN TESTS if there are some
    {{badge}}                        the badge that opens this notebook in Colab
    # {{setup}}                      first line of the set-up cell: the lines that install the library on Colab
    {{words}}                        the terms that this lesson uses first, from glossary.toml beside the sources
    {{next}}                         links to the lessons before and after this one
"""

import copy
import hashlib
import os
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import jupytext
import nbformat
from nbformat import NotebookNode
from nbgrader import preprocessors
from traitlets.config import Config

from course_lib.course.help import help_page
from course_lib.course.update import changed, course_root, keep, mark, read
from course_lib.paths import write_text

STUB = '# YOUR CODE HERE\nraise NotImplementedError("this exercise is not written yet")'
MARKERS = re.compile(r"(BEGIN|END) +(SOLUTION|HIDDEN TESTS)|\{\{\w+\}\}", re.IGNORECASE)
STEPS = (  # of nbgrader, from the solved notebook to the one that is handed out
    preprocessors.LockCells,
    preprocessors.ClearSolutions,
    preprocessors.ClearOutput,
    preprocessors.CheckCellMetadata,
    preprocessors.ClearHiddenTests,
    preprocessors.ComputeChecksums,
)
SETUP = """\
# Set-up. On Colab and Kaggle it installs the course beside their own torch.
# Elsewhere it does nothing.
import importlib.util, os, sys

cloud = ("Colab" if "google.colab" in sys.modules else
         "Kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "")
if cloud and not importlib.util.find_spec("course_lib"):
    get_ipython().run_line_magic(
        "pip", "install -q --no-deps "
        "git+{where.repository}@{where.revision} "
        "{packages}")
    importlib.invalidate_caches()
if not importlib.util.find_spec("course_lib"):
    class Stop(Exception):  # one sentence, no traceback; "Run all" ends here
        _render_traceback_ = lambda self: [str(self)]

    course = "{where.repository}"
    failed = f"The course could not be installed from {{course}}; pip says why above. "
    raise Stop({{
        "Colab": failed + "Open that address in a browser. If it opens, choose "
                 "Runtime > Restart session and run all; if not, it has moved.",
        "Kaggle": failed + "Kaggle starts without a network: switch Internet on in "
                  "the side bar (Settings), and run all.",
        "": f"Expected the library course_lib in {{sys.executable}}, found none. "
            f"Get the course from {{course}}, run `make lab` there, and open this "
            "lesson in the page that it opens."}}[cloud])"""


@dataclass(frozen=True)
class Address:
    """Where the course is published, as pyproject.toml says."""

    repository: str
    revision: str
    colab: tuple[str, ...]

    def in_colab(self, stem: str) -> str:
        """Link that opens a student notebook in Colab."""
        path = self.repository.removeprefix("https://github.com/")
        return f"https://colab.research.google.com/github/{path}/blob/{self.revision}/notebooks/{stem}.ipynb"


def address(folder: Path) -> Address:
    """The public address of the course: [project.urls] Repository and [tool.course] of pyproject.toml.

    Args:
        folder: the one with pyproject.toml, or one below it.
    """
    name = "pyproject.toml"
    home = next(parent for parent in (folder.absolute() / name).parents if (parent / name).is_file())
    settings = tomllib.loads((home / name).read_text("utf-8"))
    course = settings["tool"]["course"]
    return Address(settings["project"]["urls"]["Repository"].rstrip("/"), course["revision"], tuple(course["colab"]))


def sources(folder: Path) -> list[Path]:
    """The reviewed sources, in the order of the lessons."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def title(source: Path) -> str:
    """The first heading of a source, without its mark-up."""
    found = re.search(r"^# # (.+)$", source.read_text("utf-8"), re.MULTILINE)
    if not found:
        raise ValueError(f"{source.name} has no title: its first Markdown cell must hold a line `# # Title`.")
    return found[1].strip()


def badge(source: Path, where: Address) -> str:
    """Markdown of the button that opens a lesson in Colab."""
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({where.in_colab(source.stem)})"
    )


def terms(folder: Path) -> dict[str, dict[str, str]]:
    """By lesson the terms that it introduces, each with its definition: glossary.toml beside the sources, if there."""
    path = folder / "glossary.toml"
    return tomllib.loads(path.read_text("utf-8")) if path.is_file() else {}


def glossary(source: Path) -> str:
    """Markdown of a lesson's new terms with their definitions, and links to the lessons that define earlier ones."""
    known, number = terms(source.parent), source.stem[:2]
    lines = [f"- **{term}**: {text}" for term, text in known.get(number, {}).items()]
    earlier = [other for other in sources(source.parent) if other.stem < source.stem and known.get(other.stem[:2])]
    links = [f"[{other.stem[:2]}]({other.stem}.ipynb#words): {', '.join(known[other.stem[:2]])}" for other in earlier]
    return "\n".join(
        [*lines, *([""] if lines and links else []), *(["Known from " + "; ".join(links) + "."] if links else [])]
    )


def solved(source: Path, where: Address) -> NotebookNode:
    """The notebook with solutions and hidden tests, without outputs."""
    notebook = jupytext.read(source)
    lines = wrap(" ".join(where.colab), 76, break_on_hyphens=False)
    words = {
        "setup": SETUP.format(where=where, packages=' "\n        "'.join(lines)),
        "badge": badge(source, where),
        "words": glossary(source),
        "next": _next(source, where),
    }
    for cell in notebook.cells:
        pattern = r"\{\{(badge|words|next)\}\}" if cell.cell_type == "markdown" else r"\A# \{\{(setup)\}\}"
        cell.source = re.sub(pattern, lambda match: words[match[1]], cell.source)
        _expand(cell)
    _refuse(notebook, source.name)
    return _tidy(notebook, source.stem)


def student(notebook: NotebookNode, name: str) -> NotebookNode:
    """The notebook as handed out, from the solved one: stubs for solutions, hidden tests gone, checks locked.

    Raises:
        ValueError: if anything of a solution or a hidden test, or an unknown {{word}}, is still in it.
    """
    notebook = copy.deepcopy(notebook)
    config, resources = Config(ClearSolutions={"code_stub": {"python": STUB}}), {}
    for step in STEPS:
        notebook, resources = step(config=config).preprocess(notebook, resources)
    for cell in notebook.cells:
        if leak := MARKERS.search(cell.source):
            raise ValueError(
                f"{name}: {leak[0]!r} is still in the student version, in the cell that starts with "
                f"{cell.source.splitlines()[0]!r}. Is the marker of its other end missing or misspelt?"
            )
    mark(notebook)
    return notebook


def build_solved(folder: Path, target: Path) -> list[Path]:
    """Write the solved notebooks of all sources in `folder` to `target`, and nothing else; returns their paths."""
    where = address(folder)
    notebooks = {target / f"{source.stem}.ipynb": solved(source, where) for source in sources(folder)}
    for path, notebook in notebooks.items():
        write_text(path, nbformat.writes(notebook) + "\n")
    return list(notebooks)


def build_student(folder: Path, target: Path, check: bool = False, force: bool = False) -> list[str]:
    """Write the student notebooks of all sources in `folder` to `target`, over what a build wrote there.

    Args:
        check: write nothing, only compare.
        force: overwrite notebooks that somebody has worked in, and keep each as NAME.mine.ipynb first.
    Returns:
        names of the notebooks that were missing or different.
    Raises:
        ValueError: notebooks that are not what a build wrote, outputs aside; all others are written.
    """
    where, different, refused = address(folder), [], []
    for source in sources(folder):
        path = target / f"{source.stem}.ipynb"
        notebook = student(solved(source, where), source.stem)
        text = nbformat.writes(notebook) + "\n"
        if path.is_file() and path.read_bytes() == text.encode():
            continue
        different.append(path.name)
        if check:
            continue
        if os.path.lexists(path):
            try:
                own = changed(read(path), notebook)
            except ValueError:
                own = ["a damaged file"]
            if own and not force:
                refused.append(f"{path}: expected a notebook as it was built, got changes: {', '.join(own)}.")
                continue
            if own:
                print(f"{path.name} had changes ({', '.join(own)}); kept as {keep(path).name}.")
            elif any(cell.get("outputs") for cell in read(path).cells):
                print(f"{path.name} had been run; its outputs are gone.")
        write_text(path, text)
    if refused:
        raise ValueError(
            "\n".join(refused) + "\nNothing of these was written. To keep both, move them to work/, where `make lab` "
            "opens them; or build with --force, which first keeps each as NAME.mine.ipynb."
        )
    return different


def choose(notebooks: list[Path], numbers: Sequence[str]) -> list[Path]:
    """The notebooks of lessons that are named by their numbers, such as 01."""
    known = {notebook.stem[:2]: notebook for notebook in notebooks}
    if unknown := set(numbers) - set(known):
        raise ValueError(f"there is no lesson {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    return [known[number] for number in numbers]


def main(check: bool = False, force: bool = False) -> int:
    """Build the notebooks from notebooks/src, and HELP.md. A notebook that somebody has worked in is refused.

    Args:
        check: write nothing; fail if a student notebook is not what its source gives.
        force: overwrite such notebooks too, and keep each as NAME.mine.ipynb first.
    """
    root = course_root()
    folder = root / "notebooks" / "src"
    if not check:
        build_solved(folder, root / "build" / "solved")
    different = build_student(folder, root / "notebooks", check, force)
    page, words = root / "HELP.md", help_page()
    if not page.is_file() or page.read_text("utf-8") != words:
        different.append(page.name)
        if not check:
            write_text(page, words)
    if check and different:
        print(f"Not what the sources give: {', '.join(different)}. Run `make notebooks` and commit the result.")
        return 1
    print(f"Built anew: {', '.join(different)}." if different else "Student notebooks are up to date.")
    return 0


def place(profile: str) -> Path:
    """The folder of what `run` makes: build/, and a folder in it for each profile but mini, so that none mixes."""
    folder = course_root() / "build"
    return folder if profile == "mini" else folder / profile


def measured(profile: str) -> Path:
    """The folder of the results of `run`: COURSE_RESULTS of the environment, else that of the profile's place."""
    return Path(os.environ.get("COURSE_RESULTS") or place(profile) / "results").absolute()


def _expand(cell: NotebookNode) -> None:
    """Turn the short headers exercise="01.1" and check="01.1" points=2 into nbgrader's metadata."""
    for kind in {"exercise", "check"} & set(cell.metadata):
        number = str(cell.metadata.pop(kind))
        cell.metadata["nbgrader"] = {
            "schema_version": 3,
            "grade_id": f"{kind}-{number.replace('.', '-')}",
            "task": False,
            "solution": kind == "exercise",
            "grade": kind == "check",
            "locked": kind == "check",
        }
        if kind == "check":
            cell.metadata["nbgrader"]["points"] = cell.metadata.pop("points", 1)


def _refuse(notebook: NotebookNode, name: str) -> None:
    """Stop at a source that would make a notebook nobody can run or grade."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    graded = [cell for cell in code if "nbgrader" in cell.metadata]
    ids = [cell.metadata["nbgrader"]["grade_id"] for cell in graded]
    numbers = {grade_id.partition("-")[2] for grade_id in ids}
    if not code or "parameters" not in code[0].metadata.get("tags", []):
        raise ValueError(f'{name}: the first code cell must be the one with tags=["parameters"].')
    if sum(cell.source.startswith(SETUP.splitlines()[0]) for cell in code) != 1:
        raise ValueError(f"{name}: exactly one cell must start with the line `# {{{{setup}}}}`.")
    if sorted(ids) != sorted(f"{kind}-{number}" for kind in ("exercise", "check") for number in numbers):
        raise ValueError(
            f"{name}: every exercise needs exactly one check with its number, but the cells are {', '.join(ids)}."
        )
    for cell, grade_id in zip(graded, ids):
        if grade_id.startswith("exercise-") and "### BEGIN SOLUTION" not in cell.source:
            raise ValueError(f"{name}: {grade_id} has no ### BEGIN SOLUTION.")


def _tidy(notebook: NotebookNode, name: str) -> NotebookNode:
    """Same source, same bytes: cell ids from contents, one kernel name, nothing of the editor or the converter."""
    seen = Counter()
    for cell in notebook.cells:
        cell.metadata.pop("lines_to_next_cell", None)
        key = cell.metadata.get("nbgrader", {}).get("grade_id") or cell.source.split("\n")[0]
        cell["id"] = hashlib.sha256(f"{name}|{key}|{seen[key]}".encode()).hexdigest()[:8]
        seen[key] += 1
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "colab": {"name": f"{name}.ipynb", "toc_visible": True},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _next(source: Path, where: Address) -> str:
    """Links to the neighbours: relative ones for a checkout, Colab's own beside them, where those lead nowhere."""
    lessons = sources(source.parent)
    at = lessons.index(source)
    around = {"Before": lessons[:at][-1:], "Next": lessons[at + 1 :][:1]}
    links = [
        f"**{word}:** [{title(lesson)}]({lesson.stem}.ipynb) ([in Colab]({where.in_colab(lesson.stem)}))"
        for word, neighbour in around.items()
        for lesson in neighbour
    ]
    return " · ".join([*links, f"[All lessons]({where.repository})"])
