"""Evidence: what a lesson measures with one seed, measured with several, and kept in git.

    python -m course_lib evidence 02            runs lesson 02 with seeds 0, 1, 2 and writes data/evidence/02.json
    python -m course_lib evidence seeds         what no lesson has time for: see `wsss.study`
    python -m course_lib evidence --check       holds the last `make run` against the committed tables

A seed changes the split of the photographs, the scenes and all random controls. Finished seeds are kept in build/evidence and
not run again for the same commit; processes run side by side, one per core.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from course_lib import paths
from course_lib.course import build, run
from course_lib.course import studies as study
from course_lib.lesson import commit, evidence, over_seeds

SEEDS = (0, 1, 2)
SLACK = 3.0  # standard deviations beyond the range of the seeds that a re-run may lie


def collect(notebook: Path, folder: Path, seeds: tuple[int, ...], workers: int) -> dict:
    """Run a solved lesson once for each seed, in the mini profile, and put its numbers side by side.

    Args:
        notebook: the solved lesson.
        folder: where finished seeds are kept; the name of each says which commit it belongs to.
    Raises:
        papermill.PapermillExecutionError: a lesson that fails with one of the seeds; finished seeds stay.
    """
    number = notebook.stem.split("_")[0]
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(partial(_one, notebook, folder / f"{number}-{commit() or 'no-commit'}"), seeds))
    names = [figure["name"] for figure in results[0]["figures"] if isinstance(figure["value"], int | float)]
    by_name = [{figure["name"]: figure for figure in result["figures"]} for result in results]
    return {
        "lesson": number,
        "profile": results[0]["profile"],
        "seeds": list(seeds),
        "commit": commit(),
        "versions": results[0]["versions"],
        "fingerprints": [result["fingerprint"] for result in results],
        "figures": {
            name: {"unit": by_name[0][name]["unit"], "values": [figures[name]["value"] for figures in by_name]}
            for name in names
        },
    }


def contradictions(result: dict, table: dict) -> list[str]:
    """Figures of a lesson's result that lie further outside the range of the seeds than 3 standard deviations."""
    found = []
    for figure in result.get("figures", []):
        values = table["figures"].get(figure["name"], {}).get("values")
        if values and isinstance(figure["value"], int | float):
            slack = SLACK * (statistics.stdev(values) if len(values) > 1 else 0) + 1e-6 + 1e-3 * abs(values[0])
            if not min(values) - slack <= figure["value"] <= max(values) + slack:
                found.append(
                    f"{result['lesson']}, {figure['name']}: {figure['value']:.4g}, but {over_seeds(values)} in the evidence"
                )
    return found


def main(argv: list[str]) -> int:
    """`python -m course_lib evidence [NN ...] [--seeds 0 1 2] [--check]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib evidence",
        description="Measure lessons with several seeds, and write data/evidence/NN.json.",
    )
    parser.add_argument(
        "lessons",
        nargs="*",
        metavar="NN",
        help=f"numbers of lessons, {' or '.join(study.STUDIES)} (default: all that have a table)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--check", action="store_true", help="run nothing; hold build/results against the committed tables"
    )
    arguments = parser.parse_args(argv)
    root = paths.checkout()
    if root is None:
        sys.exit("Evidence is collected in a checkout of the course, but course_lib is installed without one.")
    shelf = root / "data" / "evidence"
    chosen = arguments.lessons or sorted(path.stem for path in shelf.glob("*.json"))
    studies, chosen = (
        [name for name in chosen if name in study.STUDIES],
        [name for name in chosen if name not in study.STUDIES],
    )
    if arguments.check:
        results = [paths.results() / f"{number}.json" for number in chosen]
        found = [
            line
            for number, path in zip(chosen, results)
            for line in (
                contradictions(json.loads(path.read_text()), evidence(number))
                if path.is_file()
                else [f"{number}: no result in {path}; run `make run` first"]
            )
        ]
        print("\n".join(found) or f"The last run agrees with the evidence of lessons {', '.join(chosen)}.")
        return 1 if found else 0
    notebooks = {
        path.stem.split("_")[0]: path
        for path in build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    }
    if unknown := set(chosen) - set(notebooks):
        parser.error(f"there is no lesson {', '.join(sorted(unknown))}; there are: {', '.join(notebooks)}")
    for name in studies:  # lessons place their run in these tables
        print(*study.summary(study.write(name, shelf)), sep="\n")
    for number in chosen:
        table = collect(notebooks[number], root / "build" / "evidence", tuple(arguments.seeds), os.cpu_count() or 1)
        paths.write_text(shelf / f"{number}.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        for name, figure in table["figures"].items():
            print(f"{number}  {name:60} {over_seeds(figure['values'])} {figure['unit']}")
    return 0


def _one(notebook: Path, folder: Path, seed: int) -> dict:
    place = folder / f"seed{seed}"
    result = place / f"{notebook.stem.split('_')[0]}.json"
    if not result.is_file():
        run.execute(
            notebook,
            place / notebook.name,
            "mini",
            {"COURSE_STRICT": "1", "COURSE_RESULTS": str(place)},
            parameters={"SEED": seed},
        )
    return json.loads(result.read_text(encoding="utf-8"))
