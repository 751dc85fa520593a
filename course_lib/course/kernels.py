"""Execute one notebook in a kernel of its own: what each process of `run` does, which loads no more than it needs.

Torch is the kernel's affair: a process that only waits for one would take seconds and memory to load it.
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import papermill
from tqdm import tqdm

from course_lib import paths
from course_lib.course import limits

# Seconds that one cell may take: they end what hangs, on a busy machine too. The real benchmark may train for days.
TIMEOUT = {"smoke": 900, "mini": 1800, "paper": None}
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
            cwd=paths.HERE.parent / "notebooks",
            execution_timeout=TIMEOUT[profile],
            progress_bar=False if progress is None else bar,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # notes on TCP and shutdown help nobody
        )
    return time.perf_counter() - started


def share_screen(screen: Any, free: Any) -> None:
    """A process that executes notebooks takes a row of the screen for its bars."""
    global _row
    tqdm.set_lock(screen)
    _row = free.get()


def execute_and_keep(notebook: Path, output: Path, profile: str, strict: bool, commit: str | None) -> tuple[str, float]:
    """Execute one notebook and keep its result: why it failed ("" if it did not), and its seconds.

    Args:
        output: folder of the executed notebook.
        strict: a wrong or missing answer ends it.
        commit: of the sources; it stands in the result of a notebook that fails.
    """
    number, started, reason = notebook.stem[:2], time.perf_counter(), ""
    result = paths.results() / f"{number}.json"
    result.unlink(missing_ok=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    entry = {"lesson": number, "profile": profile, "commit": commit, "run": os.environ.get("COURSE_RUN"), "time": now}
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
