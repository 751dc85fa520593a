"""Few-shot learning: ResNet-12 trained on base classes, then on episodes; nearest and rectified prototypes on novel classes.

    python -m course_lib train fewshot --data /data/miniimagenet --backbone resnet12 --folder runs/fewshot
    python -m course_lib evaluate fewshot --data /data/miniimagenet --backbone resnet12 \
        --checkpoint runs/fewshot/model.safetensors
    python -m course_lib evaluate fewshot --queries 15,2,2,2,2           # the miniature, frozen ImageNet features, unbalanced

Shen et al., "Distance-Based Class Activation Map for Metric Learning", section 4.1, explain a ResNet-12, trained "by
meta-learning strategy" as in their reference [7], Liu et al. (BD-CSPN, ECCV 2020). They do not print a recipe. The one here is
Meta-Baseline's (Chen et al., ICCV 2021), with the constants of its released configuration:

    1  classification of the base classes         cross-entropy of .classifier on crops
    2  episodes of base classes                   cross-entropy of  t cos(q, P_c),  t learns along from 10

What differs: the wide ResNet-12 with DropBlock (theirs is narrow, without), 84 pixels (80), and prototypes that are means of
directions, as BD-CSPN has them, in training as in evaluation (theirs are means of features; with one shot that is the same).
They keep the epoch that is best on validation classes; here the last one counts, and `--split val` tells how good it is.
BatchNorm sees support and queries of a batch together in stage 2, as theirs does.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler
from torchvision.transforms import v2

from course_lib import backbones, engine, paths
from course_lib.backbones import Backbone, resnet12
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.evaluate.episodes import METHODS, TRANSDUCTIVE, accuracies, interval, recalls, sample
from course_lib.metric_learning.features import Images, extract
from course_lib.metric_learning.learner import LOSSES, Learner, Terms
from course_lib.worlds import minis

RESNET12 = "resnet12"
STEP: engine.Step = lambda learner, batch: learner.step(*batch)
# Side of the squashed images. Networks of ImageNet want to see more of 84 pixels: of 84, 128, 160 and 224, EfficientNet-Lite0
# is best at 160 on the validation classes of the miniature (1-shot cosine 69.9, 72.7, 75.9, 69.8 %).
SIZES = {RESNET12: 84}
SIZE = 160
# What others report on the test classes of miniImageNet, 5-way: name, is it transductive, {shots: accuracy, %}.
PAPERS = (
    ("CSPN, WRN-28-10 (Liu et al., ECCV 2020)", "no", {1: "61.84", 5: "78.64"}),
    ("BD-CSPN, WRN-28-10 (Liu et al., ECCV 2020)", "yes", {1: "70.31", 5: "81.89"}),
    ("ResNet-12 (Shen et al., section 4.1) [1]", "not said", {1: "77.14 ± 0.42"}),
)
CAVEAT = (
    "[1] Shen et al. explain a ResNet-12 that they trained after Liu et al. and call 77.14 ± 0.42 state of the art in 5-way "
    "1-shot. Liu et al. report 70.31 at best, with a wider network, so the figure is not theirs. The data of the figure, the "
    "episodes, their queries, the size of the images and what ± means are not said. It is quoted, not a target."
)
SEEN = (
    "The network was pretrained on ImageNet, which holds the test classes of miniImageNet: there its figures are no few-shot "
    "learning of classes never seen."
)


@dataclass(frozen=True)
class Training:
    """What is trained, and how: the constants of Meta-Baseline for miniImageNet, unless said otherwise."""

    data: str  # a folder in a layout of miniImageNet
    backbone: str = RESNET12  # or any of timm's that ends in GAP and one linear layer
    weights: str = "random"  # to start from: "random", "pretrained" (not ResNet-12), or the path of a checkpoint
    size: int | None = None  # side of the squashed images, pixels; None: 84 for ResNet-12 (80 there), else 160
    epochs: int = 100  # stage 1 ...
    batch_size: int = 128
    learning_rate: float = 0.1  # ... and a tenth of it in the last tenth of the epochs
    meta_epochs: int = 20  # stage 2 ...
    batches: int = 200  # ... of that many batches ...
    episodes: int = 4  # ... of that many episodes
    ways: int = 5
    shots: int = 1
    queries: int = 15
    meta_learning_rate: float = 1e-3
    temperature: float = 10.0  # t at the beginning; a factor, not a divisor
    weight_decay: float = 5e-4
    drop: float = resnet12.DROP  # ResNet-12's dropout and DropBlock (Lee et al., 2019; none there)
    workers: int = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and on which episodes."""

    data: str  # a folder in a layout of miniImageNet
    backbone: str = "tf_efficientnet_lite0"  # "resnet12", or any of timm's that ends in GAP and one linear layer
    weights: str = "pretrained"  # "pretrained", "random", or the path of a checkpoint as `train` writes it
    split: Literal["train", "val", "test"] = "test"  # choose settings on "val" only
    methods: tuple[str, ...] = tuple(METHODS)
    ways: int = 5
    shots: tuple[int, ...] = (1, 5)
    queries: int | tuple[int, ...] = 15  # of each class, or of the first, second, ... class of an episode
    episodes: int = 10_000
    surest: int = 8  # Z of the rectified prototypes ...
    epsilon: float = 10.0  # ... and the scale of their weights
    size: int | None = None  # side of the squashed images, pixels; None: 84 for ResNet-12, else 160
    batch_size: int = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: int = 0  # processes that read images
    seed: int = 0  # of the episodes, and of random weights
    device: str = "auto"  # "auto", "cpu", "cuda"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"There is no method {unknown[0]!r}; there are: {', '.join(METHODS)}.")


