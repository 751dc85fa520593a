"""Studies: what no lesson has time for, with several random seeds of training and of data; tables in data/evidence.

    python -m course_lib evidence methods       CAM, SEAM, SEAM+P2P, EPS, EPS+P2P, in both miniatures
    python -m course_lib evidence ablations     rows of Tables 5, 6 and 7 of Du et al., CVPR 2022
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
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from course_lib import lesson, paths
from course_lib.backbones.weights import LITE0
from course_lib.data.files import BrokenFile, read_json
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import IGNORE, Voc
from course_lib.evidence import over_seeds, t_interval, values
from course_lib.published import CONTRAST_TABLES
from course_lib.worlds import chimeras, minis
from course_lib.wsss import seeds
from course_lib.wsss.cam_net import CamNet, build
from course_lib.wsss.contrast import ContrastConfig, pseudo_labels, true_labels
from course_lib.wsss.learner import TagLearner, fit, train, training_images
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import OWN_PIXELS, SMALL_RECIPES, TagTraining, recipe, rows
from course_lib.wsss.views import resize

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
# Settings on chimeras: a batch of 8 as published. A prototype is made of 1/64 of the cells of a batch, as on VOC (32 of
# 2,048 there); the second view has 4 x 4 cells an image here. CAM is trained once for each random seed, and all other
# rows go on from its network for a third of its steps; contrast waits for a quarter of them, until PCM has learned.
# No setting was chosen by a mask: CAM is trained as long as the average precision of tags on val asks for.
CHIMERA_START: dict[str, Any] = {"size": 64, "small": 32, "batch_size": 8, "epochs": 6, "kept": True}
CHIMERA_TRAINING = CHIMERA_START | {
    "epochs": 2,
    "learning_rate": 1e-3,
    "new_learning_rate": 1e-3,
    "contrast_from": 0.25,
}
CHIMERA_CONTRAST = replace(OWN_PIXELS, top_k=CHIMERA_TRAINING["batch_size"] * 4 * 4 // 64)
CHIMERA_SEEDS = (0, 1, 2)  # of the training; the data are those of seed 0
CHIMERA_ROWS = {  # method and labels of contrast
    "seam": ("seam", "pseudo"),
    "seam+p2p": ("seam+p2p", "pseudo"),
    "oracle": ("seam+p2p", "true"),
    "shuffled": ("seam+p2p", "shuffled"),
}
STUDY_PREDICTIONS = {
    "chimeras": (
        "The gain of contrast over SEAM (mIoU of seeds on val) is largest at the level where CAM finds least of the "
        "bodies while more than half of the cells of bodies still have the right pseudo label. We expect that level to "
        "be 'partly': at 'kind' many bodies are given to a class that shares the body or the head, and at 'fully' CAM "
        "finds bodies by itself, so that little is left to gain. CAM's recall of bodies rises from 'kind' to 'fully'. "
        "With true labels contrast gains at least 3 points on val at every level, and with shuffled labels nothing."
    )
}
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


def levels() -> list[tuple[str, Case]]:
    """CAM, then SEAM and contrast on it with pseudo, true and shuffled labels, at every level of chimeras."""
    cases = []
    for seed in CHIMERA_SEEDS:
        for world in chimeras.CHIMERA_LEVELS:
            start = recipe("cam", "small", seed=seed, contrast=CHIMERA_CONTRAST, **CHIMERA_START)
            cases.append(("cam", Case(world, 0, start)))
            for row, (method, labels) in CHIMERA_ROWS.items():
                contrast = replace(CHIMERA_CONTRAST, labels=labels)
                config = recipe(method, "small", seed=seed, **CHIMERA_TRAINING | {"contrast": contrast})
                cases.append((row, Case(world, 0, config, start)))
    return cases


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
        start = _start(replace(case.start or config, data=config.data))
        net, history = start if case.start is None else continued(start[0], config, images)
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


def continued(start: CamNet, config: TagTraining, images: Dataset) -> tuple[CamNet, list[dict[str, float]]]:
    """A network that goes on from the trunk, neck and classifier of a CAM, in evaluation mode, and its mean loss terms.

    What is new, the background's row of the classifier among it, starts from the random seed of the configuration.
    """
    torch.manual_seed(config.seed)
    net = build(config.architecture(start.architecture.classes), config.weights)
    net.trunk.load_state_dict(start.trunk.state_dict())
    net.neck.load_state_dict(start.neck.state_dict())
    with torch.no_grad():
        net.classifier.weight[1:] = start.classifier.weight
    history = fit(TagLearner(net, config), images, progress=False)
    return net.eval(), history


@torch.inference_mode()
def part_figures(net: CamNet, data: Voc, config: TagTraining, threshold: float) -> dict[str, float]:
    """What becomes of the parts of chimeras, of whole batches of a split, in percent to three digits.

        head, body                      pixels of a part that the seeds give to its class
        mixed head, body, neither       pixels of objects beside a class with the same head, the same body, or neither,
                                        that the seeds give to that class
        label head, label body          cells of the small grid, mostly of a part, whose pseudo label is right
        prototypes                      of the cells that prototypes of classes are made of, those of the class
        tags                            average precision of the tags, mean over classes

    Args:
        threshold: of the seeds.
    """
    right, counted = Counter(), Counter()

    def count(name: str, of: torch.Tensor, hit: torch.Tensor) -> None:
        counted[name] += int(of.sum())
        right[name] += int((of & hit).sum())

    logits, each = [], config.batch_size
    loader = DataLoader(seeds.Scored(data), each, drop_last=True)
    for indices, images, tags, masks, _ in loader:
        parts = torch.stack([chimeras.part_mask(data, int(i)) for i in indices])
        found = seeds.hard_seeds(next(iter(seeds.score_maps(net, images, tags).values())), threshold)
        labels, there = masks.long() - 1, (masks > 0) & (masks != IGNORE)
        several = there & (tags.sum(1) == 2)[:, None, None]
        sums = (tags * torch.arange(tags.shape[1])).sum(1).long()  # of two tags
        others = sums[:, None, None] - labels  # the other class of the image, where it has two
        for kind, same in chimeras.shared_part(labels, others).items():
            count(f"mixed {kind}", several & same, found == others + 1)
        for part, number in chimeras.CHIMERA_PARTS.items():
            count(part, there & (parts == number), found == labels + 1)

        view = net(net.prepare(images))
        logits.append(view.cam.mean((2, 3))[:, 1:])
        size = (-(-config.small // net.trunk.stride),) * 2
        cells, confidence = pseudo_labels(resize(view.refined, size), tags, config.contrast)
        truth, known = true_labels(masks, len(data.classes), size)
        mostly, _ = true_labels(parts, 1 + len(chimeras.CHIMERA_PARTS), size)
        for part, number in chimeras.CHIMERA_PARTS.items():
            count(f"label {part}", known & (truth > 0) & (mostly == number), cells == truth)
        confidence = confidence.movedim(1, 0)[1:].flatten(1)  # c m
        best = confidence.topk(config.contrast.top_k, 1)
        classes = torch.arange(1, len(data.classes))[:, None]
        taken = (best.values > -torch.inf) & known.flatten()[best.indices]
        count("prototypes", taken, truth.flatten()[best.indices] == classes)
    tagged = data.tags[: each * len(loader)]
    share = {name: right[name] / of for name, of in counted.items() if of}
    share["tags"] = float(average_precision_score(tagged[:, tagged.any(0)], torch.cat(logits)[:, tagged.any(0)]))
    return {name: round(100 * value, 3) for name, value in share.items()}


def write(name: str, folder: Path) -> dict[str, Any]:
    """Run a study, one process per core, and write its table into the folder."""
    runs = paths.checkout() / "build" / "evidence" / f"wsss-{tree()}"
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    table = measure(STUDIES[name](), runs, here)
    if name in STUDY_PREDICTIONS:
        table = {"prediction": STUDY_PREDICTIONS[name]} | table | {"differences": paired_differences(table)}
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
