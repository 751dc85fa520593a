"""Image retrieval: an embedding trained on half of the classes, and how well it ranks the images of the other half.

    python -m course_lib train retrieval --last-block --folder runs/birds                             (a CPU, half a minute)
    python -m course_lib evaluate retrieval --checkpoint runs/birds/model.safetensors
    python -m course_lib train retrieval --backbone resnet50 --loss ProxyAnchorLoss --epochs 60 --data /data/cub --folder ...

The protocol of Oh Song et al., CVPR 2016, on CUB-200-2011: classes of test images were never trained on, and every test image is
a query for all others. The embedding is e = A GAP(F) + a, of length 1, where A, a take the place of the classifier; images are
compared by e, in Euclidean distance or by cosine, which is the same order. Beside it stand the pooled features GAP(F) themselves,
which need no training: what it brings is the difference.

Shen et al. say of their retrieval model that it is a ResNet-50, and no more. The recipe here is the usual one: AdamW, rate 1e-4,
halved every ten epochs, batches of P classes with K images, random resized crops and flips, BatchNorm with the statistics of
ImageNet. What differs from it: test images are squashed to a square without a crop, and no epoch trains the new layer alone.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from course_lib import backbones, engine, paths
from course_lib.backbones import Backbone
from course_lib.data.cub import Cub
from course_lib.evaluate.ranking import retrieval
from course_lib.experiments.localise import PAPER as NAMES
from course_lib.metric_learning.features import Images, extract
from course_lib.metric_learning.learner import BalancedBatches, Learner, check_trunk, trunk
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax
from course_lib.worlds import minis

KS = (1, 2, 4, 8)
PROXY_RATE = 1e-2  # of a loss's own weights: a hundred times that of the network, in published recipes
# Of embeddings of length 1. Every other name is that of a loss of pytorch-metric-learning.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "triplet": partial(batch_hard_triplet, margin=0.1),
    "prototype-cosine": partial(batch_prototype_softmax, metric="cosine", scale=30.0),
}
# CUB-200-2011: Recall@1, 2, 4, 8 in %, and what to know before comparing.
PUBLISHED = {
    "multi-similarity loss (Wang et al., CVPR 2019)": (
        (65.7, 77.0, 86.3, 91.2),
        "BN-Inception, 512 dimensions; BatchNorm frozen in the code, unmentioned in the paper",
    ),
    "Proxy-Anchor loss (Kim et al., CVPR 2020)": (
        (69.9, 79.6, 86.6, 91.4),
        "ResNet-50, 512 dimensions, of the released model; pools by mean plus maximum",
    ),
}


@dataclass(frozen=True)
class Training:
    """What is trained, and how."""

    data: str  # a folder in the layout of CUB-200-2011
    backbone: str = "tf_efficientnet_lite0"  # "resnet50", or any of timm's that ends in GAP and one linear layer
    weights: Literal["pretrained", "random"] = "pretrained"  # to start from
    loss: str = "triplet"  # a name of LOSSES, or of a loss of pytorch-metric-learning
    dimensions: int = 512  # of the embedding
    last_block: bool = False  # train the last block and the embedding only, on features made once
    epochs: int = 10
    classes: int = 16  # P classes ...
    images: int = 4  # ... of K images make a batch
    learning_rate: float | None = None  # None: 1e-4, or 1e-3 for the last block alone
    weight_decay: float = 1e-4
    size: int = 224  # side of the square images, pixels
    workers: int = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and on what."""

    data: str  # a folder in the layout of CUB-200-2011
    backbone: str = "tf_efficientnet_lite0"  # as in training
    weights: str = "pretrained"  # "pretrained", "random", or the path of a checkpoint
    size: int = 224  # side of the squashed images, pixels
    batch_size: int = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: int = 0  # processes that read images
    seed: int = 0  # of random weights


class Crops(Dataset):
    """Training images: a random part of 8 % to all of the area, resized to a square, and a random flip.

    Random numbers come from torch's generator, which the engine seeds for each item.
    """

    def __init__(self, data: Images, size: int):
        self.data, self.change = (
            data,
            v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]),
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 size size"], int]:
        image, label = self.data[index]
        return self.change(image), label


