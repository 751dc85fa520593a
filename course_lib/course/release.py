"""Make an assignment: a zip for students, a key, a rubric; from whole lessons, or from exercises that fit a wish.

    work/teaching/assignments/<name>/    <name>.zip (or one zip for each student), rubric.md, assignment.json
    work/teaching/source/<name>/         the key: notebooks with solutions and hidden tests, where nbgrader looks
    work/teaching/release/<name>/        the notebooks as students get them

A student's notebooks are those of notebooks/, byte for byte if all their exercises count; others give 0 points. With a
list of students each gets a variant: SEED of the parameters cell comes from the student's id, and with it the scenes,
episodes and dolls, and so every figure that the notebook shows; the checks are the same for all.
"""

import copy
import hashlib
import json
import re
import subprocess
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib import paths
from course_lib.course import update
from course_lib.course.grade import Graded, grade_id, graded_lessons, number_of, teaching
from course_lib.settings import Whole

WITH_SOLUTIONS = ("notebooks/src/", "tests/", ".ci/", ".github/workflows/")
HEADING = re.compile(r"^### Exercise (\d\d\.\d+) · (.+?) \((\d+) points?, (\d+) min\w*\)", re.M)
SHEET = """\
# {name}

{total} points, about {minutes} minutes at the keyboard. These exercises count:

{rows}

Answer them in the notebooks beside this file. Run a notebook from its top with *Run all*: it never stops at an exercise
that is open. The line under an exercise says [PASS], [FAIL] with the likely reason, or [TODO]. Further tests, which you
do not see, count as well. Hand in the notebooks; outputs may stay in. {variant}
"""


@dataclass(frozen=True)
class PoolExercise:
    """An exercise as an instructor chooses it."""

    number: str
    title: str
    points: int
    minutes: int
    section: str
    objectives: tuple[str, ...]  # of its lesson: what it says under "You will"
    text: str

    def about(self, words: Iterable[str]) -> bool:
        """Whether one of the words stands in its title, its section, its text, or the objectives of its lesson."""
        said = " ".join([self.title, self.section, self.text, *self.objectives]).lower()
        return any(word.strip().lower() in said for word in words)


def pool(lessons: dict[str, Graded]) -> list[PoolExercise]:
    """All exercises of lessons, in their order."""
    found = []
    for graded in lessons.values():
        section, objectives = "", ()
        for cell in graded.handed_out.cells:
            if cell.cell_type != "markdown":
                continue
            if not objectives and "**You will**" in cell.source:
                listed = cell.source.partition("**You will**")[2].partition("\n\n")[0]
                objectives = tuple(
                    " ".join(one.split()).rstrip(";.") for one in re.split(r"^\d\. ", listed, flags=re.M)[1:]
                )
            if heading := re.findall(r"^## (.+)$", cell.source, re.M):
                section = heading[-1]
            for number, title, points, minutes in HEADING.findall(cell.source):
                text = cell.source.partition("<details>")[0]
                found.append(PoolExercise(number, title, int(points), int(minutes), section, objectives, text))
    return found


def fitting(exercises: list[PoolExercise], minutes: int = 0, points: int = 0) -> list[PoolExercise]:
    """Exercises that together take at most `minutes` and give exactly `points`; 0 of these asks nothing.

    Without points, as many points as fit; of equal ones what takes least time.

    Raises:
        ValueError: nothing fits.
    """
    best: dict[int, tuple[int, tuple[PoolExercise, ...]]] = {0: (0, ())}
    for one in exercises:
        for total, (time, chosen) in list(best.items()):
            longer = time + one.minutes
            if (not minutes or longer <= minutes) and longer < best.get(total + one.points, (10**6,))[0]:
                best[total + one.points] = longer, (*chosen, one)
    wanted = points or max(best)
    if not best.get(wanted, (0, ()))[1]:
        raise ValueError(
            f"expected exercises with {points or 'some'} points in {minutes or 'any'} minutes, got none that fit; "
            f"the {len(exercises)} in question give {', '.join(map(str, sorted(best)))} points."
        )
    return list(best[wanted][1])


