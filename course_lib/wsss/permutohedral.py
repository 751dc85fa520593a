"""Gaussian filters of many points in a few dimensions, in linear time, on the permutohedral lattice.

    v'_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j          for all n points i at once, f in d dimensions

                    Adams, Baek & Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", 2010

The lattice is made of the integer points of d+1 dimensions whose coordinates sum to 0 and have one remainder modulo
d+1. It cuts the plane of sum 0 into simplices of d+1 vertices, one of each remainder. The filter is a product of sparse
matrices:

    splat   each point gives its value to the vertices around it, by its barycentric coordinates
    blur    along each of the d+1 axes: half of either neighbour is added; a vertex exists only where points lie
    slice   each point reads its vertices, by the same coordinates

They depend on the points alone: a `Lattice` is made once and filters any values, all channels in one pass. A row of a
matrix is a bag of weighted rows of the values, summed in a fixed order: no atomic addition, so that a result repeats,
and no hash table. A vertex is one integer, sorted once; its neighbour along an axis is a known distance away.

It approximates: the blur is a Gaussian only on average, and its scale is arbitrary. Whoever divides by filtered ones,
as `crf` does, is rid of the scale.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

TOGETHER = 2**15  # points at a time while a lattice is made: what is computed of them stays in the processor's cache


class Bags(NamedTuple):
    """A sparse matrix. Row r of its product sums some rows of what it multiplies, each times its weight."""

    index: Int32[Tensor, "..."]  # of rows to sum: "rows entries", or all entries in one line
    weight: Float[Tensor, "..."]
    start: Int32[Tensor, " rows"] | None = None  # where each row starts in the line

    def times(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "rows c"]:
        return F.embedding_bag(self.index, values, self.start, mode="sum", per_sample_weights=self.weight)


@dataclass(frozen=True)
class Lattice:
    """The filter of n points in d dimensions, by way of m vertices. Indices are int32: n (d+1) is below 2^31."""

    splat: Bags  # m n
    blurs: tuple[Bags, ...]  # of d+1 axes: m m
    slice: Bags  # n m

    def filter(self, values: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """The values of all points, each channel filtered by itself.

        Args:
            values: of the dtype of the points that the lattice was made of.
        """
        values = self.splat.times(values)  # m c
        for blur in self.blurs:
            values = blur.times(values)
        return self.slice.times(values)

    def scaled(self, before: Float[Tensor, " n"], after: Float[Tensor, " n"]) -> "Lattice":
        """The lattice whose filter multiplies by `before` first and by `after` at last; it takes no longer."""
        splat = self.splat._replace(weight=self.splat.weight * before[self.splat.index])
        return replace(self, splat=splat, slice=self.slice._replace(weight=self.slice.weight * after[:, None]))


def lattice(points: Float[Tensor, "d n"]) -> Lattice:
    """The lattice of these points, which filters with a Gaussian of standard deviation 1.

    Args:
        points: coordinates, each divided by its own standard deviation.
    Raises:
        ValueError: points that lie further apart than their dtype or an integer can tell.
    """
    reach = points.abs().amax().item()
    if not reach * torch.finfo(points.dtype).eps < 0.01:
        raise ValueError(
            f"Expected coordinates that {points.dtype} knows to a hundredth of a standard deviation, got {reach:.3g} "
            "standard deviations; choose larger ones."
        )
    v, n = len(points) + 1, points.shape[1]
    cells, ranks, weights = zip(*map(_simplices, points.split(TOGETHER, 1)))
    radix, low = _packing(cells)
    keys = torch.cat([_keys(cell - low, rank, radix) for cell, rank in zip(cells, ranks)])  # n v
    weight = torch.cat(weights)  # n v

    ordered, order = keys.flatten().sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    vertex = torch.empty_like(ordered, dtype=torch.int32)
    vertex[order] = first.cumsum(0, dtype=torch.int32) - 1
    point = order.div(v, rounding_mode="floor").int()
    splat = Bags(point, weight.flatten()[order], first.nonzero()[:, 0].int())
    blurs = tuple(Bags(index, share.to(weight.dtype)) for index, share in _neighbours(ordered[first], radix))
    return Lattice(splat, blurs, Bags(vertex.view(n, v), weight))


# points d n -> the simplex around each: cell v n, coordinates / v of its vertex of remainder 0; rank v n, the order in
# which axes fall on the way along its vertices, the last first; weight n v of its vertices of remainder 0, 1, ...
def _simplices(points):
    v, axis = len(points) + 1, torch.arange(1, len(points) + 1, dtype=points.dtype, device=points.device)[:, None]
    # Turned into the plane of sum 0; scaled so that splat, blur and slice together have the variance 1, and by 1 / v.
    points = points * (2 / 3 / (axis * (axis + 1))).sqrt()
    above = points.flip(0).cumsum(0).flip(0)
    position = F.pad(above, (0, 0, 0, 1)) - F.pad(points * axis, (0, 0, 1, 0))
    cell = position.round()
    rest = position - cell
    rank = torch.arange(v, dtype=torch.int8, device=points.device)[:, None].repeat(1, points.shape[1])
    for i in range(v):  # how many others have a larger rest; of equal ones the first is the larger
        larger = (rest[i + 1 :] > rest[i]).to(torch.int8)
        rank[i] += larger.sum(0, dtype=torch.int8)
        rank[i + 1 :] -= larger
    rank += cell.sum(0).round().to(torch.int8)  # the sum becomes 0 where rounding did most
    wrap = (rank < 0).to(torch.int8) - (rank >= v).to(torch.int8)
    rank = (rank + v * wrap).long()
    rest = torch.empty_like(rest).scatter_(0, rank, rest - wrap)  # from the largest to the least
    return cell + wrap, rank, torch.cat((1 + rest[-1:] - rest[:1], (rest[:-1] - rest[1:]).flip(0))).T


# cells (blocks of v n) -> radix d, by which the cell of any vertex or neighbour is one number; low v 1, the least cells
def _packing(cells):
    low = torch.stack([cell.amin(1) for cell in cells]).amin(0) - 2  # a vertex may be 1 below, its neighbour another 1
    spans = (torch.stack([cell.amax(1) for cell in cells]).amax(0) + 2 - low)[:-1].long().tolist()
    radix, v = [1], len(low)
    for span in spans[:0:-1]:
        radix.insert(0, radix[0] * span)
    count = v * radix[0] * spans[0]
    if count >= 2**62:
        raise ValueError(
            f"Expected points among fewer than 2^62 vertices of a lattice, got {v} x {' x '.join(map(str, spans))}; "
            "choose larger standard deviations."
        )
    dtype = torch.int32 if count < 2**30 else torch.int64  # 32 bits are sorted faster
    return torch.tensor(radix, dtype=dtype, device=low.device), low[:, None]


# cell, rank v n -> n v: the vertices of each point, of remainder 0, 1, ..., each as v * (cell packed) + remainder
def _keys(cell, rank, radix):
    v, cell = len(cell), cell[:-1].to(radix.dtype) * radix[:, None]
    first = v * cell.sum(0, keepdim=True, dtype=radix.dtype)
    # From vertex to vertex all coordinates rise by 1, and that of one axis falls by v: its remainder rises, too.
    fall = F.pad(radix, (0, 1))[:, None].expand(-1, rank.shape[1])
    fall = torch.empty_like(rank, dtype=radix.dtype).scatter_(0, rank, fall)[1:].flip(0)
    return torch.cat((first, 1 - v * fall)).cumsum(0, dtype=radix.dtype).T


# keys m in order -> for each axis: index m 3 of a vertex and its two neighbours, share m 3 (1, and 1/2 if they exist)
def _neighbours(keys, radix):
    v, itself = len(radix) + 1, torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    # To a neighbour all coordinates fall by 1 and that of the axis rises by v - 1; from it, the other way round.
    fall = torch.where(keys % v == 0, v * (1 - radix.sum(dtype=radix.dtype)), 0) - 1  # of remainder 0 cells fall, too
    for step in F.pad(v * radix, (0, 1)):
        wanted = keys + (step + fall)
        at = torch.searchsorted(keys, wanted, out_int32=True).clamp_max(len(keys) - 1)
        there = keys[at] == wanted
        here, there = itself[there], at[there]
        index = itself[:, None].repeat(1, 3)
        index[here, 1], index[there, 2] = there, here
        share = torch.tensor([1.0, 0.0, 0.0], device=keys.device).repeat(len(keys), 1)
        share[here, 1] = share[there, 2] = 0.5
        yield index, share
