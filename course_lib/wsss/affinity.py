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
takes small tiles of the map, each with the border that its pixels can see, and multiplies them by their part of T.
"""

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


def widened(maps: Shaped[Tensor, "... h w"], radius: int, value: float) -> Shaped[Tensor, "... H W"]:
    """Maps with a border of one value on the left, the right and below, so that every pixel of theirs is a source."""
    reach = radius - 1
    return F.pad(maps, (reach, reach, 0, reach), value=value)


def filled(maps: Shaped[Tensor, "... h w"], multiple: int, value: float = 0.0) -> Shaped[Tensor, "... H W"]:
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
    count = gathered(pairs.sum()[None]).sum()
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
    b, c, h, w = maps.shape
    reach = radius - 1
    with torch.autocast(maps.device.type, enabled=False):  # fp32 island: many steps, each from the one before
        maps, affinity = at_least_float32(maps), at_least_float32(affinity)
        down, right = -h % TILE, -w % TILE
        tiles = _transitions(filled(_weights(affinity, radius, beta), TILE), radius)  # n S*S T*T
        rows, columns, side = (h + down) // TILE, (w + right) // TILE, TILE + 2 * reach
        state = F.pad(maps.to(tiles.dtype), (reach, right + reach, reach, down + reach))
        inner = state[..., reach : reach + h + down, reach : reach + w + right]
        for _ in range(steps):
            seen = state.unfold(2, side, TILE).unfold(3, side, TILE).permute(0, 2, 3, 1, 4, 5)  # b rows columns c S S
            moved = (seen.reshape(-1, c, side * side) @ tiles).view(b, rows, columns, c, TILE, TILE)
            inner.copy_(moved.permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * TILE, columns * TILE))
        return inner[..., :h, :w].clone()


def _weights(affinity, radius, beta):
    """T from all around a pixel, b 2o+1 h w: from itself, from `near_pixels`, and from those on the other side."""
    near, (b, count, h, w) = near_pixels(radius), affinity.shape
    weights = affinity.new_zeros(b, 2 * count + 1, h, w)
    weights[:, 0] = 1
    for number, (y, x) in enumerate(near):
        left, right = max(0, -x), w - max(0, x)  # sources whose neighbour lies on the grid
        strength = affinity[:, number, : h - y, left:right] ** beta
        weights[:, 1 + number, : h - y, left:right] = strength
        weights[:, 1 + count + number, y:, left + x : right + x] = strength
    return weights / weights.sum(1, keepdim=True)


def _transitions(weights, radius):
    """The parts of T that tiles need: from all pixels that they see (S*S) to their own (T*T), image by image."""
    b, count, h, w = weights.shape
    reach, side = radius - 1, TILE + 2 * (radius - 1)
    near = near_pixels(radius)
    own = torch.arange(TILE, device=weights.device)
    own = ((own[:, None] + reach) * side + own + reach).flatten()
    steps = torch.tensor([0, *(y * side + x for y, x in near), *(-y * side - x for y, x in near)])
    places = steps.to(weights.device)[:, None] + own  # 2o+1 T*T
    parts = weights.view(b, count, h // TILE, TILE, w // TILE, TILE).permute(0, 2, 4, 1, 3, 5)
    parts = parts.reshape(-1, count, TILE * TILE)
    return parts.new_zeros(len(parts), side * side, TILE * TILE).scatter_(1, places.expand(len(parts), -1, -1), parts)


def _check_walk(maps, affinity, radius):
    wanted = (len(maps), len(near_pixels(radius)), *maps.shape[2:])
    if affinity.shape != wanted:
        raise ValueError(
            f"Expected affinities of the shape {wanted} (images, neighbours within radius {radius}, rows, columns) "
            f"for these maps, got {tuple(affinity.shape)}; give every pixel its pairs, 0 where it has none."
        )
