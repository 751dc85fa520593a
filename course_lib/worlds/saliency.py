"""Saliency from one image alone: no mask, no tag, no training, no other image.

    Zhu, Liang, Wei, Sun, "Saliency Optimization from Robust Background Detection", CVPR 2014, with its constants

    A region of the background touches the border of the image along more of its outline than an object does:

    boundary connectivity   bc(p) = sum_{q on the border} S(p, q) / sqrt(sum_q S(p, q)),  S = exp(-d_geo^2 / (2 * 10^2))
    background              w_bg  = 1 - exp(-bc^2 / 2)
    foreground              w_fg  = sum_q d_colour(p, q) exp(-d_space^2 / (2 * 0.25^2)) w_bg(q),    0 below its mean
    saliency                argmin_s  sum 5 w_bg s^2 + sum w_fg (s - 1)^2 + sum_{p ~ q} w_pq (s_p - s_q)^2

p and q are superpixels (about 180), d_colour is the distance of their mean colours in CIELAB, d_geo the length of the
cheapest path between them in such distances, w_pq = exp(-d_colour^2 / (2 * 10^2)) + 0.1 between neighbours and
neighbours' neighbours. EPS (see `wsss.eps`) takes its saliency from a network that learned from masks of other images;
this one learned nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from scipy.sparse.csgraph import floyd_warshall
from scipy.spatial.distance import cdist
from skimage.color import rgb2lab
from skimage.segmentation import slic

SUPERPIXELS, COMPACTNESS, SIDE = 180, 20.0, 96
COLOUR, SPACE, BACKGROUND, SMALL = 10.0, 0.25, 5.0, 0.1  # the constants of the paper: sigmas, lambda, mu


def saliency(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """How much each pixel stands out, 0..255; an image of one colour has no saliency.

    Large images are reduced by a whole number to a shorter side of 96 pixels or a little more: as good, and faster.
    """
    height, width = image.shape[:2]
    lab = rgb2lab(np.asarray(Image.fromarray(image).reduce(max(1, min(height, width) // SIDE)))).astype(np.float32)
    scale = max(lab.max() - lab.min(), 1e-3)  # slic stretches what it is given to 0..1
    regions = slic(lab, SUPERPIXELS, compactness=COMPACTNESS / scale, max_num_iter=5, convert2lab=False, start_label=0)
    y, x = np.indices(regions.shape)
    sizes = np.bincount(regions.ravel())
    colour, place = (
        np.stack([np.bincount(regions.ravel(), values.ravel()) / sizes for values in channels], 1)
        for channels in (np.moveaxis(lab, 2, 0), (y / len(y), x / len(x[0])))
    )  # n 3, n 2
    distance = cdist(colour, colour)  # n n
    touch = np.zeros_like(distance)
    touch[regions[:, 1:], regions[:, :-1]] = touch[regions[1:], regions[:-1]] = 1
    touch = np.maximum(touch, touch.T)
    near = touch + touch @ touch > 0  # they touch, or have a neighbour in common
    for neighbours in (touch, near):
        np.fill_diagonal(neighbours, 0)

    border = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
    connected = np.exp(-(_geodesic(distance, touch > 0, border) ** 2) / (2 * COLOUR**2))
    connectivity = connected[:, border].sum(1) / np.sqrt(connected.sum(1))
    background = 1 - np.exp(-(connectivity**2) / 2)

    contrast = (distance * np.exp(-(cdist(place, place) ** 2) / (2 * SPACE**2))) @ background
    if not contrast.max() > 0:
        return np.zeros((height, width), np.uint8)
    foreground = contrast / contrast.max()
    foreground[foreground < foreground.mean()] = 0

    weight = np.where(near, np.exp(-(distance**2) / (2 * COLOUR**2)) + SMALL, 0)
    system = np.diag(BACKGROUND * background + foreground + weight.sum(1)) - weight
    solution = np.linalg.solve(system, foreground)
    levels = np.round(255 * solution / solution.max()).clip(0, 255).astype(np.uint8)
    return np.asarray(Image.fromarray(levels[regions]).resize((width, height), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Quality:
    """How well saliency finds the objects of masks, over all pixels of all images together."""

    mae: float  # mean absolute error of saliency in 0..1
    f_measure: float  # at the best threshold; beta^2 = 0.3, as in the literature on saliency
    iou: float  # of the objects, at the best threshold
    threshold: float  # of that IoU, 0..1

    def __str__(self) -> str:
        return (
            f"saliency against masks: mean absolute error {self.mae:.3f}, best F-measure {self.f_measure:.3f}, "
            f"best IoU {100 * self.iou:.1f} % (above {self.threshold:.2f})"
        )


def quality(pairs: Iterable[tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]]]) -> Quality:
    """Measures of saliency maps beside masks.

    Args:
        pairs: saliency in 0..255, and label images: 0 = background, 255 = left out.
    """
    counts = np.zeros((2, 256), np.int64)  # background and objects at each level
    for given, mask in pairs:
        counts += [np.bincount(given[where], minlength=256) for where in (mask == 0, (mask > 0) & (mask < 255))]
    truth = counts[1].sum()
    levels = np.arange(256) / 255
    above = counts.sum(1, keepdims=True) - counts.cumsum(1)  # 2 256: strictly above a level
    predicted, hit = above.sum(0), above[1]
    f_measure = 1.3 * hit / np.maximum(0.3 * truth + predicted, 1)
    iou = hit / np.maximum(truth + predicted - hit, 1)
    error = (counts[0] * levels).sum() + (counts[1] * (1 - levels)).sum()
    return Quality(error / max(counts.sum(), 1), f_measure.max(), iou.max(), levels[iou.argmax()])


def _geodesic(distance: np.ndarray, touch: np.ndarray, border: np.ndarray) -> np.ndarray:  # n n, n n, b -> n n
    """Lengths of the cheapest paths over neighbours; all regions on the border count as neighbours.

    Each step is cheaper by what a step costs inside of a region of one colour, so that shades do not add up.
    """
    cheapest = np.where(touch, distance, np.inf).min(1)
    cheapest = cheapest[np.isfinite(cheapest)]
    free = cheapest.mean() if len(cheapest) else 0
    linked = touch.copy()
    linked[np.ix_(border, border)] = True
    return floyd_warshall(np.where(linked, np.maximum(distance - free, 0) + 1e-9, np.inf))  # 0 would be no link
