"""SEAM: class activation maps that agree between two scales of an image, and spread along similar pixels.

    PCM     y_j = sum_i q_i relu(cos(f_i, f_j)) / sum_i relu(cos(f_i, f_j))     pixel correlation module
    ER      |A(cam of the image) - cam of A(image)|                            equivariant regularisation, A a rescaling
    ECR     |A(cam) - refined of A(image)| + |A(refined) - cam of A(image)|    equivariant cross regularisation
                        Wang et al., "Self-supervised Equivariant Attention Mechanism", CVPR 2020

Where the released code differs from the paper, we follow the code, which made the published numbers:

    PCM         takes maps in which only the winning class of a pixel is left, and features of three depths (the scaled
                image among them); neither maps nor features send gradients back into the backbone.
    ER, ECR     maps of classes without a tag are zero and still counted in the mean: the small value is the weight.
    ECR         means over the 20 % largest differences of an image ("online hard example mining"); of the guiding map
                only the winning class of a pixel is left.
    min-pool    one more term: the quarter of pixels that is least of all any class should be no class at all. It moves
                the best background score, not the best mIoU.

Here PCM never holds the affinities of all pairs of pixels: it takes one block of destinations after another, and in
training makes a block again when its gradient is asked for. The sums are the same.
"""

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from course_lib.prototypes import at_least_float32
from course_lib.wsss import View, check_maps, tag_loss
from course_lib.wsss.views import Warp, resize

EPS = 1e-5  # of all divisions and floors in the released code
AFFINITIES = 2**21  # affinities at a time: 8 MB
HARD = 0.2  # share of the differences that ECR means over
LEAST = 4  # one pixel in so many is pooled by min-pool


