"""Execute the notebooks, each in a kernel of its own and as many at a time as fit, and write the report.

Solved lessons are built anew and run strictly: results come from them. A lesson that fails does not keep another one
from running, but the exit code says so.
"""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from course_lib.course import build, limits, report
from course_lib.course.kernels import execute_and_keep, share_screen
from course_lib.lesson import PROFILES, commit
from course_lib.settings import Workers

LESSON_MEMORY = 3 * 2**30  # bytes that a lesson may need
LONGEST_FIRST = ("07", "03", "10", "09", "08", "02", "06")  # so that no long one is left to the end


def run(notebooks: list[Path], output: Path, profile: str, strict: bool, at_once: int = 1) -> list[str]:
    """Execute notebooks, each with a progress bar while it runs; returns the names of those that failed, in order.

    A failure is written to the results in place of figures, so that no older figures stand for it in the report.

    Args:
        notebooks: what is executed.
        output: folder of the executed notebooks.
        profile: "smoke", "mini" or "paper".
        strict: a wrong or missing answer ends a notebook.
        at_once: notebooks at a time.
    """
    failed, spawn = set(), multiprocessing.get_context("spawn")
    queue = sorted(notebooks, key=lambda notebook: (*LONGEST_FIRST, notebook.stem[:2]).index(notebook.stem[:2]))
    screen, free = spawn.RLock(), spawn.Queue()
    for row in range(at_once):
        free.put(row)
    with ProcessPoolExecutor(at_once, spawn, share_screen, (screen, free)) as pool:
        one = partial(execute_and_keep, output=output, profile=profile, strict=strict, commit=commit())
        running = {pool.submit(one, notebook): notebook.stem for notebook in queue}
        for done in as_completed(running):
            reason, seconds = done.result()
            line = f"{running[done]:32.32} ran in {seconds // 60:.0f} min {seconds % 60:02.0f} s"
            if reason:
                failed.add(running[done])
                line = f"{running[done]} failed: {reason}  (see {output / running[done]}.ipynb)"
            with screen:
                print("\r\x1b[K" if sys.stderr.isatty() else "\n", line, sep="", file=sys.stderr, flush=True)
    return [notebook.stem for notebook in notebooks if notebook.stem in failed]


def _fitting() -> int:
    """Lessons that fit beside each other: a core for each of a lesson's threads, and memory."""
    memory = limits.memory() or LESSON_MEMORY
    return max(1, min(limits.cores() // limits.threads(), memory // LESSON_MEMORY))


def main(
    lessons: tyro.conf.Positional[tuple[str, ...]] = (),
    profile: Literal[PROFILES] = "mini",
    student: bool = False,
    into: str = "",
    at_once: Workers = 0,
) -> int:
    """Execute the solved notebooks, and write build/report.html; of other profiles than mini, all in build/PROFILE.

    Args:
        lessons: numbers of lessons, such as 01; all if none is given.
        profile: how much to compute.
        student: execute the student notebooks as they are, into build/student; makes no report.
        into: a folder for executed notebooks and results in place of build/run and build/results; makes no report.
        at_once: lessons at a time; 0: as many as there are cores and memory for.
    """
    root, place = build.course_root(), build.place(profile)
    output = Path(into).absolute() if into else place / ("student" if student else "run")
    results = output / "results" if student or into else build.measured(profile)
    os.environ["COURSE_RESULTS"] = str(results)
    os.environ["COURSE_RUN"] = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    if student:
        notebooks = [
            root / "notebooks" / f"{source.stem}.ipynb" for source in build.sources(root / "notebooks" / "src")
        ]
    else:
        notebooks = build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    chosen = build.choose(notebooks, lessons) if lessons else notebooks
    failed = run(chosen, output, profile, strict=not student, at_once=at_once or _fitting())
    if not (student or into):
        print(f"Report: {report.write(results, output, place / 'report.html', profile)}")
    ending = f"; failed: {', '.join(failed)}." if failed else "."
    print(f"{len(chosen) - len(failed)} of {len(chosen)} lessons ran{ending}")
    return int(bool(failed))
