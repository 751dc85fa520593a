"""Malformed input of every family: the same result, another one, or a sentence that names the file. Nothing else.

A family is a table of targets: how a good file comes to be, which file is damaged, and what reads it. Every target gets
the same damages, drawn from a seed: bytes flipped, cut, doubled or put in, numbers made huge, other encodings, files of
another kind, a folder, a pipe or a link to itself in the file's place; and what is nasty in that family alone. Reading
happens under an audit hook: a write outside the case's folder, a program or a connection is a failure, and so are a
foreign traceback, words that do not name the file, a minute without an end, and a gigabyte of memory.

`pytest tests/test_malformed.py -s` prints the table of outcomes; `-m slow` tries five times as much.
"""

import base64
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save as safetensors
from torch import nn

import course_lib
from course_lib import checkpoints
from course_lib.backbones import mxnet, released
from course_lib.course import commands, update
from course_lib.data import miniature
from course_lib.data.cub import Cub
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import load, load_grey
from course_lib.data.market1501 import Market1501
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.data.voc import Voc, write_mask
from course_lib.worlds import archives

PACKAGE = str(Path(course_lib.__file__).parent)
SECONDS, BYTES = 60, 1 << 30  # no case comes near: a limit for what hangs or grows
PROGRAMS = ("dpkg-deb",)  # unpacks zstd, and runs nothing of the package
RANDOM, OFTEN = 14, 5  # random damages of a target in the default suite, and how many times more with -m slow
FINE = ("same result", "another result", "sentence")
BAD = ("foreign traceback", "words without the file", "no advice", "endless", "memory", "outside its folder")
ADVICE = re.compile(
    r"\b(unpack|take|fetch|download|delete|give|write|save|copy|build|rename|convert|put|check|sort|is it|was it|are |"
    r"name|choose|make|run|move|look|close|keep|free|ask|get)\b",
    re.I,
)


@dataclass(frozen=True)
class Target:
    """One kind of file: `make` writes a good tree, `file` in it is damaged, `read` is what a lesson or command does."""

    name: str
    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]  # of the tree; what comes back is compared
    nasty: dict[str, bytes | Callable[[bytes], bytes]] = field(default_factory=dict)


# damages --------------------------------------------------------------------------------------------------------------


def encoded(coding: str) -> Callable[[bytes], bytes]:
    return lambda good: good.decode("latin-1").encode(coding, "replace")


