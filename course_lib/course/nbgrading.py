"""What nbgrader's own commands do in this course, as nbgrader_config.py asks: the same files and scores as ours.

`generate_assignment` gives notebooks the marks by which a student's text is known (`Marked`). `autograde` rebuilds each
submission on the lesson (`Healed`), so that a copied cell or lost metadata stops nobody's grading and no honest
submission is told that its checksum has changed; and it judges in the jail in place of a kernel (`Judged`).
"""

import atexit
import os
from functools import cache

from nbformat.v4 import new_output
from nbgrader.preprocessors import NbGraderPreprocessor

from course_lib.course import update
from course_lib.course.court import Court
from course_lib.course.grade import (
    Graded,
    Limits,
    answers,
    assignment,
    grade_id,
    graded_lessons,
    healed,
    is_exercise,
    number_of,
    teaching,
)


@cache
def _lesson(number: str, name: str) -> Graded:
    counting = assignment(name)["exercises"]
    return graded_lessons(update.course_root() / "notebooks" / "src", [number], counting)[number]


@cache
def _court(number: str, name: str) -> Court:
    limit, root = Limits(float(os.environ.get("COURSE_SECONDS", Limits.seconds))), update.course_root()
    hidden = [str(path) for path in (root / "notebooks", root / "pyproject.toml", teaching())]
    court = Court(_lesson(number, name).parts(), hidden, limit.seconds, limit.memory * 2**20)
    atexit.register(court.__exit__)
    return court


def _place(resources) -> tuple[str, str]:
    """The number of the lesson, and the name of the assignment."""
    return resources["nbgrader"]["notebook"][:2], resources["nbgrader"]["assignment"]


class Marked(NbGraderPreprocessor):
    """Gives a notebook its marks, as the last step of its making."""

    def preprocess(self, nb, resources):
        update.mark(nb)
        return nb, resources


class Healed(NbGraderPreprocessor):
    """Puts the answers of a submission on the lesson with its hidden tests."""

    def preprocess(self, nb, resources):
        lesson = _lesson(*_place(resources))
        result, notes = healed(nb, lesson.handed_out)
        for note in notes:
            self.log.info("%s: %s", resources["nbgrader"]["student"], note)
        checks = {grade_id(cell): cell.source for cell in lesson.key.cells if grade_id(cell)}
        for cell in result.cells:
            if grade_id(cell) and not is_exercise(cell):
                cell.source = checks[grade_id(cell)]
        return result, resources


class Judged(NbGraderPreprocessor):
    """Judges answers in the jail; the points and the message of each exercise become outputs of its check."""

    def preprocess(self, nb, resources):
        lesson = _lesson(*_place(resources))
        found, _ = answers(nb, lesson.handed_out)
        verdicts = _court(*_place(resources)).judge(found, 3600.0)
        for cell in nb.cells:
            if grade_id(cell) and not is_exercise(cell):
                one = verdicts[number_of(cell)]
                said = new_output("stream", name="stdout", text=f"[{one['verdict']}] {one['message']}\n")
                points = new_output("execute_result", data={"text/plain": str(one["points"])}, execution_count=None)
                cell.outputs = [said, points]
        return nb, resources
