"""Grade what students send: heal each notebook, judge its answers in a jail, write scores and feedback.

A submission is a notebook in any folder: <student>/..., <student>/<assignment>/..., or <student>_NN_name.ipynb, as
learning platforms name them. Only answers travel: of a notebook the exercises are found again by grade id, cell id or
what they define, and everything else is as handed out. What was judged is kept by its content, so the same command goes
on after a kill, and a corrected check grades anew.
"""

import ast
import copy
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any
from unittest.mock import patch

import jinja2
import tyro
from nbformat import NotebookNode
from tqdm import tqdm

from course_lib import checks, paths
from course_lib.course import build, court, jail, limits, update
from course_lib.settings import Workers, check_settings

NOTEBOOK_BYTES, ARCHIVE_BYTES, CELLS = 64 * 2**20, 4 * 2**30, 2000
HIDDEN = "### BEGIN HIDDEN TESTS"
EXERCISE = re.compile(r"(?:exercise|check)-(\d\d)-(\d+)")
FEEDBACK = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}: {{ student }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .4rem .75rem .4rem 0; border-top: 1px solid #888; }
.number { text-align: right; white-space: nowrap; }
</style>
<h1>{{ title }}: {{ student }}</h1>
<p>{{ points }} of {{ most }} points.</p>
{% for lesson in lessons %}
<table><caption>{{ lesson.name }}</caption>
<thead><tr><th scope="col">exercise</th><th scope="col" class="number">points</th>
<th scope="col">what was found</th></tr></thead>
<tbody>{% for number, found in lesson.exercises.items() %}
<tr><th scope="row">{{ number }}</th><td class="number">{{ found.points }} of {{ found.max }}</td>
<td>{{ found.message }}</td></tr>{% endfor %}
</tbody></table>
{% for note in lesson.notes %}<p>{{ note }}</p>{% endfor %}{% endfor %}
</html>
"""


@dataclass
class Work:
    """What one student sent for one lesson."""

    student: str
    lesson: str
    answers: dict[str, list[tuple[str, str]]]  # number of an exercise -> cells to execute, the answer last
    notes: list[str] = field(default_factory=list)
    exercises: dict[str, dict] = field(default_factory=dict)  # number -> points, verdict, message: see court.Bench


# lessons --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graded:
    """A lesson as it is graded."""

    stem: str
    handed_out: NotebookNode
    key: NotebookNode

    def parts(self) -> dict[str, Any]:
        """Its set-up cells, its stubs, and of each exercise the solution, the tests and the points, see `Court`."""
        code = [cell for cell in self.handed_out.cells if cell.cell_type == "code"]
        setup = [cell.source for cell in code if {"parameters", "setup"} & set(cell.metadata.get("tags", []))]
        solved = {grade_id(cell): cell for cell in self.key.cells if grade_id(cell)}
        stubs, key = {}, {}
        for cell in filter(is_exercise, code):
            number = number_of(cell)
            check = solved[f"check-{number.replace('.', '-')}"]
            visible, marker, hidden = check.source.partition(HIDDEN)
            stubs[number] = cell.source
            key[number] = {
                "solution": solved[grade_id(cell)].source,
                "visible": visible,
                "hidden": marker + hidden,
                "points": float(check.metadata.nbgrader.points),
            }
        return {"setup": setup, "stubs": stubs, "key": key}


def grade_id(cell: NotebookNode) -> str:
    """The grade id of a cell, "" if it has none."""
    graded = cell.metadata.get("nbgrader")
    return str(graded.get("grade_id", "")) if isinstance(graded, dict) else ""


def is_exercise(cell: NotebookNode) -> bool:
    """Whether a cell holds an exercise."""
    return grade_id(cell).startswith("exercise-")


def number_of(cell: NotebookNode) -> str:
    """The number of an exercise or its check, such as 01.1."""
    return ".".join(EXERCISE.fullmatch(grade_id(cell)).groups())


def graded_lessons(
    folder: Path, numbers: Iterable[str] | None = None, counting: Iterable[str] | None = None
) -> dict[str, Graded]:
    """By number the lessons that have exercises, built from their sources.

    Args:
        folder: of the sources.
        numbers: such as ["01"]; default: all.
        counting: exercises, such as ["01.1"]; all others give no points. Default: all count.
    """
    where, found = build.address(folder), {}
    for source in build.sources(folder):
        if numbers is None or source.stem[:2] in numbers:
            key = build.solved(source, where)
            for cell in key.cells:
                if (
                    counting is not None
                    and "points" in cell.metadata.get("nbgrader", {})
                    and number_of(cell) not in counting
                ):
                    cell.metadata.nbgrader.points = 0
            if any(map(is_exercise, key.cells)):
                found[source.stem[:2]] = Graded(source.stem, build.student(key, source.stem), key)
    return found


# what was sent --------------------------------------------------------------------------------------------------------


def sent(folder: Path) -> Iterator[tuple[str, Path]]:
    """Students and their notebooks in a folder, the oldest first; links are looked at, but never followed."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(place, name)
            if name.endswith(".ipynb") and not name.startswith("."):
                first, *rest = path.relative_to(folder).parts
                student = (
                    re.sub(r"_assignsubmission_.*$", "", first)
                    if rest
                    else re.sub(r"(?:^|[_. -]+)\d\d_.*$", "", path.stem)
                )
                student = (student or path.stem).encode("utf-8", "replace").decode()
                found.append((path.lstat().st_mtime_ns, student, path))
    yield from ((student, path) for _, student, path in sorted(found))


def unpacked(archive: Path, folder: Path) -> Path:
    """The notebooks of an archive, in a folder; names that lead out of it, and what is no notebook, stay packed."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = [entry for entry in opened.infolist() if entry.filename.endswith(".ipynb")]
            if sum(entry.file_size for entry in wanted) > ARCHIVE_BYTES:
                raise ValueError(f"{archive}: expected at most {ARCHIVE_BYTES / 2**30:g} GB of notebooks, got more.")
            for entry in wanted:
                target = folder / entry.filename
                if target.resolve().is_relative_to(folder.resolve()) and entry.file_size <= NOTEBOOK_BYTES:
                    paths.write_bytes(target, opened.read(entry))
                    moment = time.mktime((*entry.date_time, 0, 0, -1))
                    os.utime(target, (moment, moment))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{archive}: expected a zip archive of notebooks, got a damaged file ({error}).") from error
    return folder


def opened(path: Path) -> NotebookNode:
    """A notebook that somebody sent.

    Raises:
        ValueError: a sentence, if it is a link, no file, too large, or no notebook.
    """
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("expected a file, got a link or a device; it was not opened.")
    if about.st_size > NOTEBOOK_BYTES:
        raise ValueError(f"expected at most {NOTEBOOK_BYTES >> 20} MB, got {about.st_size >> 20}; clear its outputs.")
    try:
        notebook = update.read(path)
    except ValueError:
        raise ValueError("expected a notebook, got a damaged file.") from None
    if len(notebook.cells) > CELLS:
        raise ValueError(f"expected at most {CELLS} cells, got {len(notebook.cells)}.")
    return notebook


def lesson_of(notebook: NotebookNode, name: str) -> str:
    """The number of the lesson that a notebook is a copy of: by its grade ids, its first lines, or its file's name."""
    ids = Counter(found[1] for cell in notebook.cells if (found := EXERCISE.fullmatch(grade_id(cell))))
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    said = re.search(r'\bstart\("(\d\d)"', code) or re.search(r"(?:^|[^\d])(\d\d)_", name)
    return ids.most_common(1)[0][0] if ids else said[1] if said else ""


def definitions(source: str) -> str:
    """What of a cell defines something and computes nothing, on its own lines: imports, functions, constants."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    lines = source.splitlines()
    kept = [""] * len(lines)
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef) or _constant(node):
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            kept[first - 1 : node.end_lineno] = lines[first - 1 : node.end_lineno]
    return "\n".join(kept) if any(kept) else ""


def _constant(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign):
        return False
    try:
        ast.literal_eval(node.value)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return isinstance(node.value, ast.Lambda)
    return True


def without_magics(source: str) -> str:
    """A cell as Python: lines of IPython's own are left out, if it is Python then."""
    plain = re.sub(r"^[ \t]*[%!?].*$", "", source, flags=re.M)
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return plain
    return source


def healed(mine: NotebookNode, release: NotebookNode) -> tuple[NotebookNode, list[str]]:
    """A submission on the notebook as handed out, with the answers and the student's own cells; and what was mended.

    Raises:
        ValueError: it is no copy of the lesson.
    """
    mine, handed = copy.deepcopy(mine), update.marks(mine) or update.marks(release)
    notes, later, before = [], {}, ""
    for cell in reversed(mine.cells):  # of copies that are apart the last one counts, as when all are run
        own = grade_id(cell)
        if own and own in later and own != before and update.digest(cell) not in handed:
            cell.metadata.pop("nbgrader")
            notes.append(f"{own} is there more than once: the last one counts.")
        elif own and update.digest(cell) not in handed:
            later[own] = cell
        before = own
    lost = not any(map(grade_id, mine.cells))
    result, done = update.merged(mine, release, handed)
    if lost:
        notes.append("Its marks for grading were lost: exercises were found by what they define.")
    if changed := done["notes with your version"]:
        notes.append(
            f"{changed} cells that are not yours to change were changed, such as checks: they count as handed out."
        )
    if missing := done["cells added"]:
        notes.append(f"{missing} cells were missing, and are back as handed out.")
    return result, notes


def answers(mine: NotebookNode, release: NotebookNode) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """The cells that are executed for each exercise of a submission, and what was mended in it.

    For an exercise these are what the student's own cells and other exercises define, then its own cell; none for one
    that nobody has written in.

    Args:
        mine: the submission.
        release: the lesson as handed out.
    Raises:
        ValueError: it is no copy of the lesson.
    """
    graded = copy.copy(release)
    graded.cells = [cell for cell in release.cells if grade_id(cell)]
    whole, notes = healed(mine, graded)
    stubs = {grade_id(cell): update.digest(cell) for cell in graded.cells}
    exercises = [cell for cell in whole.cells if is_exercise(cell)]
    own = [definitions(cell.source) for cell in whole.cells if cell.cell_type == "code" and not grade_id(cell)]
    own = [(f"own-{place}", source) for place, source in enumerate(own, 1) if source]
    found = {}
    for cell in exercises:
        written = update.digest(cell) != stubs[grade_id(cell)]
        defined = set(re.findall(r"^def (\w+)", cell.source, re.M))
        below = [part for part in own if defined & set(re.findall(r"^def (\w+)", part[1], re.M))]
        if not (written or below):
            continue
        others = [
            (number_of(other), definitions(other.source))
            for other in exercises
            if other is not cell and update.digest(other) != stubs[grade_id(other)]
        ]
        last = [(number_of(cell), without_magics(cell.source))]
        found[number_of(cell)] = own + others + last + ([] if written else below)
    return found, notes


# grades ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What the answer to one exercise may use."""

    seconds: Annotated[float, (0.1, 3600.0)] = 20.0  # of a processor
    memory: Annotated[int, (1, 10**6)] = 1024  # MB, on top of what the lesson loads

    def __post_init__(self) -> None:
        check_settings(self)


def judge(
    works: list[Work], lessons: dict[str, dict], folder: Path, hidden: list[str], limit: Limits, workers: int
) -> int:
    """Fill in the exercises of each work; returns how many were known from before.

    Args:
        lessons: number -> parts, see `Graded.parts`.
        folder: of what was judged, by content.
        hidden: paths that no submission may see.
    """
    code = b"".join(Path(file).read_bytes() for file in (checks.__file__, court.__file__, jail.__file__))
    print_of = {
        number: _digest(lesson, vars(limit), hashlib.sha256(code).hexdigest()) for number, lesson in lessons.items()
    }
    todo: dict[str, SimpleQueue] = defaultdict(SimpleQueue)
    known = 0
    for work in works:
        path = folder / f"{_digest(print_of[work.lesson], work.answers)}.json"
        if path.is_file():
            work.exercises = json.loads(path.read_text("utf-8"))
            known += 1
        else:
            todo[work.lesson].put((work, path))

    def sit(number):
        queue, bench = todo[number], None
        allowed = 120 + len(lessons[number]["key"]) * (5 * limit.seconds + 60)
        try:
            while True:
                work, path = queue.get_nowait()
                try:
                    if path.is_file():  # somebody else wrote just the same
                        work.exercises = json.loads(path.read_text("utf-8"))
                        continue
                    bench = bench or court.Court(lessons[number], hidden, limit.seconds, limit.memory * 2**20)
                    work.exercises = bench.judge(work.answers, allowed)
                    paths.write_text(path, json.dumps(work.exercises, indent=1) + "\n")
                except (EOFError, ConnectionError, TimeoutError):  # the court is gone; whoever graded must look
                    bench = bench and bench.__exit__()
                    work.notes.append("Not graded: the process that checks answers ended. Look at this one yourself.")
                finally:
                    bar.update()
        except Empty:
            return
        finally:
            if bench:
                bench.__exit__()

    waiting = sum(queue.qsize() for queue in todo.values())
    with tqdm(total=waiting, desc="submissions", disable=not waiting) as bar, ThreadPoolExecutor(workers) as pool:
        for number in sorted(todo):
            at_once = min(workers, -(-todo[number].qsize() // 4))  # a court takes as long to start as four to judge
            list(pool.map(sit, [number] * at_once))
    return known


def _digest(*things: Any) -> str:
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode("utf-8", "replace")).hexdigest()[:24]


def collected(
    folder: Path, lessons: dict[str, Graded], seeds: dict[str, int]
) -> tuple[list[Work], dict[str, list[str]]]:
    """What was sent, the newest of each student and lesson; and notes by student on what could not be read.

    Args:
        seeds: of students with a variant of their own.
    """
    works, notes = {}, defaultdict(list)
    for student, path in sent(folder):
        notes[student] += []
        try:
            notebook = opened(path)
            number = lesson_of(notebook, path.name)
            if number not in lessons:
                raise ValueError(f"expected one of the lessons {', '.join(lessons)}, got {number or 'none of them'}.")
            found, mended = answers(notebook, lessons[number].handed_out)
        except (ValueError, OSError) as error:
            notes[student].append(f"{path.name}: {error}")
            continue
        said = re.search(r"^SEED = (\d+)", "\n".join(cell.source for cell in notebook.cells), re.M)
        if student in seeds and (not said or int(said[1]) != seeds[student]):
            mended.append(
                f"SEED is {said[1] if said else 'missing'}, and this student's is {seeds[student]}: whose is it?"
            )
        if (student, number) in works:
            mended.append("There is more than one file of this lesson: the newest counts.")
        works[student, number] = Work(student, number, found, mended)
    return [works[key] for key in sorted(works)], dict(notes)


def write_grades(
    works: list[Work],
    students: dict[str, list[str]],
    lessons: dict[str, Graded],
    chosen: dict[str, float],
    title: str,
    folder: Path,
) -> Path:
    """Write scores.csv and a page of feedback for each student; returns the path of the table.

    Args:
        students: all of them, with notes.
        chosen: exercises that count, with their points.
    """  # fmt: skip
    table, most = io.StringIO(), sum(chosen.values())
    rows = csv.writer(table)
    rows.writerow(["student", "points", "of", *chosen, "notes"])
    page = jinja2.Environment(autoescape=True).from_string(FEEDBACK)
    for student in sorted(students):
        own = [work for work in works if work.student == student]
        found = {number: one for work in own for number, one in work.exercises.items() if number in chosen}
        points = round(sum(one["points"] for one in found.values()), 2)
        notes = [*students[student], *(f"{work.lesson}: {note}" for work in own for note in work.notes)]
        scores = [found[number]["points"] if number in found else "" for number in chosen]
        rows.writerow(
            [_cell(student), points, most, *scores, _cell(" ".join(notes) or ("" if own else "Nothing came."))]
        )
        shown = [
            {
                "name": lessons[work.lesson].stem,
                "notes": work.notes,
                "exercises": {number: one for number, one in work.exercises.items() if number in chosen},
            }
            for work in own
        ]
        if students[student]:
            shown.append({"name": "Not read", "exercises": {}, "notes": students[student]})
        html = page.render(title=title, student=student, points=points, most=most, lessons=shown)
        paths.write_text(folder / "feedback" / f"{_file(student)}.html", html)
    paths.write_text(folder / "scores.csv", table.getvalue())
    return folder / "scores.csv"


def _cell(text: str) -> str:
    """Text for a table: what a spreadsheet would take for a formula is none."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _file(student: str) -> str:
    return re.sub(r"[^\w.@ -]", "_", student).strip(". ") or "student"


def write_gradebook(
    works: list[Work], lessons: dict[str, Graded], chosen: dict[str, float], name: str, path: Path
) -> None:
    """Put the scores into a gradebook of nbgrader, whose own commands show and export them."""
    from nbgrader.api import Gradebook, MissingEntry  # late: it takes a second

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with patch.dict(os.environ, PATH=beside), Gradebook(f"sqlite:///{path}") as book:  # a new one calls alembic
        book.update_or_create_assignment(name)
        for number in sorted({work.lesson for work in works}):
            stem, key = lessons[number].stem, lessons[number].key
            try:
                book.find_notebook(stem, name)
            except MissingEntry:
                book.add_notebook(stem, name)
            for cell in filter(grade_id, key.cells):
                kept = {"source": cell.source, "cell_type": "code", "locked": not is_exercise(cell)}
                book.update_or_create_source_cell(grade_id(cell), stem, name, **kept)
                if is_exercise(cell):
                    book.update_or_create_solution_cell(grade_id(cell), stem, name)
                else:
                    points = chosen.get(number_of(cell), 0.0)
                    book.update_or_create_grade_cell(grade_id(cell), stem, name, max_score=points, cell_type="code")
        for work in works:
            book.update_or_create_student(work.student)
            book.update_or_create_submission(name, work.student)
            for number, found in work.exercises.items():
                where = lessons[work.lesson].stem, name, work.student
                grade = book.find_grade(f"check-{number.replace('.', '-')}", *where)
                grade.auto_score, grade.needs_manual_grade = found["points"], False
                book.find_comment(f"exercise-{number.replace('.', '-')}", *where).auto_comment = found["message"]
        book.db.commit()


def assignment(name: str) -> dict[str, Any]:
    """What `release` wrote about an assignment: "lessons", "exercises" with points, "students" with random seeds."""
    path = teaching() / "assignments" / name / "assignment.json"
    if not path.is_file():
        raise ValueError(
            f"expected an assignment {name!r}, got none in {path.parent}; make it with `release --name {name}`."
        )
    return json.loads(path.read_text("utf-8"))


def teaching() -> Path:
    """The folder of an instructor: assignments, what was sent, grades. It lies in work/, which nothing clears."""
    return paths.work() / "teaching"


def main(
    submissions: tyro.conf.Positional[Path],
    name: str = "",
    limit: Limits = Limits(),
    workers: Workers = 0,
    folder: Path | None = None,
    gradebook: Path | None = None,
) -> int:
    """Grade a folder or zip of submissions: scores.csv, and a page of feedback for each student.

    Args:
        submissions: folder or zip archive of what students sent.
        name: of the assignment that `release` made; without it all exercises of the lessons that came count.
        workers: lessons judged at a time; 0 takes as many as there are cores.
        folder: of the results; default: work/teaching/grades/<name>.
        gradebook: of nbgrader, a database that the scores go into as well.
    """
    if not submissions.exists():
        raise ValueError(f"{submissions}: expected a folder or zip archive of submissions, got nothing.")
    root = update.course_root()
    folder = (folder or teaching() / "grades" / (name or submissions.stem)).absolute()
    about = assignment(name) if name else {}
    started = time.perf_counter()
    if submissions.is_file():
        submissions = unpacked(submissions, folder / "unpacked" / submissions.stem)
    lessons = graded_lessons(root / "notebooks" / "src", about.get("lessons"), about.get("exercises"))
    seeds = about.get("students", {})
    works, students = collected(submissions, lessons, seeds)
    if not students:
        raise ValueError(f"{submissions}: expected notebooks (*.ipynb) of students, got none.")
    came = sorted({work.lesson for work in works}) if not about else about["lessons"]
    parts = {number: lessons[number].parts() for number in came}
    points = {
        number: one["points"] for lesson in parts.values() for number, one in lesson["key"].items() if one["points"]
    }
    hidden = [root / "notebooks", root / "pyproject.toml", submissions.absolute(), folder, teaching()]
    known = judge(works, parts, folder / "results", [str(path) for path in hidden], limit, workers or limits.cores())
    everybody = {student: students.get(student, []) for student in {*students, *seeds}}
    table = write_grades(works, everybody, lessons, points, name or "Feedback", folder)
    if gradebook:
        write_gradebook(works, lessons, points, name or submissions.stem, gradebook.absolute())
    before = f", {known} of them known from before" if known else ""
    print(
        f"{len(works)} notebooks of {len(students)} students in {time.perf_counter() - started:.0f} s{before}: {table}"
    )
    print(f"Feedback: {folder / 'feedback'}")
    unread = sum(map(bool, students.values())) + sum(not work.exercises for work in works)
    if unread:
        print(f"{unread} could not be graded in full; their notes say why.")
    return 0
