"""Refinements: what a CRF, two random walks and a segmentation network make of seeds; a table in data/evidence.

    python -m course_lib evidence refinements       Tables 1 to 4 of Du et al., CVPR 2022, on photographs

A row for each method of seeds and each thing that is made of them, such as "seam+p2p: psa", with three random seeds:

    seeds       best threshold of the masks that score them, as the papers have it; and the method's own threshold
    crf         seeds at the method's threshold after a dense CRF, as published for pseudo masks
    psa, irn    pseudo masks after a random walk on the affinities of AffinityNet, or along the boundaries of IRNet
    deeplab     predictions of a segmentation network that was trained on the masks of psa
    "true masks: deeplab"      the same network, trained on the masks that people would draw

Settings of CRFs and walks are the published ones (a walk has fewer steps on a smaller grid), those of trainings the
recipes for a CPU. None was chosen by a mask
of these data. Everything is made by `wsss.pipeline`, whose stages are kept in build/evidence and not made again.
"""

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from course_lib import lesson, paths
from course_lib.backbones.dense import Maps, Timm
from course_lib.course.studies import finished, tree, write_table
from course_lib.data.voc import Voc
from course_lib.evidence import over_seeds, t_interval, values
from course_lib.worlds import minis
from course_lib.wsss.irn import IRNet
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.pipeline import PipelineConfig, run_pipeline

REFINED_SEEDS = (0, 1, 2)  # of the trainings; the data are those of seed 0
REFINED_WORLD = "photographs"
TRUE_MASKS = "true masks"  # in the place of a method
SCORES = {"seeds": "own threshold", "seeds, oracle threshold": "best threshold"}  # readings by the pipeline's names


