"""Studies: what no lesson has time for, with several random seeds of training and of data; tables in data/evidence.

    python -m course_lib evidence methods       CAM, SEAM, SEAM+P2P, EPS, EPS+P2P, in both miniatures
    python -m course_lib evidence ablations     rows of Tables 5, 6 and 7 of Du et al., CVPR 2022, on chimeras
    python -m course_lib evidence contrast      what the gain of contrast depends on
    python -m course_lib evidence chimeras      the same where parts are known, with true and shuffled labels

A training seed changes weights, batches and dropout; a data seed changes scenes, and with photographs also which of
them are for training and which for validation. All methods of one random seed start from the same weights and see the
same batches, so what is compared are differences of a run with its own partner (see `course_lib.evidence`).

Finished trainings are kept in build/evidence and not done again for the same sources. What STUDY_PREDICTIONS says of a
study was written, and committed with its table still empty, before the study ran; it stays as it was, right or wrong.
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
from course_lib.evidence import over_seeds, t_interval, values
from course_lib.worlds import chimeras, minis
from course_lib.worlds.chimera_figures import part_figures
from course_lib.wsss import seeds
from course_lib.wsss.cam_net import CamNet
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.learner import TagLearner, continued, fit, train, training_images
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import CHIMERA_CELLS, SMALL_RECIPES, TagTraining, chimera_recipes, recipe, rows

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
}
CHIMERA_SEEDS = (0, 1, 2)  # of the training; the data are those of seed 0
# Rows of the paper's Table 5 that are trained again, and values of K for Table 6. The paper's K of 16 and 32 are the
# same shares of its 2,048 cells as 1 and 2 are of 128 here.
ABLATED_ROWS = ("SEAM", "+ cross-CAM", "+ intra-view", "+ pixel sampling")
ABLATED_K = (1, 8, 32)  # and 0, which is SEAM, and 2, which is everything
STUDY_PREDICTIONS = {
    "chimeras": (
        "The gain of contrast over SEAM (mIoU of seeds on val) is largest at the level where CAM finds least of the "
        "bodies while more than half of the cells of bodies still have the right pseudo label. We expect that level to "
        "be 'partly': at 'kind' many bodies are given to a class that shares the body or the head, and at 'fully' CAM "
        "finds bodies by itself, so that little is left to gain. CAM's recall of bodies rises from 'kind' to 'fully'. "
        "With true labels contrast gains at least 3 points on val at every level, and with shuffled labels nothing."
    ),
    "ablations": (
        "Power: at the level 'kind' of the study chimeras, differences of a pair spread with a standard deviation of "
        "0.4 to 1.6 points on val. Three random seeds then show a difference of about 3 points; the steps of the "
        "paper's Table 5 after the first are 0.2 to 1.6. So we compare few rows that are far apart. We expect: the "
        "cross-view terms give more than half of the gain of everything over SEAM; without mining the intra-view term "
        "adds less than 1 point to them. K of 1/128, 1/64 and 1/16 of the cells are within 3 points of each other, and "
        "K of 1/4, which is every cell with the label of a class, gains less than half as much. A flip of the second "
        "view adds less than 3 points to SEAM, and contrast gains over SEAM with the same flip what it gains without: "
        "so it is not the flip."
    ),
}
# The row whose runs the others of a study are compared with.
REFERENCE_ROWS = {"chimeras": "seam", "ablations": "5: SEAM"}
FIGURES = ("miou", "miou_others", "precision", "recall", "threshold", "track")


class Case(NamedTuple):
    """One training and its evaluation."""

    world: str  # a source of `minis.mini_voc`: "photographs", "creatures" or a level of chimeras
    data_seed: int
    config: TagTraining  # its data is set where it is run
    start: TagTraining | None = None  # training of CAM whose trunk, neck and classifier this one goes on with

    @property
    def file(self) -> str:
        """A name of its own; two studies that ask for the same have the same."""
        settings = (self.config,) if self.start is None else (self.config, self.start)
        digest = hashlib.sha256("".join(map(repr, settings)).encode()).hexdigest()[:12]
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
    """Rows of Tables 5, 6 and 7 on chimeras, which go on from one CAM, and SEAM with a flip, the control of the last.

    Where they differ but little, three random seeds say nothing; so these are few. `recipes.rows` has all of them.
    """
    cases = []
    for seed in CHIMERA_SEEDS:
        known = chimera_recipes(seed)
        start, whole = known["cam"], known["seam+p2p"]
        five, seven = rows(5, whole), rows(7, whole)
        flipped = seven["rescale + flip"]
        going_on = {f"5: {row}": five[row] for row in ABLATED_ROWS}
        going_on |= {
            f"6: K = 1/{CHIMERA_CELLS // k}": replace(whole, contrast=replace(whole.contrast, top_k=k))
            for k in ABLATED_K
        }
        going_on |= {"7: SEAM + flip": replace(flipped, method="seam"), "7: rescale + flip": flipped}
        cases.append(("5: CAM", Case("chimeras-kind", 0, start)))
        cases += [(row, Case("chimeras-kind", 0, config, start)) for row, config in going_on.items()]
    return cases


def changes() -> list[tuple[str, Case]]:
    """SEAM and contrast on it under every change that concerns them, on photographs; unchanged they are `methods`."""
    return [
        (f"{name}: {method}", Case("photographs", 0, recipe(method, LITE0, seed=seed, **change)))
        for name, change in CHANGES.items()
        for method in ("seam", "seam+p2p")
        if "contrast" not in change or TAG_METHODS[method].contrast
        for seed in ABLATION_SEEDS
    ]


def levels() -> list[tuple[str, Case]]:
    """CAM, then SEAM and contrast on it with pseudo, true and shuffled labels, at every level of chimeras."""
    return [
        (row, Case(world, 0, config, None if row == "cam" else known["cam"]))
        for known in map(chimera_recipes, CHIMERA_SEEDS)
        for world in chimeras.CHIMERA_LEVELS
        for row, config in known.items()
    ]


STUDIES = {"methods": methods, "ablations": ablations, "contrast": changes, "chimeras": levels}


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
    chimeric = case.world in chimeras.CHIMERA_LEVELS
    images = _images(config.data, config.backbone, config.size, config.small, chimeric) if config.kept else None
    if chimeric:
        net, history = _start(replace(case.start or config, data=config.data))
        if case.start is not None:
            net = continued(net, config)
            images = training_images(config, progress=False) if images is None else images
            history = fit(TagLearner(net, config), images, progress=False)
            net.eval()
    else:
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
        scored = seeds.score(net, own)
        found["splits"][split] = {
            reading: {name: round(row[name], 3) for name in FIGURES if name in row}
            | ({"confounded": round(row["iou"][own.confounded], 3)} if own.confounded else {})
            for reading, row in scored.items()
        }
        if chimeric:
            reading, row = next(iter(scored.items()))
            found["splits"][split][reading] |= part_figures(net, own, config, row["threshold"])
    paths.write_text(path, json.dumps(found) + "\n")
    return found


@lru_cache(maxsize=1)
def _images(data: str, backbone: str, size: int, small: int, masks: bool = False) -> Dataset:
    """What is kept of the images: the same for all methods and random seeds."""
    like = recipe("seam+p2p", backbone, data=data, size=size, small=small, kept=True)
    true = replace(like.contrast, labels="true")  # these have masks, which only contrast with true labels asks for
    return training_images(replace(like, contrast=true) if masks else like, progress=False)


@lru_cache(maxsize=1)
def _start(config: TagTraining) -> tuple[CamNet, list[dict[str, float]]]:
    """CAM, trained once for all rows that go on from it."""
    return train(config, images=_images(config.data, config.backbone, config.size, config.small, True), progress=False)


def write(name: str, folder: Path) -> dict[str, Any]:
    """Run a study, one process per core, and write its table into the folder."""
    runs = paths.checkout() / "build" / "evidence" / f"wsss-{tree()}"
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    table = measure(STUDIES[name](), runs, here)
    if name in STUDY_PREDICTIONS:
        differences = paired_differences(table, REFERENCE_ROWS[name])
        table = {"prediction": STUDY_PREDICTIONS[name]} | table | {"differences": differences}
    write_table(table, folder / f"{name}.json")
    return table


def write_table(table: dict[str, Any], path: Path) -> None:
    """Write a table with a line for each run, so that a change can be read."""
    lines = ",\n".join("  " + json.dumps(run) for run in table["runs"])
    head = json.dumps({key: value for key, value in table.items() if key != "runs"}, indent=1)
    paths.write_text(path, f'{head[:-2]},\n "runs": [\n{lines}\n ]\n}}\n')


def paired_differences(table: dict[str, Any], against: str = "seam") -> dict[str, dict[str, dict[str, list[float]]]]:
    """mIoU of each row minus that of another one, by world, row and split: mean and 95 % interval over their pairs."""
    pairs = dict.fromkeys((run["world"], run["row"]) for run in table["runs"] if run["row"] != against)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for world, row in pairs:
        for split in ("train", "val"):
            ours, theirs = (values(table, world, name, split) for name in (row, against))
            interval = [round(end, 3) for end in t_interval([a - b for a, b in zip(ours, theirs)])]
            found.setdefault(world, {}).setdefault(row, {})[split] = interval
    return found


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
