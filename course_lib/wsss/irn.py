"""IRN: a network that sees boundaries of objects; seeds walk wherever no boundary stands in the way.

    a_ij = 1 - max_{k on the path from i to j} B_k          affinity: B is the boundary map, 0..1
    D_i                                                     displacement of a pixel to the centre of its object; of two
                                                            pixels of one object D_i - D_j is the way from i to j
    y = (x (1 - B)) T^t                                     walk, see `affinity`
                        Ahn, Cho, Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel
                        Relations", CVPR 2019

    net = IRNet("resnet50.tv_in1k")                                     # everything in front of its heads is frozen
    labels = reduced_labels(confident_labels(strong, weak))             # after a CRF; background at 0.30 and at 0.05
    terms = irn_loss(*net(net.prepare(crops)), labels)                  # their sum is the loss
    scores = refine_with_boundaries(net, photographs, seeds, BoundaryWalk())      # argmax over classes: the pseudo mask

    maps of the backbone          stride   boundary branch             displacement branch
    x1  first map, max-pooled     4        32, GN 4, ReLU              64, GN 8, ReLU
    x2  first level               4        32, GN 4, ReLU              128, GN 16, ReLU
    x3  second level              8        32, GN 4, up, ReLU          256, GN 16, ReLU
    x4  third level               16       32, GN 4, up, ReLU          256, GN 16, up, ReLU
    x5  last level                16       32, GN 4, up, ReLU          256, GN 16, up, ReLU
                                           all: 1, sigmoid             x3..x5: 256, GN 16, up, ReLU; with x1, x2:
                                                                       256, GN 16, ReLU; 2, minus its mean

Everything is a 1 x 1 convolution; GN n is group normalisation in n groups. A last level of ResNets has stride 1 and no
dilation, as released; other backbones keep their stride of 32. Boundaries teach themselves from labels of pixels: where
two pixels differ, one must stand between them. The displacement serves instances; semantic masks do not ask for it.

Published training: batches of 32 crops of 512 px from images scaled by 0.5 to 1.5, 3 epochs, SGD at 0.1, ten times as
much for displacements, weight decay 1e-4. In the released code several GPUs spoil it (46 instead of 66 mIoU); here
pairs are counted over all processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from course_lib.backbones import Colours, load_network
from course_lib.backbones.dense import Maps
from course_lib.evaluate.segmentation import IGNORE
from course_lib.prototypes import at_least_float32
from course_lib.settings import Positive, Share, Side, Whole, check_settings
from course_lib.wsss.affinity import (
    filled,
    near_pixels,
    pair_kinds,
    pair_loss,
    pair_mean,
    random_walk,
    shifted,
    widened,
)

STRIDE = 4  # of boundaries and displacements
TRAINED_RADIUS = 10  # of pairs in training, on their grid; the walk has 5
_BOUNDARY = 32  # channels of each map in the boundary branch
_DISPLACEMENT = ((64, 8), (128, 16), (256, 16), (256, 16), (256, 16))  # channels and groups of each in the other one


@dataclass(frozen=True)
class BoundaryWalk:
    """How seeds are spread between boundaries. The values here are the released ones."""

    radius: Whole = 5
    beta: Positive = 10.0  # power of the affinities
    steps: Whole = 256  # t
    background: Share = 0.25  # its score, where 1 is the highest score of the image
    side: Side | None = 512  # images are filled up to it, on the right and below; None: to multiples of the stride

    def __post_init__(self) -> None:
        check_settings(self)


class IRNet(Colours):
    """A frozen backbone of timm with a branch for boundaries and one for displacements.

    Attributes:
        strides: of x1..x5.
        mean_displacement: y, x; subtracted in evaluation mode; 0 before `fit_mean`.

    Args:
        name: a network of timm with five levels of maps, strides 2 to 32: ResNet, EfficientNet, DenseNet, RegNet, ...
        pretrained: ImageNet weights, as in `backbones.create`, or random ones.
    Raises:
        ValueError: an unknown name, or a network without these levels.
    """

    def __init__(self, name: str = "resnet50.tv_in1k", pretrained: bool = True) -> None:
        network = load_network(name, pretrained)
        super().__init__(network.pretrained_cfg)
        levels = [level["reduction"] for level in getattr(network, "feature_info", ())]
        if levels != [2, 4, 8, 16, 32] or not hasattr(network, "forward_intermediates"):
            raise ValueError(
                f"Expected a network with maps of strides 2, 4, 8, 16 and 32, got {name} with {levels}; take another, "
                "such as resnet50 or tf_efficientnet_lite0."
            )
        network.reset_classifier(0)
        self.backbone = _without_last_stride(network).requires_grad_(False).eval()
        maps = self.frozen(torch.zeros(1, 3, 128, 128)).values()
        self.strides = [128 // features.shape[-1] for features in maps]
        channels = [features.shape[1] for features in maps]
        self.boundaries = nn.ModuleList(_reduction(before, _BOUNDARY, 4) for before in channels)
        self.boundary = nn.Conv2d(5 * _BOUNDARY, 1, 1)
        self.displacements = nn.ModuleList(_reduction(before, *size) for before, size in zip(channels, _DISPLACEMENT))
        self.deep = _reduction(3 * 256, 256, 16)
        self.whole = nn.Sequential(
            _reduction(64 + 128 + 256, 256, 16), nn.ReLU(inplace=True), nn.Conv2d(256, 2, 1, bias=False)
        )
        self.register_buffer("mean_displacement", torch.zeros(2))

    def train(self, mode: bool = True) -> "IRNet":
        """Training or evaluation mode for all but the backbone; returns the network."""
        super().train(mode)
        self.backbone.eval()
        return self

    def prepare(self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]) -> Maps:
        """Maps x1..x5, which depend on nothing that learns.

        Args:
            images: RGB, uint8 in 0..255 or float in 0..1. Sides are filled up to multiples of the coarsest stride with
                the mean colour, on the right and below.
        """
        return self.frozen(filled(self.normalise(images), max(self.strides)))

    def frozen(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """The same of normalised images, whose sides are such multiples."""
        with torch.no_grad():
            first, *others = self.backbone.forward_intermediates(images, intermediates_only=True)
            maps = [F.max_pool2d(first, 3, 2, 1), *others]
        return {f"x{number + 1}": level for number, level in enumerate(maps)}

    def forward(self, prepared: Maps) -> tuple[Float[Tensor, "b 1 h w"], Float[Tensor, "b 2 h w"]]:
        """Logits of the boundary map and displacements (down, right) in pixels of the grid, at stride 4."""
        maps = [*prepared.values()]
        reduced = [
            _enlarged(branch(features), stride // STRIDE).relu()
            for branch, features, stride in zip(self.boundaries, maps, self.strides)
        ]
        logits = self.boundary(torch.cat(reduced, 1))
        shallow = [branch(features).relu() for branch, features in zip(self.displacements[:2], maps)]
        deep = [
            _enlarged(branch(features), stride // self.strides[2]).relu()
            for branch, features, stride in zip(self.displacements[2:], maps[2:], self.strides[2:])
        ]
        deep = _enlarged(self.deep(torch.cat(deep, 1)), self.strides[2] // STRIDE).relu()
        displacement = self.whole(torch.cat((*shallow, deep), 1))
        return logits, displacement if self.training else displacement - self.mean_displacement[:, None, None]

    def parameter_groups(self, lr: float = 0.1, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Groups for an optimiser: the branch of boundaries at `lr`, that of displacements at ten times as much.

        All of a branch has one rate and one decay, biases and normalisation too (released code).
        """
        branches = {lr: (self.boundaries, self.boundary), 10 * lr: (self.displacements, self.deep, self.whole)}
        return [
            {"params": [*nn.ModuleList(parts).parameters()], "lr": rate, "weight_decay": weight_decay}
            for rate, parts in branches.items()
        ]


