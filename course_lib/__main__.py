"""`python -m course_lib COMMAND`: everything that is done with the course outside its notebooks."""

import sys

from course_lib.course.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
