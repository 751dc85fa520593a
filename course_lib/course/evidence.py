"""Evidence: what a lesson measures with one seed, measured with several, and kept in git.

    python -m course_lib evidence 02            runs lesson 02 with seeds 0, 1, 2 and writes data/evidence/02.json
    python -m course_lib evidence methods       what no lesson has time for: see `studies`
    python -m course_lib evidence --check       holds the last `make run` against the committed tables

A random seed changes the split of the photographs, the scenes and all random controls. Finished runs are kept in
build/evidence and not done again for the same commit; processes run side by side, one per core.
"""

import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tyro

from course_lib import evidence, paths
from course_lib.course import build, run, studies
from course_lib.lesson import commit

SEEDS = (0, 1, 2)
SLACK = 3.0  # standard deviations beyond the range of the seeds that a re-run may lie, and never less than
# what rounding on another processor may change: one image in a hundred crosses a threshold, or 1e-5 of anything.
FLIPS = {"%": 1.0, "points": 1.0}


def collect(notebook: Path, folder: Path, seeds: tuple[int, ...]) -> dict:
    """Run a solved lesson once for each random seed, in the mini profile, and put its numbers side by side.

    Args:
        notebook: the solved lesson.
        folder: where finished runs are kept; the name of each says which commit it belongs to.
    Raises:
        papermill.PapermillExecutionError: a lesson that fails with one of the random seeds; finished runs stay.
    """
    number = notebook.stem[:2]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(_one, notebook, folder / f"{number}-{commit() or 'no-commit'}"), seeds))
    by_name = [{figure["name"]: figure for figure in result["figures"]} for result in results]
    return {
        "lesson": number,
        "profile": results[0]["profile"],
        "seeds": list(seeds),
        "commit": commit(),
        "versions": results[0]["versions"],
        "fingerprints": [result["fingerprint"] for result in results],
        "figures": {
            name: {"unit": figure["unit"], "values": [figures[name]["value"] for figures in by_name]}
            for name, figure in by_name[0].items()
            if isinstance(figure["value"], int | float)
        },
    }


def contradictions(result: dict, table: dict) -> list[str]:
    """Figures of a lesson's result that lie further outside the range of the seeds than 3 standard deviations.

    In percent and points they may lie one outside in any case: on another processor an image in a hundred falls on the
    other side of a threshold.
    """
    found = []
    for figure in result.get("figures", []):
        values = table["figures"].get(figure["name"], {}).get("values")
        if values and isinstance(figure["value"], int | float):
            spread = SLACK * (statistics.stdev(values) if len(values) > 1 else 0)
            slack = max(spread, FLIPS.get(figure["unit"], 0)) + 1e-5 + 1e-3 * abs(values[0])
            if not min(values) - slack <= figure["value"] <= max(values) + slack:
                what = f"{result['lesson']}, {figure['name']}: {figure['value']:.4g}"
                found.append(f"{what}, but {evidence.over_seeds(values)} in the evidence")
    return found


def main(
    tables: tyro.conf.Positional[tuple[str, ...]] = (), seeds: tuple[int, ...] = SEEDS, check: bool = False
) -> int:
    """Measure lessons with several random seeds, and write data/evidence/NN.json.

    Args:
        tables: numbers of lessons, or studies: methods, ablations, contrast; all that are there if none is named.
        seeds: random seeds of the lessons.
        check: run nothing; hold build/results against the committed tables.
    """
    root = build.course_root()
    shelf = root / "data" / "evidence"
    tables = tables or sorted(path.stem for path in shelf.glob("*.json"))
    lessons = [name for name in tables if name not in studies.STUDIES]
    if check:
        found = []
        for number in lessons:
            path = paths.results() / f"{number}.json"
            if path.is_file():
                found += contradictions(json.loads(path.read_text("utf-8")), evidence.table(number))
            else:
                found.append(f"{number}: no result in {path}; run `make run` first")
        print("\n".join(found) or f"The last run agrees with the evidence of lessons {', '.join(lessons)}.")
        return int(bool(found))
    solved = build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    notebooks = build.choose(solved, lessons)
    for name in tables:
        if name in studies.STUDIES:  # lessons place their run in these tables
            print(*studies.summary(studies.write(name, shelf)), sep="\n")
    for notebook in notebooks:
        table = collect(notebook, root / "build" / "evidence", seeds)
        paths.write_text(shelf / f"{table['lesson']}.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        for name, figure in table["figures"].items():
            print(f"{table['lesson']}  {name:60} {evidence.over_seeds(figure['values'])} {figure['unit']}")
    return 0


def _one(notebook: Path, folder: Path, seed: int) -> dict:
    place = folder / f"seed{seed}"
    result = place / f"{notebook.stem[:2]}.json"
    if not result.is_file():
        environment = {"COURSE_STRICT": "1", "COURSE_RESULTS": str(place)}
        run.execute(notebook, place / notebook.name, "mini", environment, parameters={"SEED": seed})
    return json.loads(result.read_text("utf-8"))
