"""A student's working copies in work/: made once, brought to a corrected release, never overwritten.

A handed-out notebook carries marks: a digest of the text of each of its cells, under metadata.course. A cell whose
digest is among them is as it was handed out; any other text in a copy is the student's and stays.

    text or code of ours, not changed by the student    becomes that of the release
    text or code of ours, changed by the student        stays; if the release changed it too, or it is a check, the
                                                        release's stands there and the student's below it, as a note
    an exercise                                         keeps its answer; of one that is gone, the answer stays
    a cell of the student's own                         stays behind the cell that it followed

Cells are found again by grade id, then cell id, then text, then what they define, then likeness: Colab and others lose
ids and metadata. Whatever is written, the copy as it was lies in work/backup/ first.
"""

import difflib
import hashlib
import os
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib import paths
from course_lib.data.files import existing

ALIKE = 0.6  # ratio of difflib from which two texts are versions of one cell
GONE = "# This exercise is no longer part of the lesson. Your answer to it:\n"
YOURS = "**Your version of the cell above, from before the update:**\n\n"
SETTLED = {
    "nbgrader",
    "tags",
    "id",
    "colab",
    "outputId",
    "editable",
    "deletable",
}  # metadata that a student does not set


def digest(cell: NotebookNode) -> str:
    """Eight characters for the kind and the text of a cell; white space at the ends of lines does not count."""
    lines = [line.rstrip() for line in cell.source.strip().splitlines()]
    return hashlib.sha256("\n".join([cell.cell_type, *lines]).encode("utf-8", "replace")).hexdigest()[:8]


def mark(notebook: NotebookNode) -> None:
    """Give a notebook the marks of what is handed out: by them `changed` and `merged` know a student's text."""
    notebook.metadata["course"] = {"handed_out": " ".join(map(digest, notebook.cells))}


def marks(notebook: NotebookNode) -> list[str]:
    """Digests of the cells as they were handed out; empty if the notebook has lost them or never had any."""
    course = notebook.metadata.get("course")
    return str(course.get("handed_out", "")).split() if isinstance(course, dict) else []


def changed(notebook: NotebookNode, release: NotebookNode) -> list[str]:
    """What of a notebook is not as handed out, or as in a release if its marks are lost; outputs do not count."""
    handed, now = marks(notebook) or marks(release), [digest(cell) for cell in notebook.cells]
    if handed == now:
        return []
    return [_name(cell) for cell, own in zip(notebook.cells, now) if own not in handed] or ["the order of its cells"]


def read(path: Path) -> NotebookNode:
    """A notebook of any version 4, as version 4.5.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # ids that are missing or double are healed by `merged`
            found = existing(path, "is missing: expected a notebook there. Run `make lab` for a new one.")
            notebook = nbformat.reads(found.read_text("utf-8"), 4)
        for cell in notebook.cells:
            digest(cell), _grade(cell), _ids(cell)  # what cannot be looked at is damaged
        marks(notebook)
    except OSError:
        raise
    except Exception as error:  # whatever nbformat raises at damaged JSON
        raise ValueError(
            f"{path}: expected a notebook, got a damaged file ({type(error).__name__}); it is left as it is. "
            "Move it away to get the lesson anew."
        ) from error
    return notebook


def course_root() -> Path:
    """The checkout of the course, which all commands of `course_lib.course` but the benchmark work in."""
    root = paths.checkout()
    if root is None:
        raise RuntimeError("expected a checkout of the course, got course_lib without one; run this in a checkout.")
    return root


def working_folder() -> Path:
    """The folder of the working copies, made if it is missing.

    Raises:
        PermissionError: a sentence, if it cannot be made or written.
    """
    folder = paths.work()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(_no_place(folder, error.strerror)) from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(_no_place(folder, "one that is only read"))
    return folder


def lessons(folder: Path) -> list[Path]:
    """The notebooks of lessons in a folder, without those that a forced build kept (NAME.mine.ipynb)."""
    return [path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if ".mine" not in path.name]


def copy_lessons(handed_out: Path, folder: Path) -> list[str]:
    """Copy the lessons that a folder of working copies lacks; what is there is not touched. Returns their names."""
    new = [lesson for lesson in lessons(handed_out) if not os.path.lexists(folder / lesson.name)]
    for lesson in new:
        for copy in (_base(folder / lesson.name), folder / lesson.name):
            paths.write_bytes(copy, lesson.read_bytes())
    return [lesson.stem for lesson in new]


def behind(handed_out: Path, folder: Path) -> list[str]:
    """Names of the lessons whose working copies were made from an earlier release."""
    pairs = [(lesson, _base(folder / lesson.name)) for lesson in lessons(handed_out)]
    return [lesson.stem for lesson, base in pairs if base.exists() and base.read_bytes() != lesson.read_bytes()]


def update(handed_out: Path, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Bring working copies to what is handed out now.

    Args:
        handed_out: folder of the lessons.
        folder: of the working copies.
    Returns:
        for each lesson its name, what was done, and whether it went well; a copy that is damaged is left alone.
    """
    new = copy_lessons(handed_out, folder)
    for lesson in lessons(handed_out):
        if lesson.stem in new:
            yield lesson.stem, "new; copied", True
            continue
        try:
            yield lesson.stem, _update(lesson, folder / lesson.name), True
        except (OSError, ValueError) as error:
            yield lesson.stem, f"left as it is. {error}", False
    for copy in lessons(folder):
        if not (handed_out / copy.name).exists():
            yield copy.stem, "not in this release; left as it is", True


