"""Training from image tags: CAM, SEAM, EPS, and pixel-to-prototype contrast (P2P) on the latter two, by one command.

    python -m course_lib train wsss --method seam+p2p --folder runs/p2p                     mini-voc: about three minutes on a CPU
    python -m course_lib train wsss --method seam+p2p --backbone small --folder runs/b2     creatures, from random weights
    torchrun --nproc-per-node 4 -m course_lib train wsss --method seam+p2p --backbone resnet38 --workers 8 --folder runs/voc \\
        --weights ilsvrc-cls_rna-a1_cls1000_ep-0001.params --data /data/VOCdevkit/VOC2012   as published

    method       the sum of                                                                                       views
    cam          tags                                                                                             1
    seam         tags, min-pool, equivariance, cross-equivariance                       (`seam`, on images)       2
    eps          tags, saliency                                                         (`eps`)                   1
    seam+p2p     those of seam, cross-prototype, cross-cam, intra                       (`contrast`)              2
    eps+p2p      those of seam (on the grids of features), saliency of maps and refined maps, and of contrast     2

The second view is the first one made smaller, and on request turned or shifted besides (`views`). With two views all terms are
means over both, as released. Optimiser and schedule are those of the released code: SGD with a learning rate that falls as
(1 - step / steps)^0.9, four parameter groups, and a momentum of 0.0005: their optimiser hands weight decay on to SGD in the
place of momentum. Published numbers were made so.

What a CPU can do differs from that by the fields in SMALL_RECIPES: AdamW, no crops and no colour jitter, a flip as the only
augmentation, and contrast among pixels that are labelled as the class (see `ContrastConfig`).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import engine
from course_lib.backbones.dense import Maps, parameter_groups
from course_lib.data.voc import Voc
from course_lib.wsss import View, tag_loss
from course_lib.wsss.cam_net import LITE0, METHODS, Architecture, CamNet, build, save
from course_lib.wsss.contrast import ContrastConfig, contrast_loss
from course_lib.wsss.eps import saliency_loss
from course_lib.wsss.seam import seam_loss
from course_lib.wsss.seeds import default_data
from course_lib.wsss.views import Transformation, Warp, resize

CONTRAST = ("cross-prototype", "cross-cam", "intra")


@dataclass(frozen=True)
class Training:
    """What is trained, and how. The values here are those of P2P on SEAM, as released for VOC; see `recipe` for the others."""

    data: str  # a folder in VOC's layout; its split trainaug is trained on
    method: str = "seam+p2p"  # one of METHODS
    backbone: str = "resnet38"  # "resnet38", "small", or a name of timm's
    weights: str = "pretrained"  # "pretrained" (timm's), "random", or for ResNet38 a path, see `cam_net.build`
    epochs: int = 8  # 10,576 steps on VOC
    batch_size: int = 8  # of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01  # of the trunk's weights; SGD: biases x 2, new layers x 10
    new_learning_rate: float = 0.01  # of new layers (AdamW only)
    momentum: float = 5e-4  # 0.9 is what papers say, and ten times the step
    weight_decay: float = 5e-4
    power: float = 0.9  # of the schedule
    size: int = 448  # side of the first view, pixels
    small: int = 128  # side of the second view; 134 in SEAM
    transformation: Transformation = Transformation()  # of the second view beside its size (Table 7)
    on_features: bool = False  # SEAM's terms on the grids of features, as released with EPS; else as large as images
    long_side: tuple[int, int] | None = (448, 768)  # the longer side is drawn from it before the crop; None: no crop
    jitter: bool = True  # of colours: brightness, contrast, saturation 0.3, hue 0.1
    contrast: ContrastConfig = field(default_factory=ContrastConfig.code)
    contrast_from: float = 0.0  # share of the training after which contrast counts
    dropout: float = 0.5  # see Architecture, as those that follow
    neck: int = 0
    width: int = 64
    taps: tuple[str, str, str] | None = None
    frozen: str = ""
    output_stride: int = 16
    scored_at: int | None = None
    kept: bool = False  # compute what is frozen once for all images and their mirror images
    precision: Literal["no", "bf16", "fp16"] = "no"
    workers: int = 0  # processes that read images
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"There is no method {self.method!r}; there are: {', '.join(METHODS)}.")
        if self.kept and (self.long_side or self.jitter):
            raise ValueError(
                "Features can be kept only of images that are not cropped or jittered. Leave out `kept`, or set "
                "long_side=None and jitter=False."
            )
        if self.kept and self.transformation != Transformation():
            raise ValueError(
                "What is kept of the second view is the smaller image as it is. Leave out `kept`, or the "
                "transformation."
            )

    def architecture(self, classes: Sequence[str]) -> Architecture:
        """The network that this trains."""
        shared = {field.name for field in fields(Architecture)} & {field.name for field in fields(Training)}
        return Architecture(classes=tuple(classes), **{name: getattr(self, name) for name in shared})


# What the other methods have in place of Training's values, as released for VOC.
METHOD_RECIPES: dict[str, dict[str, Any]] = {
    "cam": {"epochs": 15, "batch_size": 16, "learning_rate": 0.1, "long_side": (256, 512)},  # PSA
    "seam": {"small": 134},
    # 19,830 steps; the released 170 that follow keep the last rate, which is nearly 0.
    "eps": {"epochs": 15, "long_side": (256, 512), "dropout": 0.0},
    "seam+p2p": {},
    "eps+p2p": {"epochs": 15, "dropout": 0.0, "contrast": ContrastConfig.code(saliency=True)},
}
# A prototype is made of pixels of its own class, only classes that are there compete, and views add up, as in the paper.
OWN_PIXELS = replace(ContrastConfig.code(), assigned=True, ranked_background=True, absent_compete=False, sum_views=True)
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
# For miniatures on a CPU, whatever the method. The second view is less than half of the first one (published: 0.29). Contrast
# waits until the maps that label its pixels mean something, and takes its time: in half of it, what it adds to SEAM's seeds of
# unseen photographs is inside the noise (`python -m course_lib evidence contrast`).
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


def recipe(method: str = "seam+p2p", backbone: str = LITE0, **chosen: Any) -> Training:
    """The settings of a method on a backbone, as released or for a CPU, with changes.

    Args:
        chosen: fields of Training, `data` among them.
    """
    return Training(
        **{"method": method, "backbone": backbone}
        | SMALL_RECIPES.get(backbone, METHOD_RECIPES.get(method, {}))
        | chosen
    )


def loss_terms(
    method: str,
    views: Sequence[View],
    tags: Float[Tensor, "n t"],
    saliency: Float[Tensor, "n 1 H W"] | None,
    size1: int,
    size2: int,
    contrast: ContrastConfig,
    noise: Float[Tensor, "2 n h w"] | None,
    on_features: bool = False,
    warp: Warp | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Named terms of a method, whose sum is the loss.

    Args:
        views: one for "cam" and "eps", else two.
        saliency: 0..1, of the first view; for "eps" and "eps+p2p".
        size1, size2: sides of the images of both views.
        noise: see `contrast_loss`; for "...+p2p".
        on_features: SEAM's terms on the grids of the views, as always with EPS; else at the sizes of the images.
        warp: if the second view is more than a smaller copy.
    """
    first = views[0]
    if len(views) == 1:
        terms = {"tags": tag_loss(first.cam.mean((2, 3))[:, 1:], tags)}
        return terms | ({"saliency": saliency_loss(first.cam, saliency, tags)} if method == "eps" else {})
    second = views[1]
    if on_features or method == "eps+p2p":
        terms = seam_loss(first, second, tags, *(tuple(view.cam.shape[2:]) for view in views), warp)
    else:
        terms = seam_loss(first, second, tags, size1, size2, warp)
    if method == "eps+p2p":
        both = ((first, saliency), (second, resize(saliency, size2) if warp is None else warp(saliency, size2)))
        terms["saliency"] = (
            sum(saliency_loss(maps, salient, tags) for view, salient in both for maps in (view.cam, view.refined)) / 2
        )
    return terms | (contrast_loss(first, second, tags, contrast, noise, warp) if method.endswith("+p2p") else {})


