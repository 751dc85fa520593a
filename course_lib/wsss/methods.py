"""The methods that make seeds from image tags, in one table: what each consists of, and how its maps are read.

    method               views   maps that are read              scores, from the sum s over scales and flips
    cam                  1       relu(cam)                       s / max s
    seam, seam+p2p       2       after PCM                       (s - min s) / (max s - min s)
    eps                  1       softmax over the classes        s / max s
    eps+p2p              2       softmax over the classes        s / max s                         (PCM is not asked)

Where there is a PCM, the same network is also read the other way, with or without it.
"""

from typing import NamedTuple


class Method(NamedTuple):
    """What a method consists of."""

    released: str  # name of its checkpoint in `backbones.released`
    threshold: float  # of seeds, the best one of the released script on VOC
    # How scores are read, the published way first: a field of `View`, and what is done with its maps at each pass,
    # "relu", "softmax", or "" for SEAM's way, where the minimum of the sum is subtracted.
    readings: dict[str, tuple[str, str]]
    views: int = 1  # of an image in a step
    background: bool = True  # whether the classifier has a channel for it
    correlated: bool = False  # has a PCM
    contrast: bool = False  # has a projector, and the terms of pixel-to-prototype contrast (P2P)
    saliency: bool = False  # learns from saliency maps, too


_PCM = {"with PCM": ("refined", ""), "without PCM": ("cam", "")}
TAG_METHODS = {
    "cam": Method("cam", 0.20, {"without PCM": ("cam", "relu")}, background=False),
    "seam": Method("seam", 0.26, _PCM, views=2, correlated=True),
    "eps": Method("eps", 0.20, {"without PCM": ("cam", "softmax")}, saliency=True),
    "seam+p2p": Method("p2p-seam", 0.26, _PCM, views=2, correlated=True, contrast=True),
    "eps+p2p": Method(
        "p2p-eps",
        0.22,
        {"without PCM": ("cam", "softmax"), "with PCM": ("refined", "")},
        views=2,
        correlated=True,
        contrast=True,
        saliency=True,
    ),
}
