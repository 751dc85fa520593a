"""Few-shot learning: ResNet-12 trained on base classes, then on episodes; prototypes of novel classes, also rectified.

    python -m course_lib train fewshot --data /data/miniimagenet --backbone resnet12 --folder runs/fewshot
    python -m course_lib evaluate fewshot --data /data/miniimagenet --backbone resnet12 \
        --checkpoint runs/fewshot/model.safetensors
    python -m course_lib evaluate fewshot --queries 15 2 2 2 2     # the miniature, frozen ImageNet features, unbalanced

Shen et al., "Distance-Based Class Activation Map for Metric Learning", section 4.1, explain a ResNet-12, trained "by
meta-learning strategy" as in their reference [7], Liu et al. (BD-CSPN, ECCV 2020). They do not print a recipe. The one
here is Meta-Baseline's (Chen et al., ICCV 2021), with the constants of its released configuration:

    1  classification of the base classes         cross-entropy of .classifier on crops
    2  episodes of base classes                   cross-entropy of  t cos(q, P_c),  t learns along from 10

What differs: the wide ResNet-12 with DropBlock (theirs is narrow, without), 84 pixels (80), and prototypes that are
means of directions, as BD-CSPN has them, in training as in evaluation (theirs are means of features; with one shot that
is the same). They keep the epoch that is best on validation classes; here the last one counts, and `--split val` tells
how good it is. BatchNorm sees support and queries of a batch together in stage 2, as theirs does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import BatchSampler, Dataset, RandomSampler, Sampler
from torchvision.transforms import v2

from course_lib import backbones, checkpoints, engine, published
from course_lib.backbones import Backbone, resnet12
from course_lib.data.miniature import fingerprint
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.data.wrappers import Changed
from course_lib.evaluate.episodes import CLASSIFIERS, TRANSDUCTIVE, accuracies, interval, recalls, sample
from course_lib.experiments import shared
from course_lib.lesson import versions
from course_lib.metric_learning.features import extract
from course_lib.metric_learning.learner import LOSSES, Learner, Terms
from course_lib.settings import (
    DISTINCT,
    Count,
    NotNegative,
    PartialShare,
    Positive,
    RandomSeed,
    Several,
    Side,
    Whole,
    Workers,
    check_settings,
)
from course_lib.worlds import minis

RESNET12 = "resnet12"
# Side of the squashed images. Networks of ImageNet want to see more of 84 pixels: of 84, 128, 160 and 224, Lite0 is
# best at 160 on the validation classes of the miniature (1-shot cosine 69.9, 72.7, 75.9, 69.8 %).
SIZES = {RESNET12: 84}
SIZE = 160


@dataclass(frozen=True)
class FewShotTraining:
    """What is trained, and how: the constants of Meta-Baseline for miniImageNet, unless said otherwise."""

    data: str = ""  # folder of miniImageNet or of a miniature; "": mini-imagenet
    backbone: str = RESNET12  # or any of timm's that ends in GAP and one linear layer
    weights: str = "random"  # to start from: "random", "pretrained" (not ResNet-12), or the path of a checkpoint
    size: Side | None = None  # side of the squashed images, pixels; None: 84 for ResNet-12 (80 there), else 160
    epochs: Count = 100  # of stage 1, classification
    batch_size: Count = 128  # of stage 1
    learning_rate: Positive = 0.1  # of stage 1, and a tenth of it in the last tenth of the epochs
    meta_epochs: Count = 20  # of stage 2, episodes
    batches: Count = 200  # in an epoch of stage 2
    episodes: Count = 4  # in a batch of stage 2
    ways: Several = 5  # classes in an episode
    shots: Count = 1  # support images of each
    queries: Count = 15  # query images of each
    meta_learning_rate: Positive = 1e-3  # of stage 2
    temperature: Positive = 10.0  # t at the beginning; a factor, not a divisor
    weight_decay: NotNegative = 5e-4  # of both stages
    drop: PartialShare = resnet12.DROP  # ResNet-12's dropout and DropBlock (Lee et al., 2019; none there)
    workers: Workers = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of what is new in the network, and of the training

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class FewShotEvaluation:
    """What is evaluated, and on which episodes."""

    data: str = ""  # folder of miniImageNet or of a miniature; "": mini-imagenet
    backbone: str = "tf_efficientnet_lite0"  # "resnet12", or any of timm's that ends in GAP and one linear layer
    weights: Literal["pretrained", "random"] = "pretrained"  # without a checkpoint
    checkpoint: str = ""  # a model.safetensors of `train fewshot`, or pretrained.safetensors, of before its episodes
    split: Literal["train", "val", "test"] = "test"  # choose settings on "val" only
    methods: Annotated[tuple[str, ...], tuple(CLASSIFIERS), DISTINCT] = tuple(CLASSIFIERS)  # ways to answer a query
    ways: Several = 5  # classes in an episode
    shots: Annotated[tuple[Count, ...], DISTINCT] = (1, 5)  # support images of each class
    queries: Whole | tuple[Whole, ...] = 15  # of each class, or of the first, second, ... class of an episode
    episodes: Count = 10_000  # for each number of shots
    surest: Count = 8  # queries that rectify a prototype, Z
    epsilon: NotNegative = 10.0  # scale of their weights
    size: Side | None = None  # side of the squashed images, pixels; None: 84 for ResNet-12, else 160
    batch_size: Count = 8  # of images; on a CPU larger batches are slower; take 64 or more on a GPU
    workers: Workers = 0  # processes that read images
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of the episodes, and of random weights

    def __post_init__(self) -> None:
        check_settings(self)
        each = self.queries if isinstance(self.queries, tuple) else (self.queries,) * self.ways
        if len(each) != self.ways or not sum(each):
            raise ValueError(f"queries must be some, of all classes or of each of the {self.ways}, got {self.queries}.")


def few_shot_network(
    backbone: str, weights: str, num_classes: int | None = None, seed: int = 0, drop: float = resnet12.DROP
) -> Backbone:
    """A network in evaluation mode.

    Args:
        backbone: "resnet12", or a name of timm's.
        weights: "pretrained", "random" (from `seed`), or the path of a checkpoint as `train` writes it.
        num_classes: of a new classifier in training; None to evaluate, where the classifier does not matter.
    """
    torch.manual_seed(seed)
    rows, start = None, weights == "pretrained"
    if weights not in shared.WEIGHTS:
        rows, start = len(checkpoints.read(weights)[0].get("classifier.weight", ())) or None, weights
    if backbone == RESNET12:
        model = resnet12.create(rows or num_classes or 1, weights, drop)
    else:
        model = backbones.create(backbone, start, rows)
    if num_classes not in (None, model.classifier.out_features):
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
    return model


# training -------------------------------------------------------------------------------------------------------------


class EpisodeBatches(Sampler[list[int]]):
    """Batches of whole episodes: for each the support images, class after class, then the queries, class after class.

    Args:
        generator: the engine seeds it anew for each epoch.
    """

    def __init__(self, labels: Int[Tensor, " n"], config: FewShotTraining, generator: Generator):
        self.labels, self.config, self.generator = labels, config, generator

    def __len__(self) -> int:
        return self.config.batches

    def __iter__(self) -> Iterator[list[int]]:
        config = self.config
        episodes = config.batches * config.episodes
        drawn = sample(self.labels, config.ways, config.shots, config.queries, episodes, self.generator)
        yield from torch.cat((drawn.support.flatten(1), drawn.query), 1).view(config.batches, -1).tolist()


def episode_terms(ways: int, shots: int, queries: int) -> Terms:
    """The loss of stage 2, of a learner with a `temperature`, and pooled features in the order of `EpisodeBatches`."""
    per_episode = ways * (shots + queries)

    def terms(learner: nn.Module, features: Float[Tensor, "b k"], labels: Int[Tensor, " b"]) -> dict[str, Tensor]:
        if len(features) % per_episode:
            raise ValueError(
                f"Episodes of {per_episode} images were expected, but {len(features)} came. Several processes "
                "share whole episodes: choose a number of episodes in a batch that they divide."
            )
        with torch.autocast(features.device.type, enabled=False):  # fp32 island: cosines
            directions = F.normalize(features.float(), dim=1).view(-1, per_episode, features.shape[1])
            support, query = directions.split((ways * shots, ways * queries), 1)
            logits = learner.temperature * CLASSIFIERS["cosine"](support.unflatten(1, (ways, shots)), query)  # e n q
        target = torch.arange(ways, device=features.device).repeat_interleave(queries).expand(len(logits), -1)
        return {"episodes": F.cross_entropy(logits, target)}

    return terms


@shared.owner("train fewshot")
def train(config: FewShotTraining, folder: Path, progress: bool = True) -> dict[str, list[dict[str, float]]]:
    """Mean loss terms of each epoch of both stages. What was interrupted goes on.

    Writes `pretrained.safetensors` after stage 1 and `model.safetensors` after stage 2, both for `evaluate`.
    """
    data = MiniImageNet(config.data, "train")
    model = few_shot_network(config.backbone, config.weights, len(data.classes), config.seed, config.drop)
    frozen = config.weights != "random"  # BatchNorm then normalises by what it has learnt
    size = config.size or SIZES.get(config.backbone, SIZE)

    def stage(name: str, terms: Terms, dataset: Dataset, batches: Sampler, rate: float, epochs: int) -> list[dict]:
        learner = Learner(model, terms, len(data.classes), frozen_statistics=frozen)
        if name == "episodes":
            learner.temperature = nn.Parameter(torch.tensor(config.temperature))
        trained = [weight for weight in learner.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(trained, rate, 0.9, weight_decay=config.weight_decay)
        drop = MultiStepLR(optimizer, [round(0.9 * epochs) * len(batches)]) if name == "classes" else None
        history = shared.train_on_batches(
            learner, dataset, batches, optimizer, config, folder / name, progress, epochs=epochs, scheduler=drop
        )
        if engine.this_process(config.device).is_main_process:
            file = {"classes": "pretrained.safetensors", "episodes": "model.safetensors"}[name]
            checkpoints.write(folder / file, model)
        return history

    crops = Changed(data, v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]))
    every = RandomSampler(crops, generator=Generator())
    batches = BatchSampler(every, min(config.batch_size, len(data)), drop_last=True)
    return {
        "classes": stage("classes", LOSSES["softmax"], crops, batches, config.learning_rate, config.epochs),
        "episodes": stage(
            "episodes",
            episode_terms(config.ways, config.shots, config.queries),
            Changed(data, v2.Resize((size, size))),
            EpisodeBatches(data.labels, config, Generator()),
            config.meta_learning_rate,
            config.meta_epochs,
        ),
    }


# evaluation -----------------------------------------------------------------------------------------------------------


@shared.owner("evaluate fewshot")
def evaluate(config: FewShotEvaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Accuracies on novel classes: writes `fewshot.json` and `fewshot.md`, returns the former.

    Raises:
        FileNotFoundError: no such data or checkpoint.
        ValueError: classes with too few images for these episodes.
    """
    data = MiniImageNet(config.data, config.split)
    device = engine.this_process(config.device).device
    model = few_shot_network(config.backbone, config.checkpoint or config.weights, seed=config.seed)
    model.to(device, memory_format=torch.channels_last)
    size = config.size or SIZES.get(config.backbone, SIZE)
    features = extract(
        lambda images: model.features(model.normalise(images)).float().mean((-2, -1)),
        data,
        (size, size),
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        progress=progress,
    )
    names = ("split", "backbone", "ways", "queries", "episodes", "surest", "epsilon", "seed")
    result = {
        "settings": {
            "data": Path(config.data).name,
            "fingerprint": fingerprint(Path(config.data)),
            "classes": len(data.classes),
            "images": len(data),
            "weights": Path(config.checkpoint).stem or config.weights,
            "size": size,
            **{name: getattr(config, name) for name in names},
        },
        "versions": versions(),
        "rows": compare(features.to(device), data.labels, config),
    }
    return shared.write(result, table(result), folder / "fewshot")


