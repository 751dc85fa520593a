"""The second view of an image: the first one made smaller, and on request flipped, turned and shifted.

    view 2 = A(image)           what is learned from: maps of view 2 against A(maps of view 1), and so with embeddings
                        Wang et al., CVPR 2020 (SEAM); Du et al., CVPR 2022 (Table 7)

The released code of both knows the rescaling only. What papers leave open is decided here: half of the images are
flipped; an image is turned by any angle up to the largest, about its centre; it is shifted by the whole distance along
both axes, either way. Rescaling, turning and shifting are one bilinear sampling, corner on corner, so that one A fits
images, maps and embeddings on any grids; a flip moves pixels only.

What A brings in from outside the image has the mean colour in view 2, as the padding of a crop has. Networks look at
it, tags and min-pool count it. Where both views are compared it does not exist: maps of both are zero there before they
are scaled, which makes all differences zero (they count in the means, as classes without a tag do), and no term of
contrast has its pixels.
"""

from dataclasses import dataclass
from math import radians
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from course_lib.prototypes import at_least_float32
from course_lib.settings import check_settings
from course_lib.wsss import View

SIDE = 448  # of the view that translations are measured in, pixels


def resize(maps: Float[Tensor, "n c h w"], size: int | tuple[int, int]) -> Float[Tensor, "n c H W"]:
    """Maps on another grid, bilinear, corner on corner (align_corners), in float32 or more: SEAM's A.

    Args:
        size: side of a square, or (height, width).
    """
    size = _pair(size)
    maps = at_least_float32(maps)
    if maps.shape[2:] == size:
        return maps
    # A small matrix for each axis: with its backward twice as fast as F.interpolate, whose gradients no GPU repeats
    # exactly.
    rows, columns = (
        F.interpolate(
            torch.eye(old, dtype=maps.dtype, device=maps.device)[None], new, mode="linear", align_corners=True
        )[0]
        for old, new in zip(maps.shape[2:], size)
    )  # h H, w W
    with torch.autocast(maps.device.type, enabled=False):  # fp32 island: weights of neighbours
        return rows.T @ (maps @ columns)


class Warp(NamedTuple):
    """A of each of n images, drawn: what `resize` does to any maps of a square view, then rotation, shift and flip."""

    flip: Bool[Tensor, " n"]  # left to right
    rigid: Float[Tensor, "3 n"] | None = None  # angle (radians, clockwise), shift to the right, down (1: half a side)

    def __call__(self, maps: Float[Tensor, "n c h w"], size: int | tuple[int, int]) -> Float[Tensor, "n c H W"]:
        """Maps as the second view shows them, zero outside, in float32 or more.

        Args: as in `resize`. No GPU repeats gradients through a rotation or shift exactly (F.grid_sample).
        """
        if self.rigid is None:
            moved = resize(maps, size)
        else:
            maps = at_least_float32(maps)
            source = self._origins(*_pair(size))
            within = (source.abs() <= 1 + 1e-5).all(-1)[:, None]  # rounding must not lose the border
            with torch.autocast(maps.device.type, enabled=False):  # fp32 island: weights of neighbours
                moved = F.grid_sample(maps, source.to(maps.dtype), padding_mode="border", align_corners=True) * within
        return torch.where(self.flip[:, None, None, None], moved.flip(-1), moved)

    def inside(self, size: int | tuple[int, int]) -> Bool[Tensor, "n 1 H W"]:
        """Where the second view shows the image; elsewhere it shows the mean colour."""
        return self(torch.ones(len(self.flip), 1, 1, 1, device=self.flip.device), size) > 0.5

    def align(self, view1: View, view2: View) -> tuple[View, View]:
        """Both views in the place of the second and on its grid, with maps that are zero outside."""
        size = tuple(view2.cam.shape[2:])
        inside = self.inside(size)
        moved = View(*(None if maps is None else self(maps, size) for maps in view1))
        return moved, view2._replace(cam=view2.cam * inside, refined=view2.refined * inside)

    def _origins(self, height, width):  # n H W 2
        """Where each pixel comes from before the flip, (x, y) in -1..1 from corner to corner."""
        angle, right, down = self.rigid[..., None, None]  # n 1 1 each
        y, x = (torch.linspace(-1, 1, side, device=angle.device) for side in (height, width))
        y, x = y[:, None] - down, x - right  # n H 1, n 1 W
        return torch.stack((angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x), -1)


@dataclass(frozen=True)
class Transformation:
    """What is done to second views beside making them smaller. The values here: nothing."""

    flip: bool = False  # left to right, half of the images
    rotation: Annotated[float, (0, 180)] = 0.0  # degrees; the largest angle, either way
    translation: Annotated[float, (0, SIDE)] = 0.0  # pixels of 448; the distance along each axis, either way

    def __post_init__(self) -> None:
        check_settings(self)

    def draw(self, images: int, device: torch.device) -> Warp | None:
        """One A for each of so many images, by torch's generator; None if there is nothing but the rescaling."""
        if self == Transformation():
            return None
        chance, turn, *ways = torch.rand(4, images, device=device)
        rigid = None
        if self.rotation or self.translation:
            distance = 2 * self.translation / (SIDE - 1)
            rigid = torch.stack(
                (
                    radians(self.rotation) * (2 * turn - 1),
                    *(torch.where(way < 0.5, -distance, distance) for way in ways),
                )
            )
        return Warp(chance < 0.5 * self.flip, rigid)


def _pair(size):
    return (size, size) if isinstance(size, int) else tuple(size)
