"""Scenes: photographs of objects pasted onto photographs of backgrounds, with exact masks and boxes.

The same seed gives the same bytes. Photographs and backgrounds are split between train and validation before anything
is composed, so that no object and no background of a validation scene was ever seen in training.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import find_objects

from course_lib.worlds import creatures
from course_lib.worlds.photographs import Photographs, manifest, normalised

# Part of every fingerprint, like the settings below: raise it when code makes other pixels of the same seed.
SCENES_VERSION = 1
# Longest side of an object over the image's shorter side, for 1, 2, 3 objects.
OBJECT_SCALES = ((0.5, 1.1), (0.4, 0.75), (0.3, 0.5))
ANGLE = 15.0  # degrees, either way
ENLARGE = 2.0  # a cut-out is never drawn larger than this times its own size: blur would give it away
SCENE_OVERLAP = 0.15  # share of an object that later ones may cover


@dataclass(frozen=True)
class Scene:
    """One composed picture and everything that is known about it."""

    image: np.ndarray  # h w 3, uint8, RGB
    mask: np.ndarray  # h w, uint8: 0 = background, c + 1 = class c of the world
    instances: np.ndarray  # h w, uint8: 0 = background, 1..n
    labels: tuple[int, ...]  # class of each instance
    boxes: np.ndarray  # n 4, int: x0 y0 x1 y1 of the visible pixels, inclusive


@dataclass(frozen=True)
class World:
    """A source of scenes: named classes, and for each split the items that may be drawn."""

    classes: dict[str, str]  # id -> name, in label order
    items: dict[str, list[tuple[int, object]]]  # split -> (label, item) pairs
    grounds: dict[str, list]  # split -> backgrounds
    draw: Callable[[object, np.random.Generator], Image.Image]  # item -> RGBA cut-out
    draw_ground: Callable[[object, np.random.Generator], Image.Image]  # background -> RGB
    fingerprint: str


def photo_world(photographs: Photographs, labels: str = "kind", seed: int = 0) -> World:
    """The world of photo cut-outs.

    Args:
        labels: "kind" (40 coarse classes; photographs split 60:40 within each, so a class has two at least), "group"
            (12 broad ones, likewise), or "wnid" (ImageNet classes, one to three photographs each: for validation of
            pretrained networks only, nothing to train on).
        seed: of the split of photographs and backgrounds.
    """
    members = sorted((p for p in photographs.cutouts if getattr(p, labels)), key=lambda p: p.file)
    counts = Counter(getattr(p, labels) for p in members)
    names = {name for name, count in counts.items() if count > 1 or labels == "wnid"}
    classes = (
        {about["id"]: kind for kind, about in manifest()["kinds"].items() if kind in names}
        if labels == "kind"
        else {name: name for name in sorted(names)}
    )
    items = {"train": [], "val": []}
    for number, name in enumerate(classes.values()):
        own = [(number, photograph) for photograph in members if getattr(photograph, labels) == name]
        for split, part in ({"val": own} if labels == "wnid" else _split(own, f"{seed} {name}")).items():
            items[split] += part
    return World(
        classes,
        items,
        _split(sorted(photographs.backgrounds, key=lambda p: p.file), f"{seed} backgrounds"),
        draw=lambda p, rng: _brighten(_read(photographs.path(p), "RGBA"), rng),
        draw_ground=lambda p, rng: _brighten(_read(photographs.path(p), "RGB"), rng),
        fingerprint=world_fingerprint(photographs.fingerprint, labels, seed),
    )


def creature_world(side: int = 160, ground: int = 224) -> World:
    """The procedural world: six classes told apart by the texture of the head; every creature and every ground is new.

    Args:
        side, ground: of the picture of a creature and of a ground, pixels.
    """
    items = list(enumerate(creatures.TEXTURES))
    return World(
        creatures.CREATURES,
        {"train": items, "val": items},
        {"train": ["ground"], "val": ["ground"]},
        draw=lambda texture, rng: creatures.creature(texture, side, rng),
        draw_ground=lambda _, rng: creatures.ground(ground, rng),
        fingerprint=world_fingerprint("creatures"),
    )


def random_scene(world: World, split: str, size: tuple[int, int], seed: int) -> Scene:
    """A scene of one to three random objects (with probabilities .5, .4, .1) of a split, `size` = (width, height)."""
    rng = np.random.default_rng(seed)
    count = rng.choice((1, 2, 3), p=(0.5, 0.4, 0.1))
    picks = [world.items[split][i] for i in rng.choice(len(world.items[split]), count, replace=False)]
    return compose(world, split, picks, size, rng)


def compose(
    world: World,
    split: str,
    picks: Sequence[tuple[int, object]],
    size: tuple[int, int],
    rng: np.random.Generator,
    scales: Sequence[tuple[float, float]] = OBJECT_SCALES,
    overlap: float = SCENE_OVERLAP,
    ground: Image.Image | None = None,
) -> Scene:
    """A scene with the given (label, item) pairs on a random background of the split.

    The first object is always drawn; a later one is left out if it finds no place in six tries where it hides at most
    the share `overlap` of any other.

    Args:
        size: (width, height) in pixels.
        scales, overlap: as OBJECT_SCALES and SCENE_OVERLAP.
        ground: a background of that size, drawn already; None for a random one.
    """
    width, height = size
    picture = ground.copy() if ground else draw_ground(world, split, size, rng)
    instances, labels = np.zeros((height, width), np.uint8), []
    areas = np.zeros(len(picks) + 1)
    low, high = scales[len(picks) - 1]
    for label, item in picks:
        cutout = _turn(world.draw(item, rng), rng.uniform(low, high) * min(size), size, rng)
        for _ in range(6):
            left, top = rng.integers(width - cutout.width + 1), rng.integers(height - cutout.height + 1)
            window = np.s_[top : top + cutout.height, left : left + cutout.width]
            opaque = np.asarray(cutout.getchannel("A")) > 127
            hidden = np.bincount(instances[window][opaque], minlength=len(areas))
            if (hidden[1:] <= overlap * areas[1:]).all():
                break
        else:
            continue
        picture.paste(cutout, (int(left), int(top)), cutout)
        labels.append(label)
        instances[window][opaque] = len(labels)
        areas[len(labels)] = opaque.sum()
    classes = np.array([0, *(label + 1 for label in labels)], np.uint8)
    boxes = [(x.start, y.start, x.stop - 1, y.stop - 1) for y, x in find_objects(instances)]
    return Scene(np.asarray(picture), classes[instances], instances, tuple(labels), np.array(boxes))


def draw_ground(world: World, split: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random part of a random background of the split, in RGB."""
    grounds = world.grounds[split]
    return random_part(world.draw_ground(grounds[rng.integers(len(grounds))], rng), size, rng)