def compare(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], config: FewShotEvaluation
) -> list[dict[str, Any]]:
    """One row for each number of shots and method, all methods on the same episodes, in percent.

    Each figure is a pair, mean and half of the 95% interval over episodes. "accuracy": of queries; "balanced": mean
    over classes; "gain": balanced accuracy minus that of "cosine" (if it is among the methods), paired episode by
    episode.
    """
    rows = []
    for shots in config.shots:
        generator = Generator().manual_seed(config.seed)
        episodes = sample(labels, config.ways, shots, config.queries, config.episodes, generator)
        options = {"rectified": {"surest": config.surest, "epsilon": config.epsilon}}
        found = {
            method: 100 * recalls(features, episodes, method, **options.get(method, {})) for method in config.methods
        }
        for method, share in found.items():
            balanced = share.nanmean(1)
            compared = method != "cosine" and "cosine" in found
            rows.append(
                {
                    "shots": shots,
                    "method": method,
                    "transductive": method in TRANSDUCTIVE,
                    "accuracy": interval(accuracies(share, episodes.labels)),
                    "balanced": interval(balanced),
                    "gain": interval(balanced - found["cosine"].nanmean(1)) if compared else None,
                }
            )
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, the papers' figures below ours, with what is unclear about them."""
    settings, rows = result["settings"], {}
    for row in result["rows"]:
        rows.setdefault(row["method"], {})[row["shots"]] = row
    queries, shots = settings["queries"], [*next(iter(rows.values()), {})]
    balanced = isinstance(queries, int) or len(set(queries)) == 1
    columns = {"accuracy": "{}-shot accuracy", "balanced": "mean of classes", "gain": "gain over cosine"}
    if balanced:
        del columns["balanced"]
    header = ["prototypes", "transductive", *(name.format(number) for number in shots for name in columns.values())]
    lines = [
        [
            method,
            "yes" if method in TRANSDUCTIVE else "no",
            *(_figure(found[number][name], name == "gain") for number in shots for name in columns),
        ]
        for method, found in rows.items()
    ]
    each = f"{queries} queries of each class"
    if not isinstance(queries, int):
        each = f"{', '.join(map(str, queries))} queries of the classes"
    notes = [
        f"Percent, mean ± half of the 95% interval over {settings['episodes']:,} episodes ({each}; one model, "
        f"{settings['images']:,} images of {settings['classes']} classes). A gain is paired: the same episodes. "
        "Transductive methods see all queries of an episode before they answer; they do not compare with the others. "
        f"Rectified: Z = {settings['surest']}, epsilon = {settings['epsilon']:g}."
    ]
    if not balanced:
        notes[0] += (
            '\nThe "mean of classes" weighs all classes equally however many queries they have; the gain is in it.'
        )
    elif settings["ways"] == 5:
        for name, transductive, figures in published.FEW_SHOT:
            lines.append([name, transductive, *(part for number in shots for part in (figures.get(number, ""), ""))])
        notes.append(
            "Figures of papers are of 84-pixel miniImageNet, 20 test classes, 600 images each. "
            + published.FEW_SHOT_CAVEAT
        )
    if settings["weights"] == "pretrained":
        notes.append(published.IMAGENET_CAVEAT)
    title = (
        f"# {settings['backbone']} ({settings['weights']}, {settings['size']} px), {settings['ways']}-way, "
        f"{settings['split']} classes of {settings['data']}"
    )
    return "\n\n".join([title, "\n".join(shared.markdown(header, lines)), *notes]) + "\n"


def _figure(pair: tuple[float, float] | list[float] | None, signed: bool) -> str:
    if pair is None:
        return ""
    return f"{pair[0]:+.2f} ± {pair[1]:.2f}" if signed else f"{pair[0]:.2f} ± {pair[1]:.2f}"


# commands -------------------------------------------------------------------------------------------------------------


def train_command(config: FewShotTraining, folder: Path) -> None:
    """Train a network on base classes, then on their episodes.

    Args:
        folder: of checkpoints and of the trained model.safetensors
    """
    history = train(shared.prepared(config, folder, minis.mini_imagenet), folder)
    shared.tell(history["classes"] + history["episodes"], folder, "fewshot")


def evaluate_command(config: FewShotEvaluation, folder: Path | None = None) -> None:
    """Measure accuracies of prototypes on novel classes, real or miniature.

    Args:
        folder: of the results; None: in build/fewshot
    """
    config = shared.prepared(config, folder, minis.mini_imagenet)
    shared.evaluated("fewshot", evaluate, table, config, folder)
