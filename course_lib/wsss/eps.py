"""EPS: explicit pseudo-pixel supervision. Which class is where comes from tags, what is an object at all from saliency.

    S' = lambda sum_{c in F} p_c + (1 - lambda) (1 - sum_{c in B} p_c),     L_sal = mean (S' - S)^2
                        Lee et al., "Railroad is not a Train: Saliency as Pseudo-pixel Supervision", CVPR 2021

with p the softmax of the maps over all classes and the background, and S a saliency map that knows no classes. A tagged
class whose confident pixels mostly lie on salient ones (overlap > tau) explains foreground (F); a tagged class that
does not is taken with the background (B): what is tagged and not salient, like the railroad, may stay. Classes without
a tag are in neither, so in the second sum what they hold counts as foreground.

What the released code adds to the formula, and we follow: the overlap is a precision (share of the confident pixels
that are salient) with 1e-4 for each pixel in its denominator; tau is 0.5 in the code and 0.4 in its script for VOC,
which we take. There the background is the last channel, here the first. The loss stands beside `tag_loss` of the mean
of the maps, at weight 1.

With pixel-to-prototype contrast the released branch sums `seam_loss` on the grids of features (size1 and size2 those of
the maps), `contrast_loss`, and half of this loss for the maps and for the refined maps of either view; the saliency of
the second view is resized bilinearly to the size of its image first. (There the winners of cross-equivariance compete
with the background and leave out aeroplanes, because the background had moved to the last channel; here they do not.)
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from course_lib.prototypes import at_least_float32
from course_lib.wsss import check_maps

OVERLAP = 0.4  # tau
FOREGROUND = 0.5  # lambda
PER_PIXEL = 1e-4  # in the denominator


def overlaps(probabilities: Float[Tensor, "n c h w"], saliency: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n t"]:
    """Share of each foreground class's confident pixels (p > 0.5) that are salient (> 0.5); 0 without such pixels."""
    confident = probabilities[:, 1:].detach().round()  # half to even, so 0.5 is not confident
    return (confident * saliency.round()).sum((2, 3)) / (confident + PER_PIXEL).sum((2, 3))


def explanations(
    probabilities: Float[Tensor, "n c h w"], tags: Float[Tensor, "n t"], valid: Bool[Tensor, "n t"]
) -> tuple[Float[Tensor, "n h w"], Float[Tensor, "n h w"]]:
    """Two estimates of saliency: what valid tagged classes hold, and 1 - what other ones and the background hold.

    Args:
        valid: which classes lie on salient pixels (their overlap exceeds tau).
    """
    foreground = (tags * valid)[:, :, None, None]
    background = (tags * ~valid)[:, :, None, None]
    front = probabilities[:, 1:]
    return (front * foreground).sum(1), 1 - (front * background).sum(1) - probabilities[:, 0]


def saliency_loss(
    cam: Float[Tensor, "n c h w"],
    saliency: Float[Tensor, "n 1 H W"],
    tags: Float[Tensor, "n t"],
    overlap: float = OVERLAP,
    foreground: float = FOREGROUND,
) -> Float[Tensor, ""]:
    """L_sal: mean squared difference between the saliency that the maps explain and the (soft) saliency map.

    Args:
        cam: raw maps, background first.
        saliency: 0..1; brought to the grid of the maps by the nearest pixel, as released.
        overlap: tau, above which a tagged class explains foreground.
        foreground: lambda, the weight of the first estimate; that of the second is 1 - lambda.
    """
    check_maps(cam, tags)
    cam = at_least_float32(cam)  # fp32 island: softmax and differences
    saliency = F.interpolate(saliency.to(cam.dtype), cam.shape[2:], mode="nearest")
    probabilities = cam.softmax(1)
    front, back = explanations(probabilities, tags.to(cam.dtype), overlaps(probabilities, saliency) > overlap)
    return F.mse_loss(foreground * front + (1 - foreground) * back, saliency[:, 0])


def saliency_pushes(
    cam: Float[Tensor, "n c h w"],
    saliency: Float[Tensor, "n 1 H W"],
    tags: Float[Tensor, "n t"],
    regions: dict[str, Bool[Tensor, "n h w"]],
    overlap: float = OVERLAP,
) -> dict[str, float]:
    """Where a step on L_sal moves the maps of tagged classes: by region the mean of minus the gradient, their sum.

    Above 0 the maps rise. It is in units of loss for a unit of a map.

    Args: as in `saliency_loss`.
        regions: masks on the grid of the maps, by name.
    """
    maps = cam.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(saliency_loss(maps, saliency, tags, overlap), maps)
    push = -torch.einsum("nchw,nc->nhw", gradient[:, 1:], tags.to(gradient.dtype))
    return {name: push[where].mean().item() for name, where in regions.items()}
