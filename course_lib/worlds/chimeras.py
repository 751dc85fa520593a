"""Chimeras: twenty classes of five heads on four bodies, asked for by name, whose parts are known.

    class = (head, body)     5 heads x 4 bodies; a head is shared by four classes, a body by five
    head                     its texture and its hue tell which of the five it is
    body                     its markings tell which of the four it is; its hue is one of five, too

How much a body tells of its class beyond its kind is the share of bodies that have the hue of their own head; the
others take one of the five at random. Hues of bodies lie between those of heads, so that no hue is both.

    level      share    best guess of the class from the body alone
    kind       0        1 of 5: nothing beyond its kind
    partly     0.5      3 of 5
    fully      1        always

No class stands on a track. Every chimera and every ground is new.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from course_lib.data.images import load_grey
from course_lib.data.voc import Voc
from course_lib.worlds import creatures, scenes
from course_lib.worlds.tagged import TAGGED_OVERLAP, Recipe

CHIMERAS_VERSION = 1  # part of the fingerprint: raise it when code makes other pixels of the same seed
CHIMERA_HEADS = ("dots", "stripes", "rings", "checker", "cross")
CHIMERA_BODIES = ("plain", "banded", "spotted", "netted")
CHIMERA_PARTS = {"head": 1, "body": 2}  # values in the masks of parts
# Share of the bodies that have the hue of their own head, by the name of the data set's source.
CHIMERA_LEVELS = {"chimeras-kind": 0.0, "chimeras-partly": 0.5, "chimeras-fully": 1.0}
CHIMERAS = {
    f"n{96000001 + len(CHIMERA_BODIES) * i + j}": f"{head} on {body}"
    for i, head in enumerate(CHIMERA_HEADS)
    for j, body in enumerate(CHIMERA_BODIES)
}
# One or two objects a scene; of 64 pixels, so that networks learn on a CPU what twenty classes need.
CHIMERA_RECIPE = Recipe(64, {"trainaug": 800, "val": 150}, (0.4, 0.6, 0.0), "", 1)
HUE_NOISE = 0.02  # standard deviation; hues of heads are 0.2 apart, those of bodies 0.1 from them
PICTURE, GROUND = 96, 112  # sides of the pictures that scenes are made of, pixels


def chimera(
    head: int, body: int, tells: float, rng: np.random.Generator, side: int = PICTURE
) -> tuple[Image.Image, Image.Image]:
    """One chimera as RGBA, and its parts: of the same shape, red where its head is, blue where its body is.

    Args:
        head, body: places in CHIMERA_HEADS and CHIMERA_BODIES.
        tells: share of bodies that have the hue of their own head.
        side: of the pictures, pixels.
    """
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j].astype(np.float32)
    shape = creatures.silhouette(x, y, rng)
    own, other = rng.random() < tells, int(rng.integers(len(CHIMERA_HEADS)))
    hue = ((head if own else other) + 0.5) / len(CHIMERA_HEADS) + rng.normal(0, HUE_NOISE)
    light = np.where(markings(CHIMERA_BODIES[body], x, y), 1.0, 0.45) * (
        0.6 + 0.4 * creatures.noise((side, side), (10, 10), rng)
    )
    body_colour = creatures.shade(hue, 0.6, light)

    centre, radius = rng.uniform((0.2, 0.22), (0.28, 0.32)), rng.uniform(0.17, 0.21)
    u, v = (x - centre[0]) / radius, (y - centre[1]) / radius  # -1..1 inside the head
    front = np.hypot(u, v) < 1
    texture = creatures.pattern(CHIMERA_HEADS[head], u, v)
    hue = head / len(CHIMERA_HEADS) + rng.normal(0, HUE_NOISE)
    head_colour = creatures.shade(hue, 0.9, np.where(texture, 0.95, 0.3))

    parts = np.where(front[..., None], (255.0, 0.0, 0.0), (0.0, 0.0, 255.0))
    return tuple(
        Image.fromarray(np.dstack([colour, (front | shape) * 255.0]).clip(0, 255).astype(np.uint8), "RGBA")
        for colour in (np.where(front[..., None], head_colour, body_colour), parts)
    )


def markings(
    body: str, x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"] | np.ndarray:
    """Where the markings of a body are light, at places (x, y) in 0..1 of its picture."""
    return {
        "plain": np.ones_like(x, bool),
        "banded": (x * 7) % 1 < 0.5,
        "spotted": np.hypot((x * 7) % 1 - 0.5, (y * 7) % 1 - 0.5) > 0.35,
        "netted": ((x + y) * 5 % 1 > 0.25) & ((x - y) * 5 % 1 > 0.25),
    }[body]


def chimera_world(tells: float, part: int = 0) -> scenes.World:
    """Twenty classes; class i is head i // 4 on body i % 4.

    Args:
        tells: share of bodies that have the hue of their own head, 0..1.
        part: 0 draws chimeras, 1 their parts, with the same random numbers.
    """
    items = [(label, divmod(label, len(CHIMERA_BODIES))) for label in range(len(CHIMERAS))]
    return scenes.World(
        CHIMERAS,
        {"train": items, "val": items},
        {"train": ["ground"], "val": ["ground"]},
        draw=lambda kinds, rng: chimera(*kinds, tells, rng)[part],
        draw_ground=lambda _, rng: creatures.ground(GROUND, rng),
        fingerprint=scenes.world_fingerprint("chimeras", CHIMERAS_VERSION, tells, HUE_NOISE, PICTURE, GROUND),
    )


def chimera_scene(
    tells: float, split: str, number: int, seed: int, recipe: Recipe = CHIMERA_RECIPE
) -> tuple[scenes.Scene, UInt8[np.ndarray, "h w"]]:
    """Scene `number` of a split ("train" or "val"), and its parts: 0, 1 where a head is seen, 2 where a body is."""
    key = (seed, split == "val", number)
    rng = np.random.default_rng(key)
    world, size = chimera_world(tells), (recipe.side, recipe.side)
    count = rng.choice((1, 2, 3), p=recipe.counts)
    picks = [world.items[split][i] for i in rng.integers(len(world.classes), size=count)]
    ground = scenes.draw_ground(world, split, size, rng)

    def composed(world: scenes.World, ground: Image.Image) -> scenes.Scene:  # the same numbers: objects stay in place
        return scenes.compose(
            world, split, picks, size, np.random.default_rng((*key, 1)), recipe.scales, TAGGED_OVERLAP, ground
        )

    drawn = composed(world, ground)
    colours = composed(chimera_world(tells, 1), Image.new("RGB", size)).image
    parts = np.where(colours[..., 0] > colours[..., 2], CHIMERA_PARTS["head"], CHIMERA_PARTS["body"])
    return drawn, np.where(drawn.instances > 0, parts, 0).astype(np.uint8)


def part_mask(data: Voc, index: int) -> UInt8[Tensor, "h w"]:
    """Parts of an image of chimeras, as CHIMERA_PARTS; 0 elsewhere."""
    return load_grey(Path(data.root) / "Parts" / f"{data.ids[index]}.png")


def shared_part(labels: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Whether two classes (from 0) share a head, a body, or neither; a class with itself is none of these."""
    bodies = len(CHIMERA_BODIES)
    head, body = labels // bodies == others // bodies, labels % bodies == others % bodies
    return {"head": head & ~body, "body": body & ~head, "neither": ~head & ~body}
