"""Training of what refines seeds: AffinityNet (PSA) and IRNet (IRN), from the pixels that two readings agree on.

    net = train_affinity(affinity_recipe("psa", data=folder, labels=sure), Path("runs/psa"))

Both learn from labels that are sure, made from seeds by the pipeline: PSA from score maps of two CRFs, one under a
strong and one under a weak background, IRN from label images. Nobody drew a mask.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import checkpoints, engine
from course_lib.backbones.weights import LITE0
from course_lib.data.images import load_grey
from course_lib.data.voc import IGNORE, Voc
from course_lib.settings import Count, NotNegative, PartialShare, Positive, RandomSeed, Side, Workers, check_settings
from course_lib.wsss import irn, psa
from course_lib.wsss.affinity import filled, fitting_radius
from course_lib.wsss.cam_net import Architecture, kept_maps
from course_lib.wsss.learner import shuffled_batches, usual_optimizer, window
from course_lib.wsss.recipes import SMALL_RECIPES
from course_lib.wsss.seeds import read_scores

STRONG, WEAK = "strong", "weak"  # folders of score maps, ID.npz, by the background that competes in them


@dataclass(frozen=True)
class AffinityTraining:
    """What is trained, and how. The values here are those of PSA as released with P2P; see `affinity_recipe`."""

    data: str = ""  # a folder in VOC's layout, whose split trainaug is trained on
    labels: str = ""  # folder of the pipeline's stage "sure": strong/ID.npz and weak/ID.npz (psa), ID.png (irn)
    refine: Literal["psa", "irn"] = "psa"
    backbone: str = "resnet38"  # psa: resnet38, small or one of timm's; irn: one of timm's
    weights: str = "pretrained"  # to start from: pretrained (timm's), random, or for ResNet38 a path
    epochs: Count = 8  # passes through the images
    batch_size: Count = 8  # of all processes together
    optimizer: Literal["sgd", "adamw"] = "sgd"  # as released, or for a CPU
    learning_rate: Positive = 0.01  # SGD: of the trunk's weights, biases x 2, heads x 10 (psa); of boundaries (irn)
    new_learning_rate: Positive = 0.01  # of heads (AdamW only)
    momentum: PartialShare = 5e-4  # of SGD; see `recipes`
    weight_decay: NotNegative = 5e-4
    power: NotNegative = 0.9  # of the schedule
    size: Side = 448  # of a crop, or of the whole image, pixels
    scales: tuple[Positive, Positive] | None = (1.0, 1.0)  # of the image before the crop; None: no crop
    jitter: bool = True  # of colours: brightness, contrast, saturation 0.3, hue 0.1
    radius: Annotated[int, (2, 64)] | None = None  # of pairs, on the grid; None: 5 (psa) or 10 (irn)
    borders: bool = False  # whether pixels near the border are sources of pairs, which small grids need
    width: Count = 64  # of a ResNet38's first convolution; less makes a network for trials
    taps: tuple[str, str, str] | None = None  # of timm's (psa); None: chosen there
    frozen: str = ""  # of timm's (psa), the last part that is not trained
    output_stride: Literal[8, 16, 32] = 16  # of timm's (psa)
    kept: bool = False  # compute what is frozen once for all images and their mirror images (psa)
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast
    workers: Workers = 0  # processes that read images
    seed: RandomSeed = 0  # of weights, batches and everything drawn
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)
        if self.kept and (self.scales or self.jitter or self.refine == "irn"):
            raise ValueError(
                "What is kept are features of whole images as they are, for psa: set scales=None and jitter=False, or "
                "leave out `kept`."
            )

    def network(self, classes: Sequence[str]) -> psa.AffinityNet | irn.IRNet:
        """The network that this trains; its heads start from torch's generator."""
        if self.refine == "irn":
            return irn.IRNet(self.backbone, self.weights == "pretrained")
        known = vars(self) | {"classes": tuple(classes), "method": "cam"}
        shared = {part.name: known[part.name] for part in fields(Architecture) if part.name in known}
        return psa.build(Architecture(**shared), self.weights)


_RELEASED: dict[str, dict[str, Any]] = {
    "psa": {},
    "irn": {
        "backbone": "resnet50.tv_in1k",
        "epochs": 3,
        "batch_size": 32,
        "learning_rate": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "size": 512,
        "scales": (0.5, 1.5),
        "jitter": False,
    },
}
_CPU = {
    "epochs": 2,
    "batch_size": 16,
    "optimizer": "adamw",
    "new_learning_rate": 1e-3,
    "weight_decay": 0.01,
    "scales": None,
    "jitter": False,
    "borders": True,
}