def refined(method: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of a table: all that is made of the seeds of a method, or of the true masks, with one random seed.

    Args:
        folder: of finished rows, and of the stages of pipelines.
    """
    path = folder / f"{method.replace(' ', '-')}-{seed}.json"
    if found := finished(path):
        return found["rows"]
    data = minis.mini_voc(source=REFINED_WORLD)
    config = PipelineConfig(data=str(data), seed=seed)
    if method == TRUE_MASKS:
        wanted = {"deeplab": replace(config, refine="truth")}
    else:
        masks = replace(config, method=method, segment=False, masks_of=("train",))
        wanted = {
            "deeplab": replace(config, method=method, refine="psa"),
            "crf": replace(masks, refine="crf"),
            "irn": replace(masks, refine="irn"),
        }
    confounded, rows = Voc(data, "train").confounded, {}
    for name, pipeline in wanted.items():
        started = time.perf_counter()
        result = run_pipeline(pipeline, folder / "stages", progress=False)
        about = {"world": REFINED_WORLD, "data_seed": 0, "seed": seed, "fingerprint": result["world"]}
        about["seconds"] = round(time.perf_counter() - started, 1)
        made = {"seeds": {}, "deeplab": {}, "psa" if name == "deeplab" else name: {}}
        for split, scores in result["scores"].items():
            for stage, score in scores.items():
                row = {"masks": "psa" if name == "deeplab" else name, "predict": "deeplab"}.get(stage, "seeds")
                made[row].setdefault(split, {})[SCORES.get(stage, "masks")] = _figures(score, confounded)
        for row, splits in made.items():
            if splits and f"{method}: {row}" not in rows:
                if row == "seeds":  # the best threshold comes first, as the papers have it
                    splits = {split: dict(sorted(scores.items())) for split, scores in splits.items()}
                rows[f"{method}: {row}"] = {"row": f"{method}: {row}"} | about | {"splits": splits}
    paths.write_text(path, json.dumps({"rows": [*rows.values()]}) + "\n")
    return [*rows.values()]


def write_refinements(shelf: Path, workers: int | None = None) -> dict[str, Any]:
    """Make all rows, one process per core, and write refinements.json into the folder."""
    folder = paths.checkout() / "build" / "evidence" / f"refinements-{tree()}"
    folder.mkdir(parents=True, exist_ok=True)
    minis.mini_voc(source=REFINED_WORLD)  # before processes ask for it side by side
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cases = [(method, seed) for seed in REFINED_SEEDS for method in (*TAG_METHODS, TRUE_MASKS)]
    with ProcessPoolExecutor(workers or here, initializer=_remember) as pool:
        runs = pool.map(partial(refined, folder=folder), *zip(*cases))
        found = dict(zip(cases, tqdm(runs, "pipelines", len(cases)), strict=True))
    table = refinement_table(
        [row for method in (*TAG_METHODS, TRUE_MASKS) for seed in REFINED_SEEDS for row in found[method, seed]]
    )
    write_table(table, shelf / "refinements.json")
    return table


def refinement_table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of these rows: settings, versions, and the differences of each row from the seeds that it is made of."""
    differences = {}
    for row in dict.fromkeys(run["row"] for run in runs):
        method, _, made = row.rpartition(": ")
        own = [run for run in runs if run["row"] == row]
        for split in own[0]["splits"] if made != "seeds" and method in TAG_METHODS else ():
            ours, theirs = (values({"runs": runs}, REFINED_WORLD, name, split) for name in (row, f"{method}: seeds"))
            interval = t_interval([a - b for a, b in zip(ours, theirs, strict=True)])
            differences.setdefault(row, {})[split] = [round(end, 3) for end in interval]
    return {
        "commit": lesson.commit(),
        "versions": lesson.versions(),
        "settings": asdict(PipelineConfig(refine="psa"))
        | {"thresholds": {m: TAG_METHODS[m].threshold for m in TAG_METHODS}},
        "differences": differences,
        "runs": runs,
    }


def refinement_summary(table: dict[str, Any]) -> Iterable[str]:
    """A line for each row: mIoU by split, with standard deviation over the random seeds."""
    for row in dict.fromkeys(run["row"] for run in table["runs"]):
        splits = next(run["splits"] for run in table["runs"] if run["row"] == row)
        found = (f"{split} {over_seeds(values(table, REFINED_WORLD, row, split))}" for split in splits)
        yield f"{row:24} {'   '.join(found)}"


def remembered(frozen: Callable[[Any, torch.Tensor], Maps]) -> Callable[[Any, torch.Tensor], Maps]:
    """A method `frozen` of networks that computes every image once in this process: pipelines look at the same ones.

    Images and weights that do not learn are told apart by their bytes. What is remembered stays in memory, about half
    a megabyte for an image.
    """
    known, weights = {}, weakref.WeakKeyDictionary()

    def from_memory(self, images):
        if self not in weights:
            still = [part for part in self.parameters() if not part.requires_grad]
            parts = b"".join(part.numpy(force=True).tobytes() for part in still)
            weights[self] = hashlib.sha256(parts).digest()
        keys = [(weights[self], hashlib.sha256(image.numpy(force=True).tobytes()).digest()) for image in images]
        missing = [number for number, key in enumerate(keys) if key not in known]
        if missing:
            maps = frozen(self, images[missing])
            known.update(
                (keys[number], {name: part[i].clone() for name, part in maps.items()})
                for i, number in enumerate(missing)
            )
        return {name: torch.stack([known[key][name] for key in keys]) for name in known[keys[0]]}

    return from_memory


def _remember():
    torch.set_num_threads(1)
    for network in (Timm, IRNet):
        network.frozen = remembered(network.frozen)


def _figures(score, confounded):
    """Figures of one score of the pipeline, in percent to three digits."""
    others = [share for name, share in score["iou"].items() if name != confounded and share is not None]
    found = {"miou": score["miou"], "miou_others": sum(others) / len(others)}
    if confounded and score["iou"].get(confounded) is not None:
        found["confounded"] = score["iou"][confounded]
    if "threshold" in score:
        found["threshold"] = score["threshold"]
    return {name: round(value, 3) for name, value in found.items()}
