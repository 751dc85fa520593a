"""Studies: what no lesson has time for, with several random seeds of training and of data; tables in data/evidence.

    python -m course_lib evidence methods       CAM, SEAM, SEAM+P2P, EPS, EPS+P2P, in both miniatures
    python -m course_lib evidence ablations     rows of Tables 5, 6 and 7 of Du et al., CVPR 2022
    python -m course_lib evidence contrast      what the gain of contrast depends on

A training seed changes weights, batches and dropout; a data seed changes scenes, and with photographs also which of
them are for training and which for validation. All methods of one random seed start from the same weights and see the
same batches, so what is compared are differences of a run with its own partner (see `course_lib.evidence`).

Finished trainings are kept in build/evidence and not done again for the same sources.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from course_lib import lesson, paths
from course_lib.backbones.weights import LITE0
from course_lib.data.files import BrokenFile, read_json
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import Voc
from course_lib.evidence import over_seeds, values
from course_lib.published import CONTRAST_TABLES
from course_lib.worlds import minis
from course_lib.wsss import seeds
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.learner import train, training_images
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import SMALL_RECIPES, TagTraining, recipe, rows

BACKBONES = {"photographs": LITE0, "creatures": "small"}
# (data seed, training seed) of each world.
RANDOM_SEEDS = {
    "photographs": tuple((0, seed) for seed in range(4)),
    "creatures": tuple((data, seed) for data in (0, 1) for seed in range(3)),
}
ABLATION_SEEDS = (0, 1, 2)
# What is changed for photographs, one thing at a time, to see what the gain of contrast depends on.
CHANGES: dict[str, dict[str, Any]] = {
    "views of 192 and 128 pixels": {"size": 192, "scored_at": 192},
    "half as long": {"epochs": SMALL_RECIPES[LITE0]["epochs"] // 2},
    "contrast as released": {"contrast": ContrastConfig.code()},
    "contrast as in the paper": {"contrast": ContrastConfig.paper()},
}
FIGURES = ("miou", "miou_others", "precision", "recall", "threshold", "track")


class Case(NamedTuple):
    """One training and its evaluation."""

    world: str  # "photographs" or "creatures"
    data_seed: int
    config: TagTraining  # its data is set where it is run

    @property
    def file(self) -> str:
        """A name of its own; two studies that ask for the same have the same."""
        digest = hashlib.sha256(repr(self.config).encode()).hexdigest()[:12]
        return f"{self.world}-{self.data_seed}-{self.config.method}-{self.config.seed}-{digest}.json"


def methods() -> list[tuple[str, Case]]:
    """Every method with every random seed, in both worlds."""
    return [
        (method, Case(world, data_seed, recipe(method, BACKBONES[world], seed=seed)))
        for world, pairs in RANDOM_SEEDS.items()
        for data_seed, seed in pairs
        for method in TAG_METHODS
    ]


def ablations() -> list[tuple[str, Case]]:
    """Every row of every table with every random seed, on creatures."""
    return [
        (f"{table}: {row}", Case("creatures", 0, replace(changed, seed=seed)))
        for table in CONTRAST_TABLES
        for seed in ABLATION_SEEDS
        for row, changed in rows(table, recipe("seam+p2p", "small")).items()
    ]


def changes() -> list[tuple[str, Case]]:
    """SEAM and contrast on it under every change that concerns them, on photographs; unchanged they are `methods`."""
    return [
        (f"{name}: {method}", Case("photographs", 0, recipe(method, LITE0, seed=seed, **change)))
        for name, change in CHANGES.items()
        for method in ("seam", "seam+p2p")
        if "contrast" not in change or TAG_METHODS[method].contrast
        for seed in ABLATION_SEEDS
    ]


STUDIES = {"methods": methods, "ablations": ablations, "contrast": changes}


def measure(cases: Sequence[tuple[str, Case]], folder: Path, workers: int) -> dict[str, Any]:
    """A table of the runs of all rows, with their settings; what the folder holds already is not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    unlike = list(dict.fromkeys(case for _, case in cases))
    for world, data_seed in dict.fromkeys(case[:2] for case in unlike):
        minis.mini_voc(source=world, seed=data_seed)  # before processes ask for it side by side
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = tqdm(pool.map(partial(_measured, folder=folder), unlike), "trainings", len(unlike))
        found = dict(zip(unlike, runs, strict=True))
    return {
        "commit": lesson.commit(),
        "versions": lesson.versions(),
        "settings": {f"{case.world}, {row}": asdict(replace(case.config, seed=0)) for row, case in cases},
        "runs": [{"row": row} | found[case] for row, case in cases],
    }


def _measured(case: Case, folder: Path) -> dict[str, Any]:
    path = folder / case.file
    if found := finished(path):
        return found
    data = minis.mini_voc(source=case.world, seed=case.data_seed)
    config = replace(case.config, data=str(data))
    images = _images(config.data, config.backbone, config.size, config.small) if config.kept else None
    net, history = train(config, images=images, progress=False)
    found = {
        "world": case.world,
        "data_seed": case.data_seed,
        "seed": config.seed,
        "fingerprint": fingerprint(data),
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "splits": {},
    }
    for split in ("train", "val"):
        own = Voc(data, split)
        found["splits"][split] = {
            reading: {name: round(row[name], 3) for name in FIGURES if name in row}
            | {"confounded": round(row["iou"][own.confounded], 3)}
            for reading, row in seeds.score(net, own).items()
        }
    paths.write_text(path, json.dumps(found) + "\n")
    return found


@lru_cache(maxsize=1)
def _images(data: str, backbone: str, size: int, small: int) -> Dataset:
    """What is kept of the images: the same for all methods and random seeds."""
    return training_images(recipe("seam", backbone, data=data, size=size, small=small), progress=False)


def write(name: str, folder: Path) -> dict[str, Any]:
    """Run a study, one process per core, and write its table into the folder."""
    runs = paths.checkout() / "build" / "evidence" / f"wsss-{tree()}"
    table = measure(STUDIES[name](), runs, os.cpu_count() or 1)
    lines = ",\n".join("  " + json.dumps(run) for run in table["runs"])  # a line for each run: a change can be read
    head = json.dumps({key: value for key, value in table.items() if key != "runs"}, indent=1)
    paths.write_text(folder / f"{name}.json", f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')
    return table


def tree() -> str:
    """A name of the checkout's sources as they are: the commit, and a digest of the library and the lessons."""
    root, digest = paths.checkout(), hashlib.sha256()
    for path in sorted([*root.glob("course_lib/**/*.py"), *root.glob("notebooks/src/*.py")]):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"{lesson.commit() or 'no-commit'}-{digest.hexdigest()[:8]}"


def finished(path: Path) -> dict[str, Any]:
    """What an earlier run left; nothing if it left nothing, or a damaged file, which is set aside with a sentence."""
    try:
        return read_json(path) if path.is_file() else {}
    except BrokenFile as error:
        path.rename(path.with_suffix(".damaged"))
        print(f"{error} It was renamed to .damaged, and is measured again.")
        return {}


def summary(table: dict[str, Any]) -> Iterable[str]:
    """A line for each row and world: means over the runs, with standard deviation, as published and without PCM."""
    for world, row in dict.fromkeys((run["world"], run["row"]) for run in table["runs"]):
        usual, plain = (
            [over_seeds(values(table, world, row, split, reading=reading)) for split in ("train", "val")]
            for reading in (None, "without PCM")
        )
        yield f"{world:12} {row:24} train {usual[0]}   val {usual[1]}   without PCM: {' / '.join(plain)}"
