"""Connected regions of 8-bit heatmaps at all 256 levels at once, and their boxes.

The WSOL benchmark (Choe et al., CVPR 2020) thresholds every heatmap a thousand times and traces contours in each copy. The
regions of {level > l} for every l follow from four small things instead:

    run      every row is cut in its valleys; a run rises to its peak and falls again: above any level it is one piece
    basin    a run that touches a higher one at the level of its own peak is never alone: both belong to one basin
    saddle   two basins are in one region of {level > l} as soon as two touching pixels are both above l
    tree     flooding from the top, each basin ends at its saddle with a higher one; at level l, cut all saddles <= l

What is asked of a region (extent, area) is collected once per basin and level, accumulated from the top level down, and
then over the basins of a branch. A heatmap of 50 000 pixels has a thousand runs and ten basins; noise has thousands.

Holes are the same thing upside down: regions of the dark side, except the one that contains the frame around the image.

Foreground is 8-connected, holes are 4-connected. The area of a region is that of the polygon over its outermost pixels,
holes included, as a contour tracer measures it: a 2x2 cell counts 1 if all four pixels belong to the region, 1/2 for three
of them, otherwise 0. Boxes are (x0, y0, x1, y1) with x1 and y1 one past the last pixel, except that they stop on the border.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int, Int32, UInt8
from torch import Tensor

PIXELS = 2**23  # basin * 256 + level is an int32, area * PIXELS + index is exact in a double


class Tree(NamedTuple):
    """Which basin of a framed image ends in which. The last one, the highest, is the root and its own parent."""

    basin: Int32[np.ndarray, " pixels"]  # of every pixel, in reading order
    peak: Int[np.ndarray, " runs"]  # highest pixel of every run
    parent: Int[np.ndarray, " basins"]
    saddle: Int[np.ndarray, " basins"]  # it is in one region with its parent at all levels l < saddle; 0 at the root
    top: Int[np.ndarray, " basins"]  # level of its highest pixel


class Regions(NamedTuple):
    """All regions of {level > l}, l = 0..254: one for every basin and level between its saddle and its top."""

    basin: Int[np.ndarray, " regions"]
    above: Int[np.ndarray, " regions"]  # the level l
    offset: Int[np.ndarray, " basins"]  # the region of a basin at level l is number offset + l
    first: Int[np.ndarray, " regions"]  # peak of the first of its runs in reading order: a pixel of its topmost row
    box: Int[np.ndarray, "regions 4"]  # as a contour has it, in the coordinates of the image


def largest_boxes(levels: UInt8[Tensor, "n H W"]) -> Int[Tensor, "n 256 4"]:
    """Box of the largest region of {levels > l}, for every level l; zeros where nothing is above l.

    Largest is by contour area. Of equal areas the region wins whose first pixel comes last in reading order: it is the one
    that OpenCV lists first.

    Args:
        levels: 8-bit heatmaps, such as `(heatmap * 255).to(torch.uint8)`.
    """
    return contour_boxes(levels)[0]


def contour_boxes(
    levels: UInt8[Tensor, "n H W"],
) -> tuple[Int[Tensor, "n 256 4"], Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, "rows 4"]]:
    """Boxes of the largest region as in `largest_boxes`; then image, level and box of every contour of {levels > l}.

    Every contour means the outer one of each region and the one of each hole. A hole's contour runs over the pixels around
    the hole, so its box is the hole's, grown by one pixel on each side. The work is done on the CPU, wherever levels are:
    it is a few hundred small steps for each image, which would keep a GPU waiting.
    """
    images, height, width = levels.shape
    if not (height and width and (height + 2) * (width + 2) < PIXELS):
        raise ValueError(
            f"Heatmaps of 1 x 1 to 2894 x 2894 pixels were expected, but {height} x {width} came. "
            "Compute the boxes at another size and scale them."
        )
    largest = np.zeros((images, 256, 4), int)
    rows = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4), int))]
    for image, level in enumerate(np.pad(levels.cpu().numpy(), ((0, 0), (1, 1), (1, 1)))):
        regions, area, holes = _contours(level)
        # A contour inside another one is smaller: it never wins.
        order = area * PIXELS + regions.first
        best = np.full(255, -1.0)
        np.maximum.at(best, regions.above, order)
        best = (order == best[regions.above]).nonzero()[0]
        largest[image, regions.above[best]] = regions.box[best]
        for above, box in (regions.above, regions.box), (254 - holes.above, holes.box):
            rows.append((np.full_like(above, image), above, box))
    columns = (np.concatenate(column) for column in zip(*rows))
    return tuple(torch.from_numpy(part).to(levels.device) for part in (largest, *columns))


def _contours(level: UInt8[np.ndarray, "H W"]) -> tuple[Regions, Float64[np.ndarray, " regions"], Regions]:
    """Regions of one framed image, their contour areas in half cells, and its holes as regions of the dark image."""
    width, dark = level.shape[1], 255 - level
    rows, columns = _turns(level.ravel()), _turns(level.T.ravel())
    tree = _tree(level, rows, diagonal=True)
    regions = _regions(tree, level, columns, len(tree.parent))
    a, b, c, d = (level.ravel()[step : level.size - width - 1 + step] for step in (0, 1, width, width + 1))
    low, other = np.minimum(a, d), np.minimum(b, c)
    lowest = np.minimum(low, other)
    second = np.minimum(np.maximum(low, other), np.minimum(np.maximum(a, d), np.maximum(b, c)))
    half = _half_cells(tree, level, lowest, second, diagonal=True)
    area = _collect(tree, half, np.add)[0, regions.basin, regions.above].astype(float)

    # What rises in the light falls in the dark, except that a run has to begin and to end in the frame, its highest place.
    rows, columns = np.append(0, rows[:-1]), np.append(0, columns[:-1])
    dark_tree = _tree(dark, rows, diagonal=False)
    outside = len(dark_tree.parent) - 1
    holes = _regions(dark_tree, dark, columns, outside, grow=1)
    if outside == 0:
        return regions, area, holes

    top, end = holes.box[:, 1].min() + 1, holes.box[:, 3].max() + 2  # rows of the framed image that matter
    cells = slice(top * width, (end - 1) * width - 1)
    half = _half_cells(
        dark_tree._replace(basin=dark_tree.basin[top * width : end * width]),
        dark[top:end],
        255 - lowest[cells],
        255 - second[cells],
        diagonal=False,
    )
    own = _collect(dark_tree, half, np.add)[0, holes.basin, holes.above]
    # The pixel above the topmost row of a hole is of the region around it; above a region lies the hole that it is in.
    around = _owner(tree, tree.basin[holes.first - width], 254 - holes.above)
    around = regions.offset[around] + 254 - holes.above
    hole = _owner(dark_tree, dark_tree.basin[regions.first - width], 254 - regions.above)
    inside = (hole != outside).nonzero()[0]
    hole = holes.offset[hole[inside]] + 254 - regions.above[inside]

    def fill(area_of_islands):
        return area + np.bincount(around, own + np.bincount(hole, area_of_islands[inside], len(own)), len(area))

    filled = fill(area)
    while not np.array_equal(filled, further := fill(filled)):  # islands in holes of islands
        filled = further
    return regions, filled, holes


def _turns(flat: UInt8[np.ndarray, " pixels"]) -> Int[np.ndarray, " turns"]:
    """Peak, valley, peak, ..., peak of the rows of a framed image, one after another: the frame is its lowest place."""
    rises = np.ones(len(flat) + 1, bool)  # into every pixel from the one before it
    rises[-1] = False
    np.greater_equal(flat[1:], flat[:-1], out=rises[1:-1])
    # Quantisation makes terraces. Either way is right on one; if the slope goes on, there are three times fewer runs.
    rises[2:-2] &= (flat[2:-1] != flat[1:-2]) | (flat[3:] >= flat[:-3])
    return (rises[1:] != rises[:-1]).nonzero()[0]


def _tree(level: UInt8[np.ndarray, "H W"], turns: Int[np.ndarray, " turns"], diagonal: bool) -> Tree:
    """Basins and saddles of one framed image: 8-connected if diagonal, or 4-connected."""
    width, flat, peak = level.shape[1], level.ravel(), turns[::2]
    start = np.concatenate(([0], turns[1::2], [flat.size]))
    start, length = start[:-1], start[1:] - start[:-1]
    rank = flat[peak].argsort(kind="stable")  # a higher run has a higher number
    number = np.empty(len(rank), np.int32)
    number[rank] = np.arange(len(rank))
    run, top = np.repeat(number, length), flat[peak[rank]]

    # Pairs of touching runs: in a row, below one another, and diagonally where no way around is as high.
    meet = np.sort(np.concatenate((start[start < flat.size - width], start[start >= width] - width)), kind="stable")
    pairs = [
        (start[1:] - 1, start[1:], flat[start[1:]]),
        (meet, meet + width, np.maximum.reduceat(np.minimum(flat[:-width], flat[width:]), meet)),
    ]
    if diagonal:
        _, one, other = _crossings(flat, width)
        pairs.append((one, other, np.minimum(flat[one], flat[other])))
    one, other, saddle = (np.concatenate(part) for part in zip(*pairs))
    one, other = run[one], run[other]

    basin = itself = np.arange(len(top))
    while True:
        lower, higher = np.minimum(one, other), np.maximum(one, other)
        joined = (saddle == top[lower]).nonzero()[0]
        if len(joined) == 0:
            break
        onto = itself.copy()
        onto[lower[joined]] = higher[joined]
        while ((further := onto[onto]) != onto).any():
            onto = further
        basin, one, other = onto[basin], onto[one], onto[other]
        apart = (one != other).nonzero()[0]
        one, other, saddle = one[apart], other[apart], saddle[apart]
    real = basin == itself
    new = real.cumsum() - 1
    parent, saddle = _merge(new[lower], new[higher], saddle, int(new[-1]) + 1)
    return Tree(np.repeat(new[basin[number]].astype(np.int32), length), peak, parent, saddle, top[real].astype(int))


def _crossings(
    flat: UInt8[np.ndarray, " pixels"], step: int
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Diagonal neighbours that are both higher than the other two pixels of their cell: the cell's first pixel, the two."""
    a, b, c, d = flat[: -step - 1], flat[1:-step], flat[step:-1], flat[step + 1 :]
    falling = (np.minimum(a, d) > np.maximum(b, c)).nonzero()[0]
    rising = (np.minimum(b, c) > np.maximum(a, d)).nonzero()[0]
    return (
        np.concatenate((falling, rising)),
        np.concatenate((falling, rising + 1)),
        np.concatenate((falling + step + 1, rising + step)),
    )