OTHERS = {
    "a page": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>\n",
    "a PNG": base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    ),
    "a pickle": pickle.dumps({"a": [1, 2]}),
    "a program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "JSON": b'[{"a": 1e999, "b": null}, "x"]',
    "zeros": bytes(3000),
}
FIXED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "blank": lambda good: b" \r\n\t\n",
    "cut in half": lambda good: good[: len(good) // 2],
    "twice": lambda good: good + good,
    "with a byte-order mark": lambda good: b"\xef\xbb\xbf" + good,
    "as UTF-16": encoded("utf-16"),
    "as UTF-16 without a mark": encoded("utf-16-le"),
    "as UTF-32": encoded("utf-32"),
    "lines of Windows": lambda good: good.replace(b"\n", b"\r\n"),
    "lines of old Macs": lambda good: good.replace(b"\n", b"\r"),
    "blank lines": lambda good: good.replace(b"\n", b"\n \n"),
    "not UTF-8": lambda good: good[: len(good) // 2] + b"\xe9\xff" + good[len(good) // 2 :],
    "a zero byte": lambda good: good[: len(good) // 3] + b"\0" + good[len(good) // 3 :],
    "one long line": lambda good: good.replace(b"\n", b" ") + b"a" * 200_000,
}


def no_file(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


PLACES = (no_file, folder, pipe, loop)  # something else in the file's place


def numbers(good: bytes, rng: random.Random) -> bytes:
    """One number in a text is made huge, negative, a fraction or no number."""
    found = [match.span() for match in re.finditer(rb"\d+", good)]
    if not found:
        return good + b"9" * 400
    start, end = rng.choice(found)
    other = rng.choice([b"9" * 30, b"9" * 5000, b"-1", b"0", b"1e308", b"nan", b"inf", b"0.5", b"x", b""])
    return good[:start] + other + good[end:]


def words(good: bytes, rng: random.Random) -> bytes:
    """Two words change places, or one is taken out, doubled or replaced by one that means something."""
    parts = re.split(rb"(\W+)", good)
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    parts[one] = rng.choice([parts[other], b"", 3 * parts[one], b"../../x", b"null", b"\xc3\xa9", b"&x;", b'"', b"<a>"])
    return b"".join(parts)


def flipped(good: bytes, rng: random.Random) -> bytes:
    changed = bytearray(good)
    for _ in range(rng.choice([1, 1, 4, 40])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(good: bytes, rng: random.Random) -> bytes:
    return good[: rng.randrange(len(good))]


def without(good: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(good))
    return good[:start] + good[start + rng.choice([1, 4, 50]) :]


def doubled(good: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(good)), rng.randrange(len(good))))
    return good[:end] + good[start:end] * rng.choice([1, 3]) + good[end:]


def inserted(good: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(good) + 1)
    return good[:start] + rng.choice([rng.randbytes(9), b"\xff" * 8, bytes(64), b"\n\n", b"\\"]) + good[start:]


def large(good: bytes, rng: random.Random) -> bytes:
    """Eight bytes become a large number in either order: sizes and counts of binary files."""
    start = rng.randrange(max(1, len(good) - 8))
    value = rng.choice([2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
    return good[:start] + struct.pack(rng.choice("<>") + "Q", value) + good[start + 8 :]


DAMAGES = (numbers, words, flipped, cut, without, doubled, inserted, large)


def damages(target: Target, count: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Name of each damage, and what does it to the file."""

    def written(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        return lambda path: path.write_bytes(change(path.read_bytes()))

    yield "none", lambda path: None
    for place in PLACES:
        yield place.__name__, place
    for name, change in {**FIXED, **OTHERS, **target.nasty}.items():
        yield name, written(change if callable(change) else lambda good, change=change: change)
    for number in range(count):
        rng = random.Random(f"{target.name} {number}")
        damage = DAMAGES[number % len(DAMAGES)]
        yield f"{damage.__name__} {number}", written(lambda good, damage=damage, rng=rng: damage(good, rng))


# one case -------------------------------------------------------------------------------------------------------------


class Endless(BaseException):
    """No `except Exception` takes it."""


class Guard:
    """What is written, run or called while a case is read, outside the case's own folder."""

    inside: str | None = None

    def __init__(self) -> None:
        self.found: list[str] = []
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple) -> None:
        if self.inside is None:
            return
        programs = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
        if event in programs and arguments[0] not in PROGRAMS:
            self.found.append(f"{event} {arguments[:2]!r:.80}")
        writes = event == "open" and (
            any(letter in (arguments[1] or "") for letter in "wax+")
            if isinstance(arguments[1], str)
            else (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        two = ("os.rename", "os.symlink", "os.link")
        if writes or event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", *two):
            for path in arguments[: 1 + (event in two)]:
                place = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes) else os.devnull
                if place != os.devnull and not place.startswith(self.inside):
                    self.found.append(f"{event} {path!r:.80}")


@cache
def guard() -> Guard:
    return Guard()


@contextmanager
def limits(inside: Path) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Endless

    before, temporary = signal.signal(signal.SIGALRM, stop), tempfile.gettempdir()
    tempfile.tempdir = str(inside.parent)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    guard().found, guard().inside = [], str(inside.parent.resolve())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        guard().inside, tempfile.tempdir = None, temporary
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def comparable(found: object) -> str:
    """The same text for the same result."""
    if isinstance(found, torch.Tensor):
        numbers = found.reshape(-1).numpy() if found.numel() < 1 << 24 and found.layout is torch.strided else b""
        return f"{found.dtype} {tuple(found.shape)} {zlib.crc32(bytes(numbers))}"
    if isinstance(found, dict):
        return str({key: comparable(value) for key, value in found.items()})
    if isinstance(found, list | tuple):
        return str([comparable(value) for value in found])
    return repr(found)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdict(error: BaseException, tree: Path, file: Path) -> tuple[str, str]:
    """Whether an exception is a sentence of ours, and what is wrong with it."""
    *_, last = traceback.extract_tb(error.__traceback__)
    text = str(error)
    if not isinstance(error, OSError | ValueError | RuntimeError) or not last.filename.startswith(PACKAGE):
        return "foreign traceback", f"{type(error).__name__} at {last.filename}:{last.lineno}: {text:.200}"
    named = [file.name, file.stem, str(tree)]
    if not any(name in text for name in named):
        return "words without the file", text[:300]
    if len(text) > 2500 or not ADVICE.search(text.replace(str(file), "")):
        return "no advice", text[:300]
    return "sentence", text


def attempt(target: Target, tree: Path, good: str) -> tuple[str, str]:
    """Outcome of one reading, and details."""
    before = peak()
    try:
        with limits(tree):
            found = comparable(target.read(tree))
        outcome = ("same result" if found == good else "another result"), ""
    except Endless:
        outcome = "endless", ""
    except Exception as error:
        outcome = verdict(error, tree, tree / target.file)
    if guard().found:
        outcome = "outside its folder", "; ".join(guard().found)
    if peak() - before > BYTES:
        outcome = "memory", f"{(peak() - before) >> 20} MB"
    return outcome


def replace(tree: Path, original: Path) -> None:
    shutil.rmtree(tree)
    shutil.copytree(original, tree)


def tried(target: Target, place: Path, count: int) -> list[tuple[str, str, str]]:
    """(damage, outcome, details) of every damage of a target."""
    original, tree = place / "original", place / "tree"
    original.mkdir(parents=True)
    target.make(original)
    shutil.copytree(original, tree)
    before = target.read(tree)
    good, rows = comparable(before), []
    for name, damage in damages(target, count):
        damage(tree / target.file)
        rows.append((name, *attempt(target, tree, good)))
        broken = tree / target.file
        if broken.is_dir() and not broken.is_symlink():
            broken.rmdir()
        else:
            broken.unlink(missing_ok=True)
        shutil.copy(original / target.file, broken)
    return rows


# images ---------------------------------------------------------------------------------------------------------------

GREY = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (20, 1))
COLOUR = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 90)], -1)


def picture(name: str, mode: str = "RGB", **options: object) -> Callable[[Path], object]:
    return lambda tree: Image.fromarray(COLOUR).convert(mode).save(tree / name, **options)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def header(width: int, height: int, depth: int = 8, kind: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)


def coded(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(COLOUR).save(stream, kind, **options)
    return stream.getvalue()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\n(x) run\nshowpage\n%%EOF\n"
END, DATA = (b"IEND", b""), (b"IDAT", zlib.compress(bytes(4000)))
PICTURES = {
    "PostScript": POSTSCRIPT,
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400),
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(400),
    "GIF": coded("GIF"),
    "animated GIF": coded("GIF", save_all=True, append_images=[Image.new("RGB", (24, 20))]),
    "TIFF": coded("TIFF"),
    "BMP": coded("BMP"),
    "WebP": coded("WEBP"),
    "ICO": coded("ICO"),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "of no size": png(header(0, 0), DATA, END),
    "billions of pixels": png(header(200_000, 200_000), DATA, END),
    "hundreds of millions": png(header(20_000, 20_000), DATA, END),
    "a text bomb": png(header(24, 20), (b"zTXt", b"x\0\0" + zlib.compress(bytes(90_000_000))), DATA, END),
    "many texts": png(header(24, 20), *50 * [(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000)))], DATA, END),
    "a profile bomb": png(header(24, 20), (b"iCCP", b"x\0\0" + zlib.compress(bytes(90_000_000))), DATA, END),
    "pixels that unpack to more": png(header(24, 20), (b"IDAT", zlib.compress(bytes(90_000_000))), END),
    "grey with alpha": png(header(24, 20, 8, 4), (b"IDAT", zlib.compress(bytes(20 * 49))), END),
    "16 bits and colour": png(header(24, 20, 16, 2), (b"IDAT", zlib.compress(bytes(20 * 145))), END),
    "a palette without colours": png(header(24, 20, 8, 3), (b"IDAT", zlib.compress(bytes(20 * 25))), END),
    "one bit": png(header(24, 20, 1, 0), (b"IDAT", zlib.compress(bytes(20 * 4))), END),
    "animated PNG": coded("PNG", save_all=True, append_images=[Image.new("RGB", (24, 20))]),
}


