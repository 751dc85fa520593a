"""Maps: weighted sums of feature channels, and what is read from them.

A map is raw and has the resolution of the features; a heatmap is a map at image resolution, scaled to 0..1 per image;
a box is read from a heatmap. Pure tensor functions: any device, any leading batch shape, no hooks, no gradients needed.

    CAM        M_c(x, y) = sum_k w_ck F_k(x, y)         Zhou et al., CVPR 2016, Eq. 2
    and        mean_xy M_c + b_c = logit_c              (exact for every network that ends in GAP and one linear layer)

    Dist-CAM   D_ck = |GAP(S_c)_k - GAP(F)_k|           Shen et al., "Distance-Based Class Activation Map for Metric
               W_c = norm(1 / D_c)                     Learning", Eq. 4-6, with S_c a sample or the prototype of class c
               M_c(x, y) = sum_k W_ck F_k(x, y)

What is written F, q = GAP(F), P_c here is `features`, `query` and `reference` (prototypes or gallery features, pooled)
below. Dist-CAM is literal; its relatives, from the sum of all channels to the CAM of the nearest-prototype rule, stand
beside it.
"""

import warnings
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor

from course_lib.components import largest_boxes

ROUNDING = 1e-6  # share of the mean activity below which a distance is float32's rounding
TINY = 1e-30  # 1 / TINY is finite in float32, and so is its sum over channels
CHUNK = 2**20  # weights in the making at a time: they fit into a cache (twice as fast, measured)

PerClass = Float[Tensor, "c k"] | Float[Tensor, "b c k"]  # a row of channels for each class; or each image has its own
Norm = Literal["sum", "min-max", "softmax"]


def cam(features: Float[Tensor, "b k h w"], weight: Float[Tensor, "c k"]) -> Float[Tensor, "b c h w"]:
    """Class activation maps of all classes at once: M_c = sum_k w_ck F_k  (Zhou et al., Eq. 2).

    No ReLU and no bias: negative evidence stays visible, and a constant vanishes in `heatmap` anyway.

    Args:
        features: last feature map of the backbone, before global average pooling.
        weight: rows of the linear classifier; pass `weight[labels]` for chosen classes only.
    Returns:
        raw maps at feature resolution. Their spatial mean plus the bias is the logit.
    """
    return torch.einsum("bkhw,ck->bchw", features, weight)  # Eq. 3 (Shen et al.), Eq. 2 (Zhou et al.)


def heatmap(map: Float[Tensor, "*batch h w"], size: int | tuple[int, int]) -> Float[Tensor, "*batch H W"]:
    """Heatmaps in 0..1: bicubic up-sampling to `size`, then min-max for each map by itself.

    The order matters, since bicubic interpolation overshoots. A map that is constant or holds a NaN has nothing to
    show: it becomes all zeros, with one warning.

    Args:
        map: raw maps, at any resolution.
        size: side of the square output, or (height, width), in pixels.
    """
    *batch, height, width = map.shape
    map = map.reshape(-1, 1, height, width).float()  # fp32 island: min-max in half precision bands
    map = F.interpolate(map, size, mode="bicubic", align_corners=False)  # n 1 H W
    low, high = map.amin((-2, -1), keepdim=True), map.amax((-2, -1), keepdim=True)
    spread = high - low  # NaN if the map holds one
    # Rounding alone (3e-6, measured) never makes a picture.
    shown = spread > 1e-5 * torch.maximum(low.abs(), high.abs())
    if not torch.compiler.is_compiling() and not shown.all():
        cause = "Look at the features first; dead channels and division by a distance of 0 are the usual causes."
        if 1 in (height, width):
            cause = f"A map has {height} x {width} pixels: the image is too small for this network; enlarge it."
        warnings.warn(
            f"{int((~shown).sum())} of {shown.numel()} maps are constant or hold NaN: their heatmaps are all zero. "
            + cause,
            stacklevel=2,
        )
    map = (map - low).where(shown, 0.0) / spread.where(shown, 1.0)
    return map.reshape(*batch, *map.shape[-2:])


