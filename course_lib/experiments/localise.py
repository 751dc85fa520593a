"""Localisation by metric learning: the models of Dist-CAM, and Table 1 of its paper as a command.

    python -m course_lib train localise --loss triplet --last-block --folder runs/triplet
    python -m course_lib evaluate localise --checkpoint runs/triplet/model.safetensors
    python -m course_lib evaluate localise --backbone resnet50 --method cam,dist-cam --data /data/ilsvrc2012

Shen et al., "Distance-Based Class Activation Map for Metric Learning", section 3. The paper says: prototypes are means over
all training images of a class (Eq. 7); CAM rows predict by the classifier, Dist-CAM rows by the nearest prototype in L1
(Eq. 4); top-1 error counts boxes of IoU below 0.5. It does not say: the training of either model, the threshold, the
up-sampling, the crop. Taken here: images squashed to one size without a crop, heatmaps as in `maps.heatmap`, the largest
region. The threshold is reported twice, at 0.2 and at the best of the set, and the curve is written out. What a map owes to
its classifier is seen apart: every map has its top-1 error under every rule of prediction.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from safetensors import safe_open
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from course_lib import backbones, paths
from course_lib.backbones import Backbone
from course_lib.data.ilsvrc import Batch, Ilsvrc, squash
from course_lib.evaluate.controls import map_correlation, random_weights, wrong_classes
from course_lib.evaluate.localization import Localization, MaxBoxAcc
from course_lib.maps import (
    centred_weights,
    channel_weights,
    heatmap,
    intersection_weights,
    match_activity_weights,
    positive_weights,
    uniform_weights,
    weighted_map,
)
from course_lib.metric_learning.losses import distances
from course_lib.prototypes import ClassPrototypes
from course_lib.worlds import minis

# Table 1: timm's name of the network with torchvision's first weights, top-1 error of CAM and of Dist-CAM, %.
PAPER = {
    "resnet18": ("resnet18.tv_in1k", 59.5, 56.7),
    "resnet50": ("resnet50.tv_in1k", 56.2, 54.7),
    "resnet101": ("resnet101.tv_in1k", 56.6, 54.9),
    "densenet161": ("densenet161.tv_in1k", 62.4, 57.6),
    "densenet169": ("densenet169.tv_in1k", 62.3, 56.6),
    "densenet201": ("densenet201.tv_in1k", 62.5, 56.4),
}
# Where the weights of a map come from, and how: (pooled features b k, rows of all classes c k, classes b) -> b 1 k.
METHODS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "cam": ("classifier", lambda query, rows, classes: rows[classes][:, None]),
    "cam-positive": ("classifier", lambda query, rows, classes: positive_weights(rows)[classes][:, None]),
    "cam-centred": ("classifier", lambda query, rows, classes: centred_weights(rows)[classes][:, None]),
    "dist-cam": ("prototypes", lambda query, rows, classes: channel_weights(query, rows[classes][:, None])),
    "match-activity": (
        "prototypes",
        lambda query, rows, classes: match_activity_weights(query, rows[classes][:, None]),
    ),
    "intersection": ("prototypes", lambda query, rows, classes: intersection_weights(query, rows[classes][:, None])),
    "prototype": ("prototypes", lambda query, rows, classes: rows[classes][:, None]),
    "prototype-centred": ("prototypes", lambda query, rows, classes: centred_weights(rows)[classes][:, None]),
}
RULES = ("classifier", "l1", "cosine")  # of prediction: the classifier's, or the nearest prototype's
WRONG = ", wrong class"
PROBE_DECAY = 1e-3  # of a linear probe's weights: enough to leave its CAM no free gauge


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and on what."""

    data: str  # a folder in ILSVRC's CLS-LOC layout with training images
    backbone: str = "tf_efficientnet_lite0"  # a name of Table 1, or any of timm's that ends in GAP and one linear layer
    weights: str = "pretrained"  # "pretrained", "random", or the path of a checkpoint for the classes of the data
    methods: tuple[str, ...] = tuple(
        METHODS
    )  # beside these: uniform and random weights, and each map for a wrong class
    samples: int | None = None  # training images of each class, the first ones; None: all, as Eq. 7 has it
    limit: int | None = None  # validation images, the first ones; None: all
    size: int = 224  # side of the squashed images, pixels
    batch_size: int = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: int = 0  # processes that read images
    save_every: int = 50  # batches from one saved state to the next
    seed: int = 0  # of random weights, wrong classes, and a network of random weights
    device: str = "auto"  # "auto", "cpu", "cuda"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"There is no method {unknown[0]!r}; there are: {', '.join(METHODS)}.")


