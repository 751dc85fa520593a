"""The strong baseline of person re-identification: one global feature, and six tricks that add up.

Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPR Workshops 2019.

    f_t = GAP(F)                                          compared in training: triplet and center loss, Euclidean
    f_i = BN(f_t), its bias frozen at zero ("BNNeck")     classified, logits = W f_i without a bias; compared in tests, cosine
    L   = L_ID + L_triplet + 5e-4 L_center

    warmup     the learning rate grows over 10 epochs; it falls to 1/10 at epoch 40 and at 70 of 120
    erasing    random erasing, see `pedestrians`                   smoothing   L_ID with targets 0.9 one-hot + 0.1 / C
    stride     the last stride is 1: a map of 16 x 8, not 8 x 4    bnneck      as above; without it, f_i is f_t
    center     L_center on f_t; centers learn at a rate of their own

Followed is the released code where it differs from the paper: the learning rate falls at the start of epochs 40 and 70, not
after them. Different here: the stem keeps its ReLU, which the released network lost (its authors found no difference); batches
draw identities anew instead of using every image once an epoch; rows without BNNeck compare f_t by cosine too, so that a row
differs from the one before by its trick alone. A training of other than 120 epochs stretches the schedule.

On a few hundred dolls the neck made f_t better, and f_i compared worse than f_t (one seed); `evaluate` shows both.
Batch-hard triplets can collapse a pretrained network into one point where identities differ in little. "prototype-cosine", the
class means of the batch as prototypes of f_i, does not; it has no classifier, so smoothing and center loss do not take part.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset

from course_lib import engine
from course_lib.backbones import Backbone
from course_lib.data.market1501 import Market1501
from course_lib.experiments.localise import network
from course_lib.metric_learning.features import extract
from course_lib.metric_learning.learner import (
    CENTER_RATE,
    CENTER_WEIGHT,
    BalancedBatches,
    check_trunk,
    tail,
    trunk,
)
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax, center_loss
from course_lib.metric_learning.pedestrians import SIZE, Pedestrians, erase

TRICKS = ("warmup", "erasing", "smoothing", "stride", "bnneck", "center")  # in the order of the paper's ablation
LOSSES = {"id+triplet": 3.5e-4, "prototype-cosine": 1e-3}  # and their learning rates
MARGIN, SMOOTHING, PROTOTYPE_SCALE = 0.3, 0.1, 16.0
SCHEDULE, WARMUP, DROPS = 120, 10, (40, 70)  # epochs, and the first ones of a tenth of the rate (counted from 1)


@dataclass(frozen=True)
class Training:
    """What is trained, and how. The paper's figures are of resnet50 with all tricks."""

    data: str  # a folder in Market-1501's layout
    backbone: str = "tf_efficientnet_lite0"  # or "resnet50", or another ResNet or EfficientNet of timm's
    weights: Literal["pretrained", "random"] = "pretrained"
    tricks: tuple[str, ...] = TRICKS
    loss: str = "id+triplet"  # or "prototype-cosine"
    last_block: bool = False  # train the last block only, on features of those before it, made once
    epochs: int = SCHEDULE
    classes: int = 16  # P identities ...
    images: int = 4  # ... of K images make a batch
    learning_rate: float | None = None  # None: the loss's own, of LOSSES
    weight_decay: float = 5e-4
    size: tuple[int, int] = SIZE  # height, width, pixels
    workers: int = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.tricks if name not in TRICKS]:
            raise ValueError(f"There is no trick {unknown[0]!r}; there are: {', '.join(TRICKS)}.")
        if self.loss not in LOSSES:
            raise ValueError(f"There is no loss {self.loss!r}; there are: {', '.join(LOSSES)}.")

    def idle(self) -> dict[str, str]:
        """Tricks that were asked for and cannot take part, each with the reason."""
        reasons = {}
        if self.last_block:
            reasons["erasing"] = (
                "the features of the first blocks are made once, of the whole image and its mirror image"
            )
        if self.loss == "prototype-cosine":
            reasons |= dict.fromkeys(
                ("smoothing", "center"), "prototypes of the batch take the place of the classifier"
            )
        return {name: reason for name, reason in reasons.items() if name in self.tricks}

    def note(self) -> str:
        """What does not take part, in a sentence; "" if everything does."""
        idle = [f"{name} ({reason})" for name, reason in self.idle().items()]
        return f"Does not take part: {'; '.join(idle)}." if idle else ""


