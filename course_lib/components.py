"""Connected regions of 8-bit heatmaps at all 256 levels at once, and their boxes.

The WSOL benchmark (Choe et al., CVPR 2020) thresholds every heatmap a thousand times and traces contours in each copy. The
regions of {level > l} for every l follow from three small things instead:

    basin    every pixel climbs to its highest neighbour; the pixels that end on one maximum are its basin
    saddle   two neighbouring basins are in one region of {level > l} as soon as two touching pixels are both above l
    tree     flooding from the top, each basin ends at its saddle with a higher one; at level l, cut all saddles <= l

What is asked of a region (extent, area) is collected once per basin and level, accumulated from the top level down, and
then over the basins of a branch. The tree has one node per maximum: tens in a heatmap, thousands in noise.

Holes are the same thing upside down: regions of the dark side, rooted in a frame around the image.

Foreground is 8-connected, holes are 4-connected. The area of a region is that of the polygon over its outermost pixels,
holes included, as a contour tracer measures it: a 2x2 cell counts 1 if all four pixels belong to the region, 1/2 for three
of them, otherwise 0. Boxes are (x0, y0, x1, y1) with x1 and y1 one past the last pixel, except that they stop on the border.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor

INDEX_BITS = 23                         # a pixel's sort key is level * 2^23 + index: ties have an order, int32 holds it
INDEX = 2**INDEX_BITS - 1


class Tree(NamedTuple):
    """Which basin of a framed image ends in which. The last one, the highest, is the root and its own parent."""

    node: Int[Tensor, " pixels"]        # basin * 256 + level of every pixel, in reading order
    parent: Int[Tensor, " basins"]
    saddle: Int[Tensor, " basins"]      # it is in one region with its parent at all levels l < saddle; 255 at the root


class Regions(NamedTuple):
    """All regions of {level > l}, l = 0..254. A region stands in the row of one of its basins; other rows are empty."""

    group: Int[Tensor, "basins 255"]    # row in which the region of this basin stands
    first: Int[Tensor, "basins 255"]    # first pixel in reading order
    last: Int[Tensor, "basins 255"]     # last pixel in reading order; -1 where no region stands
    left: Int[Tensor, "basins 255"]     # column of the leftmost pixel
    right: Int[Tensor, "basins 255"]    # column of the rightmost pixel


def largest_boxes(levels: UInt8[Tensor, "n H W"]) -> Int[Tensor, "n 256 4"]:
    """Box of the largest region of {levels > l}, for every level l; zeros where nothing is above l.

    Largest is by contour area. Of equal areas the region wins whose first pixel comes last in reading order: it is the one
    that OpenCV lists first.

    Args:
        levels: 8-bit heatmaps, such as `(heatmap * 255).to(torch.uint8)`.
    """
    boxes = levels.new_zeros(len(levels), 256, 4, dtype=torch.long)
    for image, level in enumerate(_framed(levels)):
        filled, _ = _fill_holes(level)
        tree = _tree(filled)
        boxes[image, :255] = _largest(filled, tree, _regions(tree, filled.shape))
    return boxes


def contour_boxes(
    levels: UInt8[Tensor, "n H W"],
) -> tuple[Int[Tensor, "n 256 4"], Int[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, "rows 4"]]:
    """Boxes of the largest region as in `largest_boxes`; then image, level and box of every contour of {levels > l}.

    Every contour means the outer one of each region and the one of each hole. A hole's contour runs over the pixels around
    the hole, so its box is the hole's, grown by one pixel on each side.
    """
    largest = levels.new_zeros(len(levels), 256, 4, dtype=torch.long)
    rows = [(levels.new_zeros(0, dtype=torch.long),) * 2 + (levels.new_zeros(0, 4, dtype=torch.long),)]
    for image, level in enumerate(_framed(levels)):
        tree = _tree(level)
        regions = _regions(tree, level.shape)
        basin, above = (regions.last >= 0).nonzero(as_tuple=True)
        rows.append((torch.full_like(above, image), above, _boxes(regions, basin, above, level.shape)))

        filled, dark_tree = _fill_holes(level)
        if torch.equal(filled, level):
            largest[image, :255] = _largest(level, tree, regions)
            continue
        filled_tree = _tree(filled)
        largest[image, :255] = _largest(filled, filled_tree, _regions(filled_tree, level.shape))
        holes = _regions(dark_tree, level.shape)
        outside = holes.group[-1] == torch.arange(len(holes.group), device=level.device)[:, None]
        basin, above = ((holes.last >= 0) & ~outside).nonzero(as_tuple=True)
        rows.append((torch.full_like(above, image), 254 - above, _boxes(holes, basin, above, level.shape, grow=1)))
    return largest, *(torch.cat(column) for column in zip(*rows))


def _framed(levels: UInt8[Tensor, "n H W"]) -> Int[Tensor, "n framed_H framed_W"]:
    """Levels inside a frame of zeros: no border cases, and steps through the flat image that wrap stay in the frame."""
    height, width = levels.shape[1:]
    if not (height and width and (height + 2) * (width + 2) <= INDEX):
        raise ValueError(f"Heatmaps of 1 x 1 to 2894 x 2894 pixels were expected, but {height} x {width} came. "
                         "Compute the boxes at another size and scale them.")
    return F.pad(levels.int(), (1, 1, 1, 1))


def _tree(level: Int[Tensor, "H W"], dark: bool = False) -> Tree:
    """Basins and saddles of one framed image: 8-connected, or, if dark, 4-connected with the frame as the last basin."""
    width, device = level.shape[1], level.device
    pixel = torch.arange(level.numel(), device=device)
    key = (level << INDEX_BITS) + pixel.int().view_as(level)
    if dark:
        key[0] = key[-1] = key[:, 0] = key[:, -1] = key[-1, -1].clone()
    key, level = key.flatten(), level.flatten()
    row = _highest(key, 1)
    top = torch.maximum(row, _highest(key, width)) if dark else _highest(row, width)
    peak = _follow((top & INDEX).long())                                  # of every pixel
    peaks = (peak == pixel).nonzero().squeeze(1)
    peaks = peaks[key[peaks].argsort()]                                   # a higher basin has a higher number
    basin = torch.empty_like(peak).index_copy_(0, peaks, torch.arange(len(peaks), device=device)).index_select(0, peak)

    edges = []
    for step in (1, width) if dark else (1, width, width + 1, width - 1):
        one = (basin[step:] != basin[:-step]).nonzero().squeeze(1)
        other = one + step
        a, b = basin.index_select(0, one), basin.index_select(0, other)
        saddle = torch.minimum(level.index_select(0, one), level.index_select(0, other))
        edges.append(((torch.minimum(a, b) * len(peaks) + torch.maximum(a, b)) << 8) + saddle)
    parent, saddle = (torch.from_numpy(part).to(device) for part in _merge(torch.cat(edges).cpu().numpy(), len(peaks)))

    # Quantisation cuts slopes into terraces, and every corner of a terrace is a maximum: nine basins of ten in a heatmap.
    # They never are regions of their own, since they can be left without a descent.
    real = saddle != level[peaks]
    real[-1] = True
    onto = _follow(torch.where(real, torch.arange(len(peaks), device=device), parent))
    number = (real.cumsum(0) - 1).index_select(0, onto)
    return Tree(number.index_select(0, basin) * 256 + level, number[parent[real]], saddle[real])


def _merge(edges: np.ndarray, basins: int) -> tuple[np.ndarray, np.ndarray]:
    """Parent and saddle of every basin: flooding from the top, a basin ends in the first higher one that it meets.

    Edges are (lower basin * basins + higher basin) * 256 + saddle. On the CPU: there are a few hundred pairs of basins.
    """
    edges = np.sort(edges)
    edges = edges[np.append(edges[1:] >> 8 != edges[:-1] >> 8, True)[: len(edges)]]       # the highest saddle of each pair
    edges = edges[np.argsort(-(edges & 255), kind="stable")]
    parent, root, passes = list(range(basins)), list(range(basins)), [255] * basins
    for one, other, saddle in zip(*(part.tolist() for part in (*np.divmod(edges >> 8, basins), edges & 255))):
        while root[one] != one:
            root[one] = one = root[root[one]]
        while root[other] != other:
            root[other] = other = root[root[other]]
        if one != other:
            one, other = min(one, other), max(one, other)
            root[one] = parent[one] = other
            passes[one] = saddle
    return np.array(parent), np.array(passes)


def _highest(key: Int[Tensor, " pixels"], step: int) -> Int[Tensor, " pixels"]:
    """Maximum of every pixel and the two that lie one step before and after it."""
    highest = key.clone()
    torch.maximum(highest[step:], key[:-step], out=highest[step:])
    torch.maximum(highest[:-step], key[step:], out=highest[:-step])
    return highest


def _follow(pointer: Int[Tensor, "n *rest"]) -> Int[Tensor, "n *rest"]:
    """Where the chains of pointers along the first dimension end."""
    while not torch.equal(further := pointer.gather(0, pointer), pointer):
        pointer = further
    return pointer


def _fill_holes(level: Int[Tensor, "H W"]) -> tuple[Int[Tensor, "H W"], Tree]:
    """The framed image with the holes of all levels filled, and the tree of its dark side.

    A pixel is filled up to the lowest level at which it can be left: the highest pixel on the best 4-connected way out.
    """
    dark = 255 - level
    tree = _tree(dark, dark=True)
    hop, way = tree.parent, tree.saddle
    while (hop != len(hop) - 1).any():
        way, hop = torch.minimum(way, way.index_select(0, hop)), hop.index_select(0, hop)
    return 255 - torch.minimum(dark, way.int().index_select(0, tree.node >> 8).view_as(dark)), tree


def _regions(tree: Tree, shape: tuple[int, int]) -> Regions:
    """Extent of all regions of one framed image."""
    device, basins, (height, width) = tree.node.device, len(tree.parent), shape
    basin = torch.arange(basins, device=device)[:, None]
    joined = tree.saddle[:, None] > torch.arange(255, device=device)
    group = _follow(torch.where(joined, tree.parent[:, None], basin))     # basins 255
    pixel = torch.arange(height * width, device=device)
    column = torch.arange(width, device=device).repeat(height)

    def highest(value):
        table = torch.full((basins * 256,), -INDEX, device=device).scatter_reduce_(0, tree.node, value, "amax")
        table = table.view(basins, 256).flip(1).cummax(1).values.flip(1)[:, 1:]       # pixels of level l + 1 and more
        return torch.full_like(table, -INDEX).scatter_reduce_(0, group, table, "amax")

    return Regions(group, -highest(-pixel), highest(pixel), -highest(-column), highest(column))


def _boxes(
    regions: Regions, basin: Int[Tensor, " rows"], above: Int[Tensor, " rows"], shape: tuple[int, int], grow: int = 0
) -> Int[Tensor, "rows 4"]:
    """Boxes of regions, from the coordinates of the framed image to those of the image."""
    height, width = shape
    x0, x1 = regions.left[basin, above] - 1, regions.right[basin, above] - 1
    y0, y1 = regions.first[basin, above] // width - 1, regions.last[basin, above] // width - 1
    return torch.stack((x0 - grow, y0 - grow,
                        (x1 + grow + 1).clamp(max=width - 3), (y1 + grow + 1).clamp(max=height - 3)), -1)


def _largest(level: Int[Tensor, "H W"], tree: Tree, regions: Regions) -> Int[Tensor, "255 4"]:
    """Box of the region of largest contour area at every level of a framed image without holes."""
    height, width = level.shape
    key = (level << INDEX_BITS).flatten() + torch.arange(level.numel(), dtype=torch.int32, device=level.device)
    a, b, c, d = key[: -width - 1], key[1:-width], key[width:-1], key[width + 1:]
    lowest = torch.minimum(torch.minimum(a, b), torch.minimum(c, d))
    second = torch.minimum(torch.maximum(torch.minimum(a, b), torch.minimum(c, d)),
                           torch.minimum(torch.maximum(a, b), torch.maximum(c, d)))
    # A cell is worth 1/2 as soon as its third pixel is there, and 1/2 more with the last one.
    node = tree.node.index_select(0, torch.cat((lowest, second)) & INDEX)
    half = torch.bincount(node, minlength=len(regions.group) * 256).view(-1, 256).flip(1).cumsum(1).flip(1)[:, 1:]
    area = torch.zeros_like(half).scatter_add_(0, regions.group, half)
    order = torch.where(regions.last >= 0, (area << INDEX_BITS) + regions.first, -1)
    best, basin = order.max(0)
    boxes = _boxes(regions, basin, torch.arange(255, device=level.device), (height, width))
    return torch.where(best[:, None] >= 0, boxes, 0)