@torch.no_grad()
def fit_mean(net: IRNet, batches: Iterable[UInt8[Tensor, "_ 3 _ _"]]) -> None:
    """Sets the mean displacement that evaluation subtracts to that of these images, each with the same weight."""
    training, total, count = net.training, torch.zeros_like(net.mean_displacement), 0
    net.train()  # nothing is subtracted
    for images in batches:
        _, displacement = net(net.prepare(images))
        total += displacement.mean((2, 3)).sum(0)
        count += len(images)
    net.train(training)
    if not count:
        raise ValueError("Expected images whose mean displacement is taken, got none; give at least one batch.")
    net.mean_displacement.copy_(total / count)


def confident_labels(strong: Int[Tensor, "*b h w"], weak: Int[Tensor, "*b h w"]) -> Int[Tensor, "*b h w"]:
    """Labels that two label maps are sure of: classes that beat a strong background, background that wins when weak.

    Args:
        strong: labels of seeds at a high score of the background (0.30), after a CRF; background 0.
        weak: the same at a low score (0.05).
    Returns:
        class of `strong`; 0 where both have the background; 255, to be ignored, elsewhere.
    """
    return torch.where(strong > 0, strong, torch.where(weak > 0, IGNORE, 0))


def reduced_labels(labels: Int[Tensor, "b H W"], stride: int = STRIDE) -> Int[Tensor, "b h w"]:
    """Labels on a coarser grid, each that of the pixel in the middle. What reaches over the border is ignored.

    Args:
        stride: pixels of the image on one pixel of the grid.
    """
    return filled(labels, stride, IGNORE)[:, stride // 2 :: stride, stride // 2 :: stride]


def path(to: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels (down, right) on the way from (0, 0) to a neighbour, both ends included, at a distance below 1 from it."""
    down, right = to
    rows, columns = range(down + 1), range(min(0, right), max(0, right) + 1)
    return [(y, x) for y in rows for x in columns if (down * x - right * y) ** 2 < down * down + right * right]


def path_affinity(boundary: Float[Tensor, "b 1 h w"], radius: int) -> Float[Tensor, "b o y x"]:
    """1 - the strongest boundary on the path from each source to each of its neighbours.

    The boundaries of one path at a time are in memory, also in the backward pass, which collects them again. Where
    several are strongest, they share the gradient.

    Args:
        boundary: 0..1.
    """
    found = [_again(_strongest, boundary[:, 0], to, radius) for to in near_pixels(radius)]
    return 1 - torch.stack(found, 1)


def displacement_errors(
    displacement: Float[Tensor, "b 2 h w"], moving: Bool[Tensor, "b o y x"], radius: int
) -> Float[Tensor, "b o y x"]:
    """|D_i - D_j - way from i to j| of each pair, summed over both axes; where `moving` is False, the way is 0.

    Args:
        moving: pairs that lie on one object, whose displacements must differ; those of the background do not.
    """
    pairs = zip(near_pixels(radius), moving.unbind(1))
    return torch.stack([_again(_error, displacement, pair, to, radius) for to, pair in pairs], 1)


def irn_loss(
    boundary: Float[Tensor, "b 1 h w"],
    displacement: Float[Tensor, "b 2 h w"],
    labels: Int[Tensor, "b h w"],
    radius: int = TRAINED_RADIUS,
    borders: bool = False,
) -> dict[str, Float[Tensor, ""]]:
    """Five terms whose sum is the loss: those of `affinity.pair_loss` and two of displacements.

    Args:
        boundary, displacement: of `IRNet`; boundaries as logits.
        labels: of `confident_labels`, on the same grid; pairs with an ignored pixel (255) teach nothing.
        borders: whether pixels near the border are sources of pairs; False as released.
    """
    with torch.autocast(boundary.device.type, enabled=False):  # fp32 island: logarithms and long sums
        boundary, displacement = at_least_float32(boundary).sigmoid(), at_least_float32(displacement)
        if borders:
            boundary, displacement = widened(boundary, radius, 0.0), widened(displacement, radius, 0.0)
            labels = widened(labels, radius, IGNORE)
        kinds = pair_kinds(labels, radius)
        terms = pair_loss(path_affinity(boundary, radius), kinds)
        background, foreground, _ = kinds
        errors = displacement_errors(displacement, foreground, radius)
        for name, pairs in (("foreground", foreground), ("background", background)):
            terms[f"displacement-{name}"] = pair_mean(errors, pairs) / 4  # mean of two axes, half the weight
    return terms


def propagate_to_edge(
    maps: Float[Tensor, "b c h w"], boundary: Float[Tensor, "b 1 h w"], config: BoundaryWalk = BoundaryWalk()
) -> Float[Tensor, "b c h w"]:
    """Maps after a walk that boundaries stop; on a boundary there is nothing to start from.

    Args:
        maps: such as scores of classes, on the grid of boundaries.
        boundary: 0..1; beyond the border of the image everything is boundary.
    """
    affinity = path_affinity(widened(at_least_float32(boundary), config.radius, 1.0), config.radius)
    return random_walk(at_least_float32(maps) * (1 - boundary), affinity, config.radius, config.beta, config.steps)


@torch.inference_mode()
def refine_with_boundaries(
    net: IRNet, images: UInt8[Tensor, "b 3 H W"], scores: Float[Tensor, "b t h w"], config: BoundaryWalk
) -> Float[Tensor, "b c H W"]:
    """Scores of background and classes after the walk, at the size of the images; argmax makes the pseudo mask.

    Boundaries are those of the images and of their mirror images, the mean of their logits.

    Args:
        net: in evaluation mode, on the device of images and scores.
        images: of one size, at most `config.side`.
        scores: of seeds; 0 for classes without a tag. Of any size: they are brought to stride 4 (bilinear).
    Raises:
        ValueError: images that are larger than `config.side`.
    """
    size, side = images.shape[2:], config.side
    if side is not None and max(size) > side:
        raise ValueError(
            f"Expected images of at most {side} x {side} pixels, got {size[0]} x {size[1]}; make them smaller, or set "
            "side to None."
        )
    normalised = net.normalise(images)
    if side is not None:
        normalised = F.pad(normalised, (0, side - size[1], 0, side - size[0]))
    normalised = filled(normalised, max(net.strides))
    logits, _ = net(net.frozen(torch.cat((normalised, normalised.flip(-1)))))
    straight, mirrored = logits.chunk(2)
    grid = [-(-length // STRIDE) for length in size]
    boundary = ((straight + mirrored.flip(-1)) / 2).sigmoid()[..., : grid[0], : grid[1]]
    seeds = F.interpolate(at_least_float32(scores), grid, mode="bilinear", align_corners=False)
    walked = propagate_to_edge(seeds, boundary, config)
    whole = F.interpolate(walked, scale_factor=STRIDE, mode="bilinear", align_corners=False)
    whole = whole[..., : size[0], : size[1]]
    highest = whole.amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(whole.dtype).tiny)
    return torch.cat((torch.full_like(whole[:, :1], config.background), whole / highest), 1)


def _again(function, *args):
    """What a function returns; its gradient makes everything in between once more instead of keeping it."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _strongest(boundary, to, radius):
    return torch.stack([shifted(boundary, by, radius) for by in path(to)]).amax(0)


def _error(displacement, moving, to, radius):
    difference, moving = (
        shifted(displacement, (0, 0), radius) - shifted(displacement, to, radius),
        moving.to(displacement),
    )
    return sum((difference[:, axis] - way * moving).abs() for axis, way in enumerate(to))


def _reduction(before, after, groups):
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.GroupNorm(groups, after))


def _enlarged(maps, factor):
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False) if factor > 1 else maps


def _without_last_stride(network):
    """A ResNet whose last level keeps the grid of the one before, without dilation; other networks as they are."""
    parts = [part for part in getattr(network, "layer4", nn.Module()).modules() if not [*part.children()]]
    strided = [part for part in parts if getattr(part, "stride", 1) in (2, (2, 2))]
    if all(isinstance(part, nn.Conv2d) for part in strided):  # where pooling takes part, the two branches would part
        for part in strided:
            part.stride = (1, 1)
    return network