def train(config: Training, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss of each epoch; writes `model.safetensors` for `evaluate`. What was interrupted goes on."""
    data = Cub(config.data, "train")
    torch.manual_seed(config.seed)
    model = backbones.create(_timm(config.backbone), config.weights == "pretrained", config.dimensions)
    learner = Learner(model, _terms, len(data.classes), config.last_block, config.weights != "random")
    model.classifier.requires_grad_(True)  # it is the embedding here
    learner.loss = metric_loss(config.loss, len(data.classes), config.dimensions)
    dataset = Crops(data, config.size)
    if config.last_block:
        check_trunk(model)
        device = engine.this_process().device
        model.to(device, memory_format=torch.channels_last)
        dataset = TensorDataset(
            extract(
                partial(trunk, model),
                data,
                (config.size, config.size),
                device=device,
                workers=config.workers,
                progress=progress,
            ),
            data.labels,
        )
    loader = DataLoader(
        dataset,
        batch_sampler=BalancedBatches(data.labels, config.classes, config.images, Generator()),
        num_workers=config.workers,
    )
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    if isinstance(learner.loss, nn.Module) and list(learner.loss.parameters()):
        groups.append({"params": list(learner.loss.parameters()), "lr": PROXY_RATE})
    rate = config.learning_rate or (1e-3 if config.last_block else 1e-4)
    optimizer = torch.optim.AdamW(groups, rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10 * len(loader), 0.5)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed)
    history = engine.train(
        learner,
        lambda model, batch: model.step(*batch),
        loader,
        optimizer,
        plan,
        scheduler=scheduler,
        folder=folder,
        progress=progress,
    )
    if engine.this_process().is_main_process:
        state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"loss": config.loss, "classifier": "embedding"})
    return history


def metric_loss(name: str, num_classes: int, dimensions: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of (embeddings of length 1, labels): one of LOSSES, or of pytorch-metric-learning, as it comes from there.

    Losses with weights of their own, such as proxies, get the numbers of classes and dimensions.
    """
    if name in LOSSES:
        return LOSSES[name]
    if find_spec("pytorch_metric_learning") is None:
        raise ValueError(
            f"{name!r} is none of our losses ({', '.join(LOSSES)}), and pytorch-metric-learning, which may have it, "
            "is not installed: pip install pytorch-metric-learning"
        )
    from pytorch_metric_learning import losses

    found = getattr(losses, name, None)
    if not (isinstance(found, type) and issubclass(found, losses.BaseMetricLossFunction)):
        raise ValueError(
            f"There is no loss {name!r}; there are {', '.join(LOSSES)}, and those of pytorch-metric-learning, such as "
            "ProxyAnchorLoss, MultiSimilarityLoss or ArcFaceLoss."
        )
    sizes = {"num_classes": num_classes, "embedding_size": dimensions}
    return found(**{size: value for size, value in sizes.items() if size in inspect.signature(found).parameters})


def load(backbone: str, weights: str, seed: int = 0) -> tuple[Backbone, str | None]:
    """A network, and the loss that made an embedding of its linear layer; None if that layer is none.

    Only checkpoints that `train` wrote hold an embedding. Of others the pooled features can be compared.

    Args:
        weights: "pretrained", "random" (from `seed`) or the path of a .safetensors file.
    """
    if weights in ("pretrained", "random"):
        torch.manual_seed(seed)
        return backbones.create(_timm(backbone), weights == "pretrained"), None
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"A checkpoint was expected at {weights}, but there is no such file. `train` writes "
            "model.safetensors into its folder."
        )
    with safe_open(weights, "pt") as file:
        rows, about = file.get_slice("classifier.weight").get_shape()[0], file.metadata() or {}
    return backbones.create(_timm(backbone), weights, rows), about["loss"] if about.get(
        "classifier"
    ) == "embedding" else None


def embedding(model: Backbone, pooled: Float[Tensor, "n k"]) -> Float32[Tensor, "n d"]:
    """Embeddings of length 1 from pooled features."""
    return F.normalize(model.classifier(pooled).float(), dim=1)  # fp32 island: a norm


def pooled_features(
    model: Backbone, data: Images, size: int = 224, *, batch_size: int = 8, workers: int = 0, progress: bool = True
) -> Float[Tensor, "n k"]:
    """Pooled features of all images, squashed to a square of `size` pixels, on the CPU."""
    return extract(
        lambda images: model.features(model.normalise(images)).mean((-2, -1)),
        data,
        (size, size),
        batch_size=batch_size,
        workers=workers,
        device=model.mean.device,
        progress=progress,
    )


