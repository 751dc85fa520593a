"""Person re-identification: the protocol of Market-1501, and what each trick of the strong baseline brings.

    python -m course_lib train reid --backbone resnet50 --data /data/market1501 --folder runs/market
    python -m course_lib evaluate reid --checkpoint runs/market/model.safetensors --data /data/market1501
    python -m course_lib train reid --last-block --loss prototype-cosine --tricks none --classes 8 --epochs 20 --folder runs/dolls
    python -m course_lib train reid --ablation --folder runs/ablation           one training and one row for each trick

Luo et al., "Bag of Tricks", CVPR Workshops 2019, in `strong_baseline`; CMC, mAP and k-reciprocal re-ranking in
`evaluate.ranking`. Compared are f_i of length 1. Shen et al. give 94.5 and 85.9 for "center loss and reranking"; these are the
figures of Luo et al. for the center loss *before* re-ranking. Re-ranking looks at the other queries as well: it is a row of
its own. Its k1 is to be about the number of images of a person, of which queries and the query's own camera are a part: 22 on
Market-1501, where 20 is usual. The number is printed beside it.
"""

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from course_lib import engine, paths
from course_lib.data.market1501 import Market1501
from course_lib.evaluate.ranking import cmc_map, rerank
from course_lib.metric_learning.features import Images, extract
from course_lib.metric_learning.pedestrians import Occluded
from course_lib.metric_learning.strong_baseline import LOSSES, TRICKS, Baseline, Training, build, load, train
from course_lib.worlds import minis

# Luo et al., Market-1501, ResNet-50: rank-1 and mAP, %, when a trick is added to those above it.
PAPER = {
    "none": (87.7, 74.0),
    "warmup": (88.7, 75.2),
    "erasing": (91.3, 79.3),
    "smoothing": (91.4, 80.3),
    "stride": (92.0, 81.7),
    "bnneck": (94.1, 85.7),
    "center": (94.5, 85.9),
    "re-ranking": (95.4, 94.2),
}
RANKS = (1, 5, 10)
BEFORE = "before the neck"  # row of f_t, by cosine too


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on what, and how."""

    data: str  # a folder in Market-1501's layout
    checkpoint: str | None = None  # as `train` writes it; None: a network that has seen no pedestrian
    backbone: str = "tf_efficientnet_lite0"  # without a checkpoint
    flip: bool = False  # add the mirror image's features
    k1: int = 20  # re-ranking: size of a k-reciprocal neighbourhood
    k2: int = 6  # images whose neighbourhoods are averaged
    lam: float = 0.3  # share of the original distance
    batch_size: int = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: int = 0  # processes that read images


def embeddings(
    model: Baseline, data: Images, *, flip: bool = False, batch_size: int = 8, workers: int = 0, progress: bool = True
) -> Float[Tensor, "n k"]:
    """What is compared, of every image in order, on the CPU: f_i of length 1; with `flip` the mean with its mirror image's."""
    return _compared(_pooled(model, data, flip, batch_size, workers, progress), model.neck)


def _pooled(
    model: Baseline, data: Images, flip: bool, batch_size: int, workers: int, progress: bool
) -> Float[Tensor, "n views k"]:
    """f_t of each image, and of its mirror image."""

    def both(images: Tensor) -> Tensor:
        return torch.stack([model.pool(view) for view in ([images, images.flip(-1)] if flip else [images])], 1)

    device = model.eval().backbone.mean.device
    return extract(both, data, model.size, batch_size=batch_size, workers=workers, device=device, progress=progress)


@torch.inference_mode()
def _compared(pooled: Float[Tensor, "n views k"], neck: nn.Module) -> Float[Tensor, "n k"]:
    """Behind a neck, at length 1."""
    found = copy.deepcopy(neck).cpu()(pooled.flatten(0, 1)).view_as(pooled)
    return F.normalize(F.normalize(found, dim=2).sum(1), dim=1)


def scores(distances: Float[Tensor, "q g"], query: Market1501, gallery: Market1501) -> dict[str, float]:
    """Rank-1, -5, -10 and mAP of the protocol, in percent, from distances of any kind."""
    found = cmc_map(distances, query.identities, gallery.identities, query.cameras, gallery.cameras, max(RANKS))
    return {f"rank-{rank}": 100 * float(found.cmc[rank - 1]) for rank in RANKS} | {"mAP": 100 * found.map}