def seed_of(name: str, student: str) -> int:
    """The random seed of a student's variant of an assignment, from 1 to 2^31."""
    return 1 + int.from_bytes(hashlib.sha256(f"{name}/{student}".encode()).digest()[:4], "big") % 2**31


def variant(handed_out: NotebookNode, seed: int) -> NotebookNode:
    """A lesson with a random seed of its own."""
    own = copy.deepcopy(handed_out)
    for cell in own.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = re.sub(r"^SEED = \d+", f"SEED = {seed}", cell.source, flags=re.M)
    update.mark(own)
    return own


def table(exercises: list[PoolExercise]) -> str:
    """Exercises as a table in Markdown."""
    rows = [f"| {one.number} | {one.title} | {one.points} | {one.minutes} | {one.section} |" for one in exercises]
    return "\n".join(["| exercise | title | points | minutes | section |", "|---|---|---:|---:|---|", *rows])


def rubric(name: str, exercises: list[PoolExercise], lessons: dict[str, Graded], seeds: dict[str, int]) -> str:
    """What an instructor needs beside the key: points, minutes, objectives, credit, seeds of students."""
    parts = [f"# {name}: rubric", "", table(exercises), ""]
    parts.append(f"{sum(one.points for one in exercises)} points, {sum(one.minutes for one in exercises)} minutes.")
    for number, graded in lessons.items():
        own = [one for one in exercises if one.number.startswith(number)]
        parts += [
            "",
            f"## {graded.stem}",
            "",
            "Objectives of the lesson:",
            *(f"- {text}" for text in own[0].objectives),
        ]
        checks = {number_of(cell): cell.source for cell in graded.key.cells if grade_id(cell).startswith("check-")}
        for one in own:
            mistakes = len(re.findall(r'"(?:[^"\\]|\\.)+"\s*:', checks[one.number]))
            parts += ["", f"**{one.number} · {one.title}**: {one.points} points. Its check names {mistakes} mistakes."]
    parts += [
        "",
        "Credit: a check ends at its first wrong case. Cases before it count if a value was right among them, and once "
        "it passes, each hidden test counts as a case by itself. Points are the share of all cases.",
    ]
    if seeds:
        parts += [
            "",
            "| student | SEED |",
            "|---|---:|",
            *(f"| {student} | {seed} |" for student, seed in seeds.items()),
        ]
    return "\n".join(parts) + "\n"


def students_of(path: Path) -> list[str]:
    """Ids of students: the first column of a CSV file, or the lines of a text; a header "student" or "id" is none."""
    lines = [re.split(r"[,;\t]", line)[0].strip().strip('"') for line in path.read_text("utf-8-sig").splitlines()]
    found = [line for line in lines if line and line.lower() not in ("student", "students", "id", "user", "username")]
    if wrong := [one for one in found if not re.fullmatch(r"[\w.@ -]+", one)]:
        raise ValueError(f"{path}: expected ids of letters, digits and _ . @ -, got {wrong[0]!r}.")
    if len({*found}) < len(found) or not found:
        raise ValueError(
            f"{path}: expected one student a line and none twice, got {len(found)} lines with {len({*found})}."
        )
    return found


def _zipped(path: Path, files: dict[str, str | bytes]) -> None:
    """A zip archive whose bytes depend on its files alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)


def _text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def write_course(root: Path, path: Path, lessons: dict[str, Graded]) -> int:
    """The course as it may be public while its exercises are homework: without sources, tests and solutions.

    Args:
        root: the checkout; what git tracks in it is taken.
    Returns:
        the number of files.
    Raises:
        ValueError: a file outside of the library, which holds the methods themselves, has the lines of a solution.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name and not name.startswith(WITH_SOLUTIONS)]
    files = {name: (root / name).read_bytes() for name in names if (root / name).is_file()}
    outside = {name: content for name, content in files.items() if not name.startswith("course_lib/")}
    squeezed = {name: b"".join(content.split()) for name, content in outside.items()}
    for graded in lessons.values():
        for cell in graded.key.cells:
            for block in re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", cell.source, re.S):
                written = b"".join(block.encode().split())
                for name, content in squeezed.items():
                    if len(written) > 60 and written in content:
                        raise ValueError(f"{name} holds the solution of {grade_id(cell)}; nothing was written.")
    _zipped(path, {f"course/{name}": content for name, content in files.items()})
    return len(files)


