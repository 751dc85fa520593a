"""Training for localisation: one backbone, six losses, whole images or the last block on cached features.

    python -m course_lib train localise --loss triplet --last-block --folder runs/triplet

Shen et al. train "softmax-based models" and "distance-based metric learning models" (section 3) and say no more. Here each
loss stands on the pooled features that Dist-CAM compares, with no embedding layer after them. Metric losses see P classes of K
images in a batch (Hermans et al., 2017). BatchNorm keeps its statistics unless the weights start from random ones: those of a
small batch of few classes are not those of the data. Among several processes each one compares the classes of its own share.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, TensorDataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import engine
from course_lib.backbones import Backbone
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.experiments.localise import add_data, add_options, network
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax, center_loss

SCALE = 128.0  # of a mean over channels, so that a distance means the same at 512 and 2048 channels
COSINE_SCALE = 30.0
CENTER_WEIGHT, CENTER_RATE = 5e-4, 0.5  # as in Luo et al., "Bag of Tricks", CVPR Workshops 2019

# Named loss terms of (learner, pooled features b k, labels b).
Terms = Callable[["Learner", Tensor, Tensor], dict[str, Tensor]]
LOSSES: dict[str, Terms] = {
    "softmax": lambda learner, query, labels: {"softmax": F.cross_entropy(learner.backbone.classifier(query), labels)},
    "prototype-l1": lambda learner, query, labels: {
        "prototype": batch_prototype_softmax(query, labels, "l1", SCALE / query.shape[1])
    },
    "prototype-l2": lambda learner, query, labels: {
        "prototype": batch_prototype_softmax(query, labels, "l2", SCALE / query.shape[1])
    },
    "prototype-cosine": lambda learner, query, labels: {
        "prototype": batch_prototype_softmax(query, labels, "cosine", COSINE_SCALE)
    },
    "triplet": lambda learner, query, labels: {"triplet": batch_hard_triplet(query, labels)},
    "center": lambda learner, query, labels: {
        "softmax": F.cross_entropy(learner.backbone.classifier(query), labels),
        "center": CENTER_WEIGHT * center_loss(query, labels, learner.centers),
    },
}
CLASSIFYING = ("softmax", "center")  # the losses that train the classifier
# Learning rates at which fine-tuning moves and no more: with triplets at 0.01 most channels die and the rest saturate.
RATES = {
    "softmax": 1e-2,
    "prototype-l1": 1e-3,
    "prototype-l2": 1e-3,
    "prototype-cosine": 1e-3,
    "triplet": 3e-4,
    "center": 1e-2,
}


@dataclass(frozen=True)
class Training:
    """What is trained, and how."""

    data: str  # a folder in ILSVRC's CLS-LOC layout with training images
    backbone: str = "tf_efficientnet_lite0"  # a name of Table 1, or any of timm's that ends in GAP and one linear layer
    weights: str = "pretrained"  # to start from: "pretrained", "random", or the path of a checkpoint
    loss: str = "triplet"  # a name of LOSSES
    last_block: bool = False  # train the last block only, on features of those before it, made once
    epochs: int = 10
    classes: int = 8  # P classes ...
    images: int = 5  # ... of K images make a batch
    learning_rate: float | None = None  # None: the loss's own, of RATES
    weight_decay: float = 1e-4
    size: int = 224  # side of the squashed images, pixels
    workers: int = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"There is no loss {self.loss!r}; there are: {', '.join(LOSSES)}.")


class Learner(nn.Module):
    """A backbone with its loss. `terms` may be a function of one's own, around a loss of pytorch-metric-learning, say.

    Args:
        terms: named loss terms of (learner, pooled features, labels), as in LOSSES.
        last_block: images are features of the `trunk`, and everything in front of `tail` is frozen.
        frozen_statistics: BatchNorm normalises by what it has learnt before.
    """

    def __init__(
        self,
        backbone: Backbone,
        terms: Terms,
        num_classes: int,
        last_block: bool = False,
        frozen_statistics: bool = True,
    ) -> None:
        super().__init__()
        self.backbone, self.terms, self.last_block, self.frozen_statistics = (
            backbone,
            terms,
            last_block,
            frozen_statistics,
        )
        classifying = terms in [LOSSES[name] for name in CLASSIFYING]
        backbone.requires_grad_(not last_block)
        if last_block:
            check_trunk(backbone)
            for part in (backbone.network.blocks[-1], backbone.network.conv_head, backbone.network.bn2):
                part.requires_grad_(True)
        backbone.classifier.requires_grad_(classifying)
        if terms is LOSSES["center"]:
            self.centers = nn.Parameter(torch.zeros(num_classes, backbone.classifier.in_features))

    def train(self, mode: bool = True) -> "Learner":
        """Training mode, apart from statistics that are frozen."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and self.frozen_statistics:
                part.eval()
        return self

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss terms of one batch: uint8 images, or features of the trunk."""
        backbone = self.backbone
        features = tail(backbone, images) if self.last_block else backbone.features(backbone.normalise(images))
        return self.terms(self, features.mean((-2, -1)), labels)


class Photos(Dataset):
    """Training images of an ILSVRC tree, squashed, with a random crop of 7/8 of the side and a random flip.

    Random numbers come from torch's generator, which the engine seeds for each item.
    """

    def __init__(self, data: Ilsvrc, size: int):
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 size size"], int]:
        image, photo = self.data[index]
        whole = self.size * 8 // 7
        image = transforms.resize(image, [whole, whole], antialias=True)
        top, left, flip = (int(torch.randint(n, ())) for n in (whole - self.size + 1, whole - self.size + 1, 2))
        image = image[:, top : top + self.size, left : left + self.size]
        return (image.flip(-1) if flip else image), photo.label


class BalancedBatches(Sampler[list[int]]):
    """Batches of `classes` random classes with `images` random images of each, one class after the other.

    As many as make up the data set. No image comes twice in a batch, unless its class has fewer than `images`.

    Args:
        generator: the engine seeds it anew for each epoch.
    """

    def __init__(self, labels: Int[Tensor, " n"], classes: int, images: int, generator: Generator):
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]
        if classes > len(self.members):
            raise ValueError(
                f"Batches of {classes} classes were asked for, but the data has {len(self.members)}. "
                "Ask for fewer classes and more images of each."
            )
        self.classes, self.images, self.generator = classes, images, generator
        self.batches = max(1, len(labels) // (classes * images))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.batches):
            batch = []
            for label in torch.randperm(len(self.members), generator=self.generator)[: self.classes].tolist():
                members = self.members[label]
                few = len(members) < self.images
                pick = (
                    torch.randint(len(members), (self.images,), generator=self.generator)
                    if few
                    else torch.randperm(len(members), generator=self.generator)[: self.images]
                )
                batch += members[pick].tolist()
            yield batch


def train(config: Training, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; writes `model.safetensors` for `evaluate`. What was interrupted goes on."""
    data = Ilsvrc(config.data, "train")
    model, own = network(config.backbone, config.weights, list(data.classes), config.seed)
    if not own:
        torch.manual_seed(config.seed)
        model.classifier = nn.Linear(model.classifier.in_features, len(data.classes))
    learner = Learner(model, LOSSES[config.loss], len(data.classes), config.last_block, config.weights != "random")
    dataset = trunk_features(model, data, config.size, progress) if config.last_block else Photos(data, config.size)
    labels = torch.tensor([photo.label for photo in data.photos])
    history = fit(learner, dataset, labels, config, folder, progress)
    if engine.this_process().is_main_process:
        state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
        about = {"loss": config.loss, "classifier": "trained" if config.loss in CLASSIFYING else "untrained"}
        save_file(state, folder / "model.safetensors", about)
    return history


