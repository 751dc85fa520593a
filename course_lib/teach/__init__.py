"""Teaching: the frame of a lesson, exercise feedback, and what builds, runs and reports the notebooks."""

from course_lib.teach.checks import check, expect_error, same
from course_lib.teach.lesson import Lesson, start

__all__ = ["Lesson", "check", "expect_error", "same", "start"]
