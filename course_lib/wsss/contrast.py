"""Pixel-to-prototype contrast: pixels are drawn to the prototype of their pseudo class and pushed off the other ones.

    F(v, y, P) = -log exp(v . p_y / tau) / sum_c exp(v . p_c / tau)         one pixel against the prototypes     (Eq. 4)
    cross-prototype   mean_i F(v_i, y_i,  P')                               ' marks the other view               (Eq. 6)
    cross-CAM         mean_i F(v_i, y'_i, P )                                                                    (Eq. 7)
    intra-view        mean_i F(v_i, y_i,  P ), with mined prototypes and pixels                                  (Eq. 9)
                        Du et al., "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast", CVPR 2022

v is a pixel's embedding and p_c a prototype (`prototypes.pixel_prototypes`), both of length 1; y is a pseudo label,
read from the maps. All three terms are computed on both views. The first view is brought to the grid of the second, so
that a pixel of one is the same place in the other. Means are over the pixels of the batch: its images have one number
of them each.

Paper and released code differ; each difference is one field of `ContrastConfig`, and `paper()` and `code()` are the two
ends. The paper knows classes only and does not say where its background comes from. Some of what the code does is
hardly meant: a prototype of the background from the first pixels of the batch, those of absent classes from pixels of
other ones.

No host synchronisation and no loop over classes, pixels or images. Labels, prototypes and the choice of pixels carry no
gradient. Under torch.distributed prototypes, counts and mining are those of the batches of all processes (shares of one
size), and the mean of the terms over processes is that of one process with everything.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from course_lib.processes import gathered, process, processes
from course_lib.prototypes import at_least_float32, pixel_prototypes
from course_lib.settings import Count, NotNegative, Positive, Share, check_settings
from course_lib.wsss import View, check_maps
from course_lib.wsss.seam import EPS
from course_lib.wsss.views import Warp, resize

NEAR_ZERO = 1e-12  # below it an embedding has no direction, and maps have no peak


@dataclass(frozen=True)
class ContrastConfig:
    """What is contrasted with what, and how much. The values here are those of the released code (SEAM)."""

    cross_prototype: NotNegative = 0.1  # alpha of Eq. 1; 0 leaves the term out, which makes the rows of Table 5
    cross_cam: NotNegative = 0.1  # alpha, too
    intra: NotNegative = 0.1  # beta of Eq. 1
    temperature: Positive = 0.1  # tau
    top_k: Count = 32  # pixels of a prototype, of the whole batch; 16 with EPS in the code (Table 6)
    background: Share = 0.2  # score of the background, as a share of the highest; 0.1 with EPS in the code
    mine_prototypes: bool = True  # of the negatives only those of rank 10 to 60 %, the most similar first
    mine_pixels: bool = True  # half of a class at random and half hard; else all pixels
    # Controls: what the loss gains with the labels of masks, an oracle, and with labels of other pixels of the batch.
    labels: Literal["pseudo", "true", "shuffled"] = "pseudo"

    # Where paper and code differ: the paper's way comes first in each comment, and is the value that is not here.
    sum_views: bool = False  # paper: the terms of the two views are added; code: averaged
    refined: bool = True  # paper: labels and confidences from the classifier's maps; code: from those refined by PCM
    min_max: bool = True  # paper: maps as they are, so that images compare; code: each map by its minimum and maximum
    tagged: bool = True  # open in the paper, whose 3.3 presumes tags; False: any class can be a pixel's label
    assigned: bool = False  # paper: the K pixels of a class are among those labelled so; code: any pixels of the batch
    # open in the paper: background pixels ranked by how far off all classes are; code: all equal, so the first K
    ranked_background: bool = False
    unit_embeddings: bool = False  # paper: a prototype averages embeddings of length 1; code: of any length
    absent_compete: bool = True  # open in the paper: only classes that are labelled in the batch compete; code: all
    mine_positive: bool = True  # paper: negatives leave out the positive; code: it is among those that are mined
    skip_hardest: bool = True  # paper: the hard pixels are the least similar; code: the 10 % least similar are skipped
    class_mean: bool = True  # paper: mean over the chosen pixels; code: over those of a class, then over classes

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def paper(cls) -> "ContrastConfig":
        """What the paper says. Where it is silent: the choice that gives a prototype pixels of its own class."""
        return cls(
            sum_views=True,
            refined=False,
            min_max=False,
            assigned=True,
            ranked_background=True,
            unit_embeddings=True,
            absent_compete=False,
            mine_positive=False,
            skip_hardest=False,
            class_mean=False,
        )

    @classmethod
    def code(cls, saliency: bool = False) -> "ContrastConfig":
        """What the released code does, on SEAM or, with saliency, on EPS."""
        return cls(top_k=16, background=0.1) if saliency else cls()


def pixel_to_prototype(
    embeddings: Float[Tensor, "n d h w"],
    labels: Int[Tensor, "n h w"],
    prototypes: Float[Tensor, "c d"],
    temperature: Positive = 0.1,
) -> Float[Tensor, "n h w"]:
    """Contrast F(v, y, P) of each pixel with all prototypes: -log softmax_c(v . p_c / tau)[y]  (Du et al., Eq. 4).

    Args:
        embeddings: scaled to length 1 here; a zero embedding resembles all prototypes equally.
        labels: class of each pixel, 0..c - 1.
        prototypes: of length 1, as they come from `prototypes.pixel_prototypes`.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # fp32 island: exp(1 / tau) overflows fp16
        logits = _logits(at_least_float32(embeddings), at_least_float32(prototypes), temperature)
        return _losses(logits, labels)  # Eq. 4 (Du et al.)