def evaluate(config: Evaluation, folder: Path, progress: bool = True) -> dict:
    """Table 1 for one network: writes `localise.json` and `localise.md` (beside the paper's figures), returns the former.

    An evaluation that was interrupted goes on from the last state in the folder, to the same numbers. The prototypes stay
    there and serve further methods.

    Raises:
        FileNotFoundError: no such data, or no training images in it.
        ValueError: the folder holds the state of another evaluation.
    """
    root = Path(config.data) / "ILSVRC" / "Data" / "CLS-LOC"
    if (root / "val").is_dir() and not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{config.data} has no training images, and prototypes are means over training images "
            "(Eq. 7). Take mini-ilsvrc-kind, mini-ilsvrc-creatures, or the whole ILSVRC 2012."
        )
    train, val = Ilsvrc(config.data, "train"), Ilsvrc(config.data, "val")
    folder.mkdir(parents=True, exist_ok=True)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model, own = network(config.backbone, config.weights, list(train.classes), config.seed)
    model.to(device, memory_format=torch.channels_last)
    rows = _rows(model, own, train, config, folder, progress)
    chosen = range(len(val))[: config.limit]
    key = _key(config, train) | {"methods": list(config.methods), "images": len(chosen)}
    state = _saved(folder / "scores.pt", key) or {"key": key, "done": 0, "scores": {}, "agreement": {}}
    scores = {
        name: {right: _restored(part) for right, part in parts.items()} for name, parts in state["scores"].items()
    }
    agreement = state["agreement"]
    for number, batch in _stream(val, chosen, state["done"], config, "localising", progress):
        with torch.inference_mode():
            _localise(model, batch, rows, config, number, scores, agreement)
        if (number + 1) % config.save_every == 0:
            parts = {name: {right: vars(part) for right, part in parts.items()} for name, parts in scores.items()}
            _save(state | {"done": number + 1, "scores": parts}, folder / "scores.pt")
    result = _result(config, key, scores, agreement, own)
    paths.write_text(folder / "localise.json", json.dumps(result, indent=1) + "\n")
    paths.write_text(folder / "localise.md", table(result))
    (folder / "scores.pt").unlink(missing_ok=True)
    return result


def network(backbone: str, weights: str, classes: list[str], seed: int = 0) -> tuple[Backbone, bool]:
    """A network, and whether its classifier knows these classes (WordNet ids, in label order).

    Args:
        backbone: one of PAPER, which gets torchvision's first weights (the paper does not say which), or another of timm's.
        weights: "pretrained", "random" (from `seed`) or the path of a checkpoint with a classifier for the classes. If a loss
            that trains no classifier made it, and says so, the classifier counts as ignorant.
    """
    name = PAPER.get(backbone, (backbone,))[0]
    torch.manual_seed(seed)
    if weights in ("pretrained", "random"):
        own = classes == [wnid for wnid, _ in backbones.imagenet_classes()]
        return backbones.create(name, weights == "pretrained"), own
    path, own = Path(weights), True
    model = backbones.create(name, path, len(classes))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            own = (file.metadata() or {}).get("classifier") != "untrained"
    return model, own


def linear_probe(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], num_classes: int, decay: float = PROBE_DECAY
) -> tuple[Float32[Tensor, "c k"], Float32[Tensor, " c"]]:
    """Weight and bias of the classifier that minimises cross-entropy + decay / 2 |weight|^2: CAM for a network without one.

    The problem is convex, and L-BFGS in float64 finds its one solution. In it the weights of all classes sum to zero (else a
    row taken from all of them would shrink the penalty and change no prediction), so that CAM is centred as it stands.
    """
    features, labels = features.double(), labels.long()
    centre = features.mean(0)  # moves the bias only, and the solver is faster
    features = features - centre
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=1000, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    weight, bias = weight.detach(), bias.detach()
    return weight.float(), (bias - weight @ centre).float()


