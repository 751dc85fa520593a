"""The strong baseline of person re-identification: one global feature, and six tricks that add up.

Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPR Workshops 2019.

    f_t = GAP(F)                    compared in training: triplet and center loss, Euclidean
    f_i = BN(f_t), its bias         "BNNeck": classified, logits = W f_i without a bias;
          frozen at zero            compared in tests, by cosine
    L   = L_ID + L_triplet + 5e-4 L_center

    warmup     the learning rate grows over 10 epochs; it falls to 1/10 at epoch 40 and at 70 of 120
    smoothing  L_ID with targets 0.9 one-hot + 0.1 / C
    bnneck     as above; without it, f_i is f_t
    center     L_center on f_t; centers learn at a rate of their own
    erasing    random erasing: done to images before they come here, by `train reid` (experiments/reid.py)
    stride     the last stride is 1, for a map of 16 x 8, not 8 x 4: done to the backbone, by the same

Followed is the released code where it differs from the paper: the learning rate falls at the start of epochs 40 and
70, not after them. Different here: the stem keeps its ReLU, which the released network lost (its authors found no
difference); batches draw identities anew instead of using every image once an epoch. A training of other than 120
epochs stretches the schedule.

Batch-hard triplets can collapse a pretrained network into one point where identities differ in little.
"prototype-cosine", the class means of the batch as prototypes of f_i, does not; it has no classifier, so smoothing and
center loss do not take part.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from course_lib import engine
from course_lib.backbones import Backbone
from course_lib.data.market1501 import Market1501
from course_lib.data.wrappers import Changed
from course_lib.metric_learning.features import extract, freeze_trunk, tail, trunk
from course_lib.metric_learning.learner import CENTER_RATE, CENTER_WEIGHT, BalancedBatches
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax, center_loss
from course_lib.settings import check

TRICKS = ("warmup", "erasing", "smoothing", "stride", "bnneck", "center")  # in the order of the paper's ablation
REID_RATES = {"id+triplet": 3.5e-4, "prototype-cosine": 1e-3}  # losses and their learning rates
MARGIN, SMOOTHING, PROTOTYPE_SCALE = 0.3, 0.1, 16.0
SCHEDULE, WARMUP, DROPS = 120, 10, (40, 70)  # epochs, and the first ones of a tenth of the rate (counted from 1)


@dataclass(frozen=True)
class ReidTraining:
    """What is trained, and how. The paper's figures are of resnet50 with all tricks."""

    data: str = ""  # folder in Market-1501's layout; "": the miniature mini-market-clothes
    backbone: str = "tf_efficientnet_lite0"  # or "resnet50", or another ResNet or EfficientNet of timm's
    weights: Literal["pretrained", "random"] = "pretrained"  # to start from
    tricks: tuple[str, ...] = TRICKS  # names of TRICKS
    loss: str = "id+triplet"  # or "prototype-cosine"
    last_block: bool = False  # train the last block only, on features of those before it, made once (for a CPU)
    epochs: int = SCHEDULE  # others than 120 stretch the schedule
    classes: int = 16  # P identities ...
    images: int = 4  # ... of K images make a batch
    learning_rate: float | None = None  # None: the loss's own
    weight_decay: float = 5e-4
    size: tuple[int, int] = (256, 128)  # height and width of the images, pixels
    workers: int = 0  # processes that read images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    device: str = "auto"  # or "cpu", "cuda"
    seed: int = 0  # of weights that are new, and of the training

    def __post_init__(self) -> None:
        check(
            self,
            positive=("epochs", "classes", "images", "learning_rate", "size"),
            not_negative=("weight_decay", "workers"),
            known={"tricks": TRICKS, "loss": REID_RATES},
        )


