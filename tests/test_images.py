"""Image files of every odd kind are read as RGB or refused with a sentence."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.data.images import BrokenFile, load

GREY = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
COLOUR = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 90)], -1)


def save(tmp_path, array, name, mode=None, **options):
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_colour(tmp_path):
    image = load(save(tmp_path, COLOUR, "colour.png"))
    assert image.dtype == torch.uint8 and np.array_equal(image.permute(1, 2, 0), COLOUR)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    image = load(save(tmp_path, GREY, "grey.png"))
    assert image.shape == (3, 30, 40) and all(np.array_equal(channel, GREY) for channel in image)


def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path):
    image = load(save(tmp_path, GREY.astype(np.uint16) * 257, "deep.png"))
    assert np.array_equal(image[0], GREY)


def test_cmyk_jpeg(tmp_path):
    image = load(save(tmp_path, COLOUR, "print.jpg", mode="CMYK", quality=98))
    assert image.shape == (3, 30, 40) and np.abs(image.permute(1, 2, 0).numpy().astype(int) - COLOUR).mean() < 4


def test_palette_with_transparency(tmp_path):
    image = load(save(tmp_path, COLOUR, "palette.png", mode="P"))
    assert image.shape == (3, 30, 40)


def test_truncated_jpeg_is_named(tmp_path):
    path = save(tmp_path, np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8), "cut.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BrokenFile, match=r"cut.jpg cannot be decoded.*delete it and fetch it again"):
        load(path)


def test_text_is_not_an_image(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(BrokenFile, match=r"page.jpg cannot be decoded"):
        load(tmp_path / "page.jpg")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.jpg is missing"):
        load(tmp_path / "gone.jpg")


@pytest.mark.parametrize("side", [20_000, 200_000])
def test_zip_bomb_is_refused_before_decoding(tmp_path, side):
    """A few hundred bytes that claim 0.4 or 40 billion pixels; Pillow's own limit lies between the two."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(BrokenFile, match=r"bomb.png"):
        load(tmp_path / "bomb.png")