def merged(mine: NotebookNode, release: NotebookNode, handed: list[str] | None = None) -> tuple[NotebookNode, Counter]:
    """A working copy brought to a release, and what that did: Counter of words such as "answers kept".

    Args:
        mine: the working copy; not changed.
        release: the lesson as handed out now.
        handed: marks of the lesson that the copy was made from; default: those that the copy carries.
    Raises:
        ValueError: less than a quarter of the lesson is found in the copy.
    """
    handed, done = set(marks(mine) if handed is None else handed), Counter()
    cells = _joined(mine.cells, handed)
    found = _match(cells, release.cells, handed)
    if 4 * len(found) < len(release.cells):
        raise ValueError(
            f"Expected a copy of the lesson, got a notebook with {len(found)} of its {len(release.cells)} cells."
        )
    at, kept = -1, {-1: []}  # number of a cell of the release -> cells behind it
    body = [nbformat.from_dict(cell) for cell in release.cells]
    for number, cell in enumerate(cells):
        if number in found:
            at = found[number]
            kept.setdefault(at, [])
            body[at], note = _settle(cell, release.cells[at], handed, done)
            if note:
                kept[at].insert(0, note)
        elif own := _own(cell, release, handed, done):
            kept[at].append(own)
    done["cells added"] = len(body) - len(found)
    taken = {cell.id for cell in body}
    for cell in (cell for cells in kept.values() for cell in cells):
        _identify(cell, taken)
    ordered = [*kept[-1], *(cell for number, one in enumerate(body) for cell in (one, *kept.get(number, [])))]
    metadata = {**release.metadata, **mine.metadata, "course": release.metadata.get("course", {})}
    result = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": ordered})
    return result, +done


def main() -> int:
    """Bring the working copies in work/ to the lessons as handed out now, and keep every answer."""
    root = course_root()
    folder, well = working_folder(), True
    for name, done, fine in update(root / "notebooks", folder):
        print(f"{name}: {done}")
        well &= fine
    print(f"Working copies: {folder}. If a lesson is open in the browser, reload it (File > Reload from Disk).")
    return int(not well)


def _update(lesson: Path, copy: Path) -> str:
    """Update one working copy; returns what was done."""
    before, base = copy.read_bytes(), _base(copy)
    mine = read(copy)
    handed = marks(mine) or (marks(read(base)) if base.exists() else [])
    try:
        result, done = merged(mine, read(lesson), handed)
    except ValueError as error:
        raise ValueError(f"{copy}: {error} Move it away to get the lesson anew.") from error
    after = nbformat.writes(result) + "\n"
    if nbformat.reads(after, 4) == mine:
        return "up to date"
    backup = _free(copy.parent / "backup" / f"{copy.stem}-{time.strftime('%Y-%m-%d-%H%M%S')}.ipynb")
    paths.write_bytes(backup, before)
    if copy.read_bytes() != before:
        raise ValueError(f"{copy}: it was saved while it was updated; run the same command again.")
    paths.write_text(copy, after)
    paths.write_bytes(base, lesson.read_bytes())
    what = ", ".join(f"{count} {words}" for words, count in done.items()) or "marks and order mended"
    return f"{what}; as it was before: {backup}"


def _match(mine: list[NotebookNode], release: list[NotebookNode], handed: set[str]) -> dict[int, int]:
    """Number of a cell of the copy -> number of the same cell of the release."""
    found: dict[int, int] = {}
    for key in (_grade, _ids, lambda cell: [cell.cell_type + digest(cell)], _subjects):
        places = {}
        for j in sorted(set(range(len(release))) - set(found.values()), reverse=True):
            places.update(dict.fromkeys(key(release[j]), j))
        # of two copies of an exercise, the one that holds an answer
        for i in sorted(set(range(len(mine))) - set(found), key=lambda i: (digest(mine[i]) in handed, i)):
            for word in key(mine[i]):
                if places.get(word, -1) >= 0 and places[word] not in found.values():
                    found[i] = places[word]
                    break
    likeness = sorted(
        (-ratio, i, j)
        for i in set(range(len(mine))) - set(found)
        for j in set(range(len(release))) - set(found.values())
        if mine[i].cell_type == release[j].cell_type
        and len(mine[i].source) > 40  # few characters are alike by chance
        and not (handed and handed.isdisjoint((digest(mine[i]), digest(release[j]))))  # else two new ones
        and (ratio := _likeness(mine[i].source, release[j].source)) >= ALIKE
    )
    for _, i, j in likeness:
        if i not in found and j not in found.values():
            found[i] = j
    return found