class Learner(nn.Module):
    """A network with what its training needs.

    Attributes:
        start: the step from which contrast counts.
    """

    def __init__(self, net: CamNet, config: Training) -> None:
        super().__init__()
        self.net, self.config, self.start = net, config, 0
        self.norms = [(part, part.momentum) for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # done so far; it outlives an interruption

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss terms of a batch of Photos or of Kept."""
        config, net, tags = self.config, self.net, batch["tags"]
        prepared, warp = batch.get("views"), config.transformation.draw(len(tags), tags.device)
        if prepared is None:
            prepared = [net.prepare(batch["image"], batch["inside"], size, warp) for size in _sizes(config)]
        elif warp is not None:
            raise ValueError(
                "Kept features are those of second views without a transformation, but one is set. Train on `Photos`."
            )
        views = [self._view(maps, number) for number, maps in enumerate(prepared[: len(_sizes(config))])]
        saliency = batch["saliency"] / 255 if "eps" in config.method else None
        contrasted = net.architecture.contrasted
        noise = torch.rand(2, len(tags), *views[1].cam.shape[2:], device=tags.device) if contrasted else None
        terms = loss_terms(
            config.method,
            views,
            tags,
            saliency,
            config.size,
            config.small,
            config.contrast,
            noise,
            config.on_features,
            warp,
        )
        if contrasted:
            counts = (self.steps >= self.start).to(tags.dtype)
            terms = {name: term * counts if name in CONTRAST else term for name, term in terms.items()}
        self.steps += 1
        return terms

    def _view(self, maps: Maps, number: int) -> View:
        """A view; only the first leaves statistics for evaluation, where images have its size (frozen ones stay anyhow)."""
        for norm, momentum in self.norms:
            norm.momentum = 0.0 if number else momentum
        return self.net(maps)


def _sizes(config: Training) -> list[int | None]:
    """Of the views that the method looks at; None: as the image is."""
    return [None] if config.method in ("cam", "eps") else [None, config.small]


class Photos(Dataset):
    """Training images with tags, and with saliency if the method wants it, by torch's generator, which the engine seeds.

    In the published order: longer side, flip, jitter, crop. Where an image is smaller than the crop, it lies anywhere in it,
    and `inside` says where. Without a crop an image is squashed to a square.
    """

    def __init__(self, data: Voc, config: Training):
        self.data, self.config = data, config
        self.jitter = ColorJitter(0.3, 0.3, 0.3, 0.1) if config.jitter else nn.Identity()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config = self.config
        image, tags = self.data[index]
        if "eps" in config.method:
            image = torch.cat((image, self.data.saliency(index)[None]))
        size = [config.size] * 2
        if config.long_side is not None:
            low, high = config.long_side
            scale = int(torch.randint(low, high + 1, ())) / max(image.shape[1:])
            size = [round(side * scale) for side in image.shape[1:]]
        image = _resized(image, size)
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        image = torch.cat((self.jitter(image[:3]), image[3:], torch.ones_like(image[:1])))
        if config.long_side is not None:
            image = window(image, config.size)
        item = {"image": image[:3], "inside": image[-1].bool(), "tags": tags}
        return item | ({"saliency": image[3:4]} if "eps" in config.method else {})


def _resized(image: UInt8[Tensor, "k h w"], size: list[int]) -> UInt8[Tensor, "k H W"]:
    if [*image.shape[1:]] == size:
        return image
    return transforms.resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def window(image: UInt8[Tensor, "k h w"], size: int) -> UInt8[Tensor, "k size size"]:
    """A random crop; an image that is too small lies at a random place among zeros."""
    canvas = image.new_zeros(len(image), size, size)
    (rows, to_rows), (columns, to_columns) = (_place(side, size) for side in image.shape[1:])
    canvas[:, to_rows, to_columns] = image[:, rows, columns]
    return canvas


def _place(side: int, size: int) -> tuple[slice, slice]:
    """What of a side goes where in a window."""
    start = int(torch.randint(abs(side - size) + 1, ()))
    part = slice(start, start + min(side, size))
    whole = slice(0, min(side, size))
    return (part, whole) if side > size else (whole, part)


class Kept(Dataset):
    """What the frozen part of a network makes of both views of all images and of their mirror images, with tags and saliency.

    An item is that of one of both, by torch's generator. One serves all methods: it depends on data, trunk and sizes only.
    """

    def __init__(self, net: CamNet, data: Voc, config: Training, progress: bool = True):
        device, sizes = net.trunk.mean.device, (None, config.small)
        self.tags = data.tags.float()
        self.saliency = torch.stack([_resized(data.saliency(i)[None], [config.size] * 2) for i in range(len(data))])
        parts: list[list[list[Maps]]] = [[[] for _ in sizes] for _ in range(2)]  # flip, view, batch
        with torch.no_grad():
            for start in tqdm(range(0, len(data), 8), "features", disable=not progress):
                numbers = range(start, min(start + 8, len(data)))
                images = torch.stack([_resized(data[i][0], [config.size] * 2) for i in numbers])
                for flip, views in enumerate(parts):
                    turned = (images.flip(-1) if flip else images).to(device)
                    for size, batches in zip(sizes, views):
                        batches.append({name: maps.cpu() for name, maps in net.prepare(turned, size=size).items()})
        self.views = [
            [{name: torch.cat([maps[name] for maps in batches]) for name in batches[0]} for batches in views]
            for views in parts
        ]

    def __len__(self) -> int:
        return len(self.tags)

    def __getitem__(self, index: int) -> dict[str, Any]:
        flip = int(torch.randint(2, ()))
        views = [{name: maps[index] for name, maps in view.items()} for view in self.views[flip]]
        saliency = self.saliency[index].flip(-1) if flip else self.saliency[index]
        return {"views": views, "tags": self.tags[index], "saliency": saliency}


def training_images(config: Training, progress: bool = True) -> Dataset:
    """The images of split trainaug as `train` wants them: read one by one, or kept with what frozen parts make of them.

    What is kept serves every training on the same data with the same trunk and sizes, whatever its method and seed.
    """
    data = Voc(config.data, "trainaug")
    if not config.kept:
        return Photos(data, config)
    net = build(config.architecture(data.classes), config.weights)
    return Kept(net.to(engine.this_process().device, memory_format=torch.channels_last), data, config, progress)


def train(
    config: Training,
    folder: Path | None = None,
    progress: bool = True,
    images: Dataset | None = None,
    watch: Callable[[CamNet, int], None] | None = None,
) -> tuple[CamNet, list[dict[str, float]]]:
    """A trained network in evaluation mode, and the mean loss terms of each epoch.

    Args:
        folder: of checkpoints, where what was interrupted goes on, and of `model.safetensors` for `evaluate seeds`.
        images: of an earlier `training_images`; None: made here.
        watch: see `fit`.
    """
    images = training_images(config, progress) if images is None else images
    torch.manual_seed(config.seed)
    net = build(config.architecture(Voc(config.data, "trainaug").classes), config.weights)
    history = fit(Learner(net, config), images, folder, progress, watch)
    if folder is not None and engine.this_process().is_main_process:
        save(net, folder / "model.safetensors")
    engine.this_process().wait_for_everyone()  # who comes next may load it
    return net.eval(), history


def fit(
    learner: Learner,
    dataset: Dataset,
    folder: Path | None = None,
    progress: bool = True,
    watch: Callable[[CamNet, int], None] | None = None,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch of a learner by its own configuration.

    Args:
        watch: called with the network and the number of the step before each of them, for pictures of a training.
    Raises:
        ValueError: fewer images than a batch.
    """
    config = learner.config
    if len(dataset) < config.batch_size:
        raise ValueError(
            f"Batches of {config.batch_size} were asked for, but there are {len(dataset)} images. Take smaller batches."
        )
    batches = BatchSampler(RandomSampler(dataset, generator=Generator()), config.batch_size, drop_last=True)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)
    steps = config.epochs * len(batches)
    learner.start = int(config.contrast_from * steps)
    optimizer = _optimizer(learner.net, config)
    scheduler = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** config.power)
    numbers = count()

    def step(model: Learner, batch: dict[str, Any]) -> dict[str, Tensor]:
        if watch is not None:
            watch(model.net, next(numbers))
        return model.step(batch)

    return engine.train(
        learner,
        step,
        loader,
        optimizer,
        engine.Plan(config.epochs, config.precision, seed=config.seed),
        scheduler=scheduler,
        folder=folder,
        progress=progress,
    )


