"""DeepLab: the segmentation networks that are trained on pseudo masks, as if these were the truth.

    net, history = train_segmenter(mask_recipe(data=folder, masks=pseudo), Path("runs/deeplab"))
    shares = class_shares(net, photographs, scales=(0.5, 1.0, 1.5))         # b c H W, sum to 1 over the classes

    head           on conv6 of a trunk at stride 8 (backbones.dense)                       published as
    large-fov      3 x 3 dilated 12, 512 - 1 x 1, 512 - dropout - classes                  DeepLab-LargeFOV, Table 3
    aspp           the sum of four 3 x 3 to the classes, dilated 6, 12, 18, 24             DeepLab v2, Table 4
    aspp-concat    four 3 x 3 and one of the whole image, 256 each, side by side           what is released with P2P as
                   - 1 x 1, 256 - dropout - classes                                        its "v2"
                   Chen et al., ICLR 2015; TPAMI 2018 (v2); arXiv 1706.05587 (v3); Du et al., CVPR 2022, Tables 3, 4

The code that is released with P2P has the head "aspp-concat", which is that of v3, under the name of v2. It never
trains scale and shift of batch normalisation, while its statistics follow the batches. Which of the two heads made the
paper's Table 4 is not said. Logits are brought to the size of the image corner on corner, and those of several scales
and of the mirror image are averaged before the softmax.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import checkpoints, engine
from course_lib.backbones.dense import Dense, Maps
from course_lib.backbones.weights import LITE0
from course_lib.data.voc import CLASSES, IGNORE, Voc
from course_lib.settings import (
    Count,
    NotNegative,
    PartialShare,
    Positive,
    RandomSeed,
    Side,
    Whole,
    Workers,
    check_settings,
)
from course_lib.wsss.cam_net import Architecture, kept_maps, trunk_of
from course_lib.wsss.learner import shuffled_batches, usual_optimizer, window
from course_lib.wsss.views import resize

DEEPLAB_HEADS = ("large-fov", "aspp", "aspp-concat")
ASPP_RATES = (6, 12, 18, 24)  # dilations of ASPP
SEGMENTATION_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the released test, each with its mirror image
HEAD_MOMENTUM = 3e-4  # of the running statistics, as released for 20,000 steps: in 300 they move by a tenth
HUES = 180  # of OpenCV, in whose steps the jitter is published; PIL has 256


@dataclass(frozen=True)
class SegmenterArchitecture:
    """What a segmentation network is built from; it is kept in checkpoints."""

    classes: tuple[str, ...] = CLASSES  # names, background first
    backbone: str = "resnet101"  # resnet38, small, or any of timm's that `dense.Timm` can take apart
    head: Annotated[str, DEEPLAB_HEADS] = "aspp"
    width: int = 64  # of a ResNet38's first convolution; less makes a network for trials
    taps: tuple[str, str, str] | None = None  # of timm's; None: chosen there
    frozen: str = ""  # of timm's, the last part that is not trained
    output_stride: int = 8  # of timm's
    statistics: Literal["batch", "frozen"] = "batch"  # of the trunk's batch normalisation
    head_momentum: float = HEAD_MOMENTUM  # of the head's running statistics
    scored_at: int | None = None  # longer side that images are brought to for a prediction; None: as they are

    def __post_init__(self) -> None:
        check_settings(self)


class Segmenter(nn.Module):
    """A trunk with a head of DeepLab; see `build_segmenter`."""

    def __init__(self, trunk: Dense, architecture: SegmenterArchitecture) -> None:
        super().__init__()
        self.trunk, self.architecture = trunk, architecture
        if architecture.statistics == "batch":
            # As released: statistics follow the batches, scale and shift stay. What is frozen besides stays frozen.
            norms = {part for part in trunk.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
            inside = {layer for part in trunk.still if part not in norms for layer in part.modules()}
            trunk.still = [part for part in trunk.still if part not in norms - inside]
            for norm in norms - inside:
                norm.momentum = HEAD_MOMENTUM if architecture.backbone == "resnet38" else norm.momentum
        channels, count = trunk.channels["conv6"], len(architecture.classes)
        self.head = {"large-fov": LargeFov, "aspp": Aspp, "aspp-concat": AsppConcat}[architecture.head](channels, count)
        for part in self.head.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = architecture.head_momentum

    def prepare(self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]) -> Maps:
        """What the frozen part of the trunk makes of images: RGB, uint8 in 0..255 or float in 0..1."""
        return self.trunk.frozen(self.trunk.normalise(images))

    def forward(self, prepared: Maps) -> Float[Tensor, "b c h w"]:
        """Logits on the grid of the features, from what `prepare` returned."""
        return self.head(self.trunk.trained(prepared)["conv6"])


class LargeFov(nn.Sequential):
    """Head with one dilated convolution of a large field of view."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__(
            *_normalised(channels, 512, 3, ASPP_RATES[1]),
            *_normalised(512, 512, 1),
            nn.Dropout(0.5),
            nn.Conv2d(512, count, 1),
        )
        nn.init.kaiming_normal_(self[-1].weight, mode="fan_out")