def evaluate(config: Evaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Ranks and mAP, with and without re-ranking; writes `reid.json` and `reid.md`, returns the former."""
    model = (
        load(config.checkpoint) if config.checkpoint else build(Training(config.data, config.backbone, tricks=()), 1)
    )
    rows = _rows(model, config, progress)
    weights = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest() if config.checkpoint else "pretrained"
    result = {
        "settings": vars(config) | _data(config.data) | {"checkpoint": weights},
        "versions": _versions(),
        "rows": rows,
        "paper": {"cosine": PAPER["center"], "re-ranked": PAPER["re-ranking"]},
    }
    name = (
        Path(config.checkpoint).parent.name
        if config.checkpoint
        else f"{config.backbone}, which has seen no pedestrian,"
    )
    return _written(result, folder / "reid", f"{name} on {Path(config.data).name}")


def ablation(config: Training, evaluation: Evaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Trains and evaluates with no trick, one, two, ...; writes `ablation.json` and `ablation.md`, returns the former.

    Each training has a folder of its own and goes on where it was interrupted. A trick that cannot take part has no row.
    """
    idle, rows, done = config.idle(), {}, ()
    for name in ("none", *config.tricks):
        if name in idle:
            continue
        done += () if name == "none" else (name,)
        train(replace(config, tricks=done), folder / name, progress)
        found = _rows(load(folder / name / "model.safetensors"), evaluation, progress)
        row = name if name == "none" else f"+ {name}"
        rows |= {row: found["cosine"]} | ({f"{row}, {BEFORE}": found[BEFORE]} if BEFORE in found else {})
    rows["+ re-ranking"] = found["re-ranked"]
    result = {
        "settings": vars(config) | _data(config.data),
        "versions": _versions(),
        "note": config.note(),
        "rows": rows,
        "paper": {row: PAPER[name] for row in rows if (name := row.removeprefix("+ ")) in PAPER},
    }
    return _written(result, folder / "ablation", f"{config.backbone} on {Path(config.data).name}, one trick a row")


def occlusion(
    model: Baseline,
    query: Market1501,
    gallery: Market1501,
    which: Sequence[Sequence[str]] = (("torso", "legs"), ("head", "bag")),
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Scores of queries with parts painted over, and of untouched ones ("nothing"); the gallery stays as it is.

    What a network goes by costs it ranks when it is gone. Needs part masks, which the miniature has.

    Args:
        which: sets of parts, of `market1501.PARTS`; each makes a row, "torso + legs".
    """
    references = embeddings(model, gallery, progress=progress)
    shown = {"nothing": query} | {" + ".join(parts): Occluded(query, parts) for parts in which}
    return {
        name: scores(cosine(embeddings(model, data, progress=progress), references), query, gallery)
        for name, data in shown.items()
    }


def cosine(query: Float[Tensor, "q k"], gallery: Float[Tensor, "g k"]) -> Float[Tensor, "q g"]:
    """Distances 1 - cos of features of length 1."""
    return 1 - query @ gallery.T


def _rows(model: Baseline, config: Evaluation, progress: bool) -> dict[str, dict[str, float]]:
    """Scores by cosine distance, the same of f_t if there is a neck, and re-ranked."""
    query, gallery = Market1501(config.data, "query"), Market1501(config.data, "gallery")
    model.to(engine.this_process().device, memory_format=torch.channels_last)
    pooled = [
        _pooled(model, data, config.flip, config.batch_size, config.workers, progress) for data in (query, gallery)
    ]
    everyone = torch.cat((query.identities, gallery.identities))
    images = float((query.identities[:, None] == everyone).sum(1).double().mean())
    features = [_compared(part, model.neck) for part in pooled]
    rows = {"cosine": scores(cosine(*features), query, gallery)}
    if isinstance(model.neck, nn.BatchNorm1d):
        rows[BEFORE] = scores(cosine(*[_compared(part, nn.Identity()) for part in pooled]), query, gallery)
    rows["re-ranked"] = scores(rerank(*features, config.k1, config.k2, config.lam), query, gallery)
    rows["re-ranked"] |= {"k1": config.k1, "k2": config.k2, "lam": config.lam, "images of a person": images}
    return rows


def _data(folder: str) -> dict[str, str]:
    return {"data": Path(folder).name, "world": minis.fingerprint(Path(folder))}


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "timm": timm.__version__}


def _written(result: dict[str, Any], path: Path, title: str) -> dict[str, Any]:
    if engine.this_process().is_main_process:
        paths.write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
        paths.write_text(path.with_suffix(".md"), table(result, title))
    return result


def table(result: dict[str, Any], title: str) -> str:
    """The result as Markdown, in percent, the paper's figures (ResNet-50, Market-1501) beside it."""
    names = [f"rank-{rank}" for rank in RANKS] + ["mAP"]
    lines = [
        f"# {title}",
        "",
        f"| features | {' | '.join(names)} | paper: rank-1 | paper: mAP |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row, found in result["rows"].items():
        ours, paper = [f"{found[name]:.1f}" for name in names], result["paper"].get(row, ("", ""))
        lines.append(f"| {' | '.join([row, *ours, *map(str, paper)])} |")
    last = list(result["rows"].values())[-1]
    lines += [
        "",
        f"Re-ranked with k1 = {last['k1']}, k2 = {last['k2']}, lambda = {last['lam']}; query and gallery show a "
        f"person in {last['images of a person']:.1f} images on average. Paper: Luo et al., ResNet-50, Market-1501.",
    ]
    return "\n".join([*lines, *([result["note"]] if result.get("note") else []), ""])


def parse_tricks(text: str) -> tuple[str, ...]:
    """The tricks that are meant: "none", "all", "stride" (it and all in front of it), or "erasing,center" (just these)."""
    if text == "none":
        return ()
    names = tuple(text.split(","))
    if len(names) > 1:
        return names
    last = TRICKS[-1] if text == "all" else text
    return TRICKS[: TRICKS.index(last) + 1] if last in TRICKS else names


def train_main(argv: list[str]) -> int:
    """`python -m course_lib train reid`: the strong baseline, with all of its tricks or some, or an ablation of them."""
    parser = _parser("train", train_main.__doc__)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--pretrained", dest="weights", action="store_const", const="pretrained", help="ImageNet weights (default)"
    )
    start.add_argument("--random", dest="weights", action="store_const", const="random", help="random weights")
    parser.add_argument(
        "--tricks",
        type=parse_tricks,
        metavar="NAME",
        help=f"none, all (default), one of {', '.join(TRICKS)} with those in front of it, or some: NAME,NAME",
    )
    parser.add_argument(
        "--ablation", action="store_true", help="train and evaluate with none of the tricks, one, two, ..."
    )
    parser.add_argument("--loss", choices=LOSSES, help=f"(default: {Training.loss})")
    parser.add_argument(
        "--last-block", action="store_true", help="train the last block only, on cached features (for a CPU)"
    )
    parser.add_argument("--epochs", type=int, help=f"(default: {Training.epochs})")
    parser.add_argument("--classes", type=int, help=f"identities in a batch (default: {Training.classes})")
    parser.add_argument("--images", type=int, help=f"of each identity in a batch (default: {Training.images})")
    parser.add_argument("--learning-rate", type=float, help="(default: the loss's own)")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    parser.add_argument("--seed", type=int, help=f"(default: {Training.seed})")
    parser.add_argument(
        "--folder", type=Path, required=True, help="of checkpoints and of the trained model.safetensors"
    )
    chosen = _chosen(parser, argv)
    folder, ablated = chosen.pop("folder"), chosen.pop("ablation", False)
    evaluation = {name: chosen.pop(name) for name in ("k1", "k2", "lam", "flip", "batch_size") if name in chosen}
    try:
        config = Training(**chosen)
        if evaluation and not ablated:
            raise ValueError(
                f"{', '.join(evaluation)}: options of the evaluation, which a training does with --ablation only."
            )
        if ablated:
            ablation(config, Evaluation(config.data, workers=config.workers, **evaluation), folder)
        else:
            history = train(config, folder)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if not engine.this_process().is_main_process:
        return 0
    if ablated:
        print((folder / "ablation.md").read_text("utf-8"))
        return 0
    if note := config.note():
        print(note)
    engine.tell(history, folder, "reid")
    return 0


def evaluate_main(argv: list[str]) -> int:
    """`python -m course_lib evaluate reid`: CMC and mAP of a trained network, or of one that has seen no pedestrian."""
    parser = _parser("evaluate", evaluate_main.__doc__)
    parser.add_argument("--checkpoint", help="a model.safetensors of `train reid` (default: ImageNet weights only)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: in build/reid)")
    chosen = _chosen(parser, argv)
    out = chosen.pop("out", None)
    try:
        config = Evaluation(**chosen)
        name = Path(config.checkpoint).parent.name if config.checkpoint else config.backbone
        out = out or paths.results().parent / "reid" / f"{name}-{Path(config.data).name}"
        evaluate(config, out)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print((out / "reid.md").read_text("utf-8"))
    return 0


def _parser(command: str, purpose: str) -> argparse.ArgumentParser:
    """Options that training and evaluation share. What is not given does not appear: the defaults of the configuration hold."""
    parser = argparse.ArgumentParser(
        prog=f"python -m course_lib {command} reid", description=purpose, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--data", help="folder of Market-1501 or of a miniature (default: mini-market-clothes)")
    parser.add_argument("--backbone", help=f"of timm's; the paper's is resnet50 (default: {Training.backbone})")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--batch-size", type=int, help=f"of the evaluation (default: {Evaluation.batch_size})")
    parser.add_argument("--flip", action="store_true", help="evaluate with the mirror image's features added")
    parser.add_argument(
        "--k1", type=int, help=f"of re-ranking, about as many as images of a person (default: {Evaluation.k1})"
    )
    parser.add_argument("--k2", type=int, help=f"of re-ranking, neighbourhoods averaged (default: {Evaluation.k2})")
    parser.add_argument(
        "--lam", type=float, help=f"of re-ranking, share of the first distance (default: {Evaluation.lam})"
    )
    return parser


def _chosen(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    chosen = vars(parser.parse_args(argv))
    if "data" not in chosen:
        chosen["data"] = str(minis.mini_market())
    return chosen