def contrast_loss(
    view1: View,
    view2: View,
    tags: Float[Tensor, "n t"],
    config: ContrastConfig,
    noise: Float[Tensor, "2 n h w"],
    warp: Warp | None = None,
    masks: UInt8[Tensor, "n H W"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Weighted terms "cross-prototype", "cross-cam" and "intra" of both views, whose sum is L_contrast  (Du et al.).

    A term of weight 0 is left out.

    Args:
        view1: of the images, on any grid; maps and embeddings are brought to the grid of view2.
        view2: of the smaller copies of the images.
        tags: 1 where the class is in the image, else 0; class t is channel t + 1 of the maps.
        noise: uniform random numbers for each pixel of both views on the grid of view2, which choose the random half of
            the pixels: `torch.rand(2, n, h, w, generator=generator, device=device)`.
        warp: if the second view is more than a smaller copy; pixels from outside the image take no part.
        masks: classes of the pixels of the images, IGNORE where unknown; of true labels only.
    """
    weight = {"cross-prototype": config.cross_prototype, "cross-cam": config.cross_cam, "intra": config.intra}
    terms = contrast_terms(view1, view2, tags, config, noise, warp, masks)
    # Eq. 1 and 8 (Du et al.)
    return {name: weight[name] * (term.sum() if config.sum_views else term.mean()) for name, term in terms.items()}


def contrast_terms(
    view1: View,
    view2: View,
    tags: Float[Tensor, "n t"],
    config: ContrastConfig,
    noise: Float[Tensor, "2 n h w"],
    warp: Warp | None = None,
    masks: UInt8[Tensor, "n H W"] | None = None,
) -> dict[str, Float[Tensor, "2"]]:
    """The six terms before their weights: for each name that of the first and of the second view.

    Args: as in `contrast_loss`.
    """
    for number, view in enumerate((view1, view2), 1):
        if view.embeddings is None:
            raise ValueError(
                f"Expected embeddings beside the maps of view {number}, got None; the network needs a projector."
            )
        check_maps(view.cam, tags)
    size = tuple(view2.cam.shape[2:])
    if noise.shape != (2, len(tags), *size):
        raise ValueError(
            f"Expected a random number for each pixel of both views on the grid of the second, {(2, len(tags), *size)},"
            f" got noise of the shape {tuple(noise.shape)}."
        )
    if config.labels == "true" and masks is None:
        raise ValueError(
            "Expected masks for true labels, got None; make the images with `training_images` of this configuration."
        )
    with torch.autocast(tags.device.type, enabled=False):  # fp32 island: all of it
        if warp is not None:
            view1, view2 = warp.align(view1, view2)
        maps = (view.refined if config.refined else view.cam for view in (view1, view2))
        cam = torch.stack([resize(own.detach(), size) for own in maps])  # 2 n c h w
        embeddings = [resize(view.embeddings, size) for view in (view1, view2)]  # n d h w each
        true, inside = None, None if warp is None else warp.inside(size)  # n 1 h w
        if config.labels == "true":
            true, inside = true_labels(masks, cam.shape[2], size, warp)
            true, inside = true.expand(2, *true.shape), inside[:, None]
        labels, confidence = pseudo_labels(cam, tags, config, true)
        if config.labels == "shuffled":  # by the other view's numbers: a view's own choose among its pixels
            order = noise.flip(0).flatten(1).argsort(1).view_as(labels)  # 2 n h w, places in the batch
            labels, confidence = _moved(labels, order), _moved(confidence.movedim(2, -1), order).movedim(-1, 2)
        whole = config.absent_compete and inside is None
        inside = torch.ones_like(labels[0, :, None], dtype=torch.bool) if inside is None else inside
        confidence = torch.where(inside, confidence, -torch.inf)
        prototypes = torch.stack(
            [  # 2 c d
                pixel_prototypes(own, pixels / _lengths(pixels) if config.unit_embeddings else pixels, config.top_k)
                for own, pixels in zip(confidence, embeddings)
            ]
        ).to(embeddings[0].dtype)
        labels, inside = labels.flatten(1), inside.flatten()  # 2 m, m
        members = _one_hot(labels, cam.shape[2]) & inside[:, None]  # 2 m c
        counts = gathered(members.sum(1)[None]).sum(0)  # 2 c
        competing = (counts > 0) | config.absent_compete
        rivals = torch.cat((prototypes, prototypes.flip(0)), 1)  # 2 2c d: the view's own, then the other view's
        logits = torch.stack([_logits(pixels, of, config.temperature) for pixels, of in zip(embeddings, rivals)])
        own, other = logits.chunk(2, 2)  # 2 m c each
        terms = {}
        if config.cross_prototype:
            terms["cross-prototype"] = _cross(other, labels, competing.flip(0), inside, whole)  # Eq. 6 (Du et al.)
        if config.cross_cam:
            terms["cross-cam"] = _cross(own, labels.flip(0), competing, inside, whole)  # Eq. 7 (Du et al.)
        if config.intra:
            noise = noise.flatten(1)
            terms["intra"] = _intra(own, labels, counts, competing, noise, config, inside)  # Eq. 9 (Du et al.)
    return terms


def pseudo_labels(
    cam: Float[Tensor, "*views n c h w"],
    tags: Float[Tensor, "n t"],
    config: ContrastConfig,
    true: Int[Tensor, "*views n h w"] | None = None,
) -> tuple[Int[Tensor, "*views n h w"], Float[Tensor, "*views n c h w"]]:
    """Pseudo label of each pixel, 0 for background, and the confidences that prototypes take their pixels by.

    The label is the class of highest score, and the background where none exceeds `config.background` (of the image's
    highest score, if maps are not scaled by themselves). An image whose maps are all zero is background.

    Args:
        true: labels in their place; confidences are still those of the maps.
    """
    maps = min_max(cam) if config.min_max else at_least_float32(cam).relu()
    front = maps[..., 1:, :, :]
    labelled = front * tags[:, :, None, None].to(front.dtype) if config.tagged else front
    best = labelled.amax(-3, keepdim=True)  # n 1 h w
    highest = best.amax((-2, -1), keepdim=True)
    score = torch.full_like(best, config.background) * (1.0 if config.min_max else highest)
    # Of equals the first, so background wins a tie.
    labels = torch.cat((score, labelled), -3).max(-3).indices if true is None else true
    if config.ranked_background:
        score = 1 - best.clamp_min(0) / highest.clamp_min(NEAR_ZERO)
    elif not config.assigned:
        place = torch.arange(score.shape[-4:].numel(), device=cam.device)
        first = (process() * len(place) + place < config.top_k).view(score.shape[-4:])
        score = torch.where(first, score, -torch.inf)
    confidence = torch.cat((score, front), -3)
    if true is not None:  # a pixel of the class that its map does not show has little weight, and none against it
        confidence = torch.where(confidence > -torch.inf, confidence.clamp_min(EPS), confidence)
    if config.assigned:
        confidence = torch.where(_one_hot(labels, cam.shape[-3]).movedim(-1, -3), confidence, -torch.inf)
    return labels, confidence


def true_labels(
    masks: UInt8[Tensor, "n H W"], num_classes: int, size: tuple[int, int], warp: Warp | None = None
) -> tuple[Int[Tensor, "n h w"], Bool[Tensor, "n h w"]]:
    """Label of each cell of a grid: the class of most of its known pixels; and whether it has any.

    Args:
        masks: classes, 0 for background; from num_classes on: unknown, as IGNORE is.
        warp: if the second view is more than a smaller copy; pixels from outside the image are unknown.
    """
    votes = (masks[:, None] == torch.arange(num_classes, device=masks.device)[:, None, None]).float()  # n c H W
    votes = F.adaptive_avg_pool2d(votes if warp is None else warp(votes, masks.shape[1:]), size)
    most = votes.max(1)
    return most.indices, most.values > 0


def mined(
    cosine: Float[Tensor, "m c"], labels: Int[Tensor, " m"], noise: Float[Tensor, " m"]
) -> tuple[Bool[Tensor, "m c"], Int[Tensor, " m"]]:
    """Negatives of each pixel, and how often it counts, in the intra-view term as the paper says it  (Du et al., 3.3).

    Of the n = c - 1 prototypes of other classes, the most similar first, those from rank ceil(0.6 n) - n // 2 to
    ceil(0.6 n) are kept. Of a class of k pixels the k // 2 of lowest noise and the k // 2 least like their own
    prototype count; a pixel in both counts twice.

    Args:
        cosine: of pixels and prototypes, all of which compete; labels: 0..c - 1; noise: uniform random numbers.
    """
    negatives = cosine.shape[1] - 1
    stop = -(-6 * negatives // 10)
    ranks = cosine.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True).argsort(1)
    keys = torch.stack((cosine.gather(1, labels[:, None])[:, 0], noise))[:, None]  # 2 1 m
    half = labels.bincount(minlength=cosine.shape[1])[labels] // 2
    times = (_ranks_in_class(keys, labels[None])[:, 0] < half).sum(0)
    return (ranks >= stop - negatives // 2) & (ranks < stop), times


def min_max(cam: Float[Tensor, "*views n c h w"]) -> Float[Tensor, "*views n c h w"]:
    """Each map scaled by its minimum and maximum after a ReLU, literally as released.

    Values at the minimum are zeroed before it is subtracted, so they come out at about -low / (high - low): negative. A
    zero map becomes -1 everywhere and a constant one is far below. None of them can be a label, since the background is
    above.
    """
    maps = at_least_float32(cam).relu()
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (torch.where(maps < low + EPS, 0.0, maps) - low - EPS) / (high - low + EPS)


def _logits(embeddings, prototypes, temperature):  # n d h w, c d -> m c
    """Cosines of pixels and prototypes, over the temperature."""
    pixels = embeddings.movedim(1, -1).flatten(0, 2)  # m d
    # Lengths are divided out last: there are fewer prototypes than channels.
    return pixels @ (prototypes.T / temperature) / _lengths(pixels)


def _losses(logits, labels):  # ... c, ... -> ...
    """Contrast F of each pixel with the prototypes of its row of logits, the positive one given by the label."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="none").view_as(labels)


def _lengths(embeddings):  # n d ... -> n 1 ...
    """Lengths to divide by, 1 for a zero: its cosines are 0, their gradient is finite (with F.normalize it is 1e12)."""
    lengths = embeddings.norm(dim=1, keepdim=True)
    return torch.where(lengths > NEAR_ZERO, lengths, 1.0)


def _moved(values, order):  # 2 n h w ..., 2 n h w -> 2 n h w ...
    """What stands at other places of the batch."""
    flat = values.flatten(1, 3)
    return torch.stack([own[places.flatten()] for own, places in zip(flat, order)]).view_as(values)


def _one_hot(labels, num_classes):  # ... -> ... c
    return labels[..., None] == torch.arange(num_classes, device=labels.device)


def _cross(logits, labels, competing, inside, whole):
    """Mean contrast over the pixels inside with the competing prototypes, for each view.

    A pixel whose own prototype does not compete is left out.

    Args:
        logits: 2 m c; labels: 2 m; competing: 2 c; inside: m; whole: whether all pixels and prototypes take part.
    """
    # Its own stays in, so that the loss is finite.
    logits = torch.where(competing[:, None] | _one_hot(labels, logits.shape[2]), logits, -torch.inf)
    losses = _losses(logits, labels)
    if whole:
        return losses.mean(1)
    valid = (competing.gather(1, labels) & inside).to(losses.dtype)
    return _sum(losses, valid / gathered(valid.sum(1)[None]).sum(0).clamp_min(1)[:, None])


def _intra(
    logits,
    labels,
    counts,
    competing,
    noise,
    config,
    inside,
):
    """Contrast with the prototypes of the same view: mined ones, on mined pixels.

    Args:
        logits: 2 m c; labels, noise: 2 m; counts: 2 c, pixels of each class inside; competing: 2 c; inside: m.
    """
    own = logits.gather(2, labels[..., None])  # 2 m 1
    rivals = competing[:, None]
    if not (config.mine_prototypes and config.mine_positive):
        rivals = rivals & ~_one_hot(labels, logits.shape[2])
    count = rivals.sum(2, keepdim=True)  # 2 m 1, or 2 1 1 if the same for all pixels
    ranked = torch.where(rivals, logits, -torch.inf).sort(2, descending=True).values
    if config.mine_prototypes:
        # The counts of the released code for 21 prototypes: of the 13 most similar (60 %) the last 10 (half of all).
        rank, end = torch.arange(logits.shape[2], device=logits.device), -(-6 * count // 10)
        ranked = torch.where((rank >= end - (count // 2).clamp_min(1)) & (rank < end), ranked, -torch.inf)
    losses = _losses(torch.cat((own, ranked), 2), torch.zeros_like(labels))  # the positive comes first
    return _sum(losses, _pixel_weights(labels, own.detach()[..., 0], noise, counts, config, inside))


def _pixel_weights(
    labels,
    similarity,
    noise,
    counts,
    config,
    inside,
):
    """Weight of each pixel in the intra-view term, 2 m.

    The weights of all processes sum to 1, less where classes are too small. Of a class of k pixels k // 2 are drawn at
    random and k // 2 are hard: a pixel may be both, and then counts twice.

    Args:
        labels, similarity, noise: 2 m; counts: 2 c, pixels of each class inside; inside: m.
    """
    taken, times = counts, inside.to(similarity.dtype).expand_as(similarity)
    if config.mine_pixels:
        keys = torch.stack((similarity, noise.to(similarity.dtype)))  # 2 2 m
        # What is outside comes last in its class, where nothing is taken.
        hardness, chance = _ranks_in_class(torch.where(inside, keys, torch.inf), labels)
        whole = counts.gather(1, labels)
        half, taken = whole // 2, counts // 2 * 2
        first = 6 * whole // 10 - half if config.skip_hardest else 0
        times = ((hardness >= first) & (hardness < first + half)).to(times.dtype) + (chance < half)
    if config.class_mean:
        # A class of one pixel cannot be halved. It adds nothing, but is counted among the classes, as released.
        return times / taken.clamp_min(1).gather(1, labels) / (counts > 0).sum(1, keepdim=True).clamp_min(1)
    return times / taken.sum(1, keepdim=True).clamp_min(1)


def _ranks_in_class(keys, labels):  # k 2 m, 2 m -> k 2 m
    """Rank of each key among those of its class, from 0 for the smallest, over the pixels of all processes."""
    everyone = gathered(torch.cat((keys, labels[None].to(keys.dtype))).movedim(-1, 0)).movedim(0, -1)  # k+1 2 all
    order = everyone[:-1].sort(stable=True).indices
    # By class, and by key within it.
    classes, again = everyone[-1:].expand_as(order).gather(2, order).sort(stable=True)
    rank = torch.arange(order.shape[2], device=order.device) - torch.searchsorted(classes, classes)
    return torch.empty_like(order).scatter(2, order.gather(2, again), rank).chunk(processes(), 2)[process()]


def _sum(losses, weights):  # 2 m, 2 m -> 2
    """Weighted sums over the pixels of all processes, as this one's share of a mean over processes."""
    return processes() * (weights * losses).sum(1)