class Baseline(nn.Module):
    """A backbone with neck, classifier and centers.

    Inputs are photographs (uint8) or, as floats, features of the `trunk` of an EfficientNet.

    Args:
        backbone: gets a new classifier, and keeps its last stride no longer if "stride" is among the tricks.
        last_block: everything in front of `tail` is frozen, and so are statistics of BatchNorm, apart from the neck's.
        size: height and width of the images it is trained on and compares, pixels.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        tricks: tuple[str, ...] = TRICKS,
        loss: str = "id+triplet",
        last_block: bool = False,
        size: tuple[int, int] = SIZE,
    ) -> None:
        super().__init__()
        self.backbone, self.loss, self.last_block, self.size = backbone, loss, last_block, size
        channels, neck = backbone.classifier.in_features, "bnneck" in tricks
        self.smoothing = SMOOTHING if "smoothing" in tricks else 0.0
        if "stride" in tricks:
            last_stride_one(backbone)
        backbone.requires_grad_(not last_block)
        if last_block:
            check_trunk(backbone)
            for part in (backbone.network.blocks[-1], backbone.network.conv_head, backbone.network.bn2):
                part.requires_grad_(True)
        self.neck = nn.BatchNorm1d(channels) if neck else nn.Identity()
        backbone.classifier = nn.Linear(channels, num_classes, bias=not neck)
        if neck:
            self.neck.bias.requires_grad_(False)  # at zero; the optimiser does not get it
            nn.init.normal_(backbone.classifier.weight, std=0.001)
        backbone.classifier.requires_grad_(loss == "id+triplet")
        self.centers = None
        if "center" in tricks and loss == "id+triplet":
            self.centers = nn.Parameter(torch.randn(num_classes, channels))

    def train(self, mode: bool = True) -> "Baseline":
        """Training mode, apart from statistics that are frozen."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d) and self.last_block:
                part.eval()
        return self

    def feature_map(
        self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"], rectangles: Int[Tensor, "b 4"] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """The map F that is pooled: 16 x 8 cells for images of 256 x 128 with the last stride 1.

        Args:
            rectangles: to erase from photographs, as `pedestrians.random_rectangle` draws them.
        """
        if inputs.dtype != torch.uint8:
            return tail(self.backbone, inputs)
        images = self.backbone.normalise(inputs)
        if rectangles is not None:
            images = erase(images, rectangles, self.backbone.mean)
        return self.backbone.features(images)

    def pool(
        self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"], rectangles: Int[Tensor, "b 4"] | None = None
    ) -> Float32[Tensor, "b k"]:
        """f_t, the mean of the map."""
        return self.feature_map(inputs, rectangles).float().mean((-2, -1))  # fp32 island: a mean, and distances of it

    def embed(self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"]) -> Float32[Tensor, "b k"]:
        """What is compared in tests: f_i of length 1, so that squared Euclidean distances are twice the cosine ones."""
        return F.normalize(self.neck(self.pool(inputs)), dim=1)

    def step(self, inputs: Tensor, labels: Tensor, rectangles: Tensor | None = None) -> dict[str, Tensor]:
        """Named loss terms of one batch."""
        pooled = self.pool(inputs, rectangles)  # b k, f_t
        compared = self.neck(pooled)  # b k, f_i
        if self.loss == "prototype-cosine":
            return {"prototype": batch_prototype_softmax(compared, labels, "cosine", PROTOTYPE_SCALE)}
        logits = self.backbone.classifier(compared).float()  # b c
        terms = {
            "id": F.cross_entropy(logits, labels, label_smoothing=self.smoothing),
            "triplet": batch_hard_triplet(pooled, labels, MARGIN),
        }
        if self.centers is not None:
            terms["center"] = CENTER_WEIGHT * center_loss(pooled, labels, self.centers)
        return terms


class Views(Dataset):
    """Features of each image and of its mirror image, made once, of which a batch gets either: (features, label)."""

    def __init__(self, features: Float[Tensor, "n 2 j h w"], labels: Int[Tensor, " n"]):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "j h w"], Int[Tensor, ""]]:
        return self.features[index, int(torch.randint(2, ()))], self.labels[index]


def last_stride_one(backbone: Backbone) -> None:
    """Sets the last stride of a ResNet or EfficientNet of timm to 1, in convolution and shortcut: a map of twice the sides.

    Raises:
        ValueError: a network in which it is not known where that is.
    """
    parts = list(getattr(backbone.network, "layer4", getattr(backbone.network, "blocks", [])))
    strided = [part for part in parts if any(_halves(layer) for layer in part.modules())]
    if not strided:
        raise ValueError(
            "The last stride is known in ResNets (layer4) and EfficientNets (blocks) of timm, and this network is "
            'neither. Leave out the trick "stride", or take resnet50 or tf_efficientnet_lite0.'
        )
    for part in list(strided[-1].modules()):
        for name, layer in part.named_children():
            if isinstance(layer, nn.AvgPool2d) and _halves(layer):  # in the shortcut of a ResNet-D
                setattr(part, name, nn.Identity())
            elif _halves(layer):
                layer.stride = (1, 1)


def _halves(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv2d, nn.AvgPool2d)) and layer.stride in (2, (2, 2))


def build(config: Training, num_classes: int) -> Baseline:
    """The network of a configuration, at its start."""
    backbone, _ = network(config.backbone, config.weights, [], config.seed)  # seeds torch for what is new, too
    return Baseline(backbone, num_classes, config.tricks, config.loss, config.last_block, config.size)


def views(model: Baseline, data: Market1501, progress: bool = True) -> Views:
    """Training views of all images in front of the last block: 49 KB an image for Lite0, 197 KB if its last stride is 1."""
    check_trunk(model.backbone)
    device = engine.this_process().device
    model.to(device, memory_format=torch.channels_last).eval()

    def both(images: Tensor) -> Tensor:
        return torch.stack([trunk(model.backbone, view).contiguous() for view in (images, images.flip(-1))], 1)

    return Views(extract(both, data, model.size, device=device, progress=progress), data.labels)


def train(config: Training, folder: Path, progress: bool = True) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; writes `model.safetensors`, see `load`. What was interrupted goes on."""
    data = Market1501(config.data, "train")
    model = build(config, len(data.classes))
    dataset = (
        views(model, data, progress)
        if config.last_block
        else Pedestrians(data, "erasing" in config.tricks, config.size)
    )
    history = fit(model, dataset, data.labels, config, folder, progress)
    if engine.this_process().is_main_process:
        about = {
            "backbone": config.backbone,
            "classes": len(data.classes),
            "tricks": config.tricks,
            "loss": config.loss,
            "size": config.size,
        }
        save_model(model, str(folder / "model.safetensors"), {"reid": json.dumps(about)})
    engine.this_process().wait_for_everyone()  # who comes next may load it
    return history


def fit(
    model: Baseline,
    dataset: Dataset,
    labels: Int[Tensor, " n"],
    config: Training,
    folder: Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; the model is trained in place, on `Pedestrians` or `Views`.

    Warns if the triplet loss has collapsed the features into one point.
    """
    batches = BalancedBatches(labels, config.classes, config.images, Generator())
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=config.workers, pin_memory=torch.cuda.is_available()
    )
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and name != "centers"]
    rates, groups = [learning_rate_factor(config, len(batches))], [{"params": trained}]
    if model.centers is not None:
        # Adam without memory and with an epsilon that swallows the gradient is plain gradient descent of rate lr / eps: the
        # second optimiser of the released code. The factor before the loss is divided out again.
        groups.append(
            {
                "params": [model.centers],
                "lr": CENTER_RATE / CENTER_WEIGHT * 1e8,
                "eps": 1e8,
                "betas": (0.0, 0.0),
                "weight_decay": 0.0,
            }
        )
        rates.append(lambda step: 1.0)
    optimizer = torch.optim.Adam(groups, config.learning_rate or LOSSES[config.loss], weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed)
    before = _spread(model, dataset)
    history = engine.train(
        model,
        lambda model, batch: model.step(*batch),
        loader,
        optimizer,
        plan,
        scheduler=scheduler,
        folder=folder,
        progress=progress,
    )
    if config.loss == "id+triplet" and (after := _spread(model, dataset)) < min(MARGIN / 3, before / 10):
        warnings.warn(
            f"The features have collapsed: of 64 images, the two most different ones were {before:.2g} apart before "
            f"the training and are {after:.2g} now, while the triplet loss wants a margin of {MARGIN}. Take the loss "
            '"prototype-cosine", or a smaller learning rate.',
            stacklevel=2,
        )
    return history


@torch.inference_mode()
def _spread(model: Baseline, dataset: Dataset) -> float:
    """The largest distance between pooled features of up to 64 images."""
    inputs = torch.stack([dataset[index][0] for index in range(0, len(dataset), -(-len(dataset) // 64))])
    model.eval()
    pooled = model.pool(inputs.to(model.backbone.mean.device))
    model.train()
    return float(torch.cdist(pooled, pooled).max())


def learning_rate_factor(config: Training, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at an optimiser step (from 0), the same for all `steps` of an epoch.

    For the 120 epochs of the paper: 0.01 + 0.99 e/10 in epoch e < 10 with warm-up, then 1, from 40 on 0.1, from 70 on 0.01.
    Other lengths are stretched to it; below 24 epochs hardly anything is left of the warm-up.
    """

    def factor(step: int) -> float:
        epoch = (step // steps + 1) * SCHEDULE / config.epochs
        if "warmup" in config.tricks and epoch < WARMUP:
            return 0.01 + 0.99 * epoch / WARMUP
        return 0.1 ** sum(epoch >= drop for drop in DROPS)

    return factor


def load(path: str | Path) -> Baseline:
    """A model that `train` has written, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: nothing is there, or the file is of another system.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. A file model.safetensors was expected, as `train reid` writes it.")
    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("reid")
    if about is None:
        raise ValueError(
            f"{path} was not written by `train reid`: it does not say which network and which tricks it is of."
        )
    about = json.loads(about)
    backbone, _ = network(about["backbone"], "random", [])
    model = Baseline(backbone, about["classes"], tuple(about["tricks"]), about["loss"], size=tuple(about["size"]))
    load_model(model, str(path))
    return model.eval()
