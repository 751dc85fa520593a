"""Images of pedestrians on their way into a network: training views of the strong baseline, and images with parts painted over.

    resize to 256 x 128, flip, pad 10 (black) and crop, normalise, erase         Luo et al., CVPR Workshops 2019, section 3.2
    erasing: in half of the images, one rectangle of 2-40 % of the area          Zhong et al., AAAI 2020 ("Random Erasing")

Rectangles follow the baseline's released code: an aspect ratio (height over width) uniform in 0.3..3.33, at most 100 tries
until one is smaller than the image in both directions, filled with the pixel mean *after* normalisation: about half a standard
deviation brighter than the mean colour, which would be 0. torchvision's `v2.RandomErasing` draws the logarithm of the aspect
ratio uniformly and gives up after 10 tries, which no option changes; its defaults are an area of 2-33 % and a fill of 0. Workers
draw the rectangle, the device fills it, so that images travel as bytes.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from course_lib.data.market1501 import PARTS, Market1501

SIZE = (256, 128)  # height, width, pixels
PADDING = 10
PROBABILITY, AREA, ASPECT, TRIES = 0.5, (0.02, 0.4), (0.3, 1 / 0.3), 100  # of random erasing


class Pedestrians(Dataset):
    """Training views: (image, label), and the rectangle to erase if `erasing`.

    Random numbers come from torch's generator, which the engine seeds for each item.
    """

    def __init__(self, data: Market1501, erasing: bool, size: tuple[int, int] = SIZE):
        self.data, self.erasing, self.size = data, erasing, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[Tensor, "3 h w"], int] | tuple[UInt8[Tensor, "3 h w"], int, Int[Tensor, "4"]]:
        image, label = self.data[index]
        height, width = self.size
        image = transforms.resize(image, [height, width], antialias=True)
        flip, top, left = (int(torch.randint(n, ())) for n in (2, 2 * PADDING + 1, 2 * PADDING + 1))
        image = transforms.pad(image.flip(-1) if flip else image, [PADDING])
        image = image[:, top : top + height, left : left + width]
        return (image, label, random_rectangle(height, width)) if self.erasing else (image, label)


def random_rectangle(height: int, width: int) -> Int[Tensor, "4"]:
    """A rectangle to erase, x0 y0 x1 y1 with x1 and y1 one past its last pixel; in half of the calls an empty one, all zeros.

    Args:
        height, width: of the image, pixels. No rectangle reaches its full height or width.
    """
    share, aspect = (low + (high - low) * torch.rand(TRIES) for low, high in (AREA, ASPECT))
    h, w = (height * width * share * aspect).sqrt().round(), (height * width * share / aspect).sqrt().round()
    fits = ((h < height) & (w < width)).nonzero()[:, 0]
    if torch.rand(()) >= PROBABILITY or not len(fits):
        return torch.zeros(4, dtype=torch.long)
    h, w = int(h[fits[0]]), int(w[fits[0]])
    top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
    return torch.tensor([left, top, left + w, top + h])


def erase(
    images: Float[Tensor, "b c h w"], rectangles: Int[Tensor, "b 4"], fill: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Images with one rectangle each filled, x0 y0 x1 y1 as `random_rectangle` draws it; an empty one changes nothing."""
    height, width = images.shape[-2:]
    x0, y0, x1, y1 = rectangles[:, :, None, None].unbind(1)  # b 1 1
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)[:, None]
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)  # b h w
    return torch.where(inside[:, None], fill, images)


def occlude(image: UInt8[Tensor, "3 h w"], parts: UInt8[Tensor, "h w"], which: Sequence[str]) -> UInt8[Tensor, "3 h w"]:
    """The image with some parts painted over, in the mean colour of all that stays visible (so that nothing of them leaks).

    Args:
        parts: what each pixel shows, as position in PARTS.
        which: names of PARTS.
    """
    if unknown := [name for name in which if name not in PARTS]:
        raise ValueError(f"There is no part {unknown[0]!r}; there are: {', '.join(PARTS)}.")
    hidden = torch.isin(parts, torch.tensor([PARTS.index(name) for name in which], dtype=torch.uint8))
    colour = torch.where(hidden, 0.0, image.float()).sum((-2, -1)) / (~hidden).sum().clamp_min(1)
    return torch.where(hidden, colour.round().to(torch.uint8)[:, None, None], image)


class Occluded(Dataset):
    """Images of a data set that has part masks (the miniature), with parts painted over as by `occlude`."""

    def __init__(self, data: Market1501, which: Sequence[str]):
        self.data, self.which = data, which

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        image, label = self.data[index]
        return occlude(image, self.data.parts(index), self.which), label
