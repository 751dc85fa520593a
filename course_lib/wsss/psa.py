"""PSA: a network learns which near pixels are of one class, and a random walk spreads seeds along what it says.

    a_ij = exp(-mean_k |f_ik - f_jk|)           affinity of two pixels from their features (AffinityNet)
    x T^t,  T = W^beta D^-1                     scores after t steps of the walk, see `affinity`
                        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
                        Supervised Semantic Segmentation", CVPR 2018

    net = build(Architecture("cam", classes), "ilsvrc-cls_rna-a1_cls1000_ep-0001.params")    # from ImageNet
    labels = affinity_labels(low, high, net.trunk.stride)           # scores of two CRFs: strong and weak background
    terms = affinity_loss(net(net.prepare(crops)), labels)          # their sum is the loss
    scores = refine_with_affinity(net, photographs, seeds, WalkConfig.psa())      # argmax over classes: the pseudo mask

    head         from                      to     published name
    reduce4      conv4                     64     f8_3
    reduce5      conv5                     128    f8_4
    reduce6      conv6                     256    f8_5
    mix          the three, after ELU      448    f9, ELU

Where the released code differs from the paper, we follow the code: the distance is the mean over channels, not the sum;
and a pixel near the left, right or lower border is the source of no pair. `borders` brings those pairs back, which
small grids need: of 12 x 12 pixels 32 are sources without them. The trunk learns too: its taps are not detached.

Images are cropped at their size, no other scale; beyond their border crops are black, and labels ignored. Published
training: 8 epochs of batches of 8, SGD at 0.1 (PSA) or 0.01 (its author for ResNet38, SEAM, P2P), weight decay 5e-4.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from course_lib import checkpoints
from course_lib.backbones import released
from course_lib.backbones.dense import Dense, Maps
from course_lib.evaluate.segmentation import IGNORE
from course_lib.prototypes import at_least_float32
from course_lib.settings import Positive, Share, Whole, check_settings
from course_lib.wsss.affinity import (
    filled,
    fitting_radius,
    near_pixels,
    pair_kinds,
    pair_loss,
    random_walk,
    shifted,
    widened,
)
from course_lib.wsss.cam_net import Architecture, trunk_of

RADIUS = 5  # of pairs, on the grid of the features
NO_SCORE = 1e-5  # where all scores are below it, there is no image


@dataclass(frozen=True)
class WalkConfig:
    """How seeds are spread. The values here are those of PSA."""

    radius: Whole = RADIUS  # less where the grid is small, as in SEAM
    beta: Positive = 8.0  # power of the affinities
    steps: Whole = 256  # t
    alpha: Positive = 16.0  # score of the background: (1 - highest score)^alpha, unless
    background: Share | None = None  # it is a constant
    borders: bool = False  # whether pixels near the border are sources of pairs; False as released

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def psa(cls) -> "WalkConfig":
        """As released with PSA."""
        return cls()

    @classmethod
    def seam(cls) -> "WalkConfig":
        """As released with SEAM: a quarter of the steps, a stronger background."""
        return cls(steps=64, alpha=6.0)

    @classmethod
    def p2p(cls) -> "WalkConfig":
        """As released with pixel-to-prototype contrast: SEAM's steps, a constant background."""
        return cls(steps=64, background=0.27)