class Baseline(nn.Module):
    """A backbone with neck, classifier and centers.

    Inputs are photographs (uint8) or, as floats, features of the `trunk` of an EfficientNet.

    Args:
        backbone: gets a new classifier. If the last block alone is trained, everything in front of `tail` is frozen,
            and so are statistics of BatchNorm, apart from the neck's.
    """

    def __init__(self, backbone: Backbone, num_classes: int, config: ReidTraining) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        channels, classifying = backbone.classifier.in_features, config.loss == "id+triplet"
        if config.last_block:
            freeze_trunk(backbone)
        neck = "bnneck" in config.tricks
        self.neck = nn.BatchNorm1d(channels) if neck else nn.Identity()
        backbone.classifier = nn.Linear(channels, num_classes, bias=not neck)
        if neck:
            self.neck.bias.requires_grad_(False)  # at zero; the optimiser does not get it
            nn.init.normal_(backbone.classifier.weight, std=0.001)
        backbone.classifier.requires_grad_(classifying)
        pulled = classifying and "center" in config.tricks
        self.centers = nn.Parameter(torch.randn(num_classes, channels)) if pulled else None

    def train(self, mode: bool = True) -> "Baseline":
        """Training mode, apart from statistics that are frozen."""
        super().train(mode)
        self.backbone.train(mode and not self.config.last_block)
        return self

    def feature_map(self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"]) -> Float[Tensor, "b k h w"]:
        """The map F that is pooled: 8 x 4 cells for images of 256 x 128, 16 x 8 if the last stride is 1."""
        if inputs.dtype == torch.uint8:
            return self.backbone.features(self.backbone.normalise(inputs))
        return tail(self.backbone, inputs)

    def pool(self, inputs: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b j H W"]) -> Float32[Tensor, "b k"]:
        """f_t, the mean of the map. Behind the `neck` it is f_i."""
        return self.feature_map(inputs).float().mean((-2, -1))  # fp32 island: a mean, and distances of it

    def terms(self, pooled: Float32[Tensor, "b k"], labels: Int[Tensor, " b"]) -> dict[str, Float32[Tensor, ""]]:
        """Named loss terms of one batch, from f_t."""
        compared = self.neck(pooled)  # b k, f_i
        if self.config.loss == "prototype-cosine":
            return {"prototype": batch_prototype_softmax(compared, labels, "cosine", PROTOTYPE_SCALE)}
        logits = self.backbone.classifier(compared).float()  # b c
        smoothing = SMOOTHING if "smoothing" in self.config.tricks else 0.0
        terms = {
            "id": F.cross_entropy(logits, labels, label_smoothing=smoothing),
            "triplet": batch_hard_triplet(pooled, labels, MARGIN),
        }
        if self.centers is not None:
            terms["center"] = CENTER_WEIGHT * center_loss(pooled, labels, self.centers)
        return terms

    def step(self, batch: list[Tensor]) -> dict[str, Float32[Tensor, ""]]:
        """Named loss terms of one batch: inputs and labels."""
        inputs, labels = batch
        return self.terms(self.pool(inputs), labels)


def mirrored_features(model: Baseline, data: Market1501, progress: bool = True) -> Changed:
    """What the last block is trained on: features in front of it, of each image or of its mirror image by chance.

    Both are made once, where the model is: 49 KB an image for Lite0, 197 KB if its last stride is 1.
    """
    model.to(memory_format=torch.channels_last).eval()

    def both(images: Tensor) -> Tensor:  # b 2 j h w
        return torch.stack([trunk(model.backbone, one).contiguous() for one in (images, images.flip(-1))], 1)

    features = extract(both, data, model.config.size, device=model.backbone.mean.device, progress=progress)
    return Changed(TensorDataset(features, data.labels), _either)


def _either(pair: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return pair[int(torch.randint(2, ()))], label


def learning_rate_factor(config: ReidTraining, epoch: int) -> float:
    """The factor of the learning rate in an epoch, counted from 0.

    For the 120 epochs of the paper: 0.01 + 0.99 e/10 in the e-th epoch, e < 10, with warm-up, then 1, from the 40th on
    0.1, from the 70th on 0.01. Others are stretched to it; below 24 epochs hardly anything is left of the warm-up.
    """
    stretched = (epoch + 1) * SCHEDULE / config.epochs
    if "warmup" in config.tricks and stretched < WARMUP:
        return 0.01 + 0.99 * stretched / WARMUP
    return 0.1 ** sum(stretched >= drop for drop in DROPS)


def fit_baseline(
    model: Baseline,
    dataset: Dataset,
    labels: Int[Tensor, " n"],
    config: ReidTraining,
    folder: Path | None = None,
    progress: bool = True,
    step: engine.Step = Baseline.step,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch; the model is trained in place.

    Args:
        dataset: of (input of the model, label), such as `mirrored_features`; of something else if `step` takes that.
    """
    batches = BalancedBatches(labels, config.classes, config.images, Generator())
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=config.workers, pin_memory=torch.cuda.is_available()
    )
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad and name != "centers"]
    groups = [{"params": trained}]
    factors = [lambda step: learning_rate_factor(config, step // len(batches))]  # one for all steps of an epoch
    if model.centers is not None:
        # Adam without memory and with an epsilon that swallows the gradient is plain gradient descent of rate lr / eps:
        # the second optimiser of the released code. The factor before the loss is divided out again.
        rate = CENTER_RATE / CENTER_WEIGHT * 1e8
        groups.append({"params": [model.centers], "lr": rate, "eps": 1e8, "betas": (0.0, 0.0), "weight_decay": 0.0})
        factors.append(lambda step: 1.0)
    rate = config.learning_rate or REID_RATES[config.loss]
    optimizer = torch.optim.Adam(groups, rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed, device=config.device)
    return engine.train(model, step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress)
