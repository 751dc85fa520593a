"""Evidence of seeds: all methods in both miniatures, and the ablation tables, each with several training and data seeds.

    python -m course_lib evidence seeds         CAM, SEAM, SEAM+P2P, EPS, EPS+P2P: writes data/evidence/seeds.json
    python -m course_lib evidence ablations     rows of Tables 5, 6 and 7 of Du et al., CVPR 2022: data/evidence/ablations.json
    python -m course_lib evidence contrast      what the gain of contrast depends on: data/evidence/contrast.json

A training seed changes weights, batches and dropout; a data seed changes scenes, and with photographs also which of them are
for training and which for validation. All methods of one seed start from the same weights and see the same batches, so what is
compared are differences of a seed with itself: their mean, with the interval of Student's t over the seeds, both sides, 95 %.

Finished trainings are kept in build/evidence and not done again for the same commit.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch.utils.data import Dataset
from tqdm import tqdm

from course_lib import lesson, paths
from course_lib.data.voc import Voc
from course_lib.experiments import wsss as ablate
from course_lib.worlds import minis
from course_lib.wsss import seeds
from course_lib.wsss.cam_net import LITE0, METHODS
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.learner import SMALL_RECIPES, Training, recipe, train, training_images

BACKBONES = {"photographs": LITE0, "creatures": "small"}
# (data seed, training seed) of each world
SEEDS = {
    "photographs": tuple((0, seed) for seed in range(4)),
    "creatures": tuple((data, seed) for data in (0, 1) for seed in range(3)),
}
ABLATED = "creatures"  # the world of the tables
ABLATION_SEEDS = (0, 1, 2)
# What is changed for photographs, one thing at a time, to see what the gain of contrast depends on: Training and its contrast.
CHANGES: dict[str, dict[str, Any]] = {
    "views of 192 and 128 pixels": {"size": 192, "scored_at": 192},
    "half as long": {"epochs": SMALL_RECIPES[LITE0]["epochs"] // 2},
    "contrast as released": {"contrast": ContrastConfig.code()},
    "contrast as in the paper": {"contrast": ContrastConfig.paper()},
}
SPLITS = ("train", "val")
FIGURES = ("miou", "miou_others", "precision", "recall", "threshold", "track")


class Case(NamedTuple):
    """One training and its evaluation."""

    world: str  # "photographs" or "creatures"
    data_seed: int
    config: Training  # its data is set where it is run

    @property
    def file(self) -> str:
        """A name of its own; two studies that ask for the same have the same."""
        config = self.config
        digest = hashlib.sha256(repr(config).encode()).hexdigest()[:12]
        return f"{self.world}-{self.data_seed}-{config.method}-{config.seed}-{digest}.json"


def methods() -> list[tuple[str, Case]]:
    """Every method with every seed, in both worlds."""
    return [
        (method, Case(world, data_seed, recipe(method, BACKBONES[world], data="", seed=seed)))
        for world, pairs in SEEDS.items()
        for data_seed, seed in pairs
        for method in METHODS
    ]


def ablations() -> list[tuple[str, Case]]:
    """Every row of every table with every seed."""
    return [
        (f"{table}: {row}", Case(ABLATED, 0, replace(changed, seed=seed)))
        for table in ablate.PAPER
        for seed in ABLATION_SEEDS
        for row, changed in ablate.rows(table, recipe("seam+p2p", BACKBONES[ABLATED], data="")).items()
    ]


def changes() -> list[tuple[str, Case]]:
    """SEAM and contrast on it under every change that concerns them, on photographs; unchanged they are among `methods`."""
    asked = [
        (name, method, change)
        for name, change in CHANGES.items()
        for method in (("seam+p2p",) if "contrast" in change else ("seam", "seam+p2p"))
    ]
    return [
        (f"{name}: {method}", Case("photographs", 0, recipe(method, LITE0, data="", seed=seed, **change)))
        for name, method, change in asked
        for seed in ABLATION_SEEDS
    ]


STUDIES = {"seeds": methods, "ablations": ablations, "contrast": changes}


def collect(rows: Sequence[tuple[str, Case]], folder: Path, workers: int) -> dict[str, Any]:
    """A table of the runs of all rows, with their settings; what the folder holds already is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = list(dict.fromkeys(case for _, case in rows))
    for world, data_seed in dict.fromkeys((case.world, case.data_seed) for case in cases):
        minis.mini_voc(source=world, seed=data_seed)  # before processes ask for it side by side
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(
            zip(cases, tqdm(pool.map(partial(_measured, folder=folder), cases), "trainings", len(cases)), strict=True)
        )
    settings = {f"{case.world}, {row}": asdict(replace(case.config, seed=0)) for row, case in rows}
    return {
        "commit": lesson.commit(),
        "versions": lesson.versions(),
        "settings": settings,
        "runs": [{"row": row} | found[case] for row, case in rows],
    }


