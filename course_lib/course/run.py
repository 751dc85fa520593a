"""Execute the notebooks one after the other, each in a kernel of its own, and write the report.

Solved lessons are built anew and run strictly: results come from them. A lesson that fails does not keep the next one
from running, but the exit code says so.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import papermill
import tyro

from course_lib import paths
from course_lib.course import build, report
from course_lib.lesson import PROFILES

# Seconds that one cell may take: they end what hangs, on a busy machine too. The real benchmark may train for days.
TIMEOUT = {"smoke": 900, "mini": 1800, "paper": None}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def execute(
    notebook: Path,
    output: Path,
    profile: str,
    environment: dict[str, str] | None = None,
    progress: bool = False,
    parameters: dict[str, int | str] | None = None,
) -> float:
    """Seconds that one notebook took from top to bottom in a fresh kernel, in the notebook's place notebooks/.

    Args:
        notebook: what is executed.
        output: where the executed notebook goes; it is written after each cell, on a failure too.
        profile: "smoke", "mini" or "paper".
        environment: variables that the kernel gets on top of this process's own.
        progress: show a bar.
        parameters: of the notebook, beside its profile, such as {"SEED": 1}.
    Raises:
        papermill.PapermillExecutionError: at the first cell that raises.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    bar = {"desc": notebook.stem, "bar_format": "{desc:32.32} {bar:20} {n_fmt:>3}/{total_fmt} cells  {elapsed}"}
    threads = {name: os.environ.get(name, "1") for name in THREADS}
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
            progress_bar=bar if progress else False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # notes on TCP and shutdown help nobody
        )
    return time.perf_counter() - started


def run(notebooks: list[Path], output: Path, profile: str, strict: bool) -> list[str]:
    """Execute notebooks with a progress bar each; returns the names of those that failed.

    A failure is written to the results in place of figures, so that no older figures stand for it in the report.
    """
    failed = []
    for notebook in notebooks:
        number = notebook.stem[:2]
        result = paths.results() / f"{number}.json"
        result.unlink(missing_ok=True)
        entry = {"lesson": number, "profile": profile}
        try:
            wall = execute(
                notebook, output / notebook.name, profile, {"COURSE_STRICT": str(int(strict))}, progress=True
            )
        except Exception as error:
            failed.append(notebook.stem)
            reason = ANSI_COLOURS.sub("", str(error)).strip().splitlines() or [type(error).__name__]
            entry["failed"] = reason[-1]
            print(f"{notebook.stem} failed: {reason[-1]}  (see {output / notebook.name})", file=sys.stderr)
        else:
            if result.is_file():
                entry = json.loads(result.read_text("utf-8"))
            else:
                entry["failed"] = "ran, but did not end with lesson.finish()"
            entry["wall_seconds"] = round(wall, 1)
        paths.write_text(result, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    return failed


def main(
    lessons: tyro.conf.Positional[tuple[str, ...]] = (),
    profile: Literal[PROFILES] = "mini",
    student: bool = False,
    into: str = "",
) -> int:
    """Execute the solved notebooks, and write build/report.html.

    Args:
        lessons: numbers of lessons, such as 01; all if none is given.
        profile: how much to compute.
        student: execute the student notebooks as they are, into build/student; makes no report.
        into: a folder for executed notebooks and results in place of build/run and build/results; makes no report.
    """
    root = build.course_root()
    output = Path(into).absolute() if into else root / "build" / ("student" if student else "run")
    if student or into:
        os.environ["COURSE_RESULTS"] = str(output / "results")
    if student:
        notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    else:
        notebooks = build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    chosen = build.choose(notebooks, lessons) if lessons else notebooks
    failed = run(chosen, output, profile, strict=not student)
    if not (student or into):
        print(f"Report: {report.write(paths.results(), output, root / 'build' / 'report.html', profile)}")
    ending = f"; failed: {', '.join(failed)}." if failed else "."
    print(f"{len(chosen) - len(failed)} of {len(chosen)} lessons ran{ending}")
    return int(bool(failed))