def network(
    backbone: str, weights: str, num_classes: int | None = None, seed: int = 0, drop: float = resnet12.DROP
) -> Backbone:
    """A network in evaluation mode.

    Args:
        backbone: "resnet12", or a name of timm's.
        weights: "pretrained", "random" (from `seed`), or the path of a .safetensors checkpoint as `train` writes it.
        num_classes: of a new classifier in training; None to evaluate, where the classifier does not matter.
    """
    torch.manual_seed(seed)
    path = None if weights in ("pretrained", "random") else Path(weights)
    rows = _classifier_rows(path) if path else None
    if backbone == RESNET12:
        model = resnet12.create(rows or num_classes or 1, weights, drop)
    else:
        model = backbones.create(backbone, path or weights == "pretrained", rows)
    if num_classes is not None and num_classes != model.classifier.out_features:
        model.classifier = nn.Linear(model.classifier.in_features, num_classes)
    return model


def _classifier_rows(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(
            f"A checkpoint was expected at {path}, but there is no such file. Give model.safetensors of a "
            "training, or pretrained.safetensors, which is the same before its episodes."
        )
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("classifier.weight").get_shape()[0]
    except SafetensorError as error:
        raise ValueError(f"{path} is no checkpoint as `train fewshot` writes it: {error}.") from error


# training ----------------------------------------------------------------------------------------------------------------


class Views(Dataset):
    """Images of a data set after a transform, with their labels. Its random numbers are torch's, which the engine seeds."""

    def __init__(self, data: Images, transform: Callable[[Tensor], Tensor]):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return self.transform(image), label


class EpisodeBatches(Sampler[list[int]]):
    """Batches of whole episodes: for each the support images, class after class, then the queries, class after class.

    Args:
        generator: the engine seeds it anew for each epoch.
    """

    def __init__(self, labels: Int[Tensor, " n"], config: Training, generator: Generator):
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
            logits = learner.temperature * METHODS["cosine"](support.unflatten(1, (ways, shots)), query)  # e n q
        target = torch.arange(ways, device=features.device).repeat_interleave(queries).expand(len(logits), -1)
        return {"episodes": F.cross_entropy(logits, target)}

    return terms


def train(config: Training, folder: Path, progress: bool = True) -> dict[str, list[dict[str, float]]]:
    """Mean loss terms of each epoch of both stages. What was interrupted goes on.

    Writes `pretrained.safetensors` after stage 1 and `model.safetensors` after stage 2, both for `evaluate`.
    """
    data = MiniImageNet(config.data, "train")
    model = network(config.backbone, config.weights, len(data.classes), config.seed, config.drop)
    frozen = config.weights != "random"  # BatchNorm then normalises by what it has learnt
    size = config.size or SIZES.get(config.backbone, SIZE)
    history = {
        "classes": _pretrain(
            Learner(model, LOSSES["softmax"], len(data.classes), frozen_statistics=frozen),
            data,
            size,
            config,
            folder / "classes",
            progress,
        )
    }
    _write(model, folder / "pretrained.safetensors")
    terms = episode_terms(config.ways, config.shots, config.queries)
    learner = Learner(model, terms, len(data.classes), frozen_statistics=frozen)
    learner.temperature = nn.Parameter(torch.tensor(config.temperature))
    history["episodes"] = _meta_train(learner, data, size, config, folder / "episodes", progress)
    _write(model, folder / "model.safetensors")
    return history


def _pretrain(
    learner: Learner, data: MiniImageNet, size: int, config: Training, folder: Path, progress: bool
) -> list[dict[str, float]]:
    crops = Views(data, v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]))
    batches = BatchSampler(
        RandomSampler(crops, generator=Generator()), min(config.batch_size, len(data)), drop_last=True
    )
    optimizer = _sgd(learner, config.learning_rate, config)
    scheduler = MultiStepLR(optimizer, [round(0.9 * config.epochs) * len(batches)])
    return engine.train(
        learner,
        STEP,
        DataLoader(crops, batch_sampler=batches, num_workers=config.workers),
        optimizer,
        engine.Plan(config.epochs, config.precision, seed=config.seed),
        scheduler=scheduler,
        folder=folder,
        progress=progress,
    )


