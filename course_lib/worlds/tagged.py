"""Scenes for segmentation from image tags: one to three objects, and one class that is confounded with its ground.

Trains are found by their rails where no picture shows one without the other. Here one class stands on a track in every
training scene that shows it, and no other scene has a track: on the training set, nothing tells the class from its
track but saliency or a sense of objects. In validation a coin decides whether a scene has a track, whatever else is in
it, so that the confusion can be measured: `track` is the mask of the track where it is seen.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from course_lib.data.images import open_image
from course_lib.worlds import scenes
from course_lib.worlds.photographs import Photographs

TAGGED_OVERLAP = 0.4  # share of an object that each later one may cover: large objects must go together


@dataclass(frozen=True)
class Recipe:
    """What is drawn; sides in pixels."""

    side: int  # of a scene
    images: dict[str, int]  # scenes of "trainaug" and "val"
    counts: tuple[float, float, float]  # probabilities of 1, 2, 3 objects
    confounded: str  # id of the class with the track
    void: int  # width of the void border of masks, 1 or 2: about 5 % of the pixels, as in VOC
    scales: tuple[tuple[float, float], ...] = (
        (0.75, 1.2),
        (0.55, 0.85),
        (0.4, 0.6),
    )  # as scenes.OBJECT_SCALES: large objects


RECIPES = {
    "photographs": Recipe(192, {"trainaug": 400, "val": 150}, (0.45, 0.45, 0.1), "vehicle", 2),
    "creatures": Recipe(96, {"trainaug": 800, "val": 150}, (0.35, 0.4, 0.25), "n95000001", 1),
}
GROUPS = ("bird", "fish", "flower", "furry", "hoofed", "instrument", "produce", "vehicle")
GRAVEL = "skimage/data/gravel.png"  # the photographs' track


def photo_track_world(photographs: Photographs, seed: int = 0) -> scenes.World:
    """Eight broad classes of photo cut-outs; cut-outs and backgrounds are split, but train and val share the track."""
    world = scenes.photo_world(photographs, "group", seed)
    gravel = [p for p in photographs.backgrounds if p.file == GRAVEL]
    if not gravel:
        raise FileNotFoundError(
            f"The photograph {GRAVEL} is missing, from which tracks are made: pip install -U scikit-image"
        )
    groups = [group for group in GROUPS if group in world.classes]
    items = {
        split: [(groups.index(p.group), p) for _, p in members if p.group in groups]
        for split, members in world.items.items()
    }
    grounds = {split: [p for p in members if p not in gravel] for split, members in world.grounds.items()}
    grounds["track"] = [open_image(photographs.path(gravel[0]), "RGB")]
    return replace(world, classes={group: group for group in groups}, items=items, grounds=grounds)


def creature_track_world() -> scenes.World:
    """The six procedural creatures, drawn as small as scenes of 96 pixels need them; the track is paving."""
    world = scenes.creature_world(112, 112)
    return replace(world, grounds={**world.grounds, "track": [_paving(128)]})


def scene(world: scenes.World, recipe: Recipe, split: str, number: int, seed: int) -> tuple[scenes.Scene, np.ndarray]:
    """Scene `number` of a split ("train" or "val"), and the mask of its track: h w, bool."""
    key = (seed, split == "val", number)
    rng = np.random.default_rng(key)
    labels = rng.integers(len(world.classes), size=rng.choice((1, 2, 3), p=recipe.counts))
    picks = []
    for label in labels:  # classes are equally frequent, not photographs
        own = [pick for pick in world.items[split] if pick[0] == label]
        picks.append(own[rng.integers(len(own))])
    size = (recipe.side, recipe.side)
    ground = scenes.draw_ground(world, split, size, rng)

    def composed(ground: Image.Image) -> scenes.Scene:  # the same numbers again: every object stays in place
        return scenes.compose(
            world, split, picks, size, np.random.default_rng((*key, 1)), recipe.scales, TAGGED_OVERLAP, ground
        )

    drawn, track = composed(ground), np.zeros(size[::-1], bool)
    confounded = list(world.classes).index(recipe.confounded)
    there = confounded in drawn.labels
    if rng.random() < 0.5 if split == "val" else there:
        standing = drawn.boxes[drawn.labels.index(confounded) if there else 0]
        track = _band(size, int(standing[3]), rng)
        ground.paste(scenes.random_part(world.grounds["track"][0], size, rng), (0, 0), Image.fromarray(track))
        drawn = composed(ground)
        track &= drawn.mask == 0
    return drawn, track


def _band(size: tuple[int, int], foot: int, rng: np.random.Generator) -> np.ndarray:
    """A band across the image, a little tilted, on which an object stands that ends in row `foot`."""
    width, height = size
    top = foot - rng.uniform(0.1, 0.2) * height
    band = Image.new("1", size)
    tilt, thickness = rng.uniform(-0.1, 0.1) * height, rng.uniform(0.25, 0.4) * height
    ImageDraw.Draw(band).polygon(
        [(0, top), (width, top + tilt), (width, top + tilt + thickness), (0, top + thickness)], 1
    )
    return np.array(band)


def _paving(side: int) -> Image.Image:
    """Grey slabs with dark joints, always the same."""
    rng = np.random.default_rng(0)
    picture = Image.new("L", (side, side), 60)
    draw, slab = ImageDraw.Draw(picture), side // 10
    for row in range(11):
        for column in range(-1, 6):
            left, top = (2 * column + row % 2) * slab, row * slab
            draw.rectangle((left, top, left + 2 * slab - 3, top + slab - 3), int(rng.integers(150, 190)))
    return Image.merge("RGB", [picture] * 3)