def main(
    name: str = "",
    lessons: str = "",
    exercises: str = "",
    about: str = "",
    minutes: Whole = 0,
    points: Whole = 0,
    students: Path | None = None,
    without_solutions: bool = False,
) -> int:
    """Make an assignment of lessons: a zip for students, a key, a rubric. Without --name it lists the exercises.

    Args:
        name: of the assignment, such as hw1.
        lessons: numbers such as 02,04; default: all.
        exercises: numbers such as 02.1,04.2 that count; default: all of the lessons.
        about: words such as prototype,recall; exercises that speak of one of them are chosen from.
        minutes: that the chosen exercises may take together.
        points: that they give together.
        students: a file with an id on each line, or a CSV with ids first: each student gets a variant.
        without_solutions: write the course without its solutions, too, as it may be public during the term.
    """
    root = update.course_root()
    built = graded_lessons(root / "notebooks" / "src", _listed(lessons) or None)
    if missing := set(_listed(lessons)) - set(built):
        raise ValueError(
            f"expected lessons with exercises, got {', '.join(sorted(missing))}; there are {', '.join(built)}."
        )
    chosen = pool(built)
    if unknown := set(_listed(exercises)) - {one.number for one in chosen}:
        raise ValueError(f"expected exercises of these lessons, got {', '.join(sorted(unknown))}.")
    if exercises:
        chosen = [one for one in chosen if one.number in _listed(exercises)]
    if about:
        chosen = [one for one in chosen if one.about(_listed(about))]
    if minutes or points or not chosen:
        chosen = fitting(chosen, minutes, points)
    if not name:
        print(table(chosen))
        return 0
    if not re.fullmatch(r"[A-Za-z][\w-]{0,60}", name):
        raise ValueError(f"expected a name of letters, digits, _ and -, got {name!r}.")
    numbers = [one.number for one in chosen]
    built = graded_lessons(root / "notebooks" / "src", {number[:2] for number in numbers}, numbers)
    seeds = {student: seed_of(name, student) for student in students_of(students)} if students else {}
    place = teaching() / "assignments" / name
    total, took = sum(one.points for one in chosen), sum(one.minutes for one in chosen)
    told = "Your SEED is your own: it draws the data, and so your figures differ from others'." if seeds else ""
    sheet = SHEET.format(name=name, total=total, minutes=took, rows=table(chosen), variant=told)
    for step in ("source", "release"):
        for old in (teaching() / step / name).glob("*.ipynb"):
            old.unlink()
        for graded in built.values():
            notebook = graded.key if step == "source" else graded.handed_out
            paths.write_text(teaching() / step / name / f"{graded.stem}.ipynb", _text(notebook))
    for student, seed in (seeds or {"": 0}).items():
        own = {one.stem: variant(one.handed_out, seed) if student else one.handed_out for one in built.values()}
        files = {f"{name}/README.md": sheet} | {f"{name}/{stem}.ipynb": _text(one) for stem, one in own.items()}
        _zipped(place / (f"{name}-{student}.zip" if student else f"{name}.zip"), files)
    paths.write_text(place / "rubric.md", rubric(name, chosen, built, seeds))
    kept = {"lessons": [*built], "exercises": {one.number: one.points for one in chosen}, "students": seeds}
    paths.write_text(place / "assignment.json", json.dumps(kept, indent=1) + "\n")
    print(f"{name}: {len(chosen)} exercises of lessons {', '.join(built)}, {total} points, {took} minutes.")
    print(f"For students: {place / (f'{name}-*.zip' if seeds else f'{name}.zip')}")
    print(f"Rubric: {place / 'rubric.md'}; key: {teaching() / 'source' / name}")
    if without_solutions:
        count = write_course(root, place / "course.zip", graded_lessons(root / "notebooks" / "src"))
        print(f"The course without solutions: {place / 'course.zip'}, {count} files.")
    print(f"When they have sent their work: python -m course_lib grade FOLDER --name {name}")
    return 0


def _listed(words: str) -> list[str]:
    return [word.strip() for word in words.split(",") if word.strip()]
