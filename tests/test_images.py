"""Image files of every odd kind are read as RGB or refused with a sentence."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

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


# other formats, pipes, and a photograph of one's own -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "TIFF", "PDF", "EPS"])
def test_other_formats_are_named_and_never_opened(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", kind)
    name = {"WEBP": "WebP", "EPS": "PostScript"}.get(kind, kind)
    with pytest.raises(BrokenFile, match=rf"a.jpg is {name}: expected JPEG or PNG, whatever .*; convert it"):
        load(tmp_path / "a.jpg")


@pytest.mark.parametrize(("brand", "name"), [("heic", "HEIC"), ("heix", "HEIC"), ("mif1", "HEIC"), ("avif", "AVIF")])
def test_what_phones_call_jpg(tmp_path, brand, name):
    (tmp_path / "IMG_0001.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand.encode() + bytes(3000))
    with pytest.raises(BrokenFile, match=rf"IMG_0001.jpg is {name}: expected JPEG or PNG"):
        load(tmp_path / "IMG_0001.jpg")


def test_jpeg_and_png_are_known_by_their_content(tmp_path):
    """One of ILSVRC's photographs is a PNG called .JPEG."""
    Image.fromarray(COLOUR).save(tmp_path / "a.JPEG", "PNG")
    Image.fromarray(COLOUR).save(tmp_path / "a.png", "JPEG", quality=98)
    assert np.array_equal(load(tmp_path / "a.JPEG").permute(1, 2, 0), COLOUR)
    assert load(tmp_path / "a.png").shape == (3, 30, 40)


def test_pipes_folders_and_links_to_themselves(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(BrokenFile, match=f"{name}: expected a file, got a folder, pipe or device"):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"loop.jpg is missing"):
        load(tmp_path / "loop.jpg")


def test_a_bomb_of_text_is_refused(tmp_path):
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * 3_000_000, zip=True)
    path = save(tmp_path, COLOUR, "text.png", pnginfo=about)
    with pytest.raises(BrokenFile, match=r"text.png cannot be decoded"):
        load(path)


def test_an_animation_is_its_first_picture(tmp_path):
    path = save(tmp_path, COLOUR, "moves.png", save_all=True, append_images=[Image.fromarray(255 - COLOUR)])
    assert np.array_equal(load(path).permute(1, 2, 0), COLOUR)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_of_ones_own_stands_upright_and_a_benchmarks_stays(tmp_path, orientation):
    about = Image.Exif()
    about[0x0112] = orientation
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 1, 8: 1}  # to the left
    for name in ("a.png", "a.jpg"):
        path = save(tmp_path, COLOUR, name, exif=about, **({"quality": 98} if name == "a.jpg" else {}))
        upright, plain = load(path, upright=True), load(path)
        assert plain.shape == (3, 30, 40) and upright.shape == ((3, 30, 40) if orientation < 5 else (3, 40, 30))
        if orientation in (1, 3, 6, 8):
            assert torch.equal(upright, plain.rot90(turns[orientation], (1, 2)))


def test_grey_of_sixteen_bits_stands_upright_too(tmp_path):
    about = Image.Exif()
    about[0x0112] = 6
    path = save(tmp_path, GREY.astype(np.uint16) * 257, "deep.png", exif=about)
    assert np.array_equal(load(path, upright=True)[0], np.rot90(GREY, 3))
