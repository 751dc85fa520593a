"""Ablations of pixel-to-prototype contrast, with several training seeds: one training and one evaluation for each row and seed.

    python -m course_lib ablate --table 5 --folder runs/table5                  mini-voc
    python -m course_lib ablate --table 6 --backbone resnet38 --weights ... --data /data/VOCdevkit/VOC2012 --folder ...

Du et al., CVPR 2022. Table 5 adds one part after another, Table 6 varies the number K of pixels that a prototype is made of,
Table 7 flips, turns or shifts the second view (`views`); all score seeds before any refinement. All rows of a seed start from
the same weights and see the same batches. What was interrupted goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from course_lib import engine, paths
from course_lib.worlds import minis
from course_lib.wsss.learner import METHOD_RECIPES, SMALL_RECIPES, Training, add_options, from_options, train
from course_lib.wsss.seeds import Evaluation, evaluate
from course_lib.wsss.views import Transformation

# mIoU of seeds, %: on train, and on val where it is given.
PAPER = {
    5: {
        "CAM": (47.43,),
        "SEAM": (55.41, 52.54),
        "+ cross-prototype": (59.08, 55.75),
        "+ cross-CAM": (60.35, 57.33),
        "+ intra-view": (59.80, 56.97),
        "+ prototype mining": (60.91, 58.20),
        "+ pixel sampling": (61.54, 58.41),
    },
    6: {
        "K = 0": (55.41,),
        "K = 4": (60.02,),
        "K = 8": (60.87,),
        "K = 16": (61.08,),
        "K = 32": (61.54,),
        "K = 64": (60.55,),
    },
    7: {
        "CAM": (47.43,),
        "rescale": (61.54,),
        "rescale + flip": (61.63,),
        "rescale + rotation": (58.57,),
        "rescale + translation": (59.31,),
    },
}
SPLITS = ("train", "val")


def rows(table: int, config: Training) -> dict[str, Training]:
    """What is trained for each row of Table 5, 6 or 7.

    Args:
        config: of contrast on SEAM with everything, the last row of Table 5.
    Raises:
        ValueError: a configuration without contrast on SEAM.
    """
    if config.method != "seam+p2p":
        raise ValueError(f"The tables are about contrast on SEAM, method seam+p2p, but {config.method} came.")
    small = config.backbone in SMALL_RECIPES
    cam, seam = (
        replace(config, method=method, **({} if small else METHOD_RECIPES[method])) for method in ("cam", "seam")
    )
    if table == 6:
        counts = {
            f"K = {count}": replace(config, contrast=replace(config.contrast, top_k=count))
            for count in (4, 8, 16, 32, 64)
        }
        return {"K = 0": seam} | counts
    if table == 7:
        added = {
            "rescale": Transformation(),
            "rescale + flip": Transformation(flip=True),
            "rescale + rotation": Transformation(rotation=20.0),
            "rescale + translation": Transformation(translation=16.0),
        }
        # Nothing is kept of transformed views; without it in any row, all draw the same images and mirror images.
        turned = {name: replace(config, kept=False, transformation=change) for name, change in added.items()}
        return {"CAM": replace(cam, kept=False)} | turned
    changes = {
        "+ cross-prototype": {"cross_cam": 0.0, "intra": 0.0},
        "+ cross-CAM": {"intra": 0.0},
        "+ intra-view": {"mine_prototypes": False, "mine_pixels": False},
        "+ prototype mining": {"mine_pixels": False},
        "+ pixel sampling": {},
    }
    added = {name: replace(config, contrast=replace(config.contrast, **change)) for name, change in changes.items()}
    return {"CAM": cam, "SEAM": seam} | added


def ablate(
    table: int, config: Training, seeds: Sequence[int], folder: Path, limit: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """mIoU of the seeds of every row and training seed; writes `table5.json` and `table5.md` (or 6, 7), returns the former.

    Args:
        limit: images that score, of each split; None: all.
    Raises:
        ValueError: the folder holds another ablation.
    """
    path = folder / f"table{table}.json"
    settings = json.loads(json.dumps({name: asdict(part) for name, part in rows(table, config).items()}))
    result: dict[str, Any] = {
        "table": table,
        "world": minis.fingerprint(Path(config.data)),
        "limit": limit,
        "settings": settings,
        "rows": {name: {} for name in settings},
    }
    if path.is_file():
        saved = json.loads(path.read_text("utf-8"))
        if {**saved, "rows": None} != {**result, "rows": None}:
            raise ValueError(f"{path} is of an ablation with other settings. Name another folder, or remove this one.")
        result = saved
    for seed in seeds:  # a whole table of the first seed comes first
        for name, part in rows(table, config).items():
            if str(seed) in result["rows"][name]:
                continue
            own = folder / name.strip("+ ").replace(" ", "").lower() / f"seed{seed}"
            train(replace(part, seed=seed), own, progress)
            evaluation = Evaluation(
                str(own / "model.safetensors"), part.data, SPLITS, limit=limit, workers=part.workers
            )
            found = evaluate(evaluation, own, progress=progress)["splits"]
            result["rows"][name][str(seed)] = {
                split: {reading: row["miou"] for reading, row in found[split].items()} for split in SPLITS
            }
            if engine.this_process().is_main_process:
                paths.write_text(path, json.dumps(result, indent=1) + "\n")
                paths.write_text(path.with_suffix(".md"), as_markdown(result))
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Mean and sample standard deviation over seeds, and each seed, in percent; the paper's figures beside them."""
    table, lines = result["table"], []
    for name, found in result["rows"].items():
        paper, cells = (*PAPER[table][name], "", "")[:2], [name]
        for split, figure in zip(SPLITS, paper):
            # The published way to read a method's maps comes first.
            scores = [next(iter(by_split[split].values())) for by_split in found.values()]
            spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
            each = f" ({', '.join(f'{score:.1f}' for score in scores)})" if len(scores) > 1 else ""
            cells += [f"{mean(scores):.1f}{spread}{each}" if scores else "", str(figure)]
        lines.append(f"| {' | '.join(cells)} |")
    head = ["row", *(column for split in SPLITS for column in (split, f"paper, {split}"))]
    return "\n".join(
        [
            f"# Table {table}, mIoU of seeds",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
            *lines,
            "",
            "Mean ± standard deviation over training seeds (each of them). Paper: VOC, ResNet38, median of three runs.",
            "",
        ]
    )


def main(argv: list[str]) -> int:
    """`python -m course_lib ablate`: rows of Table 5, 6 or 7 of pixel-to-prototype contrast; options as of `train wsss`."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib ablate", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    add_options(parser)
    parser.add_argument("--table", type=int, choices=sorted(PAPER), required=True)
    parser.add_argument(
        "--seeds",
        type=lambda text: tuple(map(int, text.split(","))),
        default=(0, 1, 2),
        help="of the trainings (default: 0,1,2); --seed is not asked",
    )
    parser.add_argument("--limit", type=int, default=None, help="images of each split that score (default: all)")
    chosen = vars(parser.parse_args(argv))
    table, seeds, limit, folder = (chosen.pop(name) for name in ("table", "seeds", "limit", "folder"))
    try:
        ablate(table, from_options(chosen), seeds, folder, limit)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if engine.this_process().is_main_process:
        print((folder / f"table{table}.md").read_text("utf-8"))
    return 0
