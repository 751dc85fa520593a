"""Image retrieval: an embedding trained on half of the classes, and how well it ranks the images of the other half.

    python -m course_lib train retrieval --last-block --folder runs/birds                         (a CPU, half a minute)
    python -m course_lib evaluate retrieval --checkpoint runs/birds/model.safetensors
    python -m course_lib train retrieval --backbone resnet50 --loss ProxyAnchorLoss --epochs 60 --data PATH --folder ...

The protocol of Oh Song et al., CVPR 2016, on CUB-200-2011: classes of test images were never trained on, and every test
image is a query for all others. The embedding is e = A GAP(F) + a, of length 1, where A, a take the place of the
classifier; images are compared by e, in Euclidean distance or by cosine, which is the same order. Beside it stand the
pooled features GAP(F) themselves, which need no training: what it brings is the difference.

Shen et al. say of their retrieval model that it is a ResNet-50, and no more. The recipe here is the usual one: AdamW,
rate 1e-4, halved every ten epochs, batches of P classes with K images, random resized crops and flips, BatchNorm with
the statistics of ImageNet. What differs from it: test images are squashed to a square without a crop, and no epoch
trains the new layer alone.
"""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from course_lib import backbones, checkpoints, engine
from course_lib.backbones import Backbone
from course_lib.data.cub import Cub
from course_lib.data.miniature import fingerprint
from course_lib.data.wrappers import Changed
from course_lib.evaluate import ranking
from course_lib.experiments import shared
from course_lib.lesson import versions
from course_lib.metric_learning.features import extract, trunk_features
from course_lib.metric_learning.learner import EMBEDDING_LOSSES, BalancedBatches, Learner, embedding
from course_lib.published import RETRIEVAL
from course_lib.settings import Count, NotNegative, Positive, RandomSeed, Several, Side, Workers, check_settings
from course_lib.worlds import minis

PROXY_RATE = 1e-2  # of a loss's own weights: a hundred times that of the network, in published recipes


@dataclass(frozen=True)
class RetrievalTraining:
    """What is trained, and how."""

    data: str = ""  # folder of CUB-200-2011 or of a miniature; "": mini-cub
    backbone: str = "tf_efficientnet_lite0"  # "resnet50", or any of timm's that ends in GAP and one linear layer
    weights: Literal["pretrained", "random"] = "pretrained"  # to start from
    loss: str = "triplet"  # triplet, prototype-cosine, or the name of a loss of pytorch-metric-learning
    dimensions: Count = 512  # of the embedding
    last_block: bool = False  # train the last block and the embedding only, on features made once (for a CPU)
    epochs: Count = 10  # passes over the data
    classes: Several = 16  # P classes ...
    images: Count = 4  # ... of K images make a batch
    learning_rate: Positive | None = None  # None: 1e-4, or 1e-3 for the last block alone
    weight_decay: NotNegative = 1e-4  # of the network
    size: Side = 224  # side of the square images, pixels
    workers: Workers = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of what is new in the network, and of the training

    def __post_init__(self) -> None:
        check_settings(self)
        metric_loss(self.loss, 2, 2)  # an unknown one is refused now


@dataclass(frozen=True)
class RetrievalEvaluation:
    """What is evaluated, and on what."""

    data: str = ""  # folder of CUB-200-2011 or of a miniature; "": mini-cub
    backbone: str = "tf_efficientnet_lite0"  # as in training
    weights: Literal["pretrained", "random"] = "pretrained"  # without a checkpoint
    checkpoint: str = (
        ""  # a model.safetensors of `train retrieval`; of other trainings the pooled features are compared
    )
    size: Side = 224  # side of the squashed images, pixels
    batch_size: Count = 8  # on a CPU larger batches are slower; take 64 or more on a GPU
    workers: Workers = 0  # processes that read images
    device: str = "auto"  # or "cpu", "cuda"
    seed: RandomSeed = 0  # of random weights

    def __post_init__(self) -> None:
        check_settings(self)