def exif(tree: Path) -> None:
    about = Image.Exif()
    about[0x0112] = 6
    Image.fromarray(COLOUR).save(tree / "phone.jpg", exif=about)


def deep(tree: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tree / "deep.png")


def described(tree: Path) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("title", "x" * 500, zip=True)
    Image.fromarray(COLOUR).save(tree / "text.png", pnginfo=about)


def mask(tree: Path) -> None:
    write_mask(tree / "m.png", GREY // 40)


IMAGES = [
    Target("JPEG", "a.jpg", picture("a.jpg", quality=90), lambda tree: load(tree / "a.jpg"), PICTURES),
    Target("CMYK JPEG", "c.jpg", picture("c.jpg", "CMYK"), lambda tree: load(tree / "c.jpg")),
    Target("progressive", "p.jpg", picture("p.jpg", progressive=True), lambda tree: load(tree / "p.jpg")),
    Target("upright JPEG", "phone.jpg", exif, lambda tree: load(tree / "phone.jpg", upright=True), PICTURES),
    Target("PNG", "a.png", picture("a.png", "RGBA"), lambda tree: load(tree / "a.png")),
    Target("16-bit PNG", "deep.png", deep, lambda tree: load(tree / "deep.png")),
    Target("PNG with text", "text.png", described, lambda tree: load(tree / "text.png")),
    Target("mask", "m.png", mask, lambda tree: load_grey(tree / "m.png", "P"), PICTURES),
]


# annotations, lists and csv files: trees of the five benchmarks -------------------------------------------------------


def written(tree: Path, files: dict[str, str | None]) -> None:
    """Texts, and small photographs where there is none."""
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            Image.new("RGB", (40, 30), "tan").save(path, "JPEG")
        else:
            path.write_text(text)


MINIATURE = '{"world": "test", "classes": ["background", "cat", "dog"], "confounded": "dog"}'


def boxes(*names: str) -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax>"
        "<ymax>25</ymax></bndbox></object>\n"
        for name in names
    )
    return f"<annotation>\n<size><width>40</width><height>30</height><depth>3</depth></size>\n{objects}</annotation>\n"


