"""Localisation by metric learning: the models of Dist-CAM, and Table 1 of its paper as a command.

    python -m course_lib train localise --loss triplet --last-block --folder runs/triplet
    python -m course_lib evaluate localise --checkpoint runs/triplet/model.safetensors
    python -m course_lib evaluate localise --backbone resnet50 --methods cam dist-cam --data /data/ilsvrc2012

Shen et al., "Distance-Based Class Activation Map for Metric Learning", section 3. The paper says: prototypes are means
over all training images of a class (Eq. 7); CAM rows predict by the classifier, Dist-CAM rows by the nearest prototype
in L1 (Eq. 4); top-1 error counts boxes of IoU below 0.5. It does not say: the training of either model, the threshold,
the up-sampling, the crop. Taken here: images squashed to one size without a crop, heatmaps as in `maps.heatmap`, the
largest region. The threshold is reported twice, at 0.2 and at the best of the set, and the curve is written out. What a
map owes to its classifier is seen apart: every map has its top-1 error under every way to predict the class.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from torch import Generator, Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset
from torchvision.transforms.v2 import RandomCrop
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from course_lib import checkpoints, engine, maps
from course_lib.backbones import Backbone
from course_lib.data.ilsvrc import Batch, Ilsvrc, Photo, squash
from course_lib.data.miniature import fingerprint
from course_lib.data.wrappers import Changed
from course_lib.evaluate.controls import map_correlation, random_weights, wrong_classes
from course_lib.evaluate.localization import FIXED, MaxBoxAcc
from course_lib.experiments import shared
from course_lib.lesson import versions
from course_lib.metric_learning.features import trunk_features
from course_lib.metric_learning.learner import (
    CENTER_RATE,
    CENTER_WEIGHT,
    CLASSIFYING,
    LOSSES,
    RATES,
    BalancedBatches,
    Learner,
    linear_probe,
)
from course_lib.metric_learning.losses import distances
from course_lib.metric_learning.rules import RULES
from course_lib.processes import sum_over_processes
from course_lib.prototypes import check_counted, check_labels
from course_lib.published import DIST_CAM_TABLE_1
from course_lib.settings import (
    DISTINCT,
    Count,
    NotNegative,
    Positive,
    RandomSeed,
    Several,
    Side,
    Workers,
    check_settings,
)
from course_lib.worlds import minis

CLASS_RULES = tuple(name for name in RULES if name != "uniform")  # those that tell classes apart
PREDICTIONS = ("classifier", "l1", "cosine")  # by the classifier, or by the nearest prototype
WRONG = ", wrong class"


@dataclass(frozen=True)
class LocaliseTraining:
    """What is trained, and how."""

    data: str = ""  # folder of ILSVRC 2012 or of a miniature with training images; "": mini-ilsvrc-kind
    backbone: str = "tf_efficientnet_lite0"  # a name of Table 1, or any of timm's that ends in GAP and one linear layer
    weights: str = "pretrained"  # to start from: "pretrained", "random", or the path of a checkpoint
    loss: Annotated[str, tuple(LOSSES)] = "triplet"  # softmax, center, triplet, prototype-l1, -l2 or -cosine
    last_block: bool = False  # train the last block only, on features of those before it, made once (for a CPU)
    epochs: Count = 10  # passes over the data
    classes: Several = 8  # P classes ...
    images: Count = 5  # ... of K images make a batch
    learning_rate: Positive | None = None  # None: the loss's own
    weight_decay: NotNegative = 1e-4  # of all but the centers
    size: Side = 224  # side of the squashed images, pixels
    workers: Workers = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of what is new in the network, and of the training

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class LocaliseEvaluation:
    """What is evaluated, and on what."""

    data: str = ""  # folder of ILSVRC 2012 or of a miniature with training images; "": mini-ilsvrc-kind
    backbone: str = "tf_efficientnet_lite0"  # a name of Table 1, or any of timm's that ends in GAP and one linear layer
    weights: Literal["pretrained", "random"] = "pretrained"  # without a checkpoint
    checkpoint: str = ""  # a model.safetensors of `train localise`, or another checkpoint for the classes of the data
    methods: Annotated[tuple[str, ...], CLASS_RULES, DISTINCT] = CLASS_RULES  # beside each its controls
    samples: Count | None = None  # training images of each class, the first ones; None: all, as Eq. 7 has it
    limit: Count | None = None  # validation images, the first ones; None: all
    size: Side = 224  # side of the squashed images, pixels
    batch_size: Count = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: Workers = 0  # processes that read images
    save_every: Count = 50  # batches from one saved state to the next
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of random weights, wrong classes, and a network of random weights

    def __post_init__(self) -> None:
        check_settings(self)


# training -------------------------------------------------------------------------------------------------------------


@shared.owner("train localise")
def train(config: LocaliseTraining, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; writes `model.safetensors` for `evaluate`. What was interrupted goes on."""
    data = Ilsvrc(config.data, "train")
    labels = torch.tensor([photo.label for photo in data.photos])
    model, own = shared.network(config.backbone, config.weights, list(data.classes), config.seed)
    if not own:
        torch.manual_seed(config.seed)
        model.classifier = nn.Linear(model.classifier.in_features, len(data.classes))
    learner = Learner(model, LOSSES[config.loss], len(data.classes), config.last_block, config.weights != "random")
    dataset = Changed(data, partial(crop, config.size))
    if config.last_block:
        device = engine.this_process(config.device).device
        features = trunk_features(model, data, config.size, device=device, workers=config.workers, progress=progress)
        dataset = TensorDataset(features, labels)
    history = fit_learner(learner, dataset, labels, config, folder, progress)
    if engine.this_process(config.device).is_main_process:
        about = {"loss": config.loss, "classifier": "trained" if config.loss in CLASSIFYING else "untrained"}
        checkpoints.write(folder / "model.safetensors", model, about)
    return history