def _settle(
    cell: NotebookNode, release: NotebookNode, handed: set[str], done: Counter
) -> tuple[NotebookNode, NotebookNode | None]:
    """The cell that stands in the place of a handed-out one, and a note with the student's version of it, or None."""
    result, before, now = nbformat.from_dict(release), digest(cell), digest(release)
    result.metadata = nbformat.from_dict(
        {name: value for name, value in cell.metadata.items() if name not in SETTLED} | release.metadata
    )
    graded, same_kind = release.metadata.get("nbgrader", {}), cell.cell_type == release.cell_type
    mine = before != now and before not in handed
    if before == now or (mine and same_kind and (graded.get("solution") or (now in handed and not graded))):
        if mine:
            done["answers kept" if graded else "changes of yours kept"] += 1
        for part in {"source", "outputs", "execution_count", "attachments"} & set(cell):
            result[part] = cell[part]
        return result, None
    done["cells corrected"] += 1
    if not mine:
        return result, None
    done["notes with your version"] += 1
    code = cell.cell_type == "code"
    text = YOURS + (f"```python\n{cell.source}\n```" if code else cell.source)
    return result, nbformat.from_dict({"cell_type": "markdown", "metadata": {}, "source": text})


def _own(cell: NotebookNode, release: NotebookNode, handed: set[str], done: Counter) -> NotebookNode | None:
    """A cell that the release does not have, as it stays in the copy; None if it was handed out and is gone."""
    graded = cell.metadata.get("nbgrader", {})
    gone = graded and not set(_grade(cell)) & {grade for other in release.cells for grade in _grade(other)}
    if digest(cell) in handed or (gone and not graded.get("solution")):
        done["cells removed"] += 1
        return None
    own = nbformat.from_dict(cell)
    own.metadata.pop("nbgrader", None)
    done["answers to exercises that are gone kept" if gone else "cells of your own kept"] += 1
    if gone and not own.source.startswith(GONE):
        own.source = GONE + own.source
    return own


def _joined(cells: list[NotebookNode], handed: set[str]) -> list[NotebookNode]:
    """Cells with the parts of an exercise that was split, or copied, put together: Jupyter gives both one grade id."""
    result: list[NotebookNode] = []
    for cell in map(nbformat.from_dict, cells):
        last = result[-1] if result else None
        if last and _grade(cell) and _grade(cell) == _grade(last):
            if digest(last) in handed:
                last.source = cell.source
            elif digest(cell) not in handed and cell.source != last.source:
                last.source += "\n\n" + cell.source
        else:
            result.append(cell)
    return result


def _grade(cell: NotebookNode) -> list[str]:
    graded = cell.metadata.get("nbgrader")
    return [str(graded["grade_id"])] if isinstance(graded, dict) and "grade_id" in graded else []


def _ids(cell: NotebookNode) -> list[str]:
    return [f"{cell.cell_type} {one}" for one in (cell.get("id"), cell.metadata.get("id")) if one]  # Colab's own place


def _subjects(cell: NotebookNode) -> list[str]:
    """What an exercise or a check is about, read from its code: functions and classes, or the number of a check."""
    if cell.cell_type != "code":
        return []
    check = re.findall(r'^with check\("([\d.]+)"', cell.source, re.M)
    return check or re.findall(r"^(?:def|class) \w+", cell.source, re.M)[::-1]


def _identify(cell: NotebookNode, taken: set[str]) -> None:
    """Give a cell an id that is valid and its own."""
    names = chain([str(cell.get("id", "")), digest(cell)], (f"{digest(cell)}-{number}" for number in count(2)))
    cell["id"] = next(name for name in names if name not in taken and re.fullmatch(r"[\w-]{1,64}", name, re.A))
    taken.add(cell["id"])


def _likeness(a: str, b: str) -> float:
    """How alike two texts are by their words, 0..1; 0 for texts of very unlike lengths, which would take long."""
    if 2 * min(len(a), len(b)) < ALIKE * (len(a) + len(b)):
        return 0.0
    return difflib.SequenceMatcher(None, *(re.findall(r"\w+|\S", text) for text in (a, b)), False).ratio()


def _name(cell: NotebookNode) -> str:
    return "".join(_grade(cell)) or repr(cell.source.strip().partition("\n")[0][:40])


def _base(copy: Path) -> Path:
    """Where the lesson lies that a working copy was made from, for copies whose marks get lost."""
    return copy.parent / ".jupyter" / "handed-out" / copy.name


def _free(path: Path) -> Path:
    """The path, with a number if something lies there."""
    others = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(2))
    return next(one for one in chain([path], others) if not os.path.lexists(one))


def keep(path: Path) -> Path:
    """Copy a notebook to NAME.mine.ipynb beside it, with a number if there is one; returns the copy's path."""
    copy = _free(path.with_suffix(".mine.ipynb"))
    shutil.copy2(path, copy)
    return copy


def _no_place(folder: Path, got: str) -> str:
    return f"{folder}: expected a folder that you may write, got {got}; set COURSE_WORK to a folder of your own."
