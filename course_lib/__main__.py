"""`python -m course_lib COMMAND`: everything that is done with the course outside its notebooks."""

import sys

from course_lib.course.commands import main


def course() -> int:
    """The console command `course`."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(course())