def _optimizer(net: CamNet, config: Training) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        groups = parameter_groups(net.trunk, net.new_layers(), config.learning_rate, config.weight_decay)
        return torch.optim.SGD(groups, config.learning_rate, config.momentum)
    new = [weight for layer in net.new_layers() for weight in layer.parameters()]
    trunk = [weight for weight in net.trunk.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
        [{"params": trunk, "lr": config.learning_rate}, {"params": new, "lr": config.new_learning_rate}],
        weight_decay=config.weight_decay,
    )


OPTIONS = {
    "method": (str, f"one of {', '.join(METHODS)} (default: {Training.method})"),
    "data": (str, "folder of PASCAL VOC 2012 or of a miniature (default: mini-voc)"),
    "backbone": (str, f"resnet38, small (for creatures) or one of timm's (default: {LITE0})"),
    "weights": (str, 'to start from: "pretrained", "random", or a path'),
    "epochs": (int, ""),
    "batch_size": (int, "of all processes together"),
    "learning_rate": (float, "of the trunk"),
    "new_learning_rate": (float, "of new layers, with AdamW"),
    "momentum": (float, f"of SGD (default: {Training.momentum}, as released)"),
    "weight_decay": (float, ""),
    "size": (int, "side of the first view, pixels"),
    "small": (int, "side of the second view, pixels"),
    "contrast_from": (float, "share of the training after which contrast counts"),
    "width": (int, f"channels of a ResNet38's first convolution (default: {Training.width}); less is for trials"),
    "precision": (str, "no, bf16 or fp16 (default: no)"),
    "workers": (int, "processes that read images"),
    "seed": (int, ""),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options for `from_options`, and --folder. What is not given does not appear: that of the recipe holds."""
    for name, (kind, purpose) in OPTIONS.items():
        purpose = purpose or "(default: that of method and backbone)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=purpose)
    parser.add_argument(
        "--preset",
        choices=("paper", "code"),
        help="contrast as in the paper, or as in the released code "
        "(default: code on ResNet38; in the small settings with prototypes of the class's own pixels)",
    )
    parser.add_argument(
        "--alpha", type=float, help=f"weight of both cross-view terms (default: {ContrastConfig.cross_cam})"
    )
    parser.add_argument("--beta", type=float, help=f"weight of the intra-view term (default: {ContrastConfig.intra})")
    parser.add_argument("--temperature", type=float, help=f"tau (default: {ContrastConfig.temperature})")
    parser.add_argument(
        "--top-k", type=int, help=f"pixels of a prototype (default: {ContrastConfig.top_k}; 16 with EPS as released)"
    )
    parser.add_argument(
        "--background",
        type=float,
        help=f"score of the background in pseudo labels (default: "
        f"{ContrastConfig.background}; 0.1 with EPS as released)",
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="of checkpoints and of the trained model.safetensors"
    )


def main(argv: list[str]) -> int:
    """`python -m course_lib train wsss`: a network that makes seeds from image tags."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib train wsss", description=main.__doc__, argument_default=argparse.SUPPRESS
    )
    add_options(parser)
    chosen = vars(parser.parse_args(argv))
    folder = chosen.pop("folder")
    try:
        _, history = train(from_options(chosen), folder)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    engine.tell(history, folder, "seeds")
    return 0


def from_options(chosen: dict[str, Any]) -> Training:
    """The settings that options of the command mean: a recipe, a preset of contrast, and what was given besides."""
    chosen = dict(chosen)
    preset = chosen.pop("preset", None)
    alpha = chosen.pop("alpha", None)
    changes = {"cross_prototype": alpha, "cross_cam": alpha, "intra": chosen.pop("beta", None)}
    changes |= {name: chosen.pop(name, None) for name in ("temperature", "top_k", "background")}
    if "data" not in chosen:
        chosen["data"] = default_data(chosen.get("backbone", LITE0))
    config = recipe(**chosen)
    contrast = config.contrast
    if preset is not None:
        contrast = ContrastConfig.paper() if preset == "paper" else ContrastConfig.code(saliency="eps" in config.method)
    changes = {name: value for name, value in changes.items() if value is not None}
    if (preset or changes) and not config.method.endswith("+p2p"):
        raise ValueError(f"{', '.join(changes) or 'preset'}: options of contrast, which {config.method} has not.")
    return replace(config, contrast=replace(contrast, **changes))