class Aspp(nn.Module):
    """Head of v2: class scores of four dilated convolutions, summed."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, count, 3, padding=rate, dilation=rate) for rate in ASPP_RATES)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        """Class scores."""
        return sum(branch(features) for branch in self.branches)


class AsppConcat(nn.Module):
    """Head as released with P2P under the name of v2: four dilated convolutions and the whole image side by side."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*_normalised(channels, 256, 3, rate)) for rate in ASPP_RATES)
        self.whole = nn.Sequential(*_normalised(channels, 256, 1))
        self.project = nn.Sequential(
            *_normalised(5 * 256, 256, 1), nn.Dropout(0.5), nn.Dropout(0.5), nn.Conv2d(256, count, 1)
        )
        nn.init.kaiming_normal_(self.project[-1].weight, mode="fan_out")

    def forward(self, features: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c h w"]:
        """Class scores."""
        whole = self.whole(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[2:])
        return self.project(torch.cat((*(branch(features) for branch in self.branches), whole), 1))


def build_segmenter(architecture: SegmenterArchitecture, weights: str | Path = "random") -> Segmenter:
    """A segmentation network in evaluation mode; its head starts from torch's generator.

    Args:
        weights: of the trunk, as in `cam_net.trunk_of`.
    Raises:
        ValueError: as `cam_net.trunk_of`.
    """
    shared = {part: getattr(architecture, part) for part in ("backbone", "width", "taps", "frozen", "output_stride")}
    trunk = trunk_of(Architecture("cam", architecture.classes, **shared), weights)
    return Segmenter(trunk, architecture).eval()


def save_segmenter(net: Segmenter, path: Path) -> None:
    """Write tensors and architecture as one safetensors file, for `load_segmenter`."""
    checkpoints.write(path, net, {"segmenter": asdict(net.architecture)})


def load_segmenter(path: str | Path) -> Segmenter:
    """A trained segmentation network in evaluation mode, from a file of `save_segmenter`.

    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or something else.
    """
    state, about = checkpoints.read(path)
    if "segmenter" not in about:
        raise RuntimeError(
            f"Expected a segmentation network of `train deeplab` at {path}, got other weights; name one."
        )
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in about["segmenter"].items()}
    net = build_segmenter(SegmenterArchitecture(**known))
    checkpoints.fill(net, state, str(path))
    return net


@torch.inference_mode()
def class_shares(
    net: Segmenter, images: UInt8[Tensor, "b 3 H W"], scales: Sequence[float] = (1.0,)
) -> Float[Tensor, "b c H W"]:
    """Softmax of the mean logits over scales and mirror images, in the size of the images.

    Args:
        net: in evaluation mode, on the device of the images.
        images: of one size.
        scales: factors of their sides, or of what these become if the network says at which size it looks.
    """
    size = tuple(images.shape[2:])
    longest, total = net.architecture.scored_at or max(size), 0
    normalised = net.trunk.normalise(images)  # and resized after that, as released
    for scale in scales:
        scaled = [max(1, round(side * scale * longest / max(size))) for side in size]
        these = F.interpolate(normalised, scaled, mode="bicubic", align_corners=False)
        logits = net(net.trunk.frozen(torch.cat((these, these.flip(-1)))))
        straight, mirrored = resize(logits.float(), size).chunk(2)
        total = total + straight + mirrored.flip(-1)
    return (total / (2 * len(scales))).softmax(1)


