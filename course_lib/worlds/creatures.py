"""The second source of objects: procedural creatures, asked for by name (`source="creatures"`), no silent fallback.

A controlled world: the textured round head carries the class, the noisy body and its legs say little, and the ground is
noise. It needs no photograph and no package, and a map that finds only heads can be caught doing so.
"""

import colorsys

import numpy as np
from jaxtyping import Bool, Float, Float32
from PIL import Image

TEXTURES = ("dots", "stripes", "rings", "checker", "cross", "grid")
CREATURES = {f"n{95000001 + i}": f"{texture} creature" for i, texture in enumerate(TEXTURES)}
HEAD_HUE, BODY_HUE = 0.15, 0.06  # spread around the class's hue: the body is a weak hint, the head's texture the proof


def creature(texture: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One creature as RGBA, `side` x `side` pixels, drawn with the given generator.

    Args:
        texture: of the head, one of TEXTURES.
    """
    hue = TEXTURES.index(texture) / len(TEXTURES)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j].astype(np.float32)

    body = silhouette(x, y, rng)
    body_colour = shade(hue + rng.normal(0, BODY_HUE), 0.45, 0.35 + 0.5 * noise((side, side), (10, 10), rng))

    centre, radius = rng.uniform((0.2, 0.22), (0.28, 0.32)), rng.uniform(0.17, 0.21)
    u, v = (x - centre[0]) / radius, (y - centre[1]) / radius  # -1..1 inside the head
    head = np.hypot(u, v) < 1
    head_colour = shade(hue + rng.normal(0, HEAD_HUE), 0.8, np.where(pattern(texture, u, v), 0.95, 0.3))

    colour = np.where(head[..., None], head_colour, body_colour)
    picture = np.dstack([colour, (head | body) * 255.0])
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8), "RGBA")


def silhouette(
    x: Float32[np.ndarray, "h w"], y: Float32[np.ndarray, "h w"], rng: np.random.Generator
) -> Bool[np.ndarray, "h w"]:
    """Where the body with its legs is, at places (x, y) in 0..1 of a creature's picture."""
    angle = np.arctan2(y - 0.55, x - 0.58)
    waves = sum(rng.uniform(-0.06, 0.06) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in range(2, 6))
    body = np.hypot((x - 0.58) / 0.36, (y - 0.55) / 0.24) < 1 + waves
    for leg in (0.36, 0.58, 0.80):
        foot = leg + rng.uniform(-0.05, 0.05)
        body |= (np.abs(x - leg - (foot - leg) * (y - 0.6) / 0.38) < 0.035) & (y > 0.6) & (y < 0.98)
    return body


def pattern(texture: str, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where a texture is light, at places (u, v) in -1..1 of a head."""
    return {
        "dots": np.hypot((u * 1.6) % 1 - 0.5, (v * 1.6) % 1 - 0.5) < 0.3,
        "stripes": (v * 1.8) % 1 < 0.5,
        "rings": (np.hypot(u, v) * 2.2) % 1 < 0.5,
        "checker": ((u * 1.5) % 1 < 0.5) ^ ((v * 1.5) % 1 < 0.5),
        "cross": (np.abs(u) < 0.25) | (np.abs(v) < 0.25),
        "grid": ((u * 2) % 1 < 0.25) | ((v * 2) % 1 < 0.25),
    }[texture]


def ground(side: int, rng: np.random.Generator) -> Image.Image:
    """A background as RGB: smooth two-colour noise with a few soft blobs."""
    low, high = (shade(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.3, 0.9)) for _ in range(2))
    mix = noise((side, side), (6, 6), rng)[..., None]
    picture = low * (1 - mix) + high * mix  # side side 3
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    for _ in range(rng.integers(3, 8)):
        blob = np.exp(-(np.hypot(x - rng.uniform(), y - rng.uniform()) ** 2) / rng.uniform(0.002, 0.02))[..., None]
        picture = picture * (1 - 0.7 * blob) + shade(rng.uniform(), 0.6, rng.uniform(0.4, 0.9)) * 0.7 * blob
    return Image.fromarray(np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8), "RGB")


def noise(shape: tuple[int, int], cells: tuple[int, int], rng: np.random.Generator) -> Float32[np.ndarray, "h w"]:
    """Smooth noise in 0..1: a grid of so many cells, each random, enlarged to `shape` = (height, width)."""
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)).clip(0, 1)


def shade(hue: float, saturation: float, value: float | np.ndarray) -> np.ndarray:
    """RGB 0..255 of one hue at many brightnesses, with a last axis of 3."""
    return np.asarray(colorsys.hsv_to_rgb(hue % 1, saturation, 1)) * np.asarray(value)[..., None] * 255
