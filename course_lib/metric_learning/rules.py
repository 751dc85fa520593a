"""The rules of a map: where the weights of its channels come from; and maps of pairs, by all rules at once.

    few-shot             a query and the prototype of its support samples
    retrieval, re-ID     a probe and its nearest gallery image; for the analysis of successes and failures, the nearest
                         correct and the nearest wrong one

Shen et al., "Distance-Based Class Activation Map for Metric Learning", sections 2 and 4: the reference S_c of Eq. 4 is
a prototype or one gallery image. The paper shows maps of good pairs. Here every map has its controls beside it: a
random wrong reference, uniform weights, random weights.

    found = neighbours(distances, query_ids, gallery_ids, keep)
    chosen = torch.stack([*found, random_wrong(query_ids, gallery_ids, keep, generator)], 1)      # b 4
    raw = pair_maps(query_maps, gallery, chosen, generator)["dist-cam"]                           # b 4 h w
    controls.map_correlation(raw[:, 1], raw[:, 2])             # 1 if the map does not care with whom it is compared

A pair has two images. The map on the gallery image is the same call from the other side, where the probe is the
reference: `pair_maps(gallery_maps[found.nearest], queries, torch.arange(len(queries))[:, None], generator)`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Generator, Tensor

from course_lib import maps
from course_lib.evaluate.controls import random_weights


def _row(query, rows, chosen):
    return rows[chosen][:, None]


def _changed(change):  # of the rows of all classes, c k -> c k
    return lambda query, rows, chosen: change(rows)[chosen][:, None]


def _compared(compare):  # of queries with their rows, b k and b 1 k -> b 1 k
    return lambda query, rows, chosen: compare(query, rows[chosen][:, None])


# Whose rows a rule takes, and the weights b 1 k as a function of (pooled queries b k, rows c k, those chosen b). In the
# place of prototypes of classes there may be pooled gallery images.
RULES = {
    "cam": ("classifier", _row),  # w of Eq. 3 (Shen et al.)
    "cam-positive": ("classifier", _changed(maps.positive_weights)),
    "cam-centred": ("classifier", _changed(maps.centred_weights)),
    "uniform": ("prototypes", _changed(maps.uniform_weights)),
    "dist-cam": ("prototypes", _compared(maps.channel_weights)),  # W of Eq. 4 and 5 (Shen et al.)
    "match-activity": ("prototypes", _compared(maps.match_activity_weights)),
    "intersection": ("prototypes", _compared(maps.intersection_weights)),
    "prototype": ("prototypes", _row),
    "prototype-centred": ("prototypes", _changed(maps.centred_weights)),
}
NAMES = (*(name for name, (source, _) in RULES.items() if source == "prototypes"), "random")  # the rules of a pair
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
    return Neighbours(
        *(
            torch.where(among.any(1), torch.where(among, distances, torch.inf).argmin(1), NONE)
            for among in (keep, keep & own, keep & ~own)
        )
    )


def ranked(distances: Float[Tensor, "q g"], keep: Bool[Tensor, "q g"] | None = None, k: int = 8) -> Int[Tensor, "q k"]:
    """The first k kept gallery images of each query, nearest first, equal ones in their order.

    NONE stands where no more are kept.
    """
    keep = torch.ones_like(distances, dtype=torch.bool) if keep is None else keep
    order = torch.where(keep, distances, torch.inf).argsort(dim=1, stable=True)[:, :k]
    return torch.where(keep.gather(1, order), order, NONE)


def random_wrong(
    query_ids: Int[Tensor, " q"], gallery_ids: Int[Tensor, " g"], keep: Bool[Tensor, "q g"] | None, generator: Generator
) -> Int[Tensor, " q"]:
    """A gallery image of another class or identity, drawn for each query: the control of a pair.

    NONE stands where there is none.
    """
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
        references: pooled features of what they are compared with, in the space in which the model compares: prototypes
            of the support classes, or all gallery images ("prototype-centred" subtracts the mean of them all).
        chosen: rows of `references`, such as those of `neighbours`. Where it is NONE the map is all zero.
        generator: of the rule "random", fresh for each pair.
        rules: names of RULES, or "random".
    """
    if unknown := [name for name in rules if name not in NAMES]:
        raise ValueError(f"There is no rule {unknown[0]!r}; there are: {', '.join(NAMES)}.")
    query, pairs = features.float().mean((-2, -1)).repeat_interleave(chosen.shape[1], 0), chosen.flatten()
    exists = (chosen != NONE)[..., None, None]  # b r 1 1
    found = {}
    for name in rules:
        if name == "random":
            weights = random_weights(*query.shape, generator).to(query.device)  # (b r) 1 k
        else:
            weights = RULES[name][1](query, references, pairs)  # (b r) 1 k
        found[name] = maps.weighted_map(features, weights.view(*chosen.shape, -1)) * exists  # Eq. 6 (Shen et al.)
    return found