def _meta_train(
    learner: Learner, data: MiniImageNet, size: int, config: Training, folder: Path, progress: bool
) -> list[dict[str, float]]:
    whole = Views(data, v2.Resize((size, size), antialias=True))
    batches = EpisodeBatches(data.labels, config, Generator())
    return engine.train(
        learner,
        STEP,
        DataLoader(whole, batch_sampler=batches, num_workers=config.workers),
        _sgd(learner, config.meta_learning_rate, config),
        engine.Plan(config.meta_epochs, config.precision, seed=config.seed),
        folder=folder,
        progress=progress,
    )


def _sgd(learner: Learner, rate: float, config: Training) -> torch.optim.SGD:
    trained = [weight for weight in learner.parameters() if weight.requires_grad]
    return torch.optim.SGD(trained, rate, 0.9, weight_decay=config.weight_decay)


def _write(model: Backbone, path: Path) -> None:
    if engine.this_process().is_main_process:
        save_file({name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}, path)


# evaluation --------------------------------------------------------------------------------------------------------------


def evaluate(config: Evaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Accuracies on novel classes: writes `fewshot.json` and `fewshot.md`, returns the former.

    Raises:
        FileNotFoundError: no such data or checkpoint.
        ValueError: classes with too few images for these episodes, or a file that is no checkpoint.
    """
    data = MiniImageNet(config.data, config.split)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    model = network(config.backbone, config.weights, seed=config.seed).to(device, memory_format=torch.channels_last)
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
    weights = config.weights if config.weights in ("pretrained", "random") else Path(config.weights).stem
    result = {
        "settings": {
            "data": Path(config.data).name,
            "fingerprint": minis.fingerprint(Path(config.data)),
            "split": config.split,
            "classes": len(data.classes),
            "images": len(data),
            "backbone": config.backbone,
            "weights": weights,
            "size": size,
            "ways": config.ways,
            "queries": config.queries,
            "episodes": config.episodes,
            "surest": config.surest,
            "epsilon": config.epsilon,
            "seed": config.seed,
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "rows": compare(features.to(device), data.labels, config),
    }
    paths.write_text(folder / "fewshot.json", json.dumps(result, indent=1) + "\n")
    paths.write_text(folder / "fewshot.md", table(result))
    return result


def compare(features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], config: Evaluation) -> list[dict[str, Any]]:
    """One row for each number of shots and method, all methods on the same episodes, in percent.

    Each figure is a pair, mean and half of the 95% interval over episodes. "accuracy": of queries; "balanced": mean over
    classes; "gain": balanced accuracy minus that of "cosine" (if it is among the methods), paired episode by episode.
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
            gain = (
                interval(share.nanmean(1) - found["cosine"].nanmean(1))
                if "cosine" in found and method != "cosine"
                else None
            )
            rows.append(
                {
                    "shots": shots,
                    "method": method,
                    "transductive": method in TRANSDUCTIVE,
                    "accuracy": interval(accuracies(share, episodes.labels)),
                    "balanced": interval(share.nanmean(1)),
                    "gain": gain,
                }
            )
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, the papers' figures below ours, with what is unclear about them."""
    settings, rows = result["settings"], result["rows"]
    queries = settings["queries"]
    balanced = isinstance(queries, int) or len(set(queries)) == 1
    shots = list(dict.fromkeys(row["shots"] for row in rows))
    columns = ["accuracy", "gain"] if balanced else ["accuracy", "balanced", "gain"]
    names = ["prototypes", "transductive"]
    for number in shots:
        names += [f"{number}-shot accuracy", *([] if balanced else ["mean of classes"]), "gain over cosine"]
    lines = [
        f"# {settings['backbone']} ({settings['weights']}, {settings['size']} px), {settings['ways']}-way, "
        f"{settings['split']} classes of {settings['data']}",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [method, "yes" if method in TRANSDUCTIVE else "no"]
        for number in shots:
            row = next(row for row in rows if (row["shots"], row["method"]) == (number, method))
            cells += [_figure(row[name], name == "gain") for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    beside = settings["ways"] == 5 and balanced
    if beside:
        for name, transductive, figures in PAPERS:
            cells = [name, transductive]
            for number in shots:
                cells += [figures.get(number, ""), *[""] * (len(columns) - 1)]
            lines.append(f"| {' | '.join(cells)} |")
    each = (
        f"{queries} queries of each class"
        if isinstance(queries, int)
        else f"{', '.join(map(str, queries))} queries of the classes"
    )
    lines += [
        "",
        f"Percent, mean ± half of the 95% interval over {settings['episodes']:,} episodes ({each}; one model, "
        f"{settings['images']:,} images of {settings['classes']} classes). A gain is paired: the same episodes. Transductive "
        "methods see all queries of an episode before they answer; they do not compare with the others. Rectified: "
        f"Z = {settings['surest']}, epsilon = {settings['epsilon']:g}.",
    ]
    if not balanced:
        lines.append(
            'The "mean of classes" weighs all classes equally however many queries they have; the gain is in it.'
        )
    if beside:
        lines += ["", "Figures of papers are of 84-pixel miniImageNet, 20 test classes, 600 images each. " + CAVEAT]
    if settings["weights"] == "pretrained":
        lines += ["", SEEN]
    return "\n".join([*lines, ""])


def _figure(pair: tuple[float, float] | list[float] | None, signed: bool) -> str:
    if pair is None:
        return ""
    return f"{pair[0]:+.2f} ± {pair[1]:.2f}" if signed else f"{pair[0]:.2f} ± {pair[1]:.2f}"


# commands ----------------------------------------------------------------------------------------------------------------


def train_main(argv: list[str]) -> int:
    """`python -m course_lib train fewshot`: a network trained on base classes, then on their episodes."""
    parser = _parser("train fewshot", train_main, Training)
    for name, kind, what in (
        ("epochs", int, "of stage 1, classification"),
        ("batch-size", int, "of stage 1"),
        ("learning-rate", float, "of stage 1"),
        ("meta-epochs", int, "of stage 2, episodes"),
        ("batches", int, "in an epoch of stage 2"),
        ("episodes", int, "in a batch of stage 2"),
        ("ways", int, "classes in an episode"),
        ("shots", int, "support images of each"),
        ("queries", int, "of each class"),
        ("meta-learning-rate", float, "of stage 2"),
        ("drop", float, "share that ResNet-12 drops"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, help=f"{what} (default: {getattr(Training, name.replace('-', '_'))})"
        )
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    parser.add_argument(
        "--folder", type=Path, required=True, help="of checkpoints and of the trained model.safetensors"
    )
    chosen = vars(parser.parse_args(argv))
    folder = chosen.pop("folder")
    try:
        history = train(Training(**_with_data(chosen)), folder)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    if engine.this_process().is_main_process:
        for stage, rows in history.items():
            for epoch, row in enumerate(rows, 1):
                print(f"{stage:8} epoch {epoch:3}  " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        print(
            f"Trained: {folder / 'model.safetensors'}. Evaluate it: python -m course_lib evaluate fewshot --checkpoint ..."
        )
    return 0


def evaluate_main(argv: list[str]) -> int:
    """`python -m course_lib evaluate fewshot`: accuracies of prototypes on novel classes, real or miniature."""
    parser = _parser("evaluate fewshot", evaluate_main, Evaluation)
    parser.add_argument("--split", choices=("train", "val", "test"), help=f"(default: {Evaluation.split})")
    parser.add_argument(
        "--methods",
        type=lambda text: tuple(text.split(",")),
        metavar="NAME,NAME,...",
        help=f"of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--ways", type=int, help=f"classes in an episode (default: {Evaluation.ways})")
    parser.add_argument("--shots", type=_numbers, metavar="K,K,...", help="support images of each class (default: 1,5)")
    parser.add_argument(
        "--queries",
        type=lambda text: _numbers(text) if "," in text else int(text),
        metavar="Q or Q,Q,...",
        help=f"of each class, or of the first, second, ... of an episode (default: {Evaluation.queries})",
    )
    parser.add_argument("--episodes", type=int, help=f"(default: {Evaluation.episodes})")
    parser.add_argument(
        "--surest", type=int, help=f"queries that rectify a prototype, Z (default: {Evaluation.surest})"
    )
    parser.add_argument("--epsilon", type=float, help=f"scale of their weights (default: {Evaluation.epsilon:g})")
    parser.add_argument("--batch-size", type=int, help=f"of images (default: {Evaluation.batch_size})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: in build/fewshot)")
    chosen = vars(parser.parse_args(argv))
    out = chosen.pop("out", None)
    try:
        config = Evaluation(**_with_data(chosen))
        name = f"{config.backbone}-{Path(config.weights).stem}-{Path(config.data).name}"
        print(table(evaluate(config, out or paths.results().parent / "fewshot" / name)))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser(command: str, main: Callable[[list[str]], int], config: type) -> argparse.ArgumentParser:
    """A parser with the options that training and evaluation share. What is not given does not appear: defaults hold."""
    parser = argparse.ArgumentParser(
        prog=f"python -m course_lib {command}", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--data", help="folder of miniImageNet or of a miniature (default: mini-imagenet)")
    parser.add_argument("--backbone", help=f"{RESNET12} or any of timm's (default: {config.backbone})")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--pretrained",
        dest="weights",
        action="store_const",
        const="pretrained",
        help="ImageNet weights, which ResNet-12 has not",
    )
    start.add_argument("--random", dest="weights", action="store_const", const="random", help="random weights")
    start.add_argument(
        "--checkpoint",
        dest="weights",
        metavar="PATH",
        help=f"weights from a file, as `train` writes it (default: {config.weights} ones)",
    )
    parser.add_argument(
        "--size",
        type=int,
        help=f"side of the squashed images, pixels (default: {SIZES[RESNET12]} for {RESNET12}, else {SIZE})",
    )
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--seed", type=int, help="(default: 0)")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _with_data(chosen: dict[str, Any]) -> dict[str, Any]:
    """Adds the option `data` if it was not given: the miniature, written if it is not there."""
    return chosen if "data" in chosen else chosen | {"data": str(minis.mini_imagenet())}