def _rows(
    model: Backbone, own: bool, train: Ilsvrc, config: Evaluation, folder: Path, progress: bool
) -> dict[str, Tensor]:
    """Classifier, bias and prototypes of all classes, and the prototypes of two halves if each class has two images."""
    classes, channels = len(train.classes), model.classifier.in_features
    chosen, split, seen = [], [], [0] * classes
    for index, photo in enumerate(train.photos):
        if config.samples is None or seen[photo.label] < config.samples:
            chosen.append(index)
            split.append(photo.label + classes * (seen[photo.label] % 2))
        seen[photo.label] += 1
    halves = ClassPrototypes(2 * classes, channels)  # every second image of a class to the second half
    key = _key(config, train) | {"images": len(chosen)}
    state = _saved(folder / "prototypes.pt", key) or {"key": key, "done": 0, "pooled": [], **vars(halves)}
    halves.sums, halves.counts = state["sums"], state["counts"]
    last = -(-len(chosen) // config.batch_size) - 1
    for number, batch in _stream(train, chosen, state["done"], config, "prototypes", progress):
        with torch.inference_mode():
            query = model.features(model.normalise(batch.images.to(model.mean.device))).float().mean((-2, -1))
        first = number * config.batch_size
        halves.accumulate(query, torch.tensor(split[first : first + len(query)]))
        if not own:
            state["pooled"].append(query.cpu())  # for the linear probe
        if (number + 1) % config.save_every == 0 or number == last:
            _save(state | {"done": number + 1}, folder / "prototypes.pt")
    whole = ClassPrototypes(classes, channels)
    whole.sums, whole.counts = (part.unflatten(0, (2, classes)).sum(0) for part in (halves.sums, halves.counts))
    rows = {"prototypes": whole.compute()}
    if halves.counts.all():
        rows["first half"], rows["second half"] = halves.compute().split(classes)
    if own:
        rows["classifier"], rows["bias"] = model.classifier.weight.detach(), model.classifier.bias.detach()
    else:
        rows["classifier"], rows["bias"] = linear_probe(
            torch.cat(state["pooled"]), torch.tensor(split) % classes, classes
        )
    return {name: row.to(model.mean.device) for name, row in rows.items()}


def _localise(
    model: Backbone,
    batch: Batch,
    rows: dict[str, Tensor],
    config: Evaluation,
    number: int,
    scores: dict[str, dict[int, MaxBoxAcc]],
    agreement: dict[str, Tensor],
) -> None:
    """Adds one batch to the scores (of each map, and of images that the same RULES get right) and to the agreement of maps.

    The map is that of the true class: top-1 localisation counts only where the predicted class is the true one.
    """
    features = model.features(model.normalise(batch.images.to(model.mean.device))).float()
    labels, query = batch.labels.to(features.device), features.mean((-2, -1))
    weights = _weights(query, labels, rows, config, number)
    maps = {name: weighted_map(features, weight)[:, 0] for name, weight in weights.items()}
    for name in config.methods:
        source, rule = METHODS[name]
        if source == "prototypes" and "first half" in rows:
            first, second = (
                weighted_map(features, rule(query, rows[half], labels))[:, 0] for half in ("first half", "second half")
            )
            pair = torch.stack([map_correlation(first, second), map_correlation(maps[name], maps[name + WRONG])])
            agreement[name] = agreement.get(name, 0) + pair.sum(1).cpu()
    rights = _rights(query, labels, rows).tolist()
    for name, raw in maps.items():
        heat = heatmap(raw, config.size)
        for right in set(rights):  # boxes are searched once for all RULES
            where = [i for i, found in enumerate(rights) if found == right]
            part = scores.setdefault(name, {}).setdefault(right, MaxBoxAcc())
            part.accumulate(heat[where], [batch.boxes[i] for i in where])


def _weights(
    query: Tensor, labels: Tensor, rows: dict[str, Tensor], config: Evaluation, number: int
) -> dict[str, Tensor]:
    """Channel weights of one batch, b 1 k: of every method, of the same for a wrong class, and of controls without a class."""
    generator = Generator().manual_seed(config.seed)  # all batches agree on which class is the wrong one
    wrong = wrong_classes(labels.cpu(), len(rows["prototypes"]), generator).to(labels.device)
    generator.manual_seed((config.seed << 32) + number + 1)
    weights = {}
    for name in config.methods:
        source, rule = METHODS[name]
        weights[name], weights[name + WRONG] = (rule(query, rows[source], classes) for classes in (labels, wrong))
    weights["uniform"] = uniform_weights(query)[:, None]
    weights["random"] = random_weights(*query.shape, generator).to(query.device)
    return weights


def _rights(query: Tensor, labels: Tensor, rows: dict[str, Tensor]) -> Int[Tensor, " b"]:
    """Which of the RULES find the class of each image: bit i is set for rule i."""
    predicted = [
        F.linear(query, rows["classifier"], rows["bias"]).argmax(1),
        *(distances(query, rows["prototypes"], metric).argmin(1) for metric in RULES[1:]),
    ]
    return sum((found == labels).long() << bit for bit, found in enumerate(predicted)).cpu()


def _stream(
    data: Ilsvrc, chosen: Sequence[int], done: int, config: Evaluation, title: str, progress: bool
) -> Iterator[tuple[int, Batch]]:
    """Numbered batches of the chosen images, from batch `done` on."""
    part = Subset(data, chosen[done * config.batch_size :])
    loader = DataLoader(
        part, config.batch_size, num_workers=config.workers, collate_fn=partial(squash, size=config.size)
    )
    bar = tqdm(loader, title, len(loader) + done, initial=done, disable=not progress)
    return enumerate(bar, done)


def _key(config: Evaluation, data: Ilsvrc) -> dict[str, Any]:
    """Everything that the features of the training images follow from."""
    weights = config.weights
    if weights not in ("pretrained", "random"):
        with open(weights, "rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "data": minis.fingerprint(data.root),
        "backbone": config.backbone,
        "weights": weights,
        "samples": config.samples,
        "size": config.size,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }


def _saved(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    state = torch.load(file, weights_only=True) if file.is_file() else None
    if state and state["key"] != key:
        differ = ", ".join(
            f"{name}: {state['key'].get(name)} there, {key[name]} here"
            for name in key
            if state["key"].get(name) != key[name]
        )
        raise ValueError(f"{file} belongs to another evaluation ({differ}). Choose another --out, or delete the file.")
    return state


def _save(state: dict[str, Any], file: Path) -> None:
    """Whole or not at all: a kill leaves the state before."""
    torch.save(state, file.with_suffix(".writing"))
    os.replace(file.with_suffix(".writing"), file)


def _restored(saved: dict[str, Any]) -> MaxBoxAcc:
    part = MaxBoxAcc()
    vars(part).update(saved)
    return part


def _merged(parts: dict[int, MaxBoxAcc], bit: int) -> Localization:
    """Accuracies over all images, those found by one of the RULES counting as classified."""
    whole = MaxBoxAcc()
    whole.classified = True
    for right, part in parts.items():
        whole.images += part.images
        for hits, more in ((whole.single, part.single), (whole.multi, part.multi), (whole.centre, part.centre)):
            hits += more
        if right >> bit & 1:
            whole.correct += part.images
            whole.both += part.single[1]
    return whole.compute()


def _result(
    config: Evaluation,
    key: dict[str, Any],
    scores: dict[str, dict[int, MaxBoxAcc]],
    agreement: dict[str, Tensor],
    own: bool,
) -> dict[str, Any]:
    rows = {}
    for name, parts in scores.items():
        found = {rule: _merged(parts, bit) for bit, rule in enumerate(RULES)}
        one = found["l1"]
        rows[name] = {
            "top1_error_best": None
            if WRONG in name
            else {rule: 100 * (1 - by.top1_best) for rule, by in found.items()},
            "top1_error": None if WRONG in name else {rule: 100 * (1 - by.top1) for rule, by in found.items()},
            "gt_known_error_best": 100 * (1 - one.max_box_acc),
            "best_threshold": one.best_threshold,
            "gt_known_error": 100 * (1 - one.gt_known),
            "max_box_acc_v2": 100 * one.max_box_acc_v2,
            "split_half": None,
            "wrong_class": None,
            "curve": (100 * one.single[1, ::10]).tolist(),
        }
        if name in agreement:
            rows[name]["split_half"], rows[name]["wrong_class"] = (agreement[name] / one.images).tolist()
    return {
        "settings": key | {"data": Path(config.data).name, "fingerprint": key["data"]},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "classifier": "own" if own else "linear probe",
        "accuracy": {rule: 100 * by.accuracy for rule, by in found.items()},
        "baselines": {
            "whole image": 100 * (1 - one.whole_image),
            "centred half": 100 * (1 - one.centre_half),
            "best centred box": 100 * (1 - one.centre_best),
        },
        "paper": dict(zip(("cam", "dist-cam"), PAPER.get(config.backbone, ())[1:])),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: errors in percent, the prediction of Table 1 in bold, the paper's figures beside it."""
    settings, accuracy, baselines = result["settings"], result["accuracy"], result["baselines"]
    classifier = "the network's own" if result["classifier"] == "own" else "a linear probe on its pooled features"
    names = (
        "map",
        "top-1 error: classifier",
        "nearest L1",
        "nearest cosine",
        "GT-known error",
        "at threshold",
        "at 0.2",
        "MaxBoxAccV2",
        "halves agree",
        "wrong class agrees",
        "paper: top-1 error",
    )
    lines = [
        f"# {settings['backbone']} ({settings['weights'][:12]}), {settings['images']} images of {settings['data']}",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for name, row in result["rows"].items():
        top1 = ["" if row["top1_error_best"] is None else f"{row['top1_error_best'][rule]:.1f}" for rule in RULES]
        if name in METHODS:
            bold = 0 if METHODS[name][0] == "classifier" else 1
            top1[bold] = f"**{top1[bold]}**"
        agree = ["" if row[kind] is None else f"{row[kind]:.2f}" for kind in ("split_half", "wrong_class")]
        cells = [
            name,
            *top1,
            f"{row['gt_known_error_best']:.1f}",
            f"{row['best_threshold']:.2f}",
            f"{row['gt_known_error']:.1f}",
            f"{row['max_box_acc_v2']:.1f}",
            *agree,
            str(result["paper"].get(name, "")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Top-1 and GT-known errors at the best threshold of the set, in percent. GT-known error of boxes that never saw the "
            "image: " + ", ".join(f"{name} {error:.1f}" for name, error in baselines.items()) + ".",
            "Class accuracy: "
            + ", ".join(f"{rule} {share:.1f}" for rule, share in accuracy.items())
            + f". The classifier is {classifier}.",
            "Agreement: correlation of maps from prototypes of two halves of the training images, of right and wrong class.",
            "",
        ]
    )


def main(argv: list[str]) -> int:
    """`python -m course_lib evaluate localise`: Table 1 for one network, on real or miniature data."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib evaluate localise", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    add_options(parser, Evaluation)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    parser.add_argument(
        "--method",
        dest="methods",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME,...",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--samples", type=int, help="training images of each class for the prototypes (default: all)")
    parser.add_argument("--limit", type=int, help="validation images (default: all)")
    parser.add_argument("--batch-size", type=int, help=f"(default: {Evaluation.batch_size})")
    parser.add_argument(
        "--save-every", type=int, help=f"batches between saved states (default: {Evaluation.save_every})"
    )
    parser.add_argument("--out", type=Path, help="folder of state and results (default: in build/localise)")
    chosen = vars(parser.parse_args(argv))
    out = chosen.pop("out", None)
    try:
        add_data(chosen)
        config = Evaluation(**chosen)
        name = f"{config.backbone}-{Path(config.weights).stem}-{Path(config.data).name}"
        print(table(evaluate(config, out or paths.results().parent / "localise" / name)))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def add_data(chosen: dict[str, Any]) -> None:
    """Adds the option `data` if it was not given: the miniature with training images, written if it is not there."""
    if "data" not in chosen:
        chosen["data"] = str(minis.mini_ilsvrc("", "kind"))


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Options that training and evaluation share. What is not given does not appear: the defaults of `config` hold."""
    parser.add_argument("--data", help="folder of ILSVRC 2012 or of a miniature (default: mini-ilsvrc-kind)")
    parser.add_argument("--backbone", help=f"{', '.join(PAPER)} or any of timm's (default: {config.backbone})")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--pretrained", dest="weights", action="store_const", const="pretrained", help="ImageNet weights (default)"
    )
    start.add_argument("--random", dest="weights", action="store_const", const="random", help="random weights")
    start.add_argument("--checkpoint", dest="weights", metavar="PATH", help="weights from a file, as `train` writes it")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--seed", type=int, help="(default: 0)")