def _split(members: list, key: str) -> dict[str, list]:
    """60:40, at least one on each side where there are two; which ones is decided by the key alone."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
    order = rng.permutation(len(members))
    cut = min(max(round(0.6 * len(members)), 1), len(members) - 1)
    parts = {"train": order[:cut], "val": order[cut:]}
    return {split: [members[i] for i in sorted(part)] for split, part in parts.items()}


_read = functools.lru_cache(maxsize=512)(normalised)


def _brighten(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    gain = rng.uniform(0.8, 1.2)
    table = [min(255, round(gain * value)) for value in range(256)] * 3
    return image.point(table + list(range(256)) if image.mode == "RGBA" else table)


def random_part(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A random part of a background, with the aspect ratio of `size`, flipped half of the time."""
    zoom = rng.uniform(0.5, 1.0) * min(image.width / size[0], image.height / size[1])
    width, height = size[0] * zoom, size[1] * zoom
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    image = image.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _turn(cutout: Image.Image, length: float, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """The cut-out flipped half of the time, turned a little, cropped to its visible part and scaled."""
    if rng.random() < 0.5:
        cutout = ImageOps.mirror(cutout)
    cutout = cutout.crop(cutout.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())
    native = max(cutout.size)
    cutout = cutout.rotate(rng.uniform(-ANGLE, ANGLE), Image.Resampling.BICUBIC, expand=True)
    cutout = cutout.crop(cutout.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())
    longest = min(length, ENLARGE * native)
    scale = min(longest / max(cutout.size), size[0] / cutout.width, size[1] / cutout.height)
    shape = tuple(max(2, min(limit, round(side * scale))) for side, limit in zip(cutout.size, size))
    return cutout.resize(shape, Image.Resampling.LANCZOS)


def world_fingerprint(*parts: object) -> str:
    """A name of a world in 12 letters: of these parts and of how scenes are composed."""
    return hashlib.sha256(
        repr((SCENES_VERSION, OBJECT_SCALES, ANGLE, ENLARGE, SCENE_OVERLAP, *parts)).encode()
    ).hexdigest()[:12]
