# nbgrader in this course. Run its commands here, in the checkout, after `python -m course_lib release --name hw1`:
#   nbgrader generate_assignment hw1 --force      the same notebooks as `release` writes
#   nbgrader autograde hw1                        the same scores as `grade`, in the same jail
# Folders are those of `release` and `grade`. generate_feedback shows the hidden tests: publish the pages of `grade`.
import os
import sys
from pathlib import Path

from nbgrader import preprocessors as steps

from course_lib.course import nbgrading
from course_lib.course.build import STUB
from course_lib.course.grade import teaching

# a new gradebook calls alembic, which lies beside Python
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
os.environ.setdefault("COURSE_PROFILE", "smoke")  # for `nbgrader validate`, which executes a notebook

c = get_config()
c.CourseDirectory.course_id = "from-maps-to-masks"
c.CourseDirectory.root = str(teaching())
c.CourseDirectory.db_url = f"sqlite:///{teaching() / 'gradebook.db'}"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback", "*.py", "*.md", "*.zip"]
c.ClearSolutions.code_stub = {"python": STUB}
c.Execute.timeout = 900  # seconds for a cell
c.GenerateAssignment.preprocessors = [
    steps.LockCells,
    steps.ClearSolutions,
    steps.ClearOutput,
    steps.CheckCellMetadata,
    steps.ComputeChecksums,
    steps.SaveCells,
    steps.ClearHiddenTests,
    steps.ComputeChecksums,
    nbgrading.Marked,
]
c.Autograde.sanitize_preprocessors = [
    steps.ClearOutput,
    nbgrading.Healed,
    steps.OverwriteKernelspec,
    steps.OverwriteCells,
    steps.CheckCellMetadata,
]
c.Autograde.autograde_preprocessors = [nbgrading.Judged, steps.SaveAutoGrades, steps.CheckCellMetadata]