@shared.owner("train retrieval")
def train(config: RetrievalTraining, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss of each epoch; writes `model.safetensors` for `evaluate`. What was interrupted goes on."""
    data = Cub(config.data, "train")
    torch.manual_seed(config.seed)
    model = backbones.create(shared.timm_name(config.backbone), config.weights == "pretrained", config.dimensions)
    learner = Learner(model, _terms, len(data.classes), config.last_block, config.weights != "random")
    model.classifier.requires_grad_(True)  # it is the embedding here
    learner.loss = metric_loss(config.loss, len(data.classes), config.dimensions)
    batches = BalancedBatches(data.labels, config.classes, config.images, Generator())
    process = engine.this_process(config.device)
    dataset = Changed(data, v2.Compose([v2.RandomResizedCrop(config.size), v2.RandomHorizontalFlip()]))
    if config.last_block:
        options = {"device": process.device, "workers": config.workers, "progress": progress}
        dataset = TensorDataset(trunk_features(model, data, config.size, **options), data.labels)
    groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
    if isinstance(learner.loss, nn.Module) and list(learner.loss.parameters()):
        groups.append({"params": list(learner.loss.parameters()), "lr": PROXY_RATE})
    rate = config.learning_rate or (1e-3 if config.last_block else 1e-4)
    optimizer = torch.optim.AdamW(groups, rate, weight_decay=config.weight_decay)
    halved = torch.optim.lr_scheduler.StepLR(optimizer, 10 * len(batches), 0.5)
    history = shared.train_on_batches(learner, dataset, batches, optimizer, config, folder, progress, scheduler=halved)
    if process.is_main_process:
        checkpoints.write(folder / "model.safetensors", model, {"loss": config.loss, "classifier": "embedding"})
    return history


def _terms(learner: Learner, pooled: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": learner.loss(embedding(learner.backbone, pooled), labels)}


def metric_loss(name: str, num_classes: int, dimensions: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of (embeddings of length 1, labels): one of EMBEDDING_LOSSES, or of pytorch-metric-learning.

    Losses with weights of their own, such as proxies, get the numbers of classes and dimensions.
    """
    if name in EMBEDDING_LOSSES:
        return EMBEDDING_LOSSES[name]
    try:
        from pytorch_metric_learning import losses
    except ImportError:
        raise ValueError(
            f"{name!r} is none of our losses ({', '.join(EMBEDDING_LOSSES)}), and pytorch-metric-learning, which may "
            "have it, is not installed: pip install pytorch-metric-learning"
        ) from None
    found = getattr(losses, name, None)
    if not (isinstance(found, type) and issubclass(found, losses.BaseMetricLossFunction)):
        raise ValueError(
            f"There is no loss {name!r}; there are {', '.join(EMBEDDING_LOSSES)}, and those of "
            "pytorch-metric-learning, such as ProxyAnchorLoss, MultiSimilarityLoss or ArcFaceLoss."
        )
    sizes = {"num_classes": num_classes, "embedding_size": dimensions}
    return found(**{size: value for size, value in sizes.items() if size in inspect.signature(found).parameters})


def load(backbone: str, weights: str, seed: int = 0) -> tuple[Backbone, str | None]:
    """A network, and the loss that made an embedding of its linear layer; None if that layer is none.

    Only checkpoints that `train` wrote hold an embedding. Of others the pooled features can be compared.

    Args:
        weights: "pretrained", "random" (from `seed`) or the path of a checkpoint.
    """
    torch.manual_seed(seed)
    if weights in shared.WEIGHTS:
        return backbones.create(shared.timm_name(backbone), weights == "pretrained"), None
    state, about = checkpoints.read(weights)
    rows = len(state.get("classifier.weight", ())) or None
    model = backbones.create(shared.timm_name(backbone), weights, rows)
    return model, about["loss"] if about.get("classifier") == "embedding" else None


@shared.owner("evaluate retrieval")
def evaluate(config: RetrievalEvaluation, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Recall@K, R-precision and MAP@R of the test classes.

    Writes `retrieval.json` and `retrieval.md`, returns the former.
    """
    data = Cub(config.data, "test")
    device = engine.this_process(config.device).device
    model, loss = load(config.backbone, config.checkpoint or config.weights, config.seed)
    model.to(device, memory_format=torch.channels_last)
    pooled = extract(
        lambda images: model.features(model.normalise(images)).mean((-2, -1)),
        data,
        (config.size, config.size),
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        progress=progress,
    ).to(device)
    compared = {"pooled features, cosine": F.normalize(pooled, dim=1), "pooled features, Euclidean": pooled}
    if loss is not None:
        with torch.inference_mode():
            compared = {"embedding": embedding(model, pooled)} | compared
    found = {name: ranking.retrieval(features, data.labels, ranking.KS) for name, features in compared.items()}
    one = found["pooled features, cosine"]
    result = {
        "settings": asdict(config)
        | {
            "data": Path(config.data).name,
            "checkpoint": Path(config.checkpoint).name,
            "loss": loss,
            "fingerprint": fingerprint(Path(config.data)),
        },
        "versions": versions(),
        "queries": one.queries,
        "without_match": one.without_match,
        "classes": len(data.classes),
        "rows": {
            name: {
                **{f"recall@{k}": 100 * share for k, share in row.recall.items()},
                "r_precision": 100 * row.r_precision,
                "map@r": 100 * row.map_at_r,
            }
            for name, row in found.items()
        },
    }
    return shared.write(result, table(result), folder / "retrieval")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, in percent; published figures below, and why they are not the same measurement."""
    settings = result["settings"]
    made_by = settings["loss"] or settings["checkpoint"] or settings["weights"]
    header = ["compared by", *(f"R@{k}" for k in ranking.KS), "R-precision", "MAP@R"]
    lines = [[name, *(f"{figure:.1f}" for figure in row.values())] for name, row in result["rows"].items()]
    lines += [
        [f"*published, CUB-200-2011:* {name}", *map(str, recall), "", ""] for name, (recall, _) in RETRIEVAL.items()
    ]
    alone = {0: "", 1: " 1 image is the only one of its class and no query."}.get(
        result["without_match"], f" {result['without_match']} images are the only ones of their classes and no queries."
    )
    notes = "; ".join(f"{name.partition(' (')[0]}: {note}" for name, (_, note) in RETRIEVAL.items())
    return "\n".join(
        [
            f"# {settings['backbone']} ({made_by}), {result['queries']} queries of {settings['data']}, "
            f"{result['classes']} classes never trained on",
            "",
            *shared.markdown(header, lines),
            "",
            f"Each image is a query for all others, without itself.{alone}",
            f"Published: {notes}. Both resize, then crop the centre; here images are squashed. Figures on a miniature "
            "and on the benchmark do not compare.",
            "",
        ]
    )


def train_command(config: RetrievalTraining, folder: Path) -> None:
    """Train an embedding in which images of a class are near each other.

    Args:
        folder: of checkpoints and of the trained model.safetensors
    """
    history = train(shared.prepared(config, folder, minis.mini_cub), folder)
    shared.tell(history, folder, "retrieval")


def evaluate_command(config: RetrievalEvaluation, folder: Path | None = None) -> None:
    """Measure Recall@K, R-precision and MAP@R, on real or miniature data.

    Args:
        folder: of the results; None: in build/retrieval
    """
    shared.evaluated("retrieval", evaluate, table, shared.prepared(config, folder, minis.mini_cub), folder)