class AffinityNet(nn.Module):
    """Features whose distances are affinities: a trunk and four 1 x 1 convolutions without bias."""

    def __init__(self, trunk: Dense, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, self.architecture = trunk, architecture
        sizes = {"conv4": 64, "conv5": 128, "conv6": 256}
        self.reduce4, self.reduce5, self.reduce6 = (
            nn.Conv2d(trunk.channels[tap], size, 1, bias=False) for tap, size in sizes.items()
        )
        self.mix = nn.Conv2d(sum(sizes.values()), sum(sizes.values()), 1, bias=False)
        for head in (self.reduce4, self.reduce5, self.reduce6):
            nn.init.kaiming_normal_(head.weight)
        nn.init.xavier_uniform_(self.mix.weight, gain=4)

    def prepare(self, images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"]) -> Maps:
        """What the frozen parts make of images, which depends on nothing that learns.

        Args:
            images: RGB, uint8 in 0..255 or float in 0..1. Sides are filled up to multiples of the stride with the mean
                colour, on the right and below.
        """
        return self.trunk.frozen(filled(self.trunk.normalise(images), self.trunk.stride))

    def forward(self, prepared: Maps) -> Float[Tensor, "b k h w"]:
        """Features of 448 channels at the trunk's stride, from what `prepare` returned."""
        taps = self.trunk.trained(prepared)
        reduced = [getattr(self, f"reduce{tap[-1]}")(features) for tap, features in taps.items()]
        return F.elu(self.mix(F.elu(torch.cat(reduced, 1))))

    def heads(self) -> dict[str, nn.Module]:
        """The heads by published name; they start from random weights."""
        return {"f8_3": self.reduce4, "f8_4": self.reduce5, "f8_5": self.reduce6, "f9": self.mix}


def build(architecture: Architecture, weights: str | Path = "random") -> AffinityNet:
    """A network in evaluation mode; heads start from torch's generator.

    Args:
        architecture: of its trunk; what it says of other heads and of methods is not asked.
        weights: of the trunk, as in `cam_net.trunk_of`. The paper starts from ImageNet, not from the network of seeds.
    Raises:
        ValueError: as `cam_net.trunk_of`.
    """
    return AffinityNet(trunk_of(architecture, weights), architecture).eval()


def write(net: AffinityNet, path: Path) -> None:
    """Write tensors and architecture as one safetensors file, for `load`."""
    checkpoints.write(path, net, {"affinity": asdict(net.architecture)})


def load(path: str | Path) -> AffinityNet:
    """A trained network in evaluation mode: a file of `write`, or a released checkpoint of PSA, SEAM or P2P.

    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it is neither.
    """
    state, about = checkpoints.read(path)
    if "affinity" in about:
        known = about["affinity"].items()
        net = build(Architecture(**{name: tuple(value) if isinstance(value, list) else value for name, value in known}))
        checkpoints.fill(net, state, str(path))
        return net
    layout, _, _ = released.read(path)
    if layout != "affinity":
        raise RuntimeError(
            f"Expected a checkpoint of AffinityNet at {path}, got one of {layout}, which says nothing of pairs of "
            "pixels; name another."
        )
    net = build(Architecture("cam"))
    released.load(path, net.trunk, net.heads())
    return net


def fused_labels(low: Int[Tensor, "*b h w"], high: Int[Tensor, "*b h w"]) -> Int[Tensor, "*b h w"]:
    """Labels that two label maps are sure of: a class that beats a strong background, a background that wins when weak.

    Args:
        low: labels under a strong background (a low alpha, such as 4); background 0.
        high: the same under a weak background (a high alpha, such as 24 or 32).
    Returns:
        class of `low`; 0 where `high` has the background; 255, to be ignored, elsewhere.
    """
    return torch.where(high == 0, 0, torch.where(low == 0, IGNORE, low))


def affinity_labels(
    low: Float[Tensor, "b c H W"], high: Float[Tensor, "b c H W"], stride: int = 8
) -> Int[Tensor, "b h w"]:
    """`fused_labels` on the grid of the features, from score maps such as those of two CRFs.

    Args:
        low, high: scores of all classes in 0..1, background first, under a strong and a weak background. Zero outside
            of the image: what has no score there is ignored.
        stride: side of the blocks that are averaged before the best class is taken, pixels.
    """
    low, high = (F.avg_pool2d(filled(at_least_float32(scores), stride), stride) for scores in (low, high))
    outside = torch.maximum(low, high).amax(1) < NO_SCORE
    return torch.where(outside, IGNORE, fused_labels(low.argmax(1), high.argmax(1)))


def feature_affinity(features: Float[Tensor, "b k h w"], radius: int = RADIUS) -> Float[Tensor, "b o y x"]:
    """exp(-mean_k |f_ik - f_jk|) of each source and its neighbours, 0..1.

    The differences of all pairs have 34 times the size of the features; one neighbour's at a time is in memory, also
    in the backward pass, which makes them again.
    """
    with torch.autocast(features.device.type, enabled=False):  # fp32 island: means of many differences
        return (-_MeanDistance.apply(at_least_float32(features), radius)).exp()


def affinity_loss(
    features: Float[Tensor, "b k h w"], labels: Int[Tensor, "b h w"], radius: int = RADIUS, borders: bool = False
) -> dict[str, Float[Tensor, ""]]:
    """Three terms whose sum is the loss: see `affinity.pair_loss`.

    Args:
        features: of `AffinityNet`.
        labels: of `affinity_labels`; pairs with an ignored pixel (255) teach nothing.
        borders: whether pixels near the border are sources of pairs; False as released.
    """
    if borders:
        features, labels = widened(features, radius, 0.0), widened(labels, radius, IGNORE)
    return pair_loss(feature_affinity(features, radius), pair_kinds(labels, radius))


def scored_background(
    scores: Float[Tensor, "b t H W"], alpha: float = 16.0, background: float | None = None
) -> Float[Tensor, "b c H W"]:
    """Scores with those of the background in front: (1 - the highest)^alpha, or a constant.

    Args:
        scores: of the classes in 0..1; 0 for those without a tag.
        alpha: 4 is a strong background, 32 a weak one.
        background: the constant, in place of alpha.
    """
    front = (1 - scores.amax(1, keepdim=True)) ** alpha
    return torch.cat((front if background is None else torch.full_like(front, background), scores), 1)


@torch.inference_mode()
def refine_with_affinity(
    net: AffinityNet, images: UInt8[Tensor, "b 3 H W"], scores: Float[Tensor, "b t H W"], config: WalkConfig
) -> Float[Tensor, "b c H W"]:
    """Scores of background and classes after the walk, at the size of the images; argmax makes the pseudo mask.

    Args:
        net: in evaluation mode, on the device of images and scores.
        images: of one size, at one scale.
        scores: of seeds, in 0..1; 0 for classes without a tag.
    Raises:
        ValueError: an image so small that no pixel of the features has all its neighbours.
    """
    if images.shape[2:] != scores.shape[2:] or len(images) != len(scores):
        raise ValueError(
            f"Expected scores of the size of the images, got images of {tuple(images.shape)} and scores of "
            f"{tuple(scores.shape)}; resize the scores."
        )
    stride, size = net.trunk.stride, images.shape[2:]
    features = net(net.prepare(images))
    radius = fitting_radius(*features.shape[2:], config.radius)
    affinity = grid_affinity(features, radius, config.borders)
    seeds = filled(scored_background(at_least_float32(scores), config.alpha, config.background), stride)
    walked = random_walk(F.avg_pool2d(seeds, stride), affinity, radius, config.beta, config.steps)
    whole = F.interpolate(walked, seeds.shape[2:], mode="bilinear", align_corners=False)
    return whole[..., : size[0], : size[1]]


def grid_affinity(
    features: Float[Tensor, "b k h w"], radius: int = RADIUS, borders: bool = False
) -> Float[Tensor, "b o h w"]:
    """`feature_affinity` of every pixel as a source, for `random_walk`: 0 for pairs that do not exist.

    Args:
        borders: whether pixels near the border are sources of pairs; False as released.
    """
    if borders:  # what leads out of the grid is not read by the walk
        return feature_affinity(widened(features, radius, 0.0), radius)
    return widened(feature_affinity(features, radius), radius, 0.0)


class _MeanDistance(torch.autograd.Function):
    """mean_k |f_ik - f_jk| of each source and its neighbours, b o y x; it keeps the features alone."""

    @staticmethod
    def forward(ctx, features, radius):
        ctx.save_for_backward(features)
        ctx.radius = radius
        near, first = near_pixels(radius), shifted(features, (0, 0), radius)
        # All differences in one place: the allocator of the C library may lay each of them behind the last one.
        room = torch.empty_like(first, memory_format=torch.contiguous_format)
        found = first.new_empty(len(first), len(near), *first.shape[2:])
        for number, by in enumerate(near):
            torch.sub(first, shifted(features, by, radius), out=room)
            found[:, number] = torch.linalg.vector_norm(room, 1, 1)
        return found / features.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (features,) = ctx.saved_tensors
        radius, total = ctx.radius, torch.zeros_like(features)
        share = (gradient / features.shape[1]).unbind(1)
        first, sums = shifted(features, (0, 0), radius), shifted(total, (0, 0), radius)
        room = torch.empty_like(first, memory_format=torch.contiguous_format)
        for by, weight in zip(near_pixels(radius), share):
            flow = torch.sub(first, shifted(features, by, radius), out=room).sign_().mul_(weight[:, None])
            sums += flow
            shifted(total, by, radius).sub_(flow)
        return total, None
