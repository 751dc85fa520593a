"""Recipes: the settings of each method, as released for VOC and for a CPU, and those of rows of published tables.

    recipe("seam+p2p", data=folder)                 photographs on a CPU: the last block of an EfficientNet-Lite0 learns
    recipe("seam+p2p", "small", data=folder)        creatures on a CPU, from random weights
    recipe("seam+p2p", "resnet38", data=folder, weights="ilsvrc-cls_rna-a1_cls1000_ep-0001.params")     as released
    rows(5, recipe("seam+p2p", data=folder))        one recipe for each row of Table 5 of Du et al., CVPR 2022
    chimera_recipes(data=folder)                    CAM on chimeras, and what goes on from its network

Optimiser and schedule are those of the released code: SGD with a learning rate that falls as (1 - step / steps)^0.9,
four parameter groups, and a momentum of 0.0005: their optimiser hands weight decay on to SGD in the place of momentum.
Published numbers were made so.

What a CPU can do differs from that by the fields in SMALL_RECIPES: AdamW, no crops and no colour jitter, a flip as the
only augmentation, and contrast among pixels that are labelled as the class (see `ContrastConfig`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from course_lib.backbones.weights import LITE0
from course_lib.settings import (
    Count,
    NotNegative,
    PartialShare,
    Positive,
    RandomSeed,
    Share,
    Side,
    Whole,
    Workers,
    check_settings,
)
from course_lib.wsss.cam_net import Architecture
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.views import Transformation


@dataclass(frozen=True)
class TagTraining:
    """What is trained, and how. The values here are those of P2P on SEAM, as released for VOC; see `recipe`."""

    data: str = ""  # a folder in VOC's layout, whose split trainaug is trained on; "": the miniature
    method: Annotated[str, tuple(TAG_METHODS)] = "seam+p2p"  # cam, seam, eps, seam+p2p or eps+p2p
    backbone: str = "resnet38"  # resnet38, small (for creatures), or a name of timm's
    weights: str = "pretrained"  # to start from: pretrained (timm's), random, or for ResNet38 a path
    epochs: Count = 8  # passes through the images: 10,576 steps on VOC
    batch_size: Count = 8  # of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"  # as released, or for a CPU
    learning_rate: Positive = 0.01  # of the trunk's weights; SGD: biases x 2, new layers x 10
    new_learning_rate: Positive = 0.01  # of new layers (AdamW only)
    momentum: PartialShare = 5e-4  # of SGD; 0.9 is what papers say, and ten times the step
    weight_decay: NotNegative = 5e-4  # of weights; SGD: not of biases
    power: NotNegative = 0.9  # of the schedule
    size: Side = 448  # side of the first view, pixels
    small: Side = 128  # side of the second view, pixels; 134 in SEAM
    transformation: Transformation = field(default_factory=Transformation)
    on_features: bool = False  # SEAM's terms on the grids of features, as released with EPS; else as large as images
    long_side: tuple[Side, Side] | None = (448, 768)  # the longer side is drawn from it before the crop; None: no crop
    jitter: bool = True  # of colours: brightness, contrast, saturation 0.3, hue 0.1
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    contrast_from: Share = 0.0  # share of the training after which contrast counts
    dropout: PartialShare = 0.5  # of channels in front of classifier and projector; EPS has none
    neck: Whole = 0  # channels of a new 1 x 1 convolution between trunk and heads; 0: none
    width: Count = 64  # of a ResNet38's first convolution; less makes a network for trials
    taps: tuple[str, str, str] | None = None  # of timm's; None: chosen there
    frozen: str = ""  # of timm's, the last part that is not trained
    output_stride: Literal[8, 16, 32] = 16  # of timm's
    scored_at: Side | None = None  # longer side that images are brought to when seeds are made; None: as they are
    kept: bool = False  # compute what is frozen once for all images and their mirror images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    workers: Workers = 0  # processes that read images
    seed: RandomSeed = 0  # of weights, batches and everything drawn
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)
        if self.long_side and self.long_side[0] > self.long_side[1]:
            raise ValueError(f"long_side must be a shorter and a longer length, got {self.long_side}.")
        if self.kept and (self.long_side or self.jitter or self.transformation != Transformation()):
            raise ValueError(
                "What is kept are features of whole images and of their smaller copies as they are: leave out `kept`, "
                "or set long_side=None and jitter=False and no transformation."
            )

    def architecture(self, classes: Sequence[str]) -> Architecture:
        """The network that this trains."""
        known = vars(self) | {"classes": tuple(classes)}
        return Architecture(**{part.name: known[part.name] for part in fields(Architecture) if part.name in known})


# What the other methods have in place of TagTraining's values, as released for VOC.
METHOD_RECIPES: dict[str, dict[str, Any]] = {
    "cam": {"epochs": 15, "batch_size": 16, "learning_rate": 0.1, "long_side": (256, 512)},  # PSA
    "seam": {"small": 134},
    # 19,830 steps; the released 170 that follow keep the last rate, which is nearly 0.
    "eps": {"epochs": 15, "long_side": (256, 512), "dropout": 0.0},
    "eps+p2p": {"epochs": 15, "dropout": 0.0, "on_features": True, "contrast": ContrastConfig.code(saliency=True)},
}
# A prototype is made of pixels of its own class, only classes that are there compete, and views add up, as in the
# paper.
OWN_PIXELS = ContrastConfig(assigned=True, ranked_background=True, absent_compete=False, sum_views=True)
_CPU = {
    "batch_size": 16,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "on_features": True,
    "long_side": None,
    "jitter": False,
    "dropout": 0.3,
    "contrast": OWN_PIXELS,
}
# For miniatures on a CPU, whatever the method. The second view is less than half of the first one (published: 0.29).
# Contrast waits until the maps that label its pixels mean something, and takes its time: in half of it, what it adds to
# SEAM's seeds of unseen photographs is inside the noise (`python -m course_lib evidence contrast`).
SMALL_RECIPES: dict[str, dict[str, Any]] = {
    LITE0: _CPU
    | {
        "epochs": 16,
        "learning_rate": 3e-4,
        "new_learning_rate": 1e-3,
        "size": 288,
        "small": 128,
        "scored_at": 288,
        "neck": 256,
        "taps": ("blocks.2", "blocks.4", "blocks.5.0"),
        "frozen": "blocks.4",
        "kept": True,
        "contrast_from": 0.3,
    },
    "small": _CPU
    | {
        "weights": "random",
        "epochs": 8,
        "learning_rate": 3e-3,
        "new_learning_rate": 3e-3,
        "size": 96,
        "small": 32,
        "neck": 128,
        "contrast_from": 0.4,
    },
}
# On chimeras: a batch of 8 as published. A prototype is made of 1/64 of the cells of a batch, as on VOC (32 of 2,048
# there); the second view has 4 x 4 cells an image here. CAM is trained once for each random seed, and all other rows go
# on from its network for a third of its steps; contrast waits for a quarter of them, until PCM has learned. No setting
# was chosen by a mask: CAM is trained as long as the average precision of tags on val asks for.
CHIMERA_START: dict[str, Any] = {"size": 64, "small": 32, "batch_size": 8, "epochs": 6, "kept": True}
CHIMERA_TRAINING = CHIMERA_START | {
    "epochs": 2,
    "learning_rate": 1e-3,
    "new_learning_rate": 1e-3,
    "contrast_from": 0.25,
}
CHIMERA_CELLS = CHIMERA_TRAINING["batch_size"] * 4 * 4  # of the second views of a batch
CHIMERA_CONTRAST = replace(OWN_PIXELS, top_k=CHIMERA_CELLS // 64)
CHIMERA_ROWS = {  # method and labels of contrast
    "seam": ("seam", "pseudo"),
    "seam+p2p": ("seam+p2p", "pseudo"),
    "oracle": ("seam+p2p", "true"),
    "shuffled": ("seam+p2p", "shuffled"),
}


def recipe(method: str = "seam+p2p", backbone: str = LITE0, **chosen: Any) -> TagTraining:
    """The settings of a method on a backbone, as released or for a CPU, with changes.

    Args:
        chosen: fields of TagTraining, `data` among them.
    """
    settings = SMALL_RECIPES.get(backbone, METHOD_RECIPES.get(method, {}))
    return TagTraining(**{"method": method, "backbone": backbone} | settings | chosen)


def chimera_recipes(seed: int = 0, **chosen: Any) -> dict[str, TagTraining]:
    """CAM on chimeras, "cam", and trainings that go on from its network with `learner.continued`.

    "seam" and "seam+p2p" are these methods; "oracle" and "shuffled" are the latter with true labels of contrast, and
    with labels of other pixels.

    Args:
        seed: random seed.
        chosen: fields of TagTraining, `data` among them, of all.
    """
    found = {"cam": recipe("cam", "small", seed=seed, **CHIMERA_START | {"contrast": CHIMERA_CONTRAST} | chosen)}
    for row, (method, labels) in CHIMERA_ROWS.items():
        contrast = replace(CHIMERA_CONTRAST, labels=labels)
        found[row] = recipe(method, "small", seed=seed, **CHIMERA_TRAINING | {"contrast": contrast} | chosen)
    return found


def rows(table: int, config: TagTraining) -> dict[str, TagTraining]:
    """What is trained for each row of Table 5, 6 or 7 of Du et al., CVPR 2022.

    Table 5 adds one part after another, Table 6 varies the number K of pixels that a prototype is made of, Table 7
    flips, turns or shifts the second view.

    Args:
        config: of contrast on SEAM with everything, the last row of Table 5.
    Raises:
        ValueError: a configuration without contrast on SEAM.
    """
    if config.method != "seam+p2p":
        raise ValueError(
            f"Expected contrast on SEAM, method seam+p2p, got {config.method}; the tables are about no other."
        )
    small = config.backbone in SMALL_RECIPES
    cam, seam = (
        replace(config, method=method, **({} if small else METHOD_RECIPES[method])) for method in ("cam", "seam")
    )
    if table == 7:
        added = {
            "rescale": {},
            "rescale + flip": {"flip": True},
            "rescale + rotation": {"rotation": 20.0},
            "rescale + translation": {"translation": 16.0},
        }
        # Nothing is kept of transformed views; without it in any row, all draw the same images and mirror images.
        turned = {
            name: replace(config, kept=False, transformation=Transformation(**change)) for name, change in added.items()
        }
        return {"CAM": replace(cam, kept=False)} | turned
    first, changes = (
        {"CAM": cam, "SEAM": seam},
        {
            "+ cross-prototype": {"cross_cam": 0.0, "intra": 0.0},
            "+ cross-CAM": {"intra": 0.0},
            "+ intra-view": {"mine_prototypes": False, "mine_pixels": False},
            "+ prototype mining": {"mine_pixels": False},
            "+ pixel sampling": {},
        },
    )
    if table == 6:
        first, changes = {"K = 0": seam}, {f"K = {count}": {"top_k": count} for count in (4, 8, 16, 32, 64)}
    return first | {
        name: replace(config, contrast=replace(config.contrast, **change)) for name, change in changes.items()
    }
