"""Image files read with care: what is broken, huge or oddly coded is named in a sentence, never passed on.

Layouts promise JPEG and PNG, and nothing else is opened: other formats bring decoders along, PostScript even a program.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from course_lib.data.files import BrokenFile, existing

FORMATS = ("JPEG", "PNG")  # whatever the name of the file ends in: a photograph of ILSVRC is a PNG called .JPEG
MAX_PIXELS = 64_000_000  # the largest ILSVRC photograph has 49 million; a "zip bomb" claims billions in a few kilobytes
MARKS = {  # in the first 16 bytes of what phones and the web also call .jpg
    b"ftyphe": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypmsf1": "HEIC",
    b"ftypavi": "AVIF",
    b"WEBP": "WebP",
    b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript",
    b"%PDF": "PDF",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"<svg": "SVG",
}


def load(path: str | Path, upright: bool = False) -> UInt8[Tensor, "3 h w"]:
    """One photograph as RGB, 0..255, whatever its coding: greyscale, palette, CMYK, 16-bit; transparency is dropped.

    Args:
        path: a JPEG or PNG file.
        upright: turn the photograph as its EXIF orientation says: right for a photograph of your own, which a phone
            stores as its sensor lay. Benchmarks ignore the orientation (False): their boxes and masks do.
    Raises:
        FileNotFoundError: nothing is there.
        BrokenFile: not a JPEG or PNG, truncated, or larger than 64 million pixels (refused before it is decoded).
    """
    return torch.from_numpy(np.array(open_image(path, "RGB", upright))).permute(2, 0, 1)


def load_grey(path: str | Path, mode: str = "L") -> UInt8[Tensor, "h w"]:
    """One mask or map: grey values, or with mode "P" indices; errors as of `load`."""
    return torch.from_numpy(np.array(open_image(path, mode)))


def open_image(path: str | Path, mode: str, upright: bool = False) -> Image.Image:
    """The decoded picture in PIL mode "RGB", "RGBA", "L", or "P": the indices of a palette, never colours.

    `upright` and errors are those of `load`.
    """
    path = existing(path, "is missing: expected an image there. Unpack the archive again.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
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
            if upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits: PIL would clip them at 255, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(mode)
    except BrokenFile:
        raise
    except Exception as error:  # broken bytes raise nearly anything
        with path.open("rb") as file:
            head = file.read(16)
        other = next((name for mark, name in MARKS.items() if mark in head), None)
        raise BrokenFile(
            f"{path} is {other}: expected JPEG or PNG, whatever the name ends in; convert it."
            if other
            else f"{path} cannot be decoded ({error}). It is truncated or not an image: delete it and fetch it again."
        ) from None