def ilsvrc(tree: Path) -> None:
    files: dict[str, str | None] = {"LOC_synset_mapping.txt": "n01440764 tench, fish\nn01443537 goldfish\n"}
    for number in (1, 2):
        name = f"val/ILSVRC2012_val_0000000{number}"
        files[f"ILSVRC/Data/CLS-LOC/{name}.JPEG"] = None
        files[f"ILSVRC/Annotations/CLS-LOC/{name}.xml"] = boxes("n01443537")
        name = f"train/n01440764/n01440764_{number}"
        files[f"ILSVRC/Data/CLS-LOC/{name}.JPEG"] = None
        files[f"ILSVRC/Annotations/CLS-LOC/{name}.xml"] = boxes("n01440764")
    written(tree, files)


def read_ilsvrc(split: str) -> Callable[[Path], object]:
    def read(tree: Path) -> object:
        data = Ilsvrc(tree, split)
        loader = data.batches(size=32, batch_size=2)
        return data.classes, [photo.boxes for photo in data.photos], str(data), vars(next(iter(loader)))

    return read


def voc(tree: Path) -> None:
    lists = dict.fromkeys(("train", "val", "trainaug"), "2007_000032\n2007_000039\n")
    files: dict[str, str | None] = {f"ImageSets/Segmentation/{name}.txt": text for name, text in lists.items()}
    files |= {f"JPEGImages/2007_0000{number}.jpg": None for number in (32, 39)}
    files |= {f"Annotations/2007_0000{number}.xml": boxes("cat", "dog") for number in (32, 39)}
    written(tree, files | {"miniature.json": MINIATURE})


def read_voc(tree: Path) -> object:
    data = Voc(tree, "train")
    return data.ids, data.classes, data.confounded, data.tags, data[0], str(data), miniature.fingerprint(tree)


def cub(tree: Path) -> None:
    rows = range(1, 5)
    files: dict[str, str | None] = {
        "classes.txt": "1 001.Albatross\n2 002.Ani\n",
        "images.txt": "".join(f"{i} 00{i // 3 + 1}.x/bird_{i}.jpg\n" for i in rows),
        "image_class_labels.txt": "".join(f"{i} {i // 3 + 1}\n" for i in rows),
        "bounding_boxes.txt": "".join(f"{i} 1.0 2.0 20.0 25.5\n" for i in rows),
        "miniature.json": '{"world": "test"}',
    }
    written(tree, files | {f"images/00{i // 3 + 1}.x/bird_{i}.jpg": None for i in rows})


def read_cub(tree: Path) -> object:
    data = [Cub(tree, split) for split in ("train", "test")]
    return [(half.classes, half.images, half.labels, half.boxes, half[0], str(half)) for half in data]


def flat(tree: Path) -> None:
    names = [f"n0144076400000{i:03}.jpg" for i in range(1, 4)]
    text = "filename,label\n" + "".join(f"{name},n01440764\n" for name in names)
    files = {f"images/{name}": None for name in names}
    written(tree, files | {"split/train.csv": text, "miniature.json": '{"world": "test"}'})


def nested(tree: Path) -> None:
    names = [f"n01440764_{i}.JPEG" for i in range(1, 4)]
    text = "class_name,image_name\n" + "".join(f"n01440764,{name}\n" for name in names)
    files = {f"train/n01440764/{name}": None for name in names}
    written(tree, files | {"train.csv": text, "miniature.json": '{"world": "test"}'})


def read_miniimagenet(tree: Path) -> object:
    data = MiniImageNet(tree, "train")
    return data.ids, data.classes, data.labels, data.images, data[0], str(data)


def market(tree: Path) -> None:
    names = [f"{folder}/000{i}_c{i}s1_00045{i}_03.jpg" for folder in ("query", "bounding_box_test") for i in (1, 2)]
    written(tree, dict.fromkeys(names) | {"miniature.json": '{"world": "test"}'})


def read_market(tree: Path) -> object:
    data = Market1501(tree, "query")
    return data.classes, data.identities, data.cameras, data.labels, data[0], str(data)


def bomb(good: bytes) -> bytes:
    entities = "".join(f'<!ENTITY e{i} "{10 * f"&e{i - 1};"}">' for i in range(1, 12))
    return f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "cat">{entities}]><annotation>&e11;</annotation>'.encode()


