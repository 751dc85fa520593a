"""Affinities of near pixels, what teaches them, and the random walk along them: shared by PSA and IRN.

    T = W^beta D^-1,  D_jj = sum_i W_ij^beta        transition matrix: affinities to a power, columns that sum to 1
    y = x T^t                                       t steps of the walk, for each map x by itself
                        Ahn, Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
                        Supervised Semantic Segmentation", CVPR 2018 (PSA); Ahn, Cho, Kwak, "Weakly Supervised Learning
                        of Instance Segmentation with Inter-pixel Relations", CVPR 2019 (IRN)

    loss = bg / 4 + fg / 4 + different / 2          means of -log a over pairs of background and of one class, and of
                                                    -log(1 - a) over pairs of two classes; the same in both methods

Pairs are pixels at a distance below the radius, each of them once: 34 at radius 5, 152 at radius 10. A pixel is the
source of a pair if it has all of these neighbours (released code): all but the last `reach` rows, and the first and
last `reach` columns. An affinity of images b, neighbours o and sources y x is a tensor b o y x.

The released code squares T, all pixels by all pixels, log2 t times. T is nearly empty, and here it never exists: a step
takes small tiles of the map, each with the border that its pixels can see, and multiplies them by their part of T. Nor
are all steps taken. D^-1/2 T D^1/2 = S is symmetric with eigenvalues in -1..1, where

    S^t = sum_k p_k C_k(S),  p_k = 2^(1-t) binomial(t, (t-k)/2), half of it for k = 0;  k = t, t-2, ...

with the Chebyshev polynomials C_k+1(S) = 2 S C_k(S) - C_k-1(S). The p_k are those of t coin tosses: beyond a few
sqrt(t) nothing is left of them, to the last digit. 256 steps take 84 products in float32, 128 in float64
(Sachdeva and Vishnoi, "Faster Algorithms via Approximation Theory", 2014).
"""

from math import comb

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from course_lib.evaluate.segmentation import IGNORE
from course_lib.processes import gathered, processes
from course_lib.prototypes import at_least_float32

EPSILON = 1e-5  # beside affinities in logarithms, and beside counts
TILE = 8  # side of a tile of the walk


def near_pixels(radius: int) -> tuple[tuple[int, int], ...]:
    """(down, right) from a pixel to each other pixel of its pairs: below it, or in its row on the right.

    Args:
        radius: distances are smaller than that, in pixels of the grid; 2 or more.
    """
    if radius < 2:
        raise ValueError(f"Expected a radius of at least 2, within which a pixel has neighbours, got {radius}.")
    near = range(1 - radius, radius)
    return tuple((y, x) for y in range(radius) for x in near if (y or x > 0) and y * y + x * x < radius * radius)