@dataclass(frozen=True)
class MaskTraining:
    """What is trained on masks, and how. The values here are those released with P2P for VOC; see `mask_recipe`."""

    data: str = ""  # a folder in VOC's layout, whose split trainaug is trained on; "": the miniature
    masks: str = ""  # folder of pseudo masks, ID.png; "": the true masks of the data
    backbone: str = "resnet101"  # resnet38, small (for creatures), or a name of timm's
    head: Annotated[str, DEEPLAB_HEADS] = "aspp"  # large-fov (Table 3), aspp or aspp-concat (Table 4)
    weights: str = "pretrained"  # to start from: pretrained (timm's), random, or for ResNet38 a path
    epochs: Count = 19  # passes through the images: 20,102 steps on VOC; released: 20,000
    batch_size: Count = 10  # of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"  # as released, or for a CPU
    learning_rate: Positive = 0.001  # of the trunk's weights; SGD: biases x 2, the head x 10
    new_learning_rate: Positive = 0.01  # of the head (AdamW only)
    momentum: PartialShare = 0.9  # of SGD
    weight_decay: NotNegative = 5e-4  # of weights; SGD: not of biases
    power: NotNegative = 0.9  # of the schedule
    size: Side = 448  # of a crop, or of the whole image, pixels
    scales: tuple[Positive, Positive] | None = (0.5, 1.5)  # of the image before the crop; None: no crop
    jitter: Whole = 10  # of hue (of 180), saturation and value (of 255), each up or down
    width: Count = 64  # of a ResNet38's first convolution; less makes a network for trials
    taps: tuple[str, str, str] | None = None  # of timm's; None: chosen there
    frozen: str = ""  # of timm's, the last part that is not trained
    output_stride: Literal[8, 16, 32] = 8  # of timm's
    statistics: Literal["batch", "frozen"] = "batch"  # of the trunk's batch normalisation
    head_momentum: Positive = HEAD_MOMENTUM  # of the running statistics of the head's batch normalisation
    scored_at: Side | None = None  # longer side that images are brought to for a prediction; None: as they are
    kept: bool = False  # compute what is frozen once for all images and their mirror images
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    workers: Workers = 0  # processes that read images
    seed: RandomSeed = 0  # of weights, batches and everything drawn
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)
        if self.scales and self.scales[0] > self.scales[1]:
            raise ValueError(f"scales must be a smaller and a larger factor, got {self.scales}.")
        if self.kept and (self.scales or self.jitter):
            raise ValueError("What is kept are features of whole images as they are: set scales=None and jitter=0.")

    def architecture(self, classes: Sequence[str]) -> SegmenterArchitecture:
        """The network that this trains."""
        known = vars(self) | {"classes": tuple(classes)}
        return SegmenterArchitecture(**{part.name: known[part.name] for part in fields(SegmenterArchitecture)})


_CPU = {
    "head": "large-fov",
    "batch_size": 16,
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "scales": None,
    "jitter": 0,
    "statistics": "frozen",
    "head_momentum": 0.1,
}
# For miniatures on a CPU; what they share with the training from tags has its values there (`recipes`).
SMALL_MASK_RECIPES: dict[str, dict[str, Any]] = {
    LITE0: _CPU
    | {
        "epochs": 4,
        "learning_rate": 3e-4,
        "new_learning_rate": 1e-3,
        "size": 288,
        "scored_at": 288,
        "taps": ("blocks.2", "blocks.4", "blocks.5.0"),
        "frozen": "blocks.4",
        "output_stride": 16,
        "kept": True,
    },
    "small": _CPU | {"weights": "random", "epochs": 8, "learning_rate": 3e-3, "new_learning_rate": 3e-3, "size": 96},
}


def mask_recipe(backbone: str = LITE0, **chosen: Any) -> MaskTraining:
    """The settings of a training on masks, as released or for a CPU, with changes.

    Args:
        chosen: fields of MaskTraining, `data` and `masks` among them.
    """
    return MaskTraining(**{"backbone": backbone} | SMALL_MASK_RECIPES.get(backbone, {}) | chosen)


class MaskedImages(Dataset):
    """Training images with masks, by torch's generator, which the engine seeds: {"image", "inside", "mask"}.

    In the published order: jitter, flip, scale, crop. What lies outside the image is 255 in the mask, and False inside.

    Args:
        masks: folder of pseudo masks; None: those of the data.
    """

    def __init__(self, data: Voc, masks: Path | None, config: MaskTraining) -> None:
        self.data, self.config = data, config
        if masks is not None:
            self.data.masks = masks

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        config, image, mask = self.config, self.data[index][0], self.data.mask(index)
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"{self.data.masks / self.data.ids[index]}.png: expected a mask of {image.shape[2]} x {image.shape[1]} "
                f"pixels like its image, got {mask.shape[1]} x {mask.shape[0]}; make it again."
            )
        if config.jitter:
            image = shifted_colours(image, torch.randint(-config.jitter, config.jitter + 1, (3,)))
        size = [config.size] * 2
        if config.scales:
            low, high = config.scales
            scale = low + (high - low) * float(torch.rand(()))
            size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = transforms.resize(image, size, InterpolationMode.BICUBIC)
        mask = transforms.resize(mask[None], size, InterpolationMode.NEAREST_EXACT)
        layers = torch.cat(
            (image, IGNORE - mask, torch.ones_like(mask))
        )  # 5 h w: a crop fills with 0, which is 255 then
        if torch.rand(()) < 0.5:
            layers = layers.flip(-1)
        if config.scales:
            layers = window(layers, config.size)
        return {"image": layers[:3], "inside": layers[4].bool(), "mask": IGNORE - layers[3]}