def _merge(
    lower: Int[np.ndarray, " pairs"],
    higher: Int[np.ndarray, " pairs"],
    saddle: UInt8[np.ndarray, " pairs"],
    basins: int,
) -> tuple[Int[np.ndarray, " basins"], Int[np.ndarray, " basins"]]:
    """Parent and saddle of every basin: flooding from the top, a basin ends in the first higher one that it meets."""
    pairs = np.sort(((lower * basins + higher) << 8) + saddle)
    pairs = pairs[np.append(pairs[1:] >> 8 != pairs[:-1] >> 8, True)[: len(pairs)]]  # the highest saddle of each pair
    pairs = pairs[np.argsort(-(pairs & 255), kind="stable")]
    parent, root, passes = list(range(basins)), list(range(basins)), [0] * basins
    for one, other, saddle in zip(*(part.tolist() for part in (*np.divmod(pairs >> 8, basins), pairs & 255))):
        while root[one] != one:
            root[one] = one = root[root[one]]
        while root[other] != other:
            root[other] = other = root[root[other]]
        if one != other:
            one, other = min(one, other), max(one, other)
            root[one] = parent[one] = other
            passes[one] = saddle
    return np.array(parent), np.array(passes)


def _regions(
    tree: Tree, level: UInt8[np.ndarray, "H W"], columns: Int[np.ndarray, " turns"], basins: int, grow: int = 0
) -> Regions:
    """The regions of the first `basins` basins of a framed image, with boxes grown by some pixels."""
    saddle, count = tree.saddle[:basins], (tree.top - tree.saddle)[:basins]
    end = count.cumsum()
    offset = end - count - saddle
    basin = np.repeat(np.arange(basins), count)
    above = np.arange(len(basin)) - offset[basin]

    # Where anything is left of a run, its peak is: peaks of rows tell first and last row, peaks of columns the columns.
    (height, width), peak = level.shape, columns[::2]
    table = np.full((4, 256 * len(tree.parent)), -PIXELS, np.int32)
    for lowest, highest, place, pixel in (
        (*table[:2], tree.peak, tree.peak),
        (*table[2:], peak, peak % height * width + peak // height),
    ):
        node = tree.basin[pixel] * 256 + level.ravel()[pixel]
        lowest[node[::-1]] = -place[::-1]  # where a node comes twice, the last one stays
        highest[node] = place
    first, last, left, right = _collect(tree, table, np.maximum)[:, basin, above]
    box = np.stack(
        (
            -left // height - 1 - grow,
            -first // width - 1 - grow,
            np.minimum(right // height + grow, width - 3),
            np.minimum(last // width + grow, height - 3),
        ),
        1,
    )
    return Regions(basin, above, offset, -first, box)


def _collect(tree: Tree, table: Int[np.ndarray, "kinds nodes"], add: np.ufunc) -> Int[np.ndarray, "kinds basins 255"]:
    """What is known of the pixels of every basin and level, for all regions of {level > l} by the basins that own them."""
    falling = table.reshape(len(table), -1, 256)[..., ::-1]
    table = add.accumulate(falling, 2, out=falling)[..., 254::-1]  # pixels of level l + 1 and more
    for basin, (onto, saddle) in enumerate(zip(tree.parent[:-1].tolist(), tree.saddle.tolist())):
        add(table[:, onto, :saddle], table[:, basin, :saddle], out=table[:, onto, :saddle])
    return table


def _owner(tree: Tree, basin: Int[np.ndarray, " rows"], above: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """The basin that owns the region of {level > above} which these basins are in."""
    while (joined := tree.saddle[basin] > above).any():
        basin = np.where(joined, tree.parent[basin], basin)
    return basin


def _half_cells(
    tree: Tree,
    level: UInt8[np.ndarray, "h W"],
    one: UInt8[np.ndarray, " cells"],
    more: UInt8[np.ndarray, " cells"],
    diagonal: bool,
) -> Int[np.ndarray, "1 nodes"]:
    """Table of cells that count for each basin and level: every 2x2 cell counts at level `one`, and again at `more`.

    A region gets a half with the third pixel of a cell and a half with the fourth. A hole, which is what its region gains
    when it is filled, gets them with the first pixel and the second.
    """
    flat, step, nodes = level.ravel(), level.shape[1], 256 * len(tree.parent)
    a, b, c, d = tree.basin[: -step - 1], tree.basin[1:-step], tree.basin[step:-1], tree.basin[step + 1 :]
    node = a * 256
    # A cell counts for the basin of its highest pixel: the others that are there touch it.
    mixed = ((a != b) | (a != c) | (a != d)).nonzero()[0]
    corner = np.array([0, 1, step, step + 1])
    node[mixed] = 256 * tree.basin[mixed + corner[flat[mixed + corner[:, None]].argmax(0)]]
    half = _count(node + one, nodes)
    if not diagonal:  # then the second may be another hole's
        cell, first, second = _crossings(flat, step)
        node[cell] = 256 * (tree.basin[first] + tree.basin[second]) - node[cell]
    return (half + _count(node + more, nodes))[None]


def _count(node: Int32[np.ndarray, " cells"], nodes: int) -> Int[np.ndarray, " nodes"]:
    return torch.bincount(torch.from_numpy(node), minlength=nodes).numpy()  # numpy's takes twice as long