def box(heatmap: Float[Tensor, "*batch H W"], threshold: float) -> Int[Tensor, "*batch 4"]:
    """Box (x0, y0, x1, y1) around the largest connected region above `threshold` times the maximum.

    The rule of the WSOL benchmark (Choe et al., CVPR 2020): 8-bit levels, strictly above, 8-connected, holes filled,
    largest by contour area; x1 and y1 lie one past the last pixel, except at the border. An empty heatmap gives zeros.

    Args:
        heatmap: values in 0..1.
        threshold: share of the maximum, 0..1; the CAM paper uses 0.2.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold is a share of the heatmap's maximum, 0..1, but {threshold} came. "
            "A percentage such as 20 is written 0.2."
        )
    *batch, height, width = heatmap.shape
    levels = (heatmap.reshape(-1, height, width) * 255).to(torch.uint8)  # n H W
    level = (threshold * levels.amax((-2, -1)).double()).long()  # n
    return largest_boxes(levels).take_along_dim(level[:, None, None], 1).reshape(*batch, 4)  # of n 256 4


def weighted_map(features: Float[Tensor, "b k h w"], weights: PerClass) -> Float32[Tensor, "b c h w"]:
    """Maps M_c = sum_k W_ck F_k for weights that may differ from image to image  (Shen et al., Eq. 6).

    With one set of weights for all images it is `cam`, in float32 whatever the precision around it.
    """
    images = "b" if weights.dim() == 3 else ""
    # fp32 island: weights of heavy tails do not fit into half precision.
    with torch.autocast(features.device.type, enabled=False):
        return torch.einsum(f"bkhw,{images}ck->bchw", features.float(), weights.float())  # Eq. 6 (Shen et al.)


def channel_weights(
    query: Float[Tensor, "b k"], reference: PerClass, eps: float = 1e-6, norm: Norm = "sum"
) -> Float32[Tensor, "b c k"]:
    """Dist-CAM channel weights W = norm(1 / |reference - query|)  (Shen et al., Eq. 4-5).

    Channels that are dead in both have distance 0, and so has every channel if the query is its own reference: the
    weights are finite all the same, and equal if all distances are.

    Args:
        query: pooled features, one row per image.
        reference: pooled prototypes or gallery features, in the space in which the model compares; one row per class,
            or rows of its own for each image (such as its nearest neighbour: `b 1 k`).
        eps: floor of a distance, relative to the row's mean distance, so that the unit of the features does not matter.
            Up to 1e-6 no map changes; near 1e-3 it takes the map from the few channels that match by coincidence; from
            1 on the map is nearly the sum of all channels.
        norm: the paper leaves it open. "sum": the weights sum to 1; L1, L2 and maximum norm, or none, give the same
            heatmap up to rounding, since a heatmap is scaled anyway. "min-max": each row to 0..1, a heatmap that is
            nearly the same. "softmax": of 1/D, which leaves one channel, often a dead one: an empty map.
    """
    if not eps > 0:
        raise ValueError(
            f"eps is a share of the mean distance above 0, but {eps} came. Without a floor the weight of a "
            "channel that is dead in query and reference is 1/0, and its share of the map inf * 0 = NaN."
        )
    if norm not in get_args(Norm):
        raise ValueError(
            f'norm is "sum", "min-max" or "softmax", but {norm!r} came. L1, L2 and maximum norm give the same '
            'heatmap as "sum".'
        )
    if reference.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"Query and reference must have the same channels, pooled, but {tuple(query.shape)} and "
            f"{tuple(reference.shape)} came. Pool feature maps by .mean((-2, -1)) first."
        )
    query, reference = query.float()[:, None], reference.float()
    distance = (query - reference).abs_()  # b c k, Eq. 4 (Shen et al.)
    # An image that is its own reference, pooled in another order, would be weighted by the noise of its last bits.
    noise = (ROUNDING * reference.abs().mean(-1, keepdim=True)).clamp_min(TINY)
    floor = torch.maximum(eps * distance.mean(-1, keepdim=True), noise)
    weights = torch.maximum(distance, floor).reciprocal_()
    if norm == "softmax":
        return weights.softmax(-1)
    if norm == "min-max":
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
        return torch.where(high > low, (weights - low) / (high - low), 1.0)
    return weights / weights.sum(-1, keepdim=True)  # Eq. 5 (Shen et al.)


def dist_cam(
    features: Float[Tensor, "b k h w"], reference: PerClass, *, eps: float = 1e-6, norm: Norm = "sum"
) -> Float32[Tensor, "b c h w"]:
    """Distance-based class activation maps of all references at once: M_c = sum_k W_ck F_k  (Shen et al., Eq. 4-6).

    Literally the equations: the query is the image itself, pooled. If it is its own reference, all weights are equal
    and the map is the sum of all channels. Memory beyond the maps does not grow with the number of references.

    Args:
        features: last feature map of the backbone, before global average pooling.
        reference: pooled prototypes (`prototypes.class_prototypes`), support or gallery features, as in
            `channel_weights`.
        eps, norm: see `channel_weights`.
    Returns:
        raw maps at feature resolution. Only their shape has a meaning: scale it with `heatmap`.
    """
    features = features.float()
    query = features.mean((-2, -1))
    step = max(1, CHUNK // max(1, query.numel()))
    parts = reference.split(step, -2)
    return torch.cat([weighted_map(features, channel_weights(query, part, eps, norm)) for part in parts], 1)


def uniform_weights(reference: Float[Tensor, "c k"]) -> Float[Tensor, "c k"]:
    """The weight 1/k for every channel of every class: the control without any class, to which `eps` leads Dist-CAM."""
    return torch.full_like(reference, 1 / reference.shape[-1])


def match_activity_weights(
    query: Float[Tensor, "b k"], reference: PerClass, eps: float = 1.0
) -> Float32[Tensor, "b c k"]:
    """Match times activity, W = P / D up to a factor for each row: a match of weak channels weighs less.

    Args:
        eps: floor of the distance D as in `channel_weights`; 1 is the mean distance, below which two channels just
            match.
    """
    return reference.float() * channel_weights(query, reference, eps)


def intersection_weights(query: Float[Tensor, "b k"], reference: PerClass) -> Float32[Tensor, "b c k"]:
    """Histogram intersection W = min(P, q): the activity that query and reference share."""
    return torch.minimum(query.float()[:, None], reference.float())


def positive_weights(weight: Float[Tensor, "c k"]) -> Float[Tensor, "c k"]:
    """W = max(w, 0): evidence for a class without the evidence against it. No longer the classifier that predicts."""
    return weight.clamp_min(0)


def centred_weights(weight: Float[Tensor, "c k"]) -> Float[Tensor, "c k"]:
    """W = w - mean_c w: the same predictions, another map.

    A row v added to the weights of all classes adds the same v . q to all logits, which neither softmax nor argmax
    sees: CAM has a free gauge, and this choice shows what tells a class from the mean class. Of prototypes it gives P -
    mean_c P.

    Args:
        weight: the rows of all classes that compete.
    """
    return weight - weight.mean(0, keepdim=True)


def euclidean_classifier(
    prototypes: Float[Tensor, "c k"],
) -> tuple[Float[Tensor, "c k"], Float[Tensor, " c"]]:
    """Weight 2P and bias -|P|^2 of the linear classifier that predicts the nearest prototype in Euclidean distance.

        -|q - P_c|^2 = 2 P_c . q - |P_c|^2 - |q|^2

    The last term is the same for all classes: the first two are the logits of a linear layer. Its CAM is therefore the
    class activation map of the nearest-prototype rule, sum_k 2 P_ck F_k with mean_xy M_c + b_c = |q|^2 - |q - P_c|^2,
    and the factor 2 vanishes in a heatmap: `cam(features, prototypes)` is all there is to it. To decompose -|q|^2 over
    the channels as well (weights 2P - q) spoils the map with a term in which there is no class; `centred_weights` takes
    more of that away.
    """
    return 2 * prototypes, -prototypes.square().sum(-1)
