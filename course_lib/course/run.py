"""Execute the notebooks, each in a kernel of its own and as many at a time as fit, and write the report.

Solved lessons are built anew and run strictly: results come from them. A lesson that fails does not keep another one
from running, but the exit code says so.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import papermill
import tyro
from tqdm import tqdm

from course_lib import paths
from course_lib.course import build, limits, report
from course_lib.lesson import PROFILES, commit
from course_lib.settings import Workers

# Seconds that one cell may take: they end what hangs, on a busy machine too. The real benchmark may train for days.
TIMEOUT = {"smoke": 900, "mini": 1800, "paper": None}
LESSON_MEMORY = 3 * 2**30  # bytes that a lesson may need
LONGEST_FIRST = ("07", "08", "03", "02", "06")  # so that no long one is left to the end
ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_row = 0  # of the screen, for the bars of this process


def execute(
    notebook: Path,
    output: Path,
    profile: str,
    environment: dict[str, str] | None = None,
    progress: int | None = None,
    parameters: dict[str, int | str] | None = None,
) -> float:
    """Seconds that one notebook took from top to bottom in a fresh kernel, in the notebook's place notebooks/.

    Args:
        notebook: what is executed.
        output: where the executed notebook goes; it is written after each cell, on a failure too.
        profile: "smoke", "mini" or "paper".
        environment: variables that the kernel gets on top of this process's own.
        progress: row of the screen for a bar, below the cursor; None for no bar.
        parameters: of the notebook, beside its profile, such as {"SEED": 1}.
    Raises:
        papermill.PapermillExecutionError: at the first cell that raises.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    layout = "{desc:32.32} {bar:20} {n_fmt:>3}/{total_fmt} cells  {elapsed}"
    bar = {"desc": notebook.stem, "bar_format": layout, "position": progress, "leave": False}
    threads = {name: str(limits.threads(name)) for name in limits.THREAD_VARIABLES}
    course = {"COURSE_PROFILE": profile, "COURSE_RESULTS": str(paths.results())}
    started = time.perf_counter()
    with patch.dict(os.environ, threads | course | (environment or {})):  # a kernel gets what this process has
        papermill.execute_notebook(
            notebook,
            output,
            parameters={"PROFILE": profile, **(parameters or {})},
            kernel_name="python3",
            cwd=build.course_root() / "notebooks",
            execution_timeout=TIMEOUT[profile],
            progress_bar=False if progress is None else bar,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # notes on TCP and shutdown help nobody
        )
    return time.perf_counter() - started


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
    with ProcessPoolExecutor(at_once, spawn, _share_screen, (screen, free)) as pool:
        one = partial(_one, output=output, profile=profile, strict=strict)
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


def _share_screen(screen: Any, free: Any) -> None:
    """A process that executes notebooks takes a row of the screen for its bars."""
    global _row
    tqdm.set_lock(screen)
    _row = free.get()


def _one(notebook: Path, output: Path, profile: str, strict: bool) -> tuple[str, float]:
    """Execute one notebook and keep its result: why it failed ("" if it did not), and its seconds."""
    number, started, reason = notebook.stem[:2], time.perf_counter(), ""
    result = paths.results() / f"{number}.json"
    result.unlink(missing_ok=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    entry = {"lesson": number, "profile": profile, "commit": commit(), "run": os.environ.get("COURSE_RUN"), "time": now}
    try:
        execute(notebook, output / notebook.name, profile, {"COURSE_STRICT": str(int(strict))}, progress=_row)
    except Exception as error:
        reason = (ANSI_COLOURS.sub("", str(error)).strip().splitlines() or [type(error).__name__])[-1]
        entry["failed"] = reason
    else:
        if result.is_file():
            entry = json.loads(result.read_text("utf-8"))
        else:
            entry["failed"] = "ran, but did not end with lesson.finish()"
    seconds = time.perf_counter() - started
    if not reason:
        entry["wall_seconds"] = round(seconds, 1)
    paths.write_text(result, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    return reason, seconds


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