def affinity_recipe(refine: Literal["psa", "irn"], backbone: str | None = None, **chosen: Any) -> AffinityTraining:
    """The settings of a training, as released or for a CPU, with changes.

    Args:
        backbone: None: the released one. That of the seeds on a CPU; the small trunk has no levels for irn, which takes
            an EfficientNet-Lite0 then.
        chosen: fields of AffinityTraining, `data` and `labels` among them.
    """
    settings = dict(_RELEASED[refine])
    if backbone in SMALL_RECIPES:
        known = SMALL_RECIPES[LITE0 if refine == "irn" else backbone]
        same = ("weights", "learning_rate", "size", "taps", "frozen", "kept")
        settings |= _CPU | {name: known[name] for name in same if name in known} | {"backbone": backbone}
        if refine == "irn":
            settings |= {"backbone": LITE0, "weights": "pretrained", "size": 192, "radius": 5, "kept": False}
    elif backbone is not None:
        settings["backbone"] = backbone
    return AffinityTraining(**{"refine": refine} | settings | chosen)


class SureImages(Dataset):
    """Training images with labels of the pixels that are sure, on the network's grid: {"image", "inside", "labels"}.

    In the published order: jitter, scale, crop, flip. Outside the image labels are 255.

    Args:
        stride: of the network.
    """

    def __init__(self, data: Voc, config: AffinityTraining, stride: int) -> None:
        self.data, self.config, self.stride = data, config, stride
        self.jitter = ColorJitter(0.3, 0.3, 0.3, 0.1) if config.jitter else nn.Identity()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.item(index)

    def item(self, index: int, flip: bool | None = None) -> dict[str, Tensor]:
        """An item.

        Args:
            flip: whether the image is mirrored; None: drawn.
        """
        config, folder, name = self.config, Path(self.config.labels), self.data.ids[index]
        image, size, classes = self.jitter(self.data[index][0]), [self.config.size] * 2, None
        if config.scales:
            low, high = config.scales
            scale = low + (high - low) * float(torch.rand(()))
            size = [max(1, round(side * scale)) for side in image.shape[1:]]
        if config.refine == "irn":
            labels = IGNORE - load_grey(folder / f"{name}.png", "P")[None]  # a crop fills with 0, which is 255 then
            mode = InterpolationMode.NEAREST_EXACT
        else:
            maps = [read_scores(folder / part / f"{name}.npz") for part in (STRONG, WEAK)]
            classes = torch.stack(maps).amax((0, 2, 3)).nonzero()[:, 0]
            classes = torch.cat((classes.new_zeros(1), classes[classes > 0]))  # the background, and those with a score
            labels = (torch.cat([each[classes] for each in maps]) * 255).round().byte()  # 2c H W
            mode = InterpolationMode.BILINEAR
        image = transforms.resize(image, size, InterpolationMode.BICUBIC)
        layers = torch.cat((image, transforms.resize(labels, size, mode), torch.ones_like(image[:1])))
        if config.scales:
            layers = window(layers, config.size)
        if torch.rand(()) < 0.5 if flip is None else flip:
            layers = layers.flip(-1)
        return {"image": layers[:3], "inside": layers[-1].bool(), "labels": self._labels(layers[3:-1], classes)}

    def _labels(self, layers, classes):  # k H W -> h w
        if classes is None:
            return irn.reduced_labels((IGNORE - layers).long())[0].byte()
        strong, weak = (layers[None].float() / 255).chunk(2, 1)
        labels = psa.affinity_labels(strong, weak, self.stride)[0]
        known = torch.full((IGNORE + 1,), IGNORE)
        known[: len(classes)] = classes
        return known[labels].byte()


