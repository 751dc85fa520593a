"""Maps: weighted sums of feature channels, and what is read from them.

A map is raw and has the resolution of the features; a heatmap is a map at image resolution, scaled to 0..1 per image;
a box is read from a heatmap. Pure tensor functions: any device, any leading batch shape, no hooks, no gradients needed.

    CAM   M_c(x, y) = sum_k w_ck F_k(x, y)              Zhou et al., CVPR 2016, Eq. 2
    and   mean_xy M_c + b_c = logit_c                   (exact for every network that ends in GAP and one linear layer)
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from course_lib.components import largest_boxes


def cam(features: Float[Tensor, "b k h w"], weight: Float[Tensor, "c k"]) -> Float[Tensor, "b c h w"]:
    """Class activation maps of all classes at once: M_c = sum_k w_ck F_k  (Zhou et al., Eq. 2).

    No ReLU and no bias: negative evidence stays visible, and a constant vanishes in `heatmap` anyway.

    Args:
        features: last feature map of the backbone, before global average pooling.
        weight: rows of the linear classifier; pass `weight[labels]` for chosen classes only.
    Returns:
        raw maps at feature resolution. Their spatial mean plus the bias is the logit.
    """
    return torch.einsum("bkhw,ck->bchw", features, weight)


def heatmap(map: Float[Tensor, "*batch h w"], size: int | tuple[int, int]) -> Float[Tensor, "*batch H W"]:
    """Heatmaps in 0..1: bicubic up-sampling to `size`, then min-max for each map by itself.

    The order matters, since bicubic interpolation overshoots. A map that is constant or holds a NaN has nothing to show:
    it becomes all zeros, with one warning.

    Args:
        map: raw maps, at any resolution.
        size: side of the square output, or (height, width), in pixels.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    *batch, h, w = map.shape
    map = map.reshape(-1, 1, h, w).float()                                # fp32 island: min-max in half precision bands
    map = F.interpolate(map, size, mode="bicubic", align_corners=False)   # n 1 H W
    low, high = map.amin((-2, -1), keepdim=True), map.amax((-2, -1), keepdim=True)
    spread = high - low                                                   # NaN if the map holds one
    flat = ~(spread > 1e-5 * torch.maximum(low.abs(), high.abs()))        # rounding alone (3e-6, measured) never makes a picture
    if not torch.compiler.is_compiling() and flat.any():
        warnings.warn(f"{int(flat.sum())} of {flat.numel()} maps are constant or hold NaN: their heatmaps are all zero. "
                      "Look at the features first; dead channels and division by a distance of 0 are the usual causes.",
                      stacklevel=2)
    map = torch.where(flat, 0.0, (map - low) / torch.where(flat, 1.0, spread))
    return map.reshape(*batch, *size)


def box(heatmap: Float[Tensor, "*batch H W"], threshold: float) -> Int[Tensor, "*batch 4"]:
    """Box (x0, y0, x1, y1) around the largest connected region above `threshold` times the maximum.

    The rule of the WSOL benchmark (Choe et al., CVPR 2020): 8-bit levels, strictly above, 8-connected, holes filled,
    largest by contour area; x1 and y1 lie one past the last pixel, except at the border. An empty heatmap gives zeros.

    Args:
        heatmap: values in 0..1.
        threshold: share of the maximum, 0..1; the CAM paper uses 0.2.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a share of the heatmap's maximum, 0..1, but {threshold} came. "
                         "A percentage such as 20 is written 0.2.")
    *batch, height, width = heatmap.shape
    levels = (heatmap.reshape(-1, height, width) * 255).to(torch.uint8)   # n H W
    level = (threshold * levels.amax((-2, -1)).double()).long()           # n
    boxes = largest_boxes(levels)                                         # n 256 4
    return boxes[torch.arange(len(boxes), device=boxes.device), level].reshape(*batch, 4)