XML = {
    "an entity bomb": bomb,
    "a quadratic bomb": b'<!DOCTYPE a [<!ENTITY e "' + b"a" * 100_000 + b'">]><annotation>' + b"&e;" * 100_000
    + b"</annotation>",
    "a file of the machine": b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>',
    "deep": b"<annotation>" + b"<object>" * 100_000,
    "deep and closed": b"<annotation>" + b"<object>" * 50_000 + b"</object>" * 50_000 + b"</annotation>",
    "another root": lambda good: good.replace(b"annotation", b"html"),
    "a namespace": lambda good: good.replace(b"<annotation>", b'<annotation xmlns="urn:x">'),
    "an unknown encoding": lambda good: b'<?xml version="1.0" encoding="nothing"?>' + good,
    "a wide encoding": lambda good: b'<?xml version="1.0" encoding="gb18030"?>' + good,
    "no size": lambda good: re.sub(rb"<size>.*</size>", b"", good),
    "size 0": lambda good: re.sub(rb"(<width>|<height>)\d+", rb"\g<1>0", good),
    "size swapped": lambda good: re.sub(rb"40(.*)30", rb"30\g<1>40", good, count=1),
    "no object": lambda good: re.sub(rb"<object>.*</object>\n", b"", good),
    "no name": lambda good: re.sub(rb"<name>.*?</name>", b"", good),
    "an empty name": lambda good: re.sub(rb"<name>.*?</name>", b"<name/>", good),
    "another name": lambda good: re.sub(rb"<name>.*?</name>", b"<name>unicorn</name>", good),
    "capitals": lambda good: re.sub(rb"<name>.*?</name>", b"<name> DOG\n</name>", good),
    "fractions": lambda good: good.replace(b"20<", b"20.4<"),
    "corners swapped": lambda good: good.replace(b"xmin", b"XM").replace(b"xmax", b"xmin").replace(b"XM", b"xmax"),
    "outside": lambda good: good.replace(b"<xmax>20<", b"<xmax>47<"),
    "no area": lambda good: good.replace(b"<xmax>20<", b"<xmax>2<"),
    "far away": lambda good: good.replace(b"<xmin>2<", b"<xmin>80<").replace(b"<xmax>20<", b"<xmax>90<"),
    "endless coordinates": lambda good: good.replace(b"20<", b"inf<"),
    "coordinates without a number": lambda good: good.replace(b"20<", b"nan<"),
    "huge coordinates": lambda good: good.replace(b"20<", b"1e200<"),
}  # fmt: skip
LISTS = {
    "backslashes": lambda good: good.replace(b"/", b"\\"),
    "spaces at the ends": lambda good: b"  " + good.replace(b"\n", b" \t\n "),
    "a line twice": lambda good: good + good.splitlines()[-1],
    "upside down": lambda good: b"\n".join(good.splitlines()[::-1]),
    "a field more": lambda good: good.replace(b"\n", b" 7\n"),
    "an absolute path": lambda good: re.sub(rb"\S+\n", b"/etc/passwd\n", good),
    "up and away": lambda good: re.sub(rb"\S+\n", b"../../../../etc/passwd\n", good),
    "a name of 3,000 letters": lambda good: re.sub(rb"\S+\n", b"a" * 3000 + b"\n", good),
    "a name of 300 letters": lambda good: re.sub(rb"\S+\n", b"a" * 300 + b".jpg\n", good),
    "separators of other kinds": lambda good: good.replace(b" ", "\u2003".encode()),
}
CSV = {
    "a field of 200,000 letters": lambda good: good + b"a" * 200_000 + b",n01440764\n",
    "an open quote": lambda good: good.replace(b"\n", b'\n"', 1),
    "quotes": lambda good: b"\n".join(b",".join(b'"' + x + b'"' for x in row.split(b",")) for row in good.splitlines()),
    "semicolons": lambda good: good.replace(b",", b";"),
    "spaces after commas": lambda good: good.replace(b",", b", "),
    "a third field": lambda good: good.replace(b"\n", b",1\n"),
    "the header alone": lambda good: good.splitlines()[0],
    "no header": lambda good: b"\n".join(good.splitlines()[1:]),
    **LISTS,
}
VAL = "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"
TRAIN = "ILSVRC/Annotations/CLS-LOC/train/n01440764/n01440764_1.xml"
ANNOTATIONS = [
    Target("ILSVRC val", VAL, ilsvrc, read_ilsvrc("val"), XML),
    Target("ILSVRC train", TRAIN, ilsvrc, read_ilsvrc("train"), XML),
    Target("VOC", "Annotations/2007_000032.xml", voc, read_voc, XML),
]
ALL_LISTS = [
    Target("synsets", "LOC_synset_mapping.txt", ilsvrc, read_ilsvrc("val"), LISTS),
    Target("VOC", "ImageSets/Segmentation/train.txt", voc, read_voc, LISTS),
    *(
        Target(f"CUB {name}", f"{name}.txt", cub, read_cub, LISTS)
        for name in ("classes", "images", "image_class_labels", "bounding_boxes")
    ),
]
TABLES = [
    Target("flat", "split/train.csv", flat, read_miniimagenet, CSV),
    Target("in class folders", "train.csv", nested, read_miniimagenet, CSV),
]

# JSON -----------------------------------------------------------------------------------------------------------------