def crop(size: int, image: UInt8[Tensor, "3 H W"], photo: Photo) -> tuple[UInt8[Tensor, "3 size size"], int]:
    """A training image, squashed, with a random crop of 7/8 of the side and a random flip; and its label."""
    image = RandomCrop(size)(resize(image, [size * 8 // 7] * 2))
    return (image.flip(-1) if torch.randint(2, ()) else image), photo.label


def fit_learner(
    learner: Learner,
    dataset: Dataset,
    labels: Int[Tensor, " n"],
    config: LocaliseTraining,
    folder: Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch: plain SGD with momentum; class-balanced batches if the loss compares images."""
    batches = BalancedBatches(labels, config.classes, config.images, Generator())
    if config.loss == "softmax":
        every = RandomSampler(dataset, generator=Generator())
        batches = BatchSampler(every, config.classes * config.images, drop_last=True)
    trained = [weight for name, weight in learner.named_parameters() if weight.requires_grad and name != "centers"]
    groups = [{"params": trained}]
    if config.loss == "center":  # the factor before the loss is divided out again
        rate = CENTER_RATE / CENTER_WEIGHT
        groups.append({"params": [learner.centers], "lr": rate, "momentum": 0.0, "weight_decay": 0.0})
    rate = config.learning_rate or RATES[config.loss]
    optimizer = torch.optim.SGD(groups, rate, 0.9, weight_decay=config.weight_decay)
    return shared.train_on_batches(learner, dataset, batches, optimizer, config, folder, progress)


# evaluation -----------------------------------------------------------------------------------------------------------


class ClassPrototypes:
    """Class prototypes of a stream, such as a training set  (Shen et al., Eq. 7): `accumulate` batches, then `compute`.

    `sums` and `counts` are all there is to save for a resume. Sums are float64, on the CPU: the order of the batches
    leaves no trace that float32 could show. Under torch.distributed each process accumulates its own share of the
    samples; a sampler that repeats samples to fill up the last batch would count them twice.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        self.sums = torch.zeros(num_classes, channels, dtype=torch.float64)
        self.counts = torch.zeros(num_classes, dtype=torch.long)

    def accumulate(self, features: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> None:
        """Adds a batch of pooled features. A batch that is refused leaves everything as it was.

        Raises:
            ValueError: another number of channels, a label out of range, or a feature that is NaN or infinite.
        """
        if features.shape[1] != self.sums.shape[1]:
            raise ValueError(
                f"Pooled features of {self.sums.shape[1]} channels were expected, but {features.shape[1]} came."
            )
        features, labels = features.detach().cpu().double(), labels.cpu().long()
        check_labels(labels, len(self.counts))
        if len(spoiled := (~features.isfinite().all(1)).nonzero()):
            raise ValueError(
                f"Sample {int(spoiled[0])} of the batch, of class {int(labels[spoiled[0]])}, holds "
                "NaN or infinite features, which would spoil the prototype of its class. Look at it first."
            )
        self.sums.index_add_(0, labels, features)
        self.counts += labels.bincount(minlength=len(self.counts))

    def compute(self) -> Float32[Tensor, "c k"]:
        """Prototypes of everything accumulated so far, with torch.distributed by all processes: all must call.

        Raises:
            ValueError: a class without samples.
        """
        sums, counts = map(sum_over_processes, (self.sums, self.counts))
        check_counted(counts)
        return (sums / counts[:, None]).float()


@shared.owner("evaluate localise", free=["methods"])
def evaluate(config: LocaliseEvaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Table 1 for one network: writes `localise.json` and `localise.md`, returns the former.

    An evaluation that was interrupted goes on from the last state in the folder, to the same numbers. The prototypes
    stay there and serve further methods.

    Raises:
        FileNotFoundError: no such data, or no training images in it.
        ValueError: the folder holds the state of another evaluation.
    """
    val = Ilsvrc(config.data, "val")
    if not (val.root / "ILSVRC/Data/CLS-LOC/train").is_dir():
        raise FileNotFoundError(
            f"{config.data} has no training images, and prototypes are means over training images "
            "(Eq. 7). Take mini-ilsvrc-kind, mini-ilsvrc-creatures, or the whole ILSVRC 2012."
        )
    train = Ilsvrc(config.data, "train")
    model, own = shared.network(config.backbone, config.checkpoint or config.weights, list(train.classes), config.seed)
    model.to(engine.this_process(config.device).device, memory_format=torch.channels_last)
    rows, key = _rows(model, own, train, config, folder, progress)
    chosen = range(len(val))[: config.limit]
    state = {
        "key": key | {"methods": list(config.methods), "images": len(chosen)},
        "scores": {},
        "both": Counter(),
        "agreement": Counter(),
        "correct": 0,
    }
    for number, batch in _batches(val, chosen, state, folder / "scores.pt", config, progress):
        _localise(model, batch, rows, config, number, state)
    result = _result(config, state, own)
    shared.write(result, table(result), folder / "localise")
    (folder / "scores.pt").unlink(missing_ok=True)
    return result


def _rows(
    model: Backbone, own: bool, train: Ilsvrc, config: LocaliseEvaluation, folder: Path, progress: bool
) -> tuple[dict, dict]:
    """Classifier, bias and prototypes of all classes, and prototypes of two halves if each class has two images.

    And everything that the features of the training images follow from.
    """
    classes, chosen, split, seen = len(train.classes), [], [], Counter()
    for index, photo in enumerate(train.photos):
        if seen[photo.label] < (config.samples or len(train)):
            chosen.append(index)
            split.append(photo.label + classes * (seen[photo.label] % 2))  # each second one to the second half
        seen[photo.label] += 1
    split = torch.tensor(split)
    key = {name: getattr(config, name) for name in ("backbone", "weights", "samples", "size", "batch_size", "seed")}
    key["data"] = fingerprint(train.root)
    if config.checkpoint:
        key["weights"] = hashlib.sha256(Path(config.checkpoint).read_bytes()).hexdigest()
    whole, halves = (ClassPrototypes(count, model.classifier.in_features) for count in (classes, 2 * classes))
    state = {"key": key | {"images": len(chosen)}, "prototypes": (whole, halves), "pooled": []}
    for number, batch in _batches(train, chosen, state, folder / "prototypes.pt", config, progress):
        query = _features(model, batch).mean((-2, -1))
        for part, labels in zip(state["prototypes"], (batch.labels, split[number * config.batch_size :][: len(query)])):
            part.accumulate(query, labels)
        if not own:
            state["pooled"].append(query.cpu())  # for the linear probe
    whole, halves = state["prototypes"]
    rows = {"prototypes": whole.compute()}
    if halves.counts.all():
        rows["first half"], rows["second half"] = halves.compute().split(classes)
    if own:
        rows["classifier"], rows["bias"] = model.classifier.weight.detach(), model.classifier.bias.detach()
    else:
        rows["classifier"], rows["bias"] = linear_probe(torch.cat(state["pooled"]), split % classes, classes)
    return {name: row.to(model.mean.device) for name, row in rows.items()}, key


def _batches(
    data: Ilsvrc, chosen: Sequence[int], state: dict, file: Path, config: LocaliseEvaluation, progress: bool
) -> Iterator[tuple[int, Batch]]:
    """Numbered batches of the chosen images, each to be counted in the state before the next one is asked for.

    The state is saved now and then; what the file holds already is not done again.
    """
    if file.is_file():
        with torch.serialization.safe_globals([MaxBoxAcc, ClassPrototypes, Counter]):
            saved = torch.load(file, weights_only=True)
        ours, there = state["key"], saved["key"]
        differ = [
            f"{name}: {there.get(name)} there, {ours[name]} here" for name in ours if there.get(name) != ours[name]
        ]
        if differ:
            raise ValueError(
                f"{file} belongs to another evaluation ({', '.join(differ)}). Choose another --folder, or "
                "delete the file."
            )
        state.update(saved)
    done = state.get("done", 0)
    part, collate = Subset(data, chosen[done * config.batch_size :]), partial(squash, size=config.size)
    loader = DataLoader(part, config.batch_size, num_workers=config.workers, collate_fn=collate)
    last = done + len(loader)
    for number, batch in enumerate(tqdm(loader, data.split, last, initial=done, disable=not progress), done):
        yield number, batch
        state["done"] = number + 1
        if state["done"] % config.save_every == 0 or state["done"] == last:
            torch.save(state, file.with_suffix(".writing"))
            os.replace(file.with_suffix(".writing"), file)  # whole or not at all: a kill leaves the state before


@torch.inference_mode()
def _features(model: Backbone, batch: Batch) -> Tensor:  # b k h w
    return model.features(model.normalise(batch.images.to(model.mean.device))).float()


@torch.inference_mode()
def _localise(model: Backbone, batch: Batch, rows: dict, config: LocaliseEvaluation, number: int, state: dict) -> None:
    """Adds one batch to the state.

    The map is that of the true class: top-1 localisation counts only where the predicted class is the true one.
    """
    features = _features(model, batch)
    labels, query = batch.labels.to(features.device), features.mean((-2, -1))
    controls = _controls(batch.labels, *rows["prototypes"].shape, config.seed, number)
    wrong, random = (part.to(features.device) for part in controls)

    def shown(weights: Tensor) -> Tensor:  # b 1 k -> b h w
        return maps.weighted_map(features, weights)[:, 0]

    found = {}
    for name in config.methods:
        source, rule = RULES[name]
        found[name], found[name + WRONG] = (shown(rule(query, rows[source], classes)) for classes in (labels, wrong))
        if source == "prototypes" and "first half" in rows:
            halves = [shown(rule(query, rows[half], labels)) for half in ("first half", "second half")]
            pair = torch.stack([map_correlation(*halves), map_correlation(found[name], found[name + WRONG])])
            state["agreement"][name] += pair.sum(1).cpu()
    found |= {"uniform": shown(maps.uniform_weights(query)[:, None]), "random": shown(random)}
    predicted = [
        F.linear(query, rows["classifier"], rows["bias"]).argmax(1),
        *(distances(query, rows["prototypes"], metric).argmin(1) for metric in PREDICTIONS[1:]),
    ]
    right = (torch.stack(predicted, 1) == labels[:, None]).cpu()  # b 3
    state["correct"] += right.sum(0)
    for name, map in found.items():
        heat, score = maps.heatmap(map, config.size), state["scores"].setdefault(name, MaxBoxAcc())
        for some in right.unique(dim=0):  # boxes are searched once for all predictions
            where = (right == some).all(1).nonzero().flatten()
            before = score.single[1].clone()
            score.accumulate(heat[where], [batch.boxes[i] for i in where])
            state["both"][name] += some[:, None] * (score.single[1] - before)  # 3 t: hits, and the class is right


def _controls(labels: Tensor, classes: int, channels: int, seed: int, number: int) -> tuple[Tensor, Tensor]:
    """A wrong class for each image, on which all batches agree, and random weights b 1 k, which are the batch's own."""
    generator = Generator().manual_seed(seed)
    wrong = wrong_classes(labels, classes, generator)
    return wrong, random_weights(len(labels), channels, generator.manual_seed((seed << 32) + number + 1))


def _result(config: LocaliseEvaluation, state: dict, own: bool) -> dict:
    rows = {}
    for name, score in state["scores"].items():
        one = score.compute()
        top1 = 100 * (1 - state["both"][name].double() / one.images)  # 3 t
        best, fixed = (dict(zip(PREDICTIONS, top1[:, index].tolist())) for index in (one.single[1].argmax(), FIXED))
        agreement = state["agreement"].get(name)
        halves, wrong = (None, None) if agreement is None else (agreement / one.images).tolist()
        rows[name] = {
            "top1_error_best": None if WRONG in name else best,
            "top1_error": None if WRONG in name else fixed,
            "gt_known_error_best": 100 * (1 - one.max_box_acc),
            "best_threshold": one.best_threshold,
            "gt_known_error": 100 * (1 - one.gt_known),
            "max_box_acc_v2": 100 * one.max_box_acc_v2,
            "split_half": halves,
            "wrong_class": wrong,
            "curve": (100 * one.single[1, ::10]).tolist(),
        }
    baselines = {"whole image": one.whole_image, "centred half": one.centre_half, "best centred box": one.centre_best}
    return {
        "settings": state["key"] | {"data": Path(config.data).name, "fingerprint": state["key"]["data"]},
        "versions": versions(),
        "classifier": "own" if own else "linear probe",
        "accuracy": dict(zip(PREDICTIONS, (100 * (state["correct"].double() / one.images)).tolist())),
        "baselines": {name: 100 * (1 - share) for name, share in baselines.items()},
        "paper": dict(zip(("cam", "dist-cam"), DIST_CAM_TABLE_1.get(config.backbone, ()))),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: errors in percent, the prediction of Table 1 in bold, the paper's figures beside it."""
    settings, lines = result["settings"], []
    classifier = "the network's own" if result["classifier"] == "own" else "a linear probe on its pooled features"
    baselines, accuracy = (
        ", ".join(f"{name} {figure:.1f}" for name, figure in result[kind].items()) for kind in ("baselines", "accuracy")
    )
    for name, row in result["rows"].items():
        top1 = [f"{error:.1f}" for error in (row["top1_error_best"] or {}).values()] or [""] * len(PREDICTIONS)
        if name in CLASS_RULES:
            own = ("classifier", "prototypes").index(RULES[name][0])
            top1[own] = f"**{top1[own]}**"
        errors = [
            f"{row['gt_known_error_best']:.1f}",
            f"{row['best_threshold']:.2f}",
            f"{row['gt_known_error']:.1f}",
            f"{row['max_box_acc_v2']:.1f}",
        ]
        agree = ["" if row[kind] is None else f"{row[kind]:.2f}" for kind in ("split_half", "wrong_class")]
        lines.append([name, *top1, *errors, *agree, str(result["paper"].get(name, ""))])
    header = (
        "map | top-1 error: classifier | nearest L1 | nearest cosine | GT-known error | at threshold | at 0.2 | "
        "MaxBoxAccV2 | halves agree | wrong class agrees | paper: top-1 error"
    )
    return "\n".join(
        [
            f"# {settings['backbone']} ({settings['weights'][:12]}), {settings['images']} images of {settings['data']}",
            "",
            *shared.markdown(header.split(" | "), lines),
            "",
            "Top-1 and GT-known errors at the best threshold of the set, in percent. GT-known error of boxes that "
            f"never saw the image: {baselines}.",
            f"Class accuracy: {accuracy}. The classifier is {classifier}.",
            "Agreement: correlation of maps from prototypes of two halves of the training images, of right and wrong "
            "class.",
            "",
        ]
    )


# commands -------------------------------------------------------------------------------------------------------------


def train_command(config: LocaliseTraining, folder: Path) -> None:
    """Train a network by classification or metric learning, whose maps `evaluate localise` measures.

    Args:
        folder: of checkpoints and of the trained model.safetensors
    """
    config = shared.prepared(config, folder, partial(minis.mini_ilsvrc, labels="kind"))
    shared.tell(train(config, folder), folder, "localise")


def evaluate_command(config: LocaliseEvaluation, folder: Path | None = None) -> None:
    """Measure CAM, Dist-CAM and their relatives as in Table 1, for one network, on real or miniature data.

    Args:
        folder: of state and results; None: in build/localise
    """
    config = shared.prepared(config, folder, partial(minis.mini_ilsvrc, labels="kind"))
    shared.evaluated("localise", evaluate, table, config, folder)
