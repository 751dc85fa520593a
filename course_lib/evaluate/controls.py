"""Controls: what a map must be held against before it is trusted.

A box around one object is found by the sum of all channels, too. That a map shows *this class*, and shows it again
tomorrow, takes other questions:

    wrong class      does the map change if the class does?                       wrong_classes, class_agreement
    chance           are weights of the same heavy tail, but random, any worse?   random_weights
    split half       do two halves of the training set give the same map?         split_half_prototypes, map_correlation
    two objects      is each class hotter on its own object than on the other?    own_object_hotter
    energy           how much of the heat lies on the object, for its area?       energy_per_area
    energy by part   and how much on each part of it, and on the background?      energy_by_part
    a change         does the answer stay the same?                               same_answers
    a free choice    how far must it go until one method errs as much as another? crossing

The curve over thresholds and the baselines that never look at the image belong to `localization.MaxBoxAcc`. Randomness
comes from an explicit generator, on the device of which results are made.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, UInt8
from torch import Generator, Tensor

from course_lib.evaluate.localization import check_heatmaps
from course_lib.maps import weighted_map
from course_lib.prototypes import check_labels, class_prototypes


class PartEnergy(NamedTuple):
    """How the heat of each image divides among the parts, and how its pixels do."""

    share: Float64[Tensor, "b p"]  # of the heat; sums to 1
    area: Float64[Tensor, "b p"]  # of the pixels; sums to 1

    @property
    def per_area(self) -> Float64[Tensor, " p"]:
        """Share of the heat over share of the area, mean over the images in which the part occurs: 1 is chance.

        A part that occurs in no image has nothing to measure: it gets 0.
        """
        occurs = self.area > 0
        return (self.share / self.area.where(occurs, torch.inf)).sum(0) / occurs.sum(0).clamp_min(1)


def wrong_classes(labels: Int[Tensor, " n"], num_classes: int, generator: Generator) -> Int[Tensor, " n"]:
    """A class other than its own for each image: all images of a class get the same one, no two classes share it.

    The classes stand in a random circle and each one takes its neighbour, so that every class serves as a wrong one,
    and as often as there are images of the class it is taken for.
    """
    if num_classes < 2:
        raise ValueError(f"Expected at least 2 classes, of which one is wrong, got {num_classes}; add classes.")
    check_labels(labels, num_classes)
    circle = torch.randperm(num_classes, generator=generator, device=generator.device)
    neighbour = circle.roll(1)[circle.argsort()]
    return neighbour.to(labels.device)[labels.long()]


def random_weights(images: int, channels: int, generator: Generator) -> Float32[Tensor, "b 1 k"]:
    """Fresh weights 1/U with U uniform on (0, 1], one set per image, summing to 1: the heavy tail of 1/D, no distance.

    Shuffled Dist-CAM weights would be no clean control: the giant weights of dead channels land on live ones.
    """
    weights = 1 / (1 - torch.rand(images, 1, channels, generator=generator, device=generator.device))
    return weights / weights.sum(-1, keepdim=True)


def split_half_prototypes(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], num_classes: int, generator: Generator
) -> tuple[Float32[Tensor, "c k"], Float32[Tensor, "c k"]]:
    """Class prototypes of two random halves of the training set, split within each class (the first has odd samples).

    Make the same map from both, and `map_correlation` is its split-half reliability.

    Raises:
        ValueError: a class with fewer than two samples.
    """
    check_labels(labels, num_classes)
    counts = labels.bincount(minlength=num_classes)
    if (counts < 2).any():
        raise ValueError(
            f"Each class needs two samples to be split, but class {int((counts < 2).nonzero()[0])} has fewer."
        )
    shuffle = torch.randperm(len(labels), generator=generator, device=generator.device).to(labels.device)
    order = shuffle[labels[shuffle].argsort(stable=True)]  # class by class, at random within each
    place = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    halves = order[place % 2 == 0], order[place % 2 == 1]
    return tuple(class_prototypes(features[half], labels[half], num_classes) for half in halves)


def map_correlation(a: Float[Tensor, "*batch h w"], b: Float[Tensor, "*batch h w"]) -> Float64[Tensor, "*batch"]:
    """Pearson correlation of two maps over their pixels, -1..1; 0 if one of them is constant, as it then shows nothing.

    The scale and offset of a map do not matter: raw maps of any size can be compared.
    """
    return (_standardised(a) * _standardised(b)).sum(-1)


def class_agreement(
    features: Float[Tensor, "b k h w"],
    rules: Mapping[str, Callable[[Int[Tensor, " b"]], Float[Tensor, "b 1 k"]]],
    own: Int[Tensor, " b"],
    other: Int[Tensor, " b"],
) -> dict[str, float]:
    """The wrong-class control of many rules: mean correlation of an image's maps of two classes, -1..1, lowest first.

    A rule near 1 draws the same map whatever class it is asked for. Correlation tells, and not localisation: on one
    object also a map of no class at all finds a box.

    Args:
        features: last feature maps.
        rules: name -> function of a class for each image, which gives the channel weights.
        own, other: two classes for each image, such as its own one and that of `wrong_classes`.
    """
    found = {}
    for name, rule in rules.items():
        a, b = (weighted_map(features, rule(classes))[:, 0] for classes in (own, other))
        found[name] = float(map_correlation(a, b).mean())
    return {name: found[name] for name in sorted(found, key=found.get)}


def same_answers(
    classify: Callable[[Tensor], Float[Tensor, "b c"]], images: Tensor, change: Callable[[Tensor], Tensor]
) -> float:
    """Share of images, 0..1, that get the same class before and after a change.

    Args:
        classify: scores of images; the class is the one with the largest.
        change: makes other images of them, such as mirrored ones.
    """
    return float((classify(images).argmax(1) == classify(change(images)).argmax(1)).double().mean())


def crossing(error_at: Callable[[float], float], limit: float, low: float, high: float, tolerance: float) -> float:
    """Where an error that falls from `low` to `high` comes down to a limit: the middle of the last interval bisected.

    Args:
        error_at: one measurement; it is above the limit at `low`, and not above it at `high`, which are not measured.
        tolerance: length of an interval that is short enough; each halving costs a measurement.
    Raises:
        ValueError: an interval without length, or a tolerance of 0.
    """
    if not (low < high and tolerance > 0):
        raise ValueError(f"Expected low < high and a tolerance above 0, got {low}, {high} and {tolerance}.")
    while high - low > tolerance:
        middle = (low + high) / 2
        if error_at(middle) > limit:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def own_object_hotter(heatmaps: Float[Tensor, "b 2 H W"], masks: Bool[Tensor, "b 2 H W"]) -> Bool[Tensor, "b 2"]:
    """The two-object test: is the mean heat of map i higher on object i than on the other one?  (Shen et al., Fig. 3)

    The share of True is "right"; `.all(1).float().mean()` is "both right", 0 for a map that does not depend on the
    class.

    Args:
        heatmaps: of the classes of the two objects, values in 0..1.
        masks: of the two objects, in the same order.
    """
    _check(heatmaps, masks)
    heat = torch.einsum("bihw,bjhw->bij", heatmaps, masks.to(heatmaps.dtype)) / masks.sum((-2, -1))[:, None]
    return (heat > heat.flip(2)).diagonal(dim1=1, dim2=2)


def energy_per_area(
    heatmaps: Float[Tensor, "*batch H W"], masks: Bool[Tensor, "*batch H W"]
) -> Float[Tensor, "*batch"]:
    """Share of the heat that lies in the mask over the mask's share of the image: 1 is chance, 1 / area the most.

    An empty heatmap scores 1: it says as much as a constant one.
    """
    _check(heatmaps, masks)
    inside = (heatmaps * masks).sum((-2, -1)) / masks.sum((-2, -1))
    anywhere = heatmaps.mean((-2, -1))
    return torch.where(anywhere > 0, inside / anywhere, 1.0)


def energy_by_part(heatmaps: Float[Tensor, "b H W"], parts: UInt8[Tensor, "b H W"], num_parts: int) -> PartEnergy:
    """Share of the heat, and of the area, of each part of each image: `.per_area` is `energy_per_area` of all parts.

    An empty heatmap counts as a constant one: it says as much.

    Args:
        heatmaps: values in 0..1.
        parts: a part's number for each pixel, 0..num_parts - 1; 0 is usually the background.
    """
    _check(heatmaps, torch.ones_like(parts, dtype=torch.bool))
    if (parts >= num_parts).any():
        raise ValueError(
            f"Parts from 0 to {num_parts - 1} were expected, but {int(parts.max())} came. Raise num_parts, or "
            "give pixels that are to be ignored a part of their own."
        )
    index, heat = parts.flatten(1).long(), heatmaps.flatten(1).double()  # b pixels
    empty = heat.new_zeros(len(heat), num_parts)
    heat = heat.where(heat.any(1, keepdim=True), 1.0)
    share, area = (empty.scatter_add(1, index, values) for values in (heat, torch.ones_like(heat)))
    return PartEnergy(share / heat.sum(1, keepdim=True), area / heat.shape[1])


def _standardised(map):  # ... h w -> ... h*w, in float64, of mean 0 and length 1
    values = map.flatten(-2).double()
    deviation = values - values.mean(-1, keepdim=True)
    norm = deviation.norm(dim=-1, keepdim=True)
    flat = norm <= 1e-5 * values.norm(dim=-1, keepdim=True)  # rounding alone is no map
    return deviation / torch.where(flat, torch.inf, norm)


def _check(heatmaps, masks):
    if masks.dtype != torch.bool or masks.shape != heatmaps.shape:
        raise ValueError(
            f"A boolean mask was expected for every heatmap of {tuple(heatmaps.shape)}, but {masks.dtype} of "
            f"{tuple(masks.shape)} came. Up-sample the map, and pass `mask == 1` for masks of numbers."
        )
    check_heatmaps(heatmaps)
    if not masks.flatten(-2).any(-1).all():
        raise ValueError("A mask is empty: there is no object for the heat to lie on. Leave such images out.")
