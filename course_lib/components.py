"""Connected regions of 8-bit heatmaps at all 256 levels at once, and their boxes.

The WSOL benchmark (Choe et al., CVPR 2020) thresholds every heatmap a thousand times and traces contours in each copy.
Here the regions of {level > l} for every l follow from four small things instead:

    run      every row is cut in its valleys; a run rises to its peak and falls again: above any level it is one piece
    basin    a run that touches a higher one at the level of its own peak is never alone: both belong to one basin
    saddle   two basins are in one region of {level > l} as soon as two touching pixels are both above l
    tree     flooding from the top, each basin ends at its saddle with a higher one; at level l, cut all saddles <= l

What is asked of a region (extent, area) is collected once per basin and level, accumulated from the top level down, and
then over the basins of a branch. A heatmap of 50 000 pixels has a thousand runs and ten basins; noise has thousands.

Holes are the same thing upside down: regions of the dark side, except the one that contains the frame around the image.

Foreground is 8-connected, holes are 4-connected. The area of a region is that of the polygon over its outermost pixels,
holes included, as a contour tracer measures it: a 2x2 cell counts 1 if all four pixels belong to the region, 1/2 for
three of them, otherwise 0. Boxes are (x0, y0, x1, y1) with x1 and y1 one past the last pixel, except that they stop on
the border.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

PIXELS = 2**23  # more than an image has: basin * 256 + level and level * PIXELS + basin are both an int32


class _Regions(NamedTuple):
    """All regions of {level > l}, l = 0..254: one for every basin and level l between its saddle and its top."""

    basin: np.ndarray  # of every pixel of the framed image, in reading order
    parent: np.ndarray  # of every basin; the last one, the highest, is the root and its own parent
    saddle: np.ndarray  # of every basin: it is in one region with its parent at all levels l < saddle; 0 at the root
    offset: np.ndarray  # of every basin: its region at level l is number offset + l
    above: np.ndarray  # of every region: the level l
    first: np.ndarray  # of every region: a pixel of its topmost row
    box: np.ndarray  # regions 4, as a contour has it, in the coordinates of the image
    half: np.ndarray  # of every region: half cells


def largest_boxes(levels: UInt8[Tensor, "n H W"]) -> Int[Tensor, "n 256 4"]:
    """Box of the largest region of {levels > l}, for every level l; zeros where nothing is above l.

    Largest is by contour area. Of equal areas the region wins whose first pixel comes last in reading order: it is the
    one that OpenCV lists first.

    Args:
        levels: 8-bit heatmaps, such as `(heatmap * 255).to(torch.uint8)`.
    """
    return contour_boxes(levels)[0]


def contour_boxes(
    levels: UInt8[Tensor, "n H W"],
) -> tuple[Int[Tensor, "n 256 4"], Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, "rows 4"]]:
    """Boxes of the largest region as in `largest_boxes`; then image, level and box of every contour of {levels > l}.

    Every contour means the outer one of each region and the one of each hole. A hole's contour runs over the pixels
    around the hole, so its box is the hole's, grown by one pixel on each side. The work is done on the CPU, wherever
    the levels are: it is a few hundred small steps for each image, which would keep a GPU waiting.
    """
    images, height, width = levels.shape
    if not (height and width and (height + 2) * (width + 2) < PIXELS):
        raise ValueError(
            f"Expected heatmaps of 1 x 1 to 2894 x 2894 pixels, got {height} x {width}; "
            "compute the boxes at another size and scale them."
        )
    largest = np.zeros((images, 256, 4), int)
    rows = [(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4), int))]
    for image, level in enumerate(np.pad(levels.cpu().numpy(), ((0, 0), (1, 1), (1, 1)))):
        regions, area, holes = _contours(level)
        order = np.argsort(area * PIXELS + regions.first)  # of those at one level, the last one stays
        largest[image, regions.above[order]] = regions.box[order]
        for above, box in (regions.above, regions.box), holes:
            rows.append((np.full_like(above, image), above, box))
    columns = (np.concatenate(column) for column in zip(*rows))
    return tuple(torch.from_numpy(part).to(levels.device) for part in (largest, *columns))


def _contours(level):
    """Regions of one framed image, their contour areas in half cells, and levels and boxes of its holes."""
    rows, columns = _turns(level.ravel()), _turns(level.T.ravel())
    light = _regions(level, rows, columns)
    # What rises in the light falls in the dark, except that a run has to begin and to end in the frame, its highest
    # place.
    dark = _regions(level, np.append(0, rows[:-1]), np.append(0, columns[:-1]), 255)
    # The pixel above the topmost row of a hole is of the region around it; above a region lies the hole that it is in.
    around = _owner(light, dark.first - level.shape[1], 254 - dark.above)
    hole = _owner(dark, light.first - level.shape[1], 254 - light.above)
    inside = (hole < len(around)).nonzero()[0]
    # A region inside another one counts for that, and never wins.
    outer = np.arange(len(hole))
    outer[inside] = around[hole[inside]]
    outer = _ends(outer)
    area = np.bincount(outer, light.half, len(outer)) + np.bincount(outer[around], dark.half, len(outer))
    return light, area, (254 - dark.above, dark.box)


def _turns(flat):
    """Peak, valley, peak, ..., peak of the rows of a framed image, one after another: the frame is its lowest place."""
    rises = np.concatenate(([True], flat[1:] >= flat[:-1], [False]))  # into every pixel from the one before it
    # Quantisation makes terraces. Either way is right on one; if the slope goes on, there are three times fewer runs.
    rises[2:-2] &= (flat[2:-1] != flat[1:-2]) | (flat[3:] >= flat[:-3])
    return np.diff(rises).nonzero()[0]


def _regions(light, rows, columns, dark=0):
    """The regions of a framed image, or of its dark side (dark = 255), which are its holes."""
    level = light ^ dark
    height, width = level.shape
    basin, parent, saddle, top = _tree(level, rows, diagonal=not dark)
    count = top - saddle
    if dark:
        count[-1] = 0  # the root is the outside
    offset = count.cumsum() - count - saddle
    owner = np.repeat(np.arange(len(count)), count)
    above = np.arange(len(owner)) - offset[owner]

    # Where anything is left of a run, its peak is: peaks of rows tell first and last row, peaks of columns the columns.
    table = np.full((4, 256 * len(parent)), -PIXELS, np.int32)
    rows, columns = rows[::2], columns[::2]
    for extent, place, pixel in (
        (table[:2], rows, rows),
        (table[2:], columns, columns % height * width + columns // height),
    ):
        node = basin[pixel] * 256 + level.ravel()[pixel]
        extent[0, node[::-1]] = -place[::-1]  # where a node comes twice, the last one stays
        extent[1, node] = place
    first, last, left, right = _collect(parent, saddle, table, np.maximum)[:, owner, above]
    edge = 2 if dark else 1  # the frame's; and the contour of a hole runs around it
    box = np.stack(
        (
            -left // height - edge,
            -first // width - edge,
            np.minimum(right // height + edge - 1, width - 3),
            np.minimum(last // width + edge - 1, height - 3),
        ),
        1,
    )

    # Other rows hold nothing of a region.
    rows = slice((box[:, 1].min(initial=height) + 1) * width, (box[:, 3].max(initial=0) + 2) * width)
    half = _half_cells(light.ravel()[rows], basin[rows], width, dark, table.shape[1])
    half = _collect(parent, saddle, half[None], np.add)[0, owner, above]
    return _Regions(basin, parent, saddle, offset, above, -first, box, half)


def _half_cells(light, basin, width, dark, nodes):
    """Number of half cells that each basin gets at each level, in some rows.

    A region gets a half with the third pixel of a cell, which is its second lowest, and a half with the fourth, its
    lowest. A hole, which is what its region gains when it is filled, gets them with its first pixel and its second:
    these are the same two.
    """
    pixel = light * np.int32(PIXELS)
    pixel += basin  # in the order of the levels
    low, high = np.minimum(pixel[:-1], pixel[1:]), np.maximum(pixel[:-1], pixel[1:])  # of neighbours in a row
    up, down = low[:-width], low[width:]
    second = np.minimum(np.maximum(up, down), np.minimum(high[:-width], high[width:]))
    node = np.concatenate((np.minimum(up, down), second))
    level = node >> 23 ^ dark
    node &= PIXELS - 1
    node <<= 8
    node += level
    return torch.bincount(torch.from_numpy(node), minlength=nodes).numpy()  # numpy's takes twice as long


def _tree(level, turns, diagonal):
    """Basins of a framed image, 8-connected if diagonal, else 4-connected.

    Returns:
        the basin of every pixel; then of every basin, from the lowest to the highest: parent, saddle, level of its top.
    """
    width, flat, peak = level.shape[1], level.ravel(), turns[::2]
    start = np.concatenate(([0], turns[1::2], [flat.size]))
    start, length = start[:-1], np.diff(start)
    rank = flat[peak].argsort(kind="stable")  # a higher run has a higher number
    number = np.empty(len(rank), np.int32)
    number[rank] = np.arange(len(rank))
    run, top = np.repeat(number, length), flat[peak[rank]]

    # Pairs of touching runs: in a row, below one another, and diagonally where no way around is as high.
    one, other = [start[1:] - 1], [start[1:]]
    if diagonal:
        a, b, c, d = flat[: -width - 1], flat[1:-width], flat[width:-1], flat[width + 1 :]
        falling = (np.minimum(a, d) > np.maximum(b, c)).nonzero()[0]
        rising = (np.minimum(b, c) > np.maximum(a, d)).nonzero()[0]
        one, other = [*one, falling, rising + 1], [*other, falling + width + 1, rising + width]
    one, other = np.concatenate(one), np.concatenate(other)
    meet = np.sort(np.concatenate((start[start < flat.size - width], start[start >= width] - width)), kind="stable")
    saddle = np.maximum.reduceat(np.minimum(flat[:-width], flat[width:]), meet)
    saddle = np.append(np.minimum(flat[one], flat[other]), saddle)
    one, other = run[np.append(one, meet)], run[np.append(other, meet + width)]

    basin = itself = np.arange(len(top))
    while True:
        lower, higher = np.minimum(one, other), np.maximum(one, other)
        joined = (saddle == top[lower]).nonzero()[0]
        if len(joined) == 0:
            break
        onto = itself.copy()
        onto[lower[joined]] = higher[joined]
        onto = _ends(onto)
        basin, one, other = onto[basin], onto[one], onto[other]
        apart = (one != other).nonzero()[0]
        one, other, saddle = one[apart], other[apart], saddle[apart]
    real = basin == itself
    new = real.cumsum() - 1
    top = top[real].astype(int)
    return (
        np.repeat(new[basin[number]].astype(np.int32), length),
        *_merge(new[lower], new[higher], saddle, len(top)),
        top,
    )


def _ends(onto):
    """Where each number ends that moves on to another one, until one stays."""
    while ((further := onto[onto]) != onto).any():
        onto = further
    return onto


def _merge(lower, higher, saddle, basins):
    """Parent and saddle of every basin: flooding from the top, a basin ends in the first higher one that it meets."""
    pairs = np.sort(((lower * basins + higher) << 8) + saddle)
    pairs = np.append(pairs[:-1][pairs[1:] >> 8 != pairs[:-1] >> 8], pairs[-1:])  # the highest saddle of each pair
    pairs = pairs[np.argsort(pairs & 255)[::-1]]
    parent, root, passes = list(range(basins)), list(range(basins)), [0] * basins
    for one, other, level in zip(*(part.tolist() for part in (*np.divmod(pairs >> 8, basins), pairs & 255))):
        while root[one] != root[other]:  # Rem's union-find: climb from the lower one, and shorten its path
            if root[one] > root[other]:
                one, other = other, one
            if root[one] == one:
                parent[one], passes[one] = root[other], level
            root[one], one = root[other], root[one]
    return np.array(parent), np.array(passes)


def _collect(parent, saddle, table, add):
    """What is known of the pixels of every basin and level, for all regions of {level > l} by basins that own them."""
    falling = table.reshape(len(table), -1, 256)[..., ::-1]
    table = add.accumulate(falling, 2, out=falling)[..., 254::-1]  # kinds basins 255: pixels of level > l
    for basin, (onto, below) in enumerate(zip(parent[:-1].tolist(), saddle.tolist())):
        rest = table[:, onto, :below]
        add(rest, table[:, basin, :below], out=rest)
    return table


def _owner(regions, pixel, above):
    """Numbers of the regions of {level > above} that these pixels are in."""
    basin = regions.basin[pixel]
    while (joined := regions.saddle[basin] > above).any():
        basin = np.where(joined, regions.parent[basin], basin)
    return regions.offset[basin] + above