def pixel_correlation(
    maps: Float[Tensor, "n c h w"], features: Float[Tensor, "n k h w"], block: int = AFFINITIES
) -> Float[Tensor, "n c h w"]:
    """Maps spread along similar pixels: y_j = sum_i q_i relu(cos(f_i, f_j)) / sum_i relu(cos(f_i, f_j))  (PCM).

    A map that is constant stays so. A pixel whose feature is zero resembles none, and gets zeros.

    Args:
        maps: what is spread, such as `winning_maps(cam)`.
        features: of any scale, on the same grid; in SEAM a linear projection without gradient into what it projects.
        block: affinities in memory at a time. It changes neither result nor gradient, beyond rounding.
    """
    n, c, h, w = maps.shape
    with torch.autocast(features.device.type, enabled=False):  # fp32 island: norms and long sums
        features = at_least_float32(features).flatten(2)  # n k hw
        features = features / (features.norm(dim=1, keepdim=True) + EPS)
        maps = at_least_float32(maps).flatten(2).to(features.dtype)
        sources = torch.cat((maps, torch.ones_like(maps[:, :1])), 1)  # the last row sums the affinities
        each = max(1, block // max(1, n * h * w))
        blocks = features.split(each, 2) if each < h * w else [features]
        spread, room = _spread, None
        if not torch.is_grad_enabled():
            # All blocks in one place: the allocator of the C library may lay each of them behind the last one.
            room = features.new_empty(n * h * w * blocks[0].shape[2])
        elif len(blocks) > 1:
            spread = partial(checkpoint, _spread, use_reentrant=False, preserve_rng_state=False)
        sums = torch.cat([spread(sources, features, part, room) for part in blocks], 2)
        return (sums[:, :-1] / (sums[:, -1:] + EPS)).view(n, c, h, w)


# sources n c m, features n k m, part n k b -> n c b
def _spread(sources, features, part, room):
    shape = len(part), features.shape[2], part.shape[2]
    out = None if room is None else room[: prod(shape)].view(shape)
    return sources @ torch.bmm(features.mT, part, out=out).relu_()


def winning_maps(cam: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """What PCM spreads: maps in 0..1, each by its maximum; at a pixel only the winning class is left; without gradient.

    The background is 1 - the winner. Classes without a tag compete too.
    """
    cam = at_least_float32(cam.detach()).relu()
    scaled = (cam - EPS).relu() / (cam.amax((2, 3), keepdim=True) + EPS)
    return winners(with_background(scaled))


def with_background(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The maps with channel 0 replaced by 1 - the maximum of the others."""
    return torch.cat((1 - maps[:, 1:].amax(1, keepdim=True), maps[:, 1:]), 1)


def winners(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The maps with zeros where a foreground class is not the pixel's largest; equals stay, and so does channel 0."""
    front = maps[:, 1:]
    return torch.cat((maps[:, :1], torch.where(front == front.amax(1, keepdim=True), front, 0.0)), 1)


def min_max_scaled(maps: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Each map scaled to 0..1 by its minimum and maximum after a ReLU, through which gradients pass.

    A constant map becomes zero.
    """
    maps = at_least_float32(maps).relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low - EPS).relu() / (high - low + EPS)


def adaptive_min_pooling(maps: Float[Tensor, "n t h w"]) -> Float[Tensor, ""]:
    """Mean response of the quarter of pixels of an image in which the largest class is smallest (min-pool).

    Args:
        maps: of the foreground classes; zero for classes without a tag.
    """
    largest = at_least_float32(maps).amax(1).flatten(1)  # n hw
    least = largest.topk(max(1, largest.shape[1] // LEAST), 1, largest=False, sorted=False).values
    return least.relu().mean()


def cross_regularisation(cam: Float[Tensor, "n c h w"], refined: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """Half of ECR: mean of an image's 20 % largest differences between refined maps and the winners of the guide.

    Args:
        cam: the guide, of one view, `with_background`; no gradient passes.
        refined: of the other view, on the same grid.
    """
    difference = (winners(cam.detach()) - refined).abs().flatten(1)
    return difference.topk(int(difference.shape[1] * HARD), 1, sorted=False).values.mean()


def seam_loss(
    view1: View,
    view2: View,
    tags: Float[Tensor, "n t"],
    size1: int | tuple[int, int],
    size2: int | tuple[int, int],
    warp: Warp | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Terms of SEAM: "tags" and "min-pool" (means of the two views), "equivariance" (ER), "cross-equivariance" (ECR).

    Args:
        view1, view2: of an image and of its smaller copy.
        tags: 1 where the class is in the image, else 0.
        size1, size2: grids that each view's maps are brought to before anything is computed. SEAM takes the sizes of
            the images, 448 and 134 (with contrast 128), so its logits are means over up-sampled maps; ER and ECR
            compare on size2.
        warp: if the second view is more than a smaller copy; ER and ECR see nothing outside the image.
    """
    check_maps(view1.cam, tags)
    tags = tags.to(torch.promote_types(view1.cam.dtype, torch.float32))
    present = F.pad(tags, (1, 0), value=1.0)[:, :, None, None]  # n c 1 1: the background always is
    with torch.autocast(view1.cam.device.type, enabled=False):  # fp32 island: differences of maps in 0..1
        pair = [View(*(resize(maps, size) for maps in view[:2])) for view, size in ((view1, size1), (view2, size2))]
        tagging = sum(tag_loss(view.cam.mean((2, 3))[:, 1:], tags) for view in pair) / 2
        pooling = sum(adaptive_min_pooling((view.refined * present)[:, 1:]) for view in pair) / 2
        if warp is not None:
            pair = warp.align(*pair)
        cam1, refined1, cam2, refined2 = (
            resize(min_max_scaled(maps), size2) * present for view in pair for maps in view[:2]
        )
        equivariance = (cam1[:, 1:] - cam2[:, 1:]).abs().mean()
        guide1, guide2 = with_background(cam1), with_background(cam2)
        if warp is not None:  # outside there is no background either
            guide1, guide2 = (guide * warp.inside(size2) for guide in (guide1, guide2))
        crossed = cross_regularisation(guide2, refined1) + cross_regularisation(guide1, refined2)
    return {"tags": tagging, "min-pool": pooling, "equivariance": equivariance, "cross-equivariance": crossed}
