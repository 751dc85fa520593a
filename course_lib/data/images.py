"""Image files read with care: what is broken, huge or oddly coded is named in a sentence, never passed on."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

MAX_PIXELS = 64_000_000  # the largest ILSVRC photograph has 49 million; a "zip bomb" claims billions in a few kilobytes


class BrokenFile(ValueError):
    """A file of a data set is not what its layout promises; the message names the file and what to do."""


def load(path: str | Path) -> UInt8[Tensor, "3 h w"]:
    """One photograph as RGB, 0..255, whatever its coding: greyscale, palette, CMYK, 16-bit; transparency is dropped.

    Raises:
        FileNotFoundError: nothing is there.
        BrokenFile: not an image, truncated, or larger than 64 million pixels (refused before it is decoded).
    """
    return torch.from_numpy(np.array(open_image(path, "RGB"))).permute(2, 0, 1)


def load_grey(path: str | Path, mode: str = "L") -> UInt8[Tensor, "h w"]:
    """One mask or map: grey values, or with mode "P" indices; errors as of `load`."""
    return torch.from_numpy(np.array(open_image(path, mode)))


def open_image(path: str | Path, mode: str) -> Image.Image:
    """The decoded picture in PIL mode "RGB", "RGBA", "L", or "P": the indices of a palette, never colours.

    Errors are those of `load`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"The image {path} is missing.")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenFile(
                    f"{path} claims {width} x {height} pixels; at most {MAX_PIXELS:,} are read. "
                    "Is it really one of the data set's photographs?"
                )
            image.load()
            if mode == "P" and image.mode not in ("P", "L"):
                raise BrokenFile(
                    f"{path} should hold indices, 8 bits a pixel, but it is of mode {image.mode}: colours cannot be "
                    "turned back. Was it saved again by another program?"
                )
            if image.mode.startswith("I"):  # 16 bits: PIL would clip them at 255, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenFile(
            f"{path} cannot be decoded ({error}). It is truncated or not an image: delete it and fetch it again."
        ) from error
