"""Maps in context: of a query and what it is compared with, by all rules of lesson 02 at once.

    few-shot             a query and the prototype of its support samples
    retrieval, re-ID     a probe and its nearest gallery image; for the analysis of successes and failures, the nearest
                         correct and the nearest wrong one

Shen et al., "Distance-Based Class Activation Map for Metric Learning", sections 2.3 and 3: the reference S_c of Eq. 4 is a
prototype or one gallery image. The rules are those of `localise.METHODS`, in which rows stand for references as they do for
classes; a reference is a row that was chosen. The paper shows maps of good pairs. Here every map has its controls beside it: a
random wrong reference, uniform weights, random weights.

    found = neighbours(distances, query_ids, gallery_ids, keep)
    chosen = torch.stack([*found, random_wrong(query_ids, gallery_ids, keep, generator)], 1)      # b 4
    maps = pair_maps(query_maps, gallery, chosen, generator)["dist-cam"]                          # b 4 h w
    controls.map_correlation(maps[:, 1], maps[:, 2])                    # 1 if the map does not care with whom it is compared

A pair has two images. The map on the gallery image is the same call from the other side, where the probe is the reference:
`pair_maps(gallery_maps[found.nearest], queries, torch.arange(len(queries))[:, None], generator)`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Generator, Tensor

from course_lib.evaluate.controls import random_weights
from course_lib.experiments.localise import METHODS
from course_lib.maps import uniform_weights, weighted_map

# (pooled queries b k, references g k, those chosen b) -> weights b 1 k; "prototype" is W = P with any reference as P.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "uniform": lambda query, rows, chosen: uniform_weights(query)[:, None],
    **{name: rule for name, (source, rule) in METHODS.items() if source == "prototypes"},
}
NAMES = (*RULES, "random")
NONE = -1  # the index of a reference that does not exist


class Neighbours(NamedTuple):
    """Rows of the gallery, one for each query; NONE where the gallery keeps no such image."""

    nearest: Int[Tensor, " q"]
    correct: Int[Tensor, " q"]  # the nearest one of the query's own class or identity
    wrong: Int[Tensor, " q"]  # the nearest one of another


def neighbours(
    distances: Float[Tensor, "q g"],
    query_ids: Int[Tensor, " q"],
    gallery_ids: Int[Tensor, " g"],
    keep: Bool[Tensor, "q g"] | None = None,
) -> Neighbours:
    """The nearest, the nearest correct and the nearest wrong gallery image of each query; of equal ones the first.

    Args:
        distances: small is near; whatever the model compares by.
        keep: what a query may be compared with: not itself, and in re-identification neither junk nor images of its own
            person from its own camera. None: all.
    Raises:
        ValueError: a distance that is NaN or infinite.
    """
    if not distances.isfinite().all():
        raise ValueError(
            "Distances must be finite, but NaN or infinite ones came. Look at the features first; what a query "
            "must not be compared with is said by `keep`, not by an infinite distance."
        )
    own = query_ids[:, None] == gallery_ids  # q g
    keep = torch.ones_like(own) if keep is None else keep
    return Neighbours(*(_nearest(distances, among) for among in (keep, keep & own, keep & ~own)))


def ranked(distances: Float[Tensor, "q g"], keep: Bool[Tensor, "q g"] | None = None, k: int = 8) -> Int[Tensor, "q k"]:
    """The first k kept gallery images of each query, nearest first, equal ones in their order; NONE where no more are kept."""
    keep = torch.ones_like(distances, dtype=torch.bool) if keep is None else keep
    order = torch.where(keep, distances, torch.inf).argsort(dim=1, stable=True)[:, :k]
    return torch.where(keep.gather(1, order), order, NONE)


def random_wrong(
    query_ids: Int[Tensor, " q"], gallery_ids: Int[Tensor, " g"], keep: Bool[Tensor, "q g"] | None, generator: Generator
) -> Int[Tensor, " q"]:
    """A gallery image of another class or identity, drawn for each query: the control of a pair. NONE where there is none."""
    dice = torch.rand(len(query_ids), len(gallery_ids), generator=generator, device=generator.device)
    return neighbours(dice.to(query_ids.device), query_ids, gallery_ids, keep).wrong


def pair_maps(
    features: Float[Tensor, "b k h w"],
    references: Float[Tensor, "g k"],
    chosen: Int[Tensor, "b r"],
    generator: Generator,
    rules: Sequence[str] = NAMES,
) -> dict[str, Float32[Tensor, "b r h w"]]:
    """Raw maps of each image against each of its chosen references, by every rule.

    Args:
        features: last feature maps of the images that are explained.
        references: pooled features of what they are compared with, in the space in which the model compares: prototypes of
            the support classes, or all gallery images ("prototype-centred" subtracts the mean of them all).
        chosen: rows of `references`, such as those of `neighbours`. Where it is NONE the map is all zero.
        generator: of the rule "random", fresh for each pair.
        rules: names of RULES, or "random".
    """
    if unknown := [name for name in rules if name not in NAMES]:
        raise ValueError(f"There is no rule {unknown[0]!r}; there are: {', '.join(NAMES)}.")
    query, pairs = features.float().mean((-2, -1)).repeat_interleave(chosen.shape[1], 0), chosen.flatten()
    exists = (chosen != NONE)[..., None, None]  # b r 1 1
    maps = {}
    for name in rules:
        weights = (
            random_weights(*query.shape, generator).to(query.device)
            if name == "random"
            else RULES[name](query, references, pairs)
        )  # (b r) 1 k
        maps[name] = weighted_map(features, weights.view(*chosen.shape, -1)) * exists
    return maps


def _nearest(distances: Float[Tensor, "q g"], among: Bool[Tensor, "q g"]) -> Int[Tensor, " q"]:
    return torch.where(among.any(1), torch.where(among, distances, torch.inf).argmin(1), NONE)
