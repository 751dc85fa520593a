"""Execute the notebooks one after the other, each in a kernel of its own, and write the report.

Solved lessons are built anew and run strictly: results come from them. A lesson that fails does not keep the next one from
running, but the exit code says so.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import papermill

from course_lib import paths
from course_lib.course import build, report
from course_lib.lesson import PROFILES

# Seconds that one cell may take. The smoke profile has to be quick; the real benchmark may train for days.
TIMEOUT = {"smoke": 300, "mini": 1800, "paper": None}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


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
    started = time.perf_counter()
    before = dict(os.environ)
    os.environ.update({name: os.environ.get(name, "1") for name in THREADS})
    os.environ.update({"COURSE_PROFILE": profile, "COURSE_RESULTS": str(paths.results()), **(environment or {})})
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters={"PROFILE": profile, **(parameters or {})},
            kernel_name="python3",
            cwd=_folder(notebook),
            execution_timeout=TIMEOUT[profile],
            progress_bar={
                "desc": notebook.stem,
                "bar_format": "{desc:32.32} {bar:20} {n_fmt:>3}/{total_fmt} cells  {elapsed}",
            }
            if progress
            else False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )  # notes on TCP and shutdown help nobody
    finally:
        os.environ.clear()
        os.environ.update(before)
    return time.perf_counter() - started


def run(notebooks: list[Path], output: Path, profile: str, strict: bool) -> list[str]:
    """Execute notebooks with a progress bar each; returns the names of those that failed.

    A failure is written to the results in place of figures, so that no older figures stand for it in the report.
    """
    failed = []
    for notebook in notebooks:
        result = paths.results() / f"{notebook.stem.split('_')[0]}.json"
        result.unlink(missing_ok=True)
        try:
            wall = execute(
                notebook, output / notebook.name, profile, {"COURSE_STRICT": "1" if strict else "0"}, progress=True
            )
        except Exception as error:
            failed.append(notebook.stem)
            reason = COLOURS.sub("", str(error)).strip().splitlines() or [type(error).__name__]
            print(f"{notebook.stem} failed: {reason[-1]}  (see {output / notebook.name})", file=sys.stderr)
            entry = {"lesson": notebook.stem.split("_")[0], "profile": profile, "failed": reason[-1]}
        else:
            entry = (
                json.loads(result.read_text(encoding="utf-8"))
                if result.is_file()
                else {
                    "lesson": notebook.stem.split("_")[0],
                    "profile": profile,
                    "failed": "ran, but did not end with lesson.finish()",
                }
            )
            entry["wall_seconds"] = round(wall, 1)
        paths.write_text(result, json.dumps(entry, indent=1, ensure_ascii=False) + "\n")
    return failed


def main(argv: list[str]) -> int:
    """`python -m course_lib run [NN ...] [--profile mini] [--student]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib run", description="Execute the solved notebooks, and write build/report.html."
    )
    parser.add_argument("lessons", nargs="*", metavar="NN", help="numbers of lessons, such as 01; all if none is given")
    parser.add_argument("--profile", choices=PROFILES, default="mini", help="how much to compute (default: mini)")
    parser.add_argument(
        "--student",
        action="store_true",
        help="execute the student notebooks as they are, into build/student; makes no report",
    )
    arguments = parser.parse_args(argv)
    root = paths.checkout()
    if root is None:
        sys.exit("Notebooks are run in a checkout of the course, but course_lib is installed without one.")
    if arguments.student:
        notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        os.environ["COURSE_RESULTS"] = str(root / "build" / "student" / "results")
    else:
        notebooks = build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    numbers = {notebook.stem.split("_")[0] for notebook in notebooks}
    if unknown := set(arguments.lessons) - numbers:
        parser.error(f"there is no lesson {', '.join(sorted(unknown))}; there are: {', '.join(sorted(numbers))}")
    chosen = [path for path in notebooks if not arguments.lessons or path.stem.split("_")[0] in arguments.lessons]
    failed = run(
        chosen, root / "build" / ("student" if arguments.student else "run"), arguments.profile, not arguments.student
    )
    if not arguments.student:
        page = report.write(paths.results(), root / "build" / "run", root / "build" / "report.html", arguments.profile)
        print(f"Report: {page}")
    print(
        f"{len(chosen) - len(failed)} of {len(chosen)} lessons ran"
        + (f"; failed: {', '.join(failed)}." if failed else ".")
    )
    return 1 if failed else 0


def _folder(notebook: Path) -> Path:
    root = paths.checkout()
    return root / "notebooks" if root else notebook.parent