NOTES = {
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no world": b'{"classes": ["background", "cat", "dog"]}',
    "a world of numbers": b'{"world": 7}',
    "classes of numbers": b'{"world": "x", "classes": [1, 2, 3]}',
    "classes as a word": b'{"world": "x", "classes": "cat"}',
    "classes as a table": b'{"world": "x", "classes": {"cat": 1}}',
    "no classes": b'{"world": "x", "classes": []}',
    "a class twice": b'{"world": "x", "classes": ["background", "cat", "cat", "dog"]}',
    "confounded by nothing": b'{"world": "x", "classes": ["background", "cat", "dog"], "confounded": ["cat"]}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "a huge number": b'{"world": ' + b"9" * 6000 + b"}",
    "not a number": b'{"world": NaN}',
    "half a pair": b'{"world": "\\ud800", "classes": ["background", "cat", "dog"]}',
}
JSON = [
    Target("VOC's note", "miniature.json", voc, read_voc, NOTES),
    Target("CUB's note", "miniature.json", cub, lambda tree: (read_cub(tree), miniature.fingerprint(tree)), NOTES),
]

# weights --------------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/code-of-a-pickle-ran",)


class Writes:
    def __reduce__(self) -> tuple:
        return open, ("/tmp/code-of-a-pickle-wrote", "w")


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def saved(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def read_weights(name: str) -> Callable[[Path], object]:
    def read(tree: Path) -> object:
        state, about = checkpoints.read(tree / name)
        checkpoints.fill(network(), state, str(tree / name))
        return network().state_dict(), about

    return read


def replaced(name: str, tensor: object) -> bytes:
    return saved({**network().state_dict(), name: tensor})


def packed(content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": 1}, protocol=2))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data/0", content)
    return stream.getvalue()


def stored(numel: int) -> Callable[[bytes], bytes]:
    """The pickle of torch claims more numbers than its storage has."""
    return lambda good: good.replace(b"K\x04", b"J" + struct.pack("<i", numel))


PICKLES = {
    "code": saved({"weight": Evil()}),
    "code that writes": saved({"weight": Writes()}),
    "code alone": pickle.dumps(Evil()),
    "a network": saved(nn.Linear(1, 1)),
    "a list": saved([torch.zeros(1)]),
    "numbers for names": saved({1: torch.zeros(1)}),
    "no tensors": saved({"epoch": 3}),
    "nothing": saved({}),
    "None": saved(None),
    "another shape": replaced("0.weight", torch.zeros(4, 3, 5, 5)),
    "a scalar": replaced("0.weight", torch.tensor(0.0)),
    "whole numbers": replaced("0.weight", torch.zeros(4, 3, 3, 3, dtype=torch.int64)),
    "sparse": replaced("2.weight", torch.eye(4)[:2].to_sparse()),
    "without numbers": replaced("2.weight", torch.empty(2, 4, device="meta")),
    "one number for a billion": replaced("2.weight", torch.zeros(1).expand(1 << 20, 1 << 20)),
    "a name of a million letters": replaced("x" * 1_000_000, torch.zeros(1)),
    "a thousand names": saved({f"layer{i}.weight": torch.zeros(1) for i in range(1000)}),
    "wrapped in itself": saved({"model": {"model": {"model": {"model": torch.zeros(1)}}}}),
    "a zip bomb": packed(bytes(2_000_000_000 // 4)),
    "a zip of something": packed(b"x", zipfile.ZIP_STORED),
    "a storage of billions": stored(2**31 - 1),
    "memory by pickle": b"\x80\x02c__builtin__\nbytearray\nq\0(J\xff\xff\xff\x7ftq\x01Rq\x02.",
    "a global of a pickle": b"cos\nsystem\n(S'touch /tmp/code-of-a-pickle-ran'\ntR.",
}


def safe(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


SAFE = {
    "a huge header": safe(b"{}", 2**62),
    "a header of a gigabyte": safe(b"{}", 2**30),
    "no header": safe(b""),
    "a header of something": safe(b"[1, 2, 3]"),
    "an empty table": safe(b"{}"),
    "offsets behind the end": safe(b'{"0.weight":{"dtype":"F32","shape":[4,3,3,3],"data_offsets":[0,432]}}'),
    "offsets that overlap": safe(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        None, b"abc",
    ),
    "a shape beyond numbers": safe(
        b'{"a":{"dtype":"U8","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}'
    ),
    "an unknown type": safe(b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}', None, b"x"),
    "words that are no JSON": safetensors(network().state_dict(), {"about": "{"}),
    "words that are no table": safetensors(network().state_dict(), {"about": "[1]"}),
    "words that are a number": safetensors(network().state_dict(), {"about": "7"}),
    "another shape": safetensors({**network().state_dict(), "2.bias": torch.zeros(3)}),
    "whole numbers": safetensors({**network().state_dict(), "2.bias": torch.zeros(2, dtype=torch.int8)}),
    "a name too few": safetensors({"2.bias": torch.zeros(2)}),
}  # fmt: skip
HEAD = {"fc8.weight": torch.zeros(21, 4096, 1, 1)}


def params(arrays: dict[str, bytes]) -> bytes:
    names = b"".join(struct.pack("<Q", len(name)) + name.encode() for name in arrays)
    count = struct.pack("<Q", len(arrays))
    return struct.pack("<QQ", 0x112, 0) + count + b"".join(arrays.values()) + count + names


def record(*shape: int, data: bytes | None = None) -> bytes:
    about = struct.pack(f"<IiI{len(shape)}qiii", 0xF993FAC9, 0, len(shape), *shape, 1, 0, 0)
    return about + (np.arange(np.prod(shape), dtype="<f4").tobytes() if data is None else data)


MXNET = params({"arg:conv1a_weight": record(2, 3, 3, 3), "aux:bn7_moving_var": record(4)})
SHAPES = {
    "2.5 million empty arrays": struct.pack("<QQQ", 0x112, 0, 2_500_000) + bytes(10_000_000),
    "a shape of exabytes": params({"a": record(2**40, 2**40, data=b"")}),
    "a shape with a zero": params({"a": record(0, 2**40, 2**40, data=b"")}),
    "a shape below zero": params({"a": record(-1, 8, data=b"")}),
    "an unknown name": params({"arg:res9_weight": record(2)}),
    "no array": params({}),
    "a name of a million letters": params({"x" * 1_000_000: record(2)}),
}


def read_params(tree: Path) -> object:
    return mxnet.resnet38_state(tree / "a.params")


def weights(kind: str, name: str, made: Callable[[], bytes], read: Callable[[Path], object], nasty: dict) -> Target:
    return Target(kind, name, lambda tree: (tree / name).write_bytes(made()), read, nasty)


WEIGHTS = [
    weights(
        "safetensors",
        "a.safetensors",
        lambda: safetensors(network().state_dict(), {"about": '{"a": 1}'}),
        read_weights("a.safetensors"),
        SAFE,
    ),
    weights(
        "pickle",
        "a.pth",
        lambda: saved({"state_dict": network().state_dict(), "epoch": 3}),
        read_weights("a.pth"),
        PICKLES,
    ),
    weights(
        "old pickle",
        "old.pt",
        lambda: saved(network().state_dict(), _use_new_zipfile_serialization=False),
        read_weights("old.pt"),
        PICKLES,
    ),
    weights("MXNet", "a.params", lambda: MXNET, read_params, SHAPES),
    weights("released", "eps.pth", lambda: saved(HEAD), lambda tree: released.read(tree / "eps.pth"), PICKLES),
]

# archives -------------------------------------------------------------------------------------------------------------


def tar(kind: str, *entries: tuple[str, bytes], **changed: object) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}", format=tarfile.PAX_FORMAT) as archive:
        for name, body in entries:
            about = tarfile.TarInfo(name)
            about.size = len(body)
            for key, value in changed.items():
                setattr(about, key, value)
            archive.addfile(about, io.BytesIO(body))
    return stream.getvalue()


def deb(data: bytes, name: str = "data.tar.xz", size: int | None = None) -> bytes:
    members = (("debian-binary", b"2.0\n", None), ("control.tar.xz", b"x", None), (name, data, size))
    text = b"!<arch>\n"
    for member, body, length in members:
        length = len(body) if length is None else length
        text += f"{member:16}{0:<12}{0:<6}{0:<6}{'100644':8}{length:<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    return text


FILES = (("usr/share/a.png", OTHERS["a PNG"]), ("usr/share/b.png", OTHERS["a PNG"] * 9))
PACKAGES = {
    "a size below zero": deb(tar("xz", *FILES), size=-60),
    "a size that is no number": deb(tar("xz", *FILES)).replace(b"1         `", b"x         `"),
    "another packing": deb(tar("gz", *FILES), "data.tar.gz"),
    "not packed": deb(tar("", *FILES), "data.tar"),
    "packed by bzip2": deb(tar("bz2", *FILES), "data.tar.bz2"),
    "zstd that is none": deb(b"\x28\xb5\x2f\xfd" + bytes(50), "data.tar.zst"),
    "up and away": deb(tar("xz", ("../../etc/x", b"x"))),
    "an absolute name": deb(tar("xz", ("/tmp/x", b"x"))),
    "a link": deb(tar("xz", ("usr/share/a.png", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a device": deb(tar("xz", ("usr/share/a.png", b""), type=tarfile.CHRTYPE)),
    "a name of 100,000 letters": deb(tar("xz", ("a" * 100_000, b"x"))),
    "300 MB of zeros": deb(tar("xz", ("usr/share/a.png", bytes(300_000_000)))),
    "no data": deb(b"", "other"),
}


def package(kind: str) -> Target:
    name = f"a.{'deb' if kind else 'zip'}"

    def make(tree: Path) -> None:
        if kind:
            (tree / name).write_bytes(deb(tar(kind, *FILES), f"data.tar.{kind}"))
        else:
            with zipfile.ZipFile(tree / name, "w", zipfile.ZIP_DEFLATED) as archive:
                for path, body in FILES:
                    archive.writestr(path, body)

    return Target(name + kind, name, make, lambda tree: [*archives.members(tree / name, lambda path: True)], PACKAGES)


# notebooks ------------------------------------------------------------------------------------------------------------


def lesson(tree: Path) -> None:
    cells = [nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("x = 1\n")]
    cells[1].metadata["nbgrader"] = {"grade_id": "exercise-01-1", "solution": True, "schema_version": 3}
    notebook = nbformat.v4.new_notebook(cells=cells)
    update.mark(notebook)
    nbformat.write(notebook, tree / "00_tour.ipynb")


NOTEBOOKS = {
    "a number": b"7",
    "no cells": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}',
    "cells of numbers": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [1, null]}',
    "cells without a source": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}',
    "version 3": b'{"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": []}',
    "version 99": b'{"nbformat": 99, "nbformat_minor": 0, "metadata": {}, "cells": []}',
    "deep": b'{"cells": ' + b"[" * 100_000,
}
COPIES = [Target("copy", "00_tour.ipynb", lesson, lambda tree: update.read(tree / "00_tour.ipynb"), NOTEBOOKS)]

FAMILIES = {
    "images": IMAGES,
    "annotations": ANNOTATIONS,
    "lists": ALL_LISTS,
    "csv": TABLES,
    "JSON": JSON,
    "weights": WEIGHTS,
    "archives": [package("xz"), package("gz"), package("")],
    "notebooks": COPIES,
}


# the table ------------------------------------------------------------------------------------------------------------

outcomes: dict[str, Counter] = {}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    columns = [outcome for outcome in (*FINE, *BAD) if any(outcome in row for row in outcomes.values())]
    print("\n| family | inputs | " + " | ".join(columns) + " |\n|---|" + "---:|" * (1 + len(columns)))
    for name, row in {**outcomes, "all": sum(outcomes.values(), Counter())}.items():
        print(f"| {name} | {row.total():,} | " + " | ".join(f"{row[column]:,}" for column in columns) + " |")


def family(name: str, place: Path, count: int) -> None:
    failures = []
    outcomes[name] = Counter()
    for target in FAMILIES[name]:
        for damage, outcome, details in tried(target, place / target.name.replace(" ", "-"), count):
            outcomes[name][outcome] += 1
            if outcome not in FINE or (damage == "none" and outcome != "same result"):
                failures.append(f"{target.name}, {damage}: {outcome}: {details}")
    assert not failures, f"{len(failures)} of {outcomes[name].total()}:\n" + "\n".join(failures[:50])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_input_ends_in_a_result_or_a_sentence(name, tmp_path):
    family(name, tmp_path, RANDOM)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_five_times_as_many(name, tmp_path):
    family(name, tmp_path, RANDOM * OFTEN * 2)


# options of commands --------------------------------------------------------------------------------------------------

COMMANDS = [name for name in commands.COMMANDS if name.split()[0] in ("train", "evaluate")] + ["ablate"]
NEEDED = {"evaluate seeds": ["--checkpoint", "none.pth"], "ablate": ["--table", "5"]}
VALUES = ("-1", "0", "nan", "inf", "1e30", "-0.5", "x", "", "9" * 400)


def said(argv: list[str], capsys: pytest.CaptureFixture) -> tuple[int | None, str]:
    """Exit code, and what a command printed."""
    try:
        code = commands.main(argv)
    except SystemExit as end:
        code = end.code
    return code, "".join(capsys.readouterr())


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_refused_by_name_or_taken(command, tmp_path, capsys, monkeypatch):
    """Every number of every command becomes negative, zero, none, huge or a word. No data: nothing is worked on."""
    monkeypatch.setenv("COLUMNS", "400")
    _, text = said([*command.split(), "--help"], capsys)
    numeric = sorted({*re.findall(r"--([a-z0-9-]+) (?:\{None\}\|)?(?:INT|FLOAT)\b", text)})
    assert len(numeric) >= 4, text
    needed = [*command.split(), *NEEDED.get(command, []), "--data", str(tmp_path / "missing"), "--folder"]
    row, failures = outcomes.setdefault("options", Counter()), []
    for option in numeric:
        rng = random.Random(f"{command} {option}")
        for value in rng.sample(VALUES, 2):
            try:
                with limits(tmp_path / "runs"):
                    code, text = said([*needed, str(tmp_path / "runs"), f"--{option}={value}"], capsys)
            except Exception as error:
                row["foreign traceback"] += 1
                failures.append(f"--{option}={value}: {type(error).__name__}: {error}")
                continue
            words = re.sub(r"[\W_]+", " ", text).lower()
            if "Traceback" in text or "fault of the course" in text:
                outcome = "foreign traceback"
            elif code and option.replace("-", " ") in words:
                outcome = "sentence"
            elif code and ("missing" in text or "none.pth" in text):  # taken: the data comes next
                outcome = "another result"
            else:
                outcome = "words without the file"
            if guard().found:
                outcome, text = "outside its folder", str(guard().found)
            row[outcome] += 1
            if outcome not in FINE:
                failures.append(f"--{option}={value}: {outcome}, exit {code}: {text:.300}")
    assert not failures, "\n".join(failures)