def fitting_radius(height: int, width: int, radius: int = 5) -> int:
    """The radius, or the largest one that leaves a pixel with all its neighbours on a grid so small (SEAM)."""
    return max(2, min(radius, (min(height, width) - 1) // 2))


def shifted(maps: Shaped[Tensor, "... h w"], by: tuple[int, int], radius: int) -> Shaped[Tensor, "... y x"]:
    """What stands (down, right) of each source: a view. (0, 0) shows the sources themselves.

    Raises:
        ValueError: a grid on which no pixel has all its neighbours.
    """
    reach, (down, right) = radius - 1, by
    height, width = maps.shape[-2] - reach, maps.shape[-1] - 2 * reach
    if min(height, width) < 1:
        raise ValueError(
            f"Expected a grid of at least {reach + 1} x {2 * reach + 1} pixels for pairs within a radius of {radius}, "
            f"got {maps.shape[-2]} x {maps.shape[-1]}; take a larger image or the radius of `fitting_radius`."
        )
    return maps[..., down : down + height, reach + right : reach + right + width]


def widened(maps: Shaped[Tensor, "... h w"], radius: int, value: float | int) -> Shaped[Tensor, "... H W"]:
    """Maps with a border of one value on the left, the right and below, so that every pixel of theirs is a source."""
    reach = radius - 1
    return F.pad(maps, (reach, reach, 0, reach), value=value)


def filled(maps: Shaped[Tensor, "... h w"], multiple: int, value: float | int = 0.0) -> Shaped[Tensor, "... H W"]:
    """Maps with one value on the right and below, up to sides that are multiples of a number."""
    return F.pad(maps, (0, -maps.shape[-1] % multiple, 0, -maps.shape[-2] % multiple), value=value)


def pair_kinds(labels: Int[Tensor, "b h w"], radius: int) -> Bool[Tensor, "3 b o y x"]:
    """Which pairs are both background (0), both of one other class, and of two classes; never with an ignored pixel.

    Args:
        labels: classes, background 0, and 255 for what is to be ignored.
    """
    labels = labels.to(torch.uint8)  # a byte for each pair is enough
    first = shifted(labels, (0, 0), radius)[:, None]
    second = torch.stack([shifted(labels, by, radius) for by in near_pixels(radius)], 1)
    known, same = (first < IGNORE) & (second < IGNORE), first == second
    return torch.stack((same & (first == 0), same & (first > 0) & known, ~same & known))


def pair_mean(values: Float[Tensor, "b o y x"], pairs: Bool[Tensor, "b o y x"]) -> Float[Tensor, ""]:
    """Mean over these pairs of the whole batch, 0 where there is none.

    The pairs of all processes are counted, so that the mean over processes is the mean of the whole batch.
    """
    count = gathered(pairs.sum()[None]).sum().to(values.dtype)
    return processes() * torch.where(pairs, values, 0.0).sum() / (count + EPSILON)


def pair_loss(affinity: Float[Tensor, "b o y x"], kinds: Bool[Tensor, "3 b o y x"]) -> dict[str, Float[Tensor, ""]]:
    """Cross-entropy of affinities, in three weighted terms: "background", "foreground" and "different".

    Args:
        affinity: of pairs, 0..1.
        kinds: of the same pairs, of `pair_kinds`.
    """
    if affinity.shape != kinds.shape[1:]:
        raise ValueError(
            f"Expected labels on the grid of the features, got affinities of {tuple(affinity.shape)} and labels of "
            f"{tuple(kinds.shape[1:])} pairs (images, neighbours, rows, columns); reduce the labels by the stride."
        )
    background, foreground, different = kinds
    with torch.autocast(affinity.device.type, enabled=False):  # fp32 island: logarithms
        affinity = at_least_float32(affinity)
        entropy = -torch.where(different, 1 + EPSILON - affinity, affinity + EPSILON).log()
        return {
            "background": pair_mean(entropy, background) / 4,
            "foreground": pair_mean(entropy, foreground) / 4,
            "different": pair_mean(entropy, different) / 2,
        }


@torch.no_grad()
def random_walk(
    maps: Float[Tensor, "b c h w"], affinity: Float[Tensor, "b o h w"], radius: int, beta: float, steps: int
) -> Float[Tensor, "b c h w"]:
    """Maps after a random walk, x T^t: each step gives a pixel the mean of its neighbours by their affinities to it.

    Equal to multiplying by the dense matrix: a pixel has affinity 1 to itself, and 0 to what is in no pair.

    Args:
        maps: any, such as scores of classes.
        affinity: of each pixel as a source and its `near_pixels(radius)`, 0..1; what leads out of the grid is not read.
        beta: power of the affinities; large ones leave only the strong.
        steps: t.
    """
    _check_walk(maps, affinity, radius)
    (c, h, w), reach = maps.shape[1:], radius - 1
    with torch.autocast(maps.device.type, enabled=False):  # fp32 island: many steps, each from the one before
        maps, affinity = at_least_float32(maps), at_least_float32(affinity)
        tiles, root = _transitions(affinity.to(maps.dtype), radius, beta)  # n S*S T*T, b 1 H W
        around = F.pad(filled(maps, TILE) * root, (reach,) * 4)
        state = around[..., reach : around.shape[2] - reach, reach : around.shape[3] - reach]  # what a step changes
        own, windows = _windows(state, TILE), _windows(around, TILE + 2 * reach)  # views: b rows columns c T T, ... S S
        seen, before, moved = (part.clone(memory_format=torch.contiguous_format) for part in (windows, own, own))
        first, *others = _chebyshev(steps, torch.finfo(tiles.dtype).eps)
        total = first * moved
        for order, share in enumerate(others):
            torch.bmm(seen.copy_(windows).view(-1, c, tiles.shape[1]), tiles, out=moved.view(-1, c, TILE**2))
            if order:
                moved.mul_(2).sub_(before)
            before.copy_(own)
            own.copy_(moved)
            total.add_(moved, alpha=share)
        own.copy_(total)
        return (state / root)[..., :h, :w]


def _windows(maps, side):
    """A view of windows of that side, one for each tile."""
    return maps.unfold(2, side, TILE).unfold(3, side, TILE).permute(0, 2, 3, 1, 4, 5)


def _chebyshev(steps, eps):
    """p_k for k = 0, 1, ... up to where the rest is smaller than eps."""
    shares = [2 * comb(steps, (steps - k) // 2) / 2**steps if (steps - k) % 2 == 0 else 0.0 for k in range(steps + 1)]
    shares[0] /= 2
    rest = 0.0
    while rest + shares[-1] < eps:
        rest += shares.pop()
    return shares


def _transitions(affinity, radius, beta):
    """The parts of S that tiles need, from all pixels that they see (S*S) to their own (T*T), and the root of D.

    Neighbour by neighbour, so that the parts are the only large thing in memory.
    """
    b, _, h, w = affinity.shape
    rows, columns, reach, side = -(-h // TILE), -(-w // TILE), radius - 1, TILE + 2 * (radius - 1)
    pairs = []  # both ends of the pairs of a neighbour that lie on the grid, and their affinities
    for (y, x), strength in zip(near_pixels(radius), affinity.unbind(1)):
        if y >= h or abs(x) >= w:
            continue
        left, right = max(0, -x), w - max(0, x)
        first, second = (slice(0, h - y), slice(left, right)), (slice(y, h), slice(left + x, right + x))
        pairs.append((y * side + x, (..., *first), (..., *second), strength[:, first[0], first[1]]))
    root = affinity.new_ones(b, rows * TILE, columns * TILE)  # affinity 1 to itself
    for _, first, second, strength in pairs:
        strength = strength**beta
        root[first] += strength
        root[second] += strength
    root = root.sqrt_()
    own = torch.arange(TILE, device=affinity.device)
    own = ((own[:, None] + reach) * side + own + reach).flatten()
    cells = own * TILE**2 + torch.arange(TILE**2, device=affinity.device)  # of a pixel to itself
    tiles = affinity.new_zeros(b * rows * columns, side**2 * TILE**2)
    tiles[:, cells] = _tiled(root**-2)
    layer = torch.zeros_like(root)
    for step, first, second, strength in pairs:
        strength = strength**beta / (root[first] * root[second])
        for target, way in ((first, step), (second, -step)):  # `way` leads to the source
            layer.zero_()
            layer[target] = strength
            tiles[:, cells + way * TILE**2] = _tiled(layer)
    return tiles.view(-1, side**2, TILE**2), root[:, None]


def _tiled(layer):
    """Pixels b H W by tiles, n T*T."""
    b, h, w = layer.shape
    return layer.view(b, h // TILE, TILE, w // TILE, TILE).transpose(2, 3).reshape(-1, TILE * TILE)


def _check_walk(maps, affinity, radius):
    wanted = (len(maps), len(near_pixels(radius)), *maps.shape[2:])
    if affinity.shape != wanted:
        raise ValueError(
            f"Expected affinities of the shape {wanted} (images, neighbours within radius {radius}, rows, columns) "
            f"for these maps, got {tuple(affinity.shape)}; give every pixel its pairs, 0 where it has none."
        )