def _measured(case: Case, folder: Path) -> dict[str, Any]:
    path = folder / case.file
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    data = minis.mini_voc(source=case.world, seed=case.data_seed)
    config = replace(case.config, data=str(data))
    images = _images(str(data), case.world, config.size, config.small) if config.kept else None
    net, history = train(config, images=images, progress=False)
    found = {
        "world": case.world,
        "data_seed": case.data_seed,
        "seed": config.seed,
        "fingerprint": minis.fingerprint(data),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "splits": {},
    }
    for split in SPLITS:
        own = Voc(data, split)
        found["splits"][split] = {
            reading: {name: round(row[name], 3) for name in FIGURES if name in row}
            | {"confounded": round(row["iou"][own.confounded], 3)}
            for reading, row in seeds.score(net, own).items()
        }
    paths.write_text(path, json.dumps(found) + "\n")
    return found


@lru_cache(maxsize=1)
def _images(data: str, world: str, size: int, small: int) -> Dataset:
    """What is kept of the images: the same for all methods and seeds."""
    return training_images(recipe("seam", BACKBONES[world], data=data, size=size, small=small), progress=False)


def write(name: str, folder: Path) -> dict[str, Any]:
    """Run a study, one process per core, and write its table into the folder."""
    runs = paths.checkout() / "build" / "evidence" / f"wsss-{lesson.commit() or 'no-commit'}"
    table = collect(STUDIES[name](), runs, os.cpu_count() or 1)
    lines = ",\n".join("  " + json.dumps(run) for run in table["runs"])  # a line for each run: a change can be read
    head = json.dumps({key: value for key, value in table.items() if key != "runs"}, indent=1)
    paths.write_text(folder / f"{name}.json", f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')
    return table


def table(name: str = "seeds") -> dict[str, Any] | None:
    """The committed table of a study; None if there is none."""
    return lesson.evidence(name)


def values(
    table: dict[str, Any], world: str, method: str, split: str, figure: str = "miou", reading: str | None = None
) -> list[float]:
    """A figure of all runs of a method (or row) in one world, in the order of their seeds, which is that of every method.

    Args:
        figure: "miou" of seeds, "miou_others" without the confounded class, "confounded" (IoU of that class), "precision",
            "recall", "track" (share of the track of that class that is taken for it), all in percent, or "threshold".
        reading: "with PCM" or "without PCM"; None: the published one of the method.
    """
    runs = [run["splits"][split] for run in table["runs"] if (run["world"], run["row"]) == (world, method)]
    return [run[reading or next(iter(run))][figure] for run in runs]


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t. One value has an interval without ends."""
    centre, count = mean(differences), len(differences)
    if count == 1:
        return centre, -float("inf"), float("inf")
    half = float(student.ppf(0.975, count - 1)) * stdev(differences) / count**0.5
    return centre, centre - half, centre + half


def ablation(number: int) -> dict[str, dict[str, Any]] | None:
    """Rows of Table 5, 6 or 7: mIoU of every seed on "train" and "val", and the "paper"'s; None if they were not measured."""
    found = table("ablations")
    if found is None:
        return None
    return {
        row: {split: values(found, ABLATED, f"{number}: {row}", split) for split in SPLITS}
        | {"paper": (*paper, None)[:2]}
        for row, paper in ablate.PAPER[number].items()
    }


def gains(split: str = "val", reading: str | None = None) -> dict[str, list[float]] | None:
    """Contrast on SEAM minus SEAM, mIoU on photographs, seed by seed, for the recipe and every change; None if not measured.

    Args:
        reading: of both, as in `values`.
    """
    plain, changed = table("seeds"), table("contrast")
    if plain is None or changed is None:
        return None
    found = {}
    for name, change in {"as in the recipe": {}, **CHANGES}.items():
        before, after = (
            (changed, f"{name}: {method}")
            if change and not ("contrast" in change and method == "seam")
            else (plain, method)
            for method in ("seam", "seam+p2p")
        )
        found[name] = [
            b - a
            for a, b in zip(
                values(before[0], "photographs", before[1], split, reading=reading),
                values(after[0], "photographs", after[1], split, reading=reading),
            )
        ]
    return found


def summary(table: dict[str, Any]) -> Iterable[str]:
    """A line for each row and world: means over the runs with their standard deviation, as published and without PCM."""
    for world, row in dict.fromkeys((run["world"], run["row"]) for run in table["runs"]):
        cells = [f"{split} {lesson.over_seeds(values(table, world, row, split))}" for split in SPLITS]
        plain = [f"{lesson.over_seeds(values(table, world, row, split, reading='without PCM'))}" for split in SPLITS]
        yield f"{world:12} {row:24} {'   '.join(cells)}   without PCM: {' / '.join(plain)}"