def evaluate(config: Evaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Recall@K, R-precision and MAP@R of the test classes; writes `retrieval.json` and `retrieval.md`, returns the former."""
    data = Cub(config.data, "test")
    model, loss = load(config.backbone, config.weights, config.seed)
    model.to(engine.this_process().device, memory_format=torch.channels_last)
    pooled = pooled_features(
        model, data, config.size, batch_size=config.batch_size, workers=config.workers, progress=progress
    ).to(model.mean.device)
    compared = {"pooled features, cosine": F.normalize(pooled, dim=1), "pooled features, Euclidean": pooled}
    if loss is not None:
        with torch.inference_mode():
            compared = {"embedding": embedding(model, pooled)} | compared
    found = {name: retrieval(features, data.labels, KS) for name, features in compared.items()}
    rows = {
        name: {
            **{f"recall@{k}": 100 * share for k, share in row.recall.items()},
            "r_precision": 100 * row.r_precision,
            "map@r": 100 * row.map_at_r,
        }
        for name, row in found.items()
    }
    one = next(iter(found.values()))
    result = {
        "settings": asdict(config)
        | {
            "data": Path(config.data).name,
            "weights": Path(config.weights).name,
            "loss": loss,
            "fingerprint": minis.fingerprint(Path(config.data)),
        },
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "queries": one.queries,
        "without_match": one.without_match,
        "classes": len(data.classes),
        "rows": rows,
    }
    paths.write_text(folder / "retrieval.json", json.dumps(result, indent=1) + "\n")
    paths.write_text(folder / "retrieval.md", table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, in percent, with published figures below and what keeps them from being the same measurement."""
    settings, names = result["settings"], [*(f"R@{k}" for k in KS), "R-precision", "MAP@R"]
    lines = [
        f"# {settings['backbone']} ({settings['loss'] or settings['weights']}), {result['queries']} queries of {settings['data']}, "
        f"{result['classes']} classes never trained on",
        "",
        f"| compared by | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    lines += [
        f"| {name} | {' | '.join(f'{figure:.1f}' for figure in row.values())} |" for name, row in result["rows"].items()
    ]
    lines += [
        f"| *published, CUB-200-2011:* {name} | {' | '.join(map(str, recall))} | | |"
        for name, (recall, _) in PUBLISHED.items()
    ]
    alone = {0: "", 1: " 1 image is the only one of its class and no query."}.get(
        result["without_match"], f" {result['without_match']} images are the only ones of their classes and no queries."
    )
    notes = "; ".join(f"{name.partition(' (')[0]}: {note}" for name, (_, note) in PUBLISHED.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Each image is a query for all others, without itself.{alone}",
            f"Published: {notes}. Both resize, then crop the centre; here images are squashed. Figures on a miniature and on the "
            "benchmark do not compare.",
            "",
        ]
    )


def _terms(learner: Learner, pooled: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": learner.loss(embedding(learner.backbone, pooled), labels)}


def _timm(backbone: str) -> str:
    """timm's name of a backbone; those of the papers get torchvision's first weights."""
    return NAMES.get(backbone, (backbone,))[0]


def train_main(argv: list[str]) -> int:
    """`python -m course_lib train retrieval`: an embedding in which images of a class are near each other."""
    parser = _parser("train", train_main, Training)
    parser.add_argument(
        "--loss", help=f"{', '.join(LOSSES)}, or a loss of pytorch-metric-learning (default: {Training.loss})"
    )
    parser.add_argument("--dimensions", type=int, help=f"of the embedding (default: {Training.dimensions})")
    parser.add_argument(
        "--last-block", action="store_true", help="train the last block only, on cached features (for a CPU)"
    )
    parser.add_argument("--epochs", type=int, help=f"(default: {Training.epochs})")
    parser.add_argument("--learning-rate", type=float, help="(default: 1e-4, or 1e-3 for the last block)")
    parser.add_argument("--classes", type=int, help=f"in a batch (default: {Training.classes})")
    parser.add_argument("--images", type=int, help=f"of each class in a batch (default: {Training.images})")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    parser.add_argument(
        "--folder", type=Path, required=True, help="of checkpoints and of the trained model.safetensors"
    )
    chosen = vars(parser.parse_args(argv))
    folder = chosen.pop("folder")

    def work() -> None:
        history = train(Training(**_with_data(chosen)), folder)
        engine.tell(history, folder, "retrieval")

    return _answer(work)


def evaluate_main(argv: list[str]) -> int:
    """`python -m course_lib evaluate retrieval`: Recall@K, R-precision and MAP@R, on real or miniature data."""
    parser = _parser("evaluate", evaluate_main, Evaluation)
    parser.add_argument(
        "--checkpoint", dest="weights", metavar="PATH", help="weights from a file, as `train` writes it"
    )
    parser.add_argument("--batch-size", type=int, help=f"(default: {Evaluation.batch_size})")
    parser.add_argument("--out", type=Path, help="folder of the results (default: in build/retrieval)")
    chosen = vars(parser.parse_args(argv))
    out = chosen.pop("out", None)

    def work() -> None:
        config = Evaluation(**_with_data(chosen))
        name = f"{config.backbone}-{Path(config.weights).parent.name or config.weights}-{Path(config.data).name}"
        print(table(evaluate(config, out or paths.results().parent / "retrieval" / name)))

    return _answer(work)


def _parser(verb: str, command: Callable, config: type) -> argparse.ArgumentParser:
    """Options that training and evaluation share. What is not given does not appear: the defaults of `config` hold."""
    parser = argparse.ArgumentParser(
        prog=f"python -m course_lib {verb} retrieval", description=command.__doc__, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--data", help="folder of CUB-200-2011 or of a miniature (default: mini-cub)")
    parser.add_argument("--backbone", help=f"resnet50, or any of timm's (default: {config.backbone})")
    parser.add_argument(
        "--random", dest="weights", action="store_const", const="random", help="random weights (default: ImageNet's)"
    )
    parser.add_argument("--size", type=int, help=f"of the square images, pixels (default: {config.size})")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0)")
    parser.add_argument("--seed", type=int, help="(default: 0)")
    return parser


def _with_data(chosen: dict[str, Any]) -> dict[str, Any]:
    return chosen if "data" in chosen else chosen | {"data": str(minis.mini_cub())}


def _answer(work: Callable[[], None]) -> int:
    """The exit code; what went wrong is printed as a sentence."""
    try:
        work()
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