class KeptMasks(Dataset):
    """What the frozen part of a network makes of all images and of their mirror images, with the masks.

    Args:
        masked: images of one size and their masks; their augmentation is the flip alone.
    """

    def __init__(self, net: Segmenter, masked: MaskedImages, progress: bool = True) -> None:
        data, size = masked.data, [masked.config.size] * 2
        numbers = range(len(data))
        images = torch.stack([transforms.resize(data[i][0], size, InterpolationMode.BICUBIC) for i in numbers])
        masks = (data.mask(i)[None] for i in numbers)
        self.masks = torch.cat([transforms.resize(mask, size, InterpolationMode.NEAREST_EXACT) for mask in masks])

        self.maps = [kept_maps(net.trunk, turned, None, progress) for turned in (images, images.flip(-1))]

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        flip = int(torch.randint(2, ()))
        mask = self.masks[index].flip(-1) if flip else self.masks[index]
        return {"maps": recursively_apply(lambda maps: maps[index], self.maps[flip]), "mask": mask}


def shifted_colours(image: UInt8[Tensor, "3 h w"], shifts: Integer[Tensor, "3"]) -> UInt8[Tensor, "3 h w"]:
    """An image whose hue turns, and whose saturation and value rise, by whole steps: of 180, 255 and 255."""
    layers = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("HSV")).astype(np.int16)
    hue, saturation, value = shifts.tolist()
    layers[..., 0] = (layers[..., 0] + round(hue * 256 / HUES)) % 256
    layers[..., 1:] = (layers[..., 1:] + (saturation, value)).clip(0, 255)
    picture = Image.fromarray(layers.astype(np.uint8), "HSV").convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def mask_loss(logits: Float[Tensor, "b c h w"], mask: UInt8[Tensor, "b H W"]) -> Float[Tensor, ""]:
    """Cross-entropy of logits that are brought to the size of the mask, mean over its pixels that are not 255.

    A batch without such a pixel gives 0, with a gradient of 0.
    """
    logits = resize(logits.float(), tuple(mask.shape[1:]))
    known = (mask != IGNORE).sum().clamp_min(1)
    return F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="sum") / known


class MaskLearner(nn.Module):
    """A segmentation network with the step of its training."""

    def __init__(self, net: Segmenter) -> None:
        super().__init__()
        self.net = net

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss terms of a batch of MaskedImages or of KeptMasks."""
        maps = batch.get("maps")
        if maps is None:  # outside the image lies the mean colour
            maps = self.net.trunk.frozen(self.net.trunk.normalise(batch["image"]) * batch["inside"][:, None])
        return {"masks": mask_loss(self.net(maps), batch["mask"])}


def train_segmenter(
    config: MaskTraining, folder: Path | None = None, progress: bool = True
) -> tuple[Segmenter, list[dict[str, float]]]:
    """A network trained on masks, in evaluation mode, and the mean loss of each epoch.

    Args:
        folder: of checkpoints, where what was interrupted goes on, and of `model.safetensors`.
    Raises:
        FileNotFoundError: masks that are not there.
        ValueError: fewer images than a batch.
    """
    masks = Path(config.masks) if config.masks else None
    data = Voc(config.data, "trainaug")
    if masks is not None and not masks.is_dir():
        raise FileNotFoundError(f"Expected a folder of pseudo masks as masks, got {masks}, where there is none.")
    torch.manual_seed(config.seed)
    net = build_segmenter(config.architecture(data.classes), config.weights)
    process = engine.this_process(config.device)
    images: Dataset = MaskedImages(data, masks, config)
    if config.kept:
        net.to(process.device, memory_format=torch.channels_last)
        images = KeptMasks(net, images, progress and process.is_main_process)
    loader = shuffled_batches(images, config)
    steps = config.epochs * len(loader)
    optimizer = usual_optimizer(net.trunk, [net.head], config)
    # As released, the schedule ends one step late.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / (steps + 1)) ** config.power)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed, device=config.device)
    step = lambda learner, batch: learner.step(batch)
    history = engine.train(
        MaskLearner(net), step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress
    )
    if folder is not None and process.is_main_process:
        save_segmenter(net, folder / "model.safetensors")
    process.wait_for_everyone()
    return net.eval(), history


def _normalised(before, after, side, dilation=1):
    """A convolution without bias, batch normalisation, ReLU."""
    convolution = nn.Conv2d(before, after, side, padding=side // 2 * dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    return convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)
