"""Weakly supervised semantic segmentation: from image tags to seeds, from seeds to masks.

What all methods share is one interface. A network shows an image at two scales, and each time returns a `View`; the
losses take two views and the tags:

    view1, view2 = net(images), net(smaller)                              # maps and embeddings, at feature resolution
    terms = seam.seam_loss(view1, view2, tags, size1=448, size2=128)
    terms |= contrast.contrast_loss(view1, view2, tags, config, noise)    # noise: torch.rand(2, n, h2, w2)

Channel 0 of all maps is the background; tags are 0 or 1 for the classes from channel 1 on. Terms are weighted: their
sum is the loss. Each is a mean over images, or made so, that the mean over processes is the loss of the whole batch.
"""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from course_lib.prototypes import at_least_float32


class View(NamedTuple):
    """What a network returns of one view of n images, on its own grid of features."""

    cam: Float[Tensor, "n c h w"]  # maps of the classifier, raw (no ReLU, no scaling)
    refined: Float[Tensor, "n c h w"]  # the same after pixel correlation (`seam.pixel_correlation`)
    embeddings: Float[Tensor, "n d h w"] | None = None  # of the projector, after its ReLU; None without contrast


def tag_loss(logits: Float[Tensor, "n t"], tags: Float[Tensor, "n t"]) -> Float[Tensor, ""]:
    """Multi-label soft margin: binary cross-entropy of each tag by itself, mean over tags and images.

    Args:
        logits: of the foreground classes: nothing supervises the background.
        tags: 1 where the class is in the image, else 0.
    """
    logits = at_least_float32(logits)
    return F.multilabel_soft_margin_loss(logits, tags.to(logits.dtype))


def check_maps(cam: Float[Tensor, "n c h w"], tags: Float[Tensor, "n t"]) -> None:
    """Raises a ValueError if maps are not those of the background (channel 0) and of all classes with tags."""
    wanted = len(tags), tags.shape[1] + 1
    if cam.shape[:2] != wanted:
        raise ValueError(
            f"Expected maps of the background (channel 0) and of {tags.shape[1]} classes for {len(tags)} images, got "
            f"the shape {tuple(cam.shape)}; pass one tag for each class, without the background."
        )