def fit(
    learner: Learner,
    dataset: Dataset,
    labels: Int[Tensor, " n"],
    config: Training,
    folder: Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch: plain SGD with momentum; class-balanced batches if the loss compares images."""
    generator = Generator()
    if config.loss == "softmax":
        batches = BatchSampler(
            RandomSampler(dataset, generator=generator), config.classes * config.images, drop_last=True
        )
    else:
        batches = BalancedBatches(labels, config.classes, config.images, generator)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)
    trained = [weight for name, weight in learner.named_parameters() if weight.requires_grad and name != "centers"]
    groups = [{"params": trained}]
    if config.loss == "center":  # the factor before the loss is divided out again
        groups.append(
            {"params": [learner.centers], "lr": CENTER_RATE / CENTER_WEIGHT, "momentum": 0.0, "weight_decay": 0.0}
        )
    optimizer = torch.optim.SGD(
        groups, config.learning_rate or RATES[config.loss], 0.9, weight_decay=config.weight_decay
    )
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed)
    return engine.train(
        learner, lambda model, batch: model.step(*batch), loader, optimizer, plan, folder=folder, progress=progress
    )


def trunk(backbone: Backbone, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b j *grid"]:
    """Features in front of the last block of an EfficientNet: 192 x 7 x 7 for Lite0."""
    network = backbone.network
    return network.blocks[:-1](network.bn1(network.conv_stem(backbone.normalise(images))))


def tail(backbone: Backbone, features: Float[Tensor, "b j *grid"]) -> Float[Tensor, "b k h w"]:
    """The last feature map from those of the `trunk`."""
    network = backbone.network
    return network.bn2(network.conv_head(network.blocks[-1](features)))


def check_trunk(backbone: Backbone) -> None:
    """Raises a ValueError if the network is not built as `trunk` and `tail` have it."""
    parts = ("conv_stem", "bn1", "blocks", "conv_head", "bn2")
    if missing := [part for part in parts if not hasattr(backbone.network, part)]:
        raise ValueError(
            f"The last block alone can be trained in EfficientNets of timm, which have {missing[0]}; this "
            "network has not. Leave out last_block to train all of it, or take tf_efficientnet_lite0."
        )


def trunk_features(backbone: Backbone, data: Ilsvrc, size: int, progress: bool = True) -> TensorDataset:
    """Features of the trunk and labels of all images, squashed, without crops or flips: 38 KB an image for Lite0."""
    check_trunk(backbone)
    device, parts = engine.this_process().device, []
    backbone.to(device, memory_format=torch.channels_last)
    with torch.inference_mode():
        for batch in tqdm(data.batches(size, 8), "features", disable=not progress):
            parts.append(trunk(backbone, batch.images.to(device)).cpu())
    return TensorDataset(torch.cat(parts).clone(), torch.tensor([photo.label for photo in data.photos]))


def main(argv: list[str]) -> int:
    """`python -m course_lib train localise`: a model whose distances or classifier Dist-CAM and CAM explain."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib train localise", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    add_options(parser, Training)
    parser.add_argument("--loss", choices=LOSSES, help=f"(default: {Training.loss})")
    parser.add_argument(
        "--last-block", action="store_true", help="train the last block only, on cached features (for a CPU)"
    )
    parser.add_argument("--epochs", type=int, help=f"(default: {Training.epochs})")
    parser.add_argument("--learning-rate", type=float, help="(default: the loss's own)")
    parser.add_argument("--classes", type=int, help=f"in a batch (default: {Training.classes})")
    parser.add_argument("--images", type=int, help=f"of each class in a batch (default: {Training.images})")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), help="(default: no)")
    parser.add_argument(
        "--folder", type=Path, required=True, help="of checkpoints and of the trained model.safetensors"
    )
    chosen = vars(parser.parse_args(argv))
    folder = chosen.pop("folder")
    try:
        add_data(chosen)
        history = train(Training(**chosen), folder)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    engine.tell(history, folder, "localise")
    return 0