class KeptSureImages(Dataset):
    """What the frozen part of an AffinityNet makes of all images and of their mirror images, with the labels.

    Args:
        sure: whole images; their augmentation is the flip alone.
    Raises:
        ValueError: images that the grid of the features does not divide.
    """

    def __init__(self, net: psa.AffinityNet, sure: SureImages, progress: bool = True) -> None:
        if sure.config.size % net.trunk.stride:
            raise ValueError(
                f"Expected images whose side is a multiple of {net.trunk.stride}, got {sure.config.size}; "
                "set another size, or leave out `kept`."
            )
        items = [[sure.item(index, flip) for index in range(len(sure))] for flip in (False, True)]
        images, self.labels = (
            [torch.stack([item[part] for item in turned]) for turned in items] for part in ("image", "labels")
        )
        self.maps = [kept_maps(net.trunk, turned, None, progress) for turned in images]

    def __len__(self) -> int:
        return len(self.labels[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        flip = int(torch.randint(2, ()))
        maps = {name: part[index] for name, part in self.maps[flip].items()}
        return {"maps": maps, "labels": self.labels[flip][index]}


class AffinityLearner(nn.Module):
    """A network of affinities with the step of its training."""

    def __init__(self, net: psa.AffinityNet | irn.IRNet, config: AffinityTraining) -> None:
        super().__init__()
        self.net, self.config = net, config

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss terms of a batch of SureImages or of KeptSureImages."""
        labels, borders, maps = batch["labels"].long(), self.config.borders, batch.get("maps")
        if maps is None:
            colours = self.net if self.config.refine == "irn" else self.net.trunk
            images = colours.normalise(batch["image"]) * batch["inside"][:, None]  # outside lies the mean colour
        if self.config.refine == "irn":
            images = filled(images, max(self.net.strides))
            boundary, displacement = self.net(self.net.frozen(images))
            grid = labels.shape[1:]  # sides of the image that were filled up have none
            parts = (part[..., : grid[0], : grid[1]] for part in (boundary, displacement))
            return irn.irn_loss(
                *parts, labels, fitting_radius(*grid, self.config.radius or irn.TRAINED_RADIUS), borders
            )
        if maps is None:
            maps = self.net.trunk.frozen(filled(images, self.net.trunk.stride))
        features = self.net(maps)
        return psa.affinity_loss(
            features, labels, fitting_radius(*labels.shape[1:], self.config.radius or psa.RADIUS), borders
        )


def train_affinity(
    config: AffinityTraining, folder: Path | None = None, progress: bool = True
) -> tuple[psa.AffinityNet | irn.IRNet, list[dict[str, float]]]:
    """A trained network in evaluation mode, and the mean loss terms of each epoch.

    Args:
        folder: of checkpoints, where what was interrupted goes on, and of `model.safetensors`.
    Raises:
        ValueError: fewer images than a batch.
    """
    data = Voc(config.data, "trainaug")
    torch.manual_seed(config.seed)
    net = config.network(data.classes)
    stride = irn.STRIDE if config.refine == "irn" else net.trunk.stride
    process = engine.this_process(config.device)
    images: Dataset = SureImages(data, config, stride)
    if config.kept:
        net.to(process.device, memory_format=torch.channels_last)
        images = KeptSureImages(net, images, progress and process.is_main_process)
    loader = shuffled_batches(images, config)
    steps = config.epochs * len(loader)
    optimizer = _optimizer(net, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** config.power)
    plan = engine.Plan(config.epochs, config.precision, seed=config.seed, device=config.device)
    step = lambda learner, batch: learner.step(batch)
    history = engine.train(
        AffinityLearner(net, config),
        step,
        loader,
        optimizer,
        plan,
        scheduler=scheduler,
        folder=folder,
        progress=progress,
    )
    if config.refine == "irn":
        pictures = DataLoader(images, config.batch_size, num_workers=config.workers)
        irn.fit_mean(net, (batch["image"].to(process.device) for batch in pictures))
    if folder is not None and process.is_main_process:
        about = {"irn": config.backbone} if config.refine == "irn" else {"affinity": asdict(net.architecture)}
        checkpoints.write(folder / "model.safetensors", net, about)
    process.wait_for_everyone()
    return net.eval(), history


def load_affinity(path: str | Path) -> psa.AffinityNet | irn.IRNet:
    """A trained network in evaluation mode: a file of `train_affinity`, or a released checkpoint of AffinityNet."""
    state, about = checkpoints.read(path)
    if "irn" not in about:
        return psa.load(path)
    net = irn.IRNet(about["irn"], pretrained=False)
    checkpoints.fill(net, state, str(path))
    return net.eval()


def _optimizer(net, config):
    if config.refine == "psa":
        return usual_optimizer(net.trunk, [*net.heads().values()], config)
    groups = net.parameter_groups(config.learning_rate, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, config.momentum)
    return torch.optim.AdamW([group | {"lr": config.new_learning_rate} for group in groups])
