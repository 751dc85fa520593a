"""Evidence: what a lesson measures with one seed, measured with several, and kept in git.

    python -m course_lib evidence 02            runs lesson 02 with seeds 0, 1, 2 and writes data/evidence/02.json
    python -m course_lib evidence methods       what no lesson has time for: see `studies`
    python -m course_lib evidence --check       holds the last `make run` against the committed tables

A random seed changes the split of the photographs, the scenes and all random controls. Finished runs are kept in
build/evidence and not done again for the same sources; processes run side by side, one per core.
"""

import json
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from course_lib import evidence, paths
from course_lib.course import build, kernels, refinements, report, studies
from course_lib.data.files import BrokenFile
from course_lib.lesson import commit
from course_lib.settings import DISTINCT, RandomSeed

SEEDS = (0, 1, 2)
STUDY_NAMES = (*studies.STUDIES, "refinements")
SLACK = 3.0  # standard deviations beyond the range of the seeds that a re-run may lie, and never less than
# what rounding on another processor may change: one image in a hundred crosses a threshold, or 1e-5 of anything.
FLIPS = {"%": 1.0, "points": 1.0}


def collect(notebook: Path, folder: Path, seeds: tuple[int, ...]) -> dict:
    """Run a solved lesson once for each random seed, in the mini profile, and put its numbers side by side.

    Args:
        notebook: the solved lesson.
        folder: where finished runs are kept; the name of each says which sources it belongs to.
    Raises:
        papermill.PapermillExecutionError: a lesson that fails with one of the random seeds; finished runs stay.
    """
    number = notebook.stem[:2]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(partial(_one, notebook, folder / f"{number}-{studies.tree()}"), seeds))
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


class Beside(NamedTuple):
    """A lesson's result beside its evidence."""

    compared: int = 0  # figures
    wrong: tuple[str, ...] = ()  # sentences: what is outside, missing, or keeps the two from being compared
    new: int = 0  # figures that the evidence does not have


def beside_evidence(result: dict, table: dict) -> Beside:
    """Figures of a lesson's result against the range of the random seeds, 3 standard deviations beyond it allowed.

    In percent and points they may lie one outside in any case: on another processor an image in a hundred falls on the
    other side of a threshold. A result of another profile, random seed or data set cannot be compared.
    """
    measured = dict(zip(table["seeds"], table["fingerprints"]))
    seed = result.get("seed")
    for known, ours, theirs in (
        ("state", result.get("failed", "ran through"), "ran through"),
        ("profile", result["profile"], table["profile"]),
        ("random seed", seed, seed if seed in measured else f"one of {', '.join(map(str, measured))}"),
        ("data", result.get("fingerprint"), measured.get(seed)),
    ):
        if ours != theirs:
            return Beside(wrong=(f"not comparable: expected the {known} {theirs}, got {ours}",))
    found = {figure["name"]: figure["value"] for figure in result["figures"]}
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    wrong = []
    for name, figure in table["figures"].items():
        values, value = figure["values"], numbers.get(name)
        spread = SLACK * (statistics.stdev(values) if len(values) > 1 else 0)
        slack = max(spread, FLIPS.get(figure["unit"], 0)) + 1e-5 + 1e-3 * abs(values[0])
        if value is None:
            wrong.append(f"{name}: missing, but {evidence.over_seeds(values)} in the evidence")
        elif not min(values) - slack <= value <= max(values) + slack:
            wrong.append(f"{name}: {value:.4g}, but {evidence.over_seeds(values)} in the evidence")
    return Beside(len({*table["figures"]} & {*numbers}), tuple(wrong), len({*numbers} - {*table["figures"]}))


def check_run(lessons: Sequence[str], results: Path) -> bool:
    """Print what was compared, and whether it agrees: a table first, then a sentence for each that is wrong."""
    print(f"{'lesson':8}{'figures compared':>18}{'wrong':>8}{'new':>6}")
    wrong, compared = [], 0
    for number in lessons:
        try:
            found = beside_evidence(report.read_result(results / f"{number}.json"), evidence.table(number))
        except (FileNotFoundError, BrokenFile) as error:
            found = Beside(wrong=(str(error).removesuffix("."),))
        print(f"{number:8}{found.compared:>18}{len(found.wrong):>8}{found.new:>6}")
        wrong += [f"{number}, {sentence}." for sentence in found.wrong]
        compared += found.compared
    print(*wrong, sep="\n")
    if not compared:
        print(f"Nothing was compared: there is no result in {results} beside the evidence. Run `make run` first.")
    elif not wrong:
        print(f"The last run agrees with the evidence of lessons {', '.join(lessons)}: {compared} figures.")
    return bool(compared and not wrong)


def main(
    tables: tyro.conf.Positional[tuple[str, ...]] = (),
    seeds: Annotated[tuple[RandomSeed, ...], DISTINCT] = SEEDS,
    check_only: Annotated[bool, tyro.conf.arg(name="check")] = False,
) -> int:
    """Measure lessons with several random seeds, and write data/evidence/NN.json.

    Args:
        tables: numbers of lessons, or studies: methods, ablations, contrast, chimeras, refinements; none: all that are
            there.
        seeds: random seeds of the lessons.
        check_only: run nothing; hold build/results against the committed tables.
    """
    root = build.course_root()
    shelf = root / "data" / "evidence"
    there = sorted(path.stem for path in shelf.glob("*.json"))
    lessons = [name for name in tables or there if name not in STUDY_NAMES]
    if check_only:
        if strange := {*tables} - {*there} | {*tables} & {*STUDY_NAMES}:
            known = ", ".join(name for name in there if name not in STUDY_NAMES)
            raise ValueError(f"Expected lessons that have evidence, {known}, got {', '.join(sorted(strange))}.")
        return int(not check_run(lessons, paths.results()))
    solved = build.build_solved(root / "notebooks" / "src", root / "build" / "solved")
    notebooks = build.choose(solved, lessons)
    for name in tables or there:
        if name in studies.STUDIES:  # lessons place their run in these tables
            print(*studies.summary(studies.write(name, shelf)), sep="\n")
        if name == "refinements":
            print(*refinements.refinement_summary(refinements.write_refinements(shelf)), sep="\n")
    for notebook in notebooks:
        table = collect(notebook, root / "build" / "evidence", seeds)
        paths.write_text(shelf / f"{table['lesson']}.json", json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        for name, figure in table["figures"].items():
            print(f"{table['lesson']}  {name:60} {evidence.over_seeds(figure['values'])} {figure['unit']}")
    return 0


def _one(notebook: Path, folder: Path, seed: int) -> dict:
    place = folder / f"seed{seed}"
    result = place / f"{notebook.stem[:2]}.json"
    if not (found := studies.finished(result)):
        environment = {"COURSE_STRICT": "1", "COURSE_RESULTS": str(place)}
        kernels.execute(notebook, place / notebook.name, "mini", environment, parameters={"SEED": seed})
        found = report.read_result(result)
    return found
