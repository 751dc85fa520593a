"""Paper dolls: pedestrians whose identity lies in the clothes, in head and bag, or in both; with exact part masks.

Networks that tell persons apart are said to look at the clothes. Here the question has a known answer: in the world
"clothes" two images show the same person if and only if they show the same clothes, while hair, hat and bag are drawn
anew for every image; in the world "head" it is the other way round. All dolls are cut from the same paper, so that skin
says nothing.

Six cameras see them: each has its own street, its own light and colour cast, and sees people larger or smaller, more
often from the front or from behind. Everything is drawn four times too large and averaged down, which smooths edges.
"""

import colorsys
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFilter

from course_lib.worlds.creatures import noise

DOLLS_VERSION = 1  # part of every fingerprint: raise it when code makes other pixels of the same seed
IDENTITIES = ("clothes", "head", "both")
WIDTH, HEIGHT, FINE = 64, 128, 4  # pixels, and how many fine ones make one
HEAD, TORSO, LEGS, BAG = 1, 2, 3, 4  # parts in the masks: head with hair and hat, torso with arms, legs with shoes
TRAIN, TEST, DISTRACTORS, JUNK = 60, 32, 24, 16  # identities, identities, images, images
SHOTS = {"train": 5, "query": 1, "gallery": 3}  # of an identity; of an identity and camera; likewise

NECK, HEAD_SIZE = 0.165, 1.25  # where the head begins, and its magnification: small ones are lost on 8 x 4 cells
SKIN = (226, 190, 155)
PAINTS = tuple(
    map(
        ImageColor.getrgb,
        "#c92c34 #e87828 #f0c83c #96be3c #288246 #28a0a0 #6eb4e6 #2850b4 #6e3ca0 "
        "#e16ea5 #784b2d #f0f0eb #8c9196 #2d2d37".split(),
    )
)
PATTERNS = ("plain", "hoops", "stripes", "dots", "checks", "band")
HAIR = ("short", "bob", "long", "bun", "curls")
HATS = ("none", "cap", "beanie", "brim")
BAGS = ("backpack", "satchel", "handbag", "tote")


@dataclass(frozen=True)
class Clothes:
    """What torso and legs wear; colours are RGB."""

    top: tuple[int, int, int]
    trim: tuple[int, int, int]  # second colour of the pattern
    pattern: str
    long_sleeves: bool
    bottom: str  # "trousers", "shorts" or "skirt"
    bottom_colour: tuple[int, int, int]
    shoes: tuple[int, int, int]


@dataclass(frozen=True)
class Head:
    """Hair, hat and bag."""

    hair: str
    hair_colour: tuple[int, int, int]
    hat: str
    hat_colour: tuple[int, int, int]
    bag: str
    bag_colour: tuple[int, int, int]


@dataclass(frozen=True)
class Pose:
    """How a doll stands in the image; angles in degrees."""

    height: float = 104.0  # of the doll, pixels
    x: float = 32.0  # of its middle
    y: float = 14.0  # of the top of its head without hat or bun
    back: bool = False  # seen from behind
    mirrored: bool = False
    stride: float = 8.0
    arms: tuple[float, float] = (12.0, 15.0)
    elbows: tuple[float, float] = (10.0, 10.0)


@dataclass(frozen=True)
class Camera:
    """What one of the six cameras does to every picture."""

    light: tuple[float, float, float]  # gain of red, green and blue
    haze: float  # share of grey mixed in, 0..1
    blur: float  # pixels
    noise: float  # standard deviation, of 255
    height: tuple[int, int]  # of the dolls, pixels
    back: float  # share of dolls seen from behind
    side: float  # side from which the light comes, -1 (left) to 1
    wall: str
    ground: str
    hues: tuple[float, float]  # of wall and ground


CAMERAS = (
    Camera((1.10, 1.00, 0.84), 0.05, 0.3, 3.0, (98, 110), 0.2, 0.8, "bricks", "slabs", (0.04, 0.10)),  # evening sun
    Camera((0.86, 0.97, 1.12), 0.08, 0.4, 4.0, (92, 104), 0.8, -0.5, "windows", "asphalt", (0.58, 0.62)),  # cold shade
    Camera((0.70, 0.68, 0.72), 0.00, 0.6, 7.0, (95, 107), 0.5, 0.3, "concrete", "slabs", (0.10, 0.08)),  # dusk
    Camera((1.18, 1.16, 1.10), 0.10, 0.3, 3.0, (88, 101), 0.3, -0.8, "hedge", "grass", (0.28, 0.24)),  # glaring noon
    Camera((0.90, 1.05, 0.88), 0.06, 0.5, 5.0, (100, 112), 0.7, 0.0, "tiles", "asphalt", (0.45, 0.40)),  # neon
    Camera((0.92, 0.92, 0.95), 0.25, 0.7, 4.0, (91, 105), 0.5, 0.2, "windows", "slabs", (0.95, 0.12)),  # fog
)


def random_clothes(rng: np.random.Generator) -> Clothes:
    """Random clothes."""
    top, trim = rng.choice(len(PAINTS), 2, replace=False)
    return Clothes(
        PAINTS[top],
        PAINTS[trim],
        str(rng.choice(PATTERNS)),
        bool(rng.random() < 0.6),
        str(rng.choice(("trousers", "shorts", "skirt"), p=(0.6, 0.2, 0.2))),
        _colour(rng),
        _colour(rng),
    )


def random_head(rng: np.random.Generator) -> Head:
    """Random hair, hat and bag."""
    return Head(
        str(rng.choice(HAIR)), _colour(rng), str(rng.choice(HATS)), _colour(rng), str(rng.choice(BAGS)), _colour(rng)
    )


def random_pose(camera: Camera, rng: np.random.Generator) -> Pose:
    """A random pose as this camera sees it."""
    height = rng.uniform(*camera.height)
    return Pose(
        height,
        WIDTH / 2 + rng.uniform(-4, 4),
        (HEIGHT - height) * rng.uniform(0.55, 0.85),
        bool(rng.random() < camera.back),
        bool(rng.random() < 0.5),
        rng.uniform(1, 14),
        tuple(rng.uniform(4, 28, 2)),
        tuple(rng.uniform(0, 30, 2)),
    )


def draw(
    clothes: Clothes, head: Head, pose: Pose
) -> tuple[UInt8[np.ndarray, "height width 4"], UInt8[np.ndarray, "height width"]]:
    """A doll on nothing, and its parts.

    Returns:
        RGB and opacity, and the part that covers most of each pixel; 128 x 64 pixels.
    """
    sheet = _Sheet(pose)
    skin = {part: sheet.ink(part, SKIN) for part in (HEAD, TORSO, LEGS)}
    top, trim = sheet.ink(TORSO, clothes.top), sheet.ink(TORSO, clothes.trim)
    hair, bag = sheet.ink(HEAD, head.hair_colour), sheet.ink(BAG, head.bag_colour)
    if head.bag == "backpack" and not pose.back:  # what lies behind is drawn first
        sheet.rounded(bag, -0.155, 0.215, 0.155, 0.48)
    if head.hair == "long" and not pose.back:
        sheet.rounded(hair, -0.1, 0.06, 0.1, 0.3)
    _draw_legs(sheet, clothes, skin[LEGS])
    hand = _draw_torso(sheet, clothes, head, top, skin, bag)
    _draw_bag(sheet, head.bag, hand, bag)
    _draw_head(sheet, head, hair, skin[HEAD])
    return sheet.picture(top, trim, clothes.pattern)


def _draw_legs(sheet: "_Sheet", clothes: Clothes, skin: int) -> None:
    bottom, shoes = sheet.ink(LEGS, clothes.bottom_colour), sheet.ink(LEGS, clothes.shoes)
    swing = np.radians(sheet.pose.stride)
    for side in (-1, 1):
        hip, knee = (0.045 * side, 0.52), (0.045 * side + side * 0.21 * np.sin(swing), 0.73)
        ankle = (knee[0] + side * 0.2 * np.sin(swing * 0.7), 0.94)
        sheet.limb(bottom if clothes.bottom == "trousers" else skin, 0.082, hip, knee, ankle)
        if clothes.bottom == "shorts":
            sheet.limb(bottom, 0.1, hip, ((hip[0] + knee[0]) / 2, 0.66))
        heel, toe = (0.005, 0.025) if side > 0 else (-0.025, -0.005)
        sheet.limb(shoes, 0.05, (ankle[0] + heel, 0.966), (ankle[0] + toe, 0.966))
    if clothes.bottom == "skirt":
        wide = 0.13 + 0.1 * np.sin(swing)
        sheet.polygon(bottom, (-0.085, 0.47), (0.085, 0.47), (wide, 0.74), (-wide, 0.74))
    else:
        sheet.rounded(bottom, -0.09, 0.46, 0.09, 0.56)


def _draw_torso(sheet: "_Sheet", clothes: Clothes, head: Head, top: int, skin: dict[int, int], bag: int) -> np.ndarray:
    """Neck, torso, the strap that arms cover, arms; returns where the bag hand is."""
    sheet.limb(skin[HEAD], 0.055, (0.0, 0.14), (0.0, 0.21))
    right = ((0.095, 0.2), (0.118, 0.235), (0.085, 0.38), (0.097, 0.5))
    corner, *left = ((-x, y) for x, y in right)
    sheet.polygon(top, corner, *right, *reversed(left))
    if head.bag == "satchel":
        sheet.limb(bag, 0.026, (-0.09, 0.2), (0.1, 0.46))
    for side, arm, elbow in zip((-1, 1), np.radians(sheet.pose.arms), np.radians(sheet.pose.elbows)):
        shoulder = np.array((0.105 * side, 0.235))
        middle = shoulder + 0.15 * np.array((side * np.sin(arm), np.cos(arm)))
        hand = middle + 0.14 * np.array((side * np.sin(arm - elbow), np.cos(arm - elbow)))
        sheet.limb(skin[TORSO], 0.046, middle, hand)
        wrist, short = (middle + 3 * hand) / 4, (shoulder + 2 * middle) / 3
        sheet.limb(top, 0.062, *((shoulder, middle, wrist) if clothes.long_sleeves else (shoulder, short)))
    return hand


def _draw_bag(sheet: "_Sheet", bag: str, hand: np.ndarray, ink: int) -> None:
    if bag == "backpack" and sheet.pose.back:
        sheet.rounded(ink, -0.1, 0.2, 0.1, 0.47)
        sheet.rounded(ink, -0.07, 0.34, 0.07, 0.45)
    elif bag == "backpack":
        for side in (-1, 1):
            sheet.limb(ink, 0.024, (0.065 * side, 0.2), (0.08 * side, 0.38))
    elif bag == "satchel":
        sheet.rounded(ink, 0.045, 0.43, 0.205, 0.57)
    elif bag == "handbag":
        x, y = hand
        sheet.limb(ink, 0.016, (x - 0.04, y + 0.06), (x, y), (x + 0.04, y + 0.06))
        sheet.rounded(ink, x - 0.08, y + 0.05, x + 0.08, y + 0.17)
    else:
        sheet.limb(ink, 0.022, (0.1, 0.2), (0.15, 0.4))
        sheet.rounded(ink, 0.075, 0.35, 0.215, 0.55)


def _draw_head(sheet: "_Sheet", head: Head, hair: int, skin: int) -> None:
    hat, face, back = sheet.ink(HEAD, head.hat_colour), sheet.ink(HEAD, (60, 40, 40)), sheet.pose.back
    sheet.zoom = HEAD_SIZE
    sheet.ellipse(hair if back else skin, -0.062, 0.02, 0.062, 0.168)
    if head.hair == "curls":
        for angle in np.radians(np.arange(0, 360, 20) if back else np.arange(-200, 21, 20)):
            x, y = 0.066 * np.cos(angle), 0.085 + 0.068 * np.sin(angle)
            sheet.ellipse(hair, x - 0.032, y - 0.032, x + 0.032, y + 0.032)
    sheet.chord(hair, 200, 340, -0.066, 0.012, 0.066, 0.17)  # hair over the upper part of the head
    if head.hair in ("bob", "long"):
        end = 0.175 if head.hair == "bob" else 0.28
        if back:
            sheet.rounded(hair, -0.078, 0.06, 0.078, end)
        else:
            for side in (-1, 1):
                sheet.limb(hair, 0.032, (0.062 * side, 0.08), (0.07 * side, end - 0.015))
    if head.hair == "bun":
        sheet.ellipse(hair, -0.04, -0.035, 0.04, 0.035)
    if not back:
        for x, y, radius in ((-0.024, 0.1, 0.009), (0.024, 0.1, 0.009), (0.0, 0.138, 0.007)):  # eyes and mouth
            sheet.pen.ellipse(sheet.corners(x - radius, y - radius, x + radius, y + radius), face)
    if head.hat == "cap":
        sheet.chord(hat, 180, 360, -0.068, 0.0, 0.068, 0.13)
        sheet.limb(hat, 0.018, (-0.03, 0.064), (0.1, 0.064))
    elif head.hat == "beanie":
        sheet.chord(hat, 180, 360, -0.07, -0.015, 0.07, 0.15)
        sheet.ellipse(hat, -0.022, -0.04, 0.022, 0.005)
    elif head.hat == "brim":
        sheet.chord(hat, 180, 360, -0.058, -0.02, 0.058, 0.12)
        sheet.limb(hat, 0.022, (-0.105, 0.052), (0.105, 0.052))


class _Sheet:
    """A large sheet of inks. Coordinates: 0 is the middle and the top of a doll, 1 its height; a box is x0 y0 x1 y1."""

    def __init__(self, pose: Pose):
        self.scale, self.pose, self.zoom = pose.height * FINE, pose, 1.0
        self.image = Image.new("L", (WIDTH * FINE, HEIGHT * FINE))
        self.pen = ImageDraw.Draw(self.image)
        self.parts, self.colours = [0], [(0, 0, 0, 0)]  # of each ink; the colours with their opacity
        self.edge = 0.55 * FINE  # width of the dark outline of every piece of paper

    def ink(self, part: int, colour: tuple[int, int, int]) -> int:
        """The number of a new ink; the next number is its dark outline."""
        self.parts += [part, part]
        self.colours += [(*colour, 255), (*(round(0.55 * value) for value in colour), 255)]
        return len(self.parts) - 2

    def at(self, x: float, y: float) -> tuple[float, float]:
        x, y = self.zoom * x, NECK + self.zoom * (y - NECK)
        x = -x if self.pose.mirrored else x
        return self.pose.x * FINE + x * self.scale, self.pose.y * FINE + y * self.scale

    def corners(self, x0: float, y0: float, x1: float, y1: float) -> tuple:
        (left, top), (right, bottom) = self.at(x0, y0), self.at(x1, y1)
        return min(left, right), top, max(left, right), bottom

    def limb(self, ink: int, width: float, *points: tuple | np.ndarray) -> None:
        points, width = [self.at(*point) for point in points], width * self.zoom * self.scale
        for number, radius in ((ink + 1, width / 2 + self.edge), (ink, width / 2)):
            self.pen.line(points, number, round(2 * radius), joint="curve")
            for x, y in points:
                self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), number)

    def polygon(self, ink: int, *points: tuple) -> None:
        points = [self.at(*point) for point in points]
        self.pen.polygon(points, ink)
        self.pen.line([*points, points[0]], ink + 1, round(1.5 * self.edge), joint="curve")

    def rounded(self, ink: int, *box: float) -> None:
        self.pen.rounded_rectangle(self.corners(*box), 0.025 * self.scale, ink, ink + 1, round(self.edge))

    def ellipse(self, ink: int, *box: float) -> None:
        self.pen.ellipse(self.corners(*box), ink, ink + 1, round(self.edge))

    def chord(self, ink: int, start: int, end: int, *box: float) -> None:
        """A part of an ellipse, between two angles in degrees."""
        self.pen.chord(self.corners(*box), start, end, ink, ink + 1, round(self.edge))

    def picture(self, top: int, trim: int, pattern: str) -> tuple[np.ndarray, np.ndarray]:  # h w 4, h w
        """Colours with opacity and parts, averaged down, once the pattern is printed on the ink of the top."""
        inks = np.array(self.image)
        rows, columns = np.nonzero(inks == top)
        # To the right of the doll's middle and below its top, in heights.
        u, v = (columns - self.pose.x * FINE) / self.scale, (rows - self.pose.y * FINE) / self.scale
        printed = {
            "plain": np.zeros(len(u), bool),
            "hoops": v * 16 % 1 < 0.45,
            "stripes": (u * 18 + 0.25) % 1 < 0.45,
            "dots": np.hypot(u * 17 % 1 - 0.5, v * 17 % 1 - 0.5) < 0.3,
            "checks": (u * 11 % 1 < 0.5) ^ (v * 11 % 1 < 0.5),
            "band": (v > 0.3) & (v < 0.38),
        }[pattern]
        inks[rows[printed], columns[printed]] = trim
        picture = Image.fromarray(np.array(self.colours, np.uint8)[inks]).reduce(FINE)
        parts = np.array(self.parts)[inks]
        share = [Image.fromarray((parts == part) * np.uint8(255)).reduce(FINE) for part in range(BAG + 1)]
        return np.asarray(picture), np.stack(share).argmax(0).astype(np.uint8)


def street(camera: Camera, rng: np.random.Generator) -> Float32[np.ndarray, "height length 3"]:
    """The panorama that a camera sees without people, 0..255, before its light; 128 x 480 pixels."""
    length, horizon = 480, round(HEIGHT * 0.68)
    y, x = np.mgrid[:HEIGHT, :length].astype(np.float32)
    wall, ground = (
        np.asarray(colorsys.hsv_to_rgb(*tone), np.float32) * 255
        for tone in zip(camera.hues, rng.uniform(0.15, 0.4, 2), rng.uniform(0.5, 0.75, 2))
    )

    def rough(cell: int) -> np.ndarray:  # h w, in 0..1, with features of so many pixels
        return noise((HEIGHT, length), (HEIGHT // cell + 1, length // cell + 1), rng)

    light = 0.85 + 0.3 * (rough(6) * 0.5 + rough(2) * 0.5)
    tone = {
        "bricks": np.where(((y % 6 < 1) | ((x + 6 * (y // 6 % 2)) % 12 < 1)), 1.25, 0.9),
        "windows": np.where((x % 40 > 8) & (x % 40 < 32) & (y % 44 > 8) & (y % 44 < 36), 0.55, 1.0),
        "concrete": np.where((x % 60 < 1.5) | (y % 48 < 1.5), 0.8, 1.0),
        "hedge": 0.6 + 0.35 * rough(9) + 0.25 * rough(3),
        "tiles": np.where((x % 10 < 1) | (y % 10 < 1), 0.75, 1.05),
    }[camera.wall]
    depth = (y - horizon).clip(0) + 4
    floor = {
        "slabs": np.where(((x - length / 2) / depth * 6 % 4 < 0.3) | (np.log(depth) * 4 % 1 < 0.12), 0.8, 1.0),
        "asphalt": 0.75 + 0.1 * rough(2),
        "grass": 0.7 + 0.35 * rough(3),
    }[camera.ground]
    picture = np.where((y < horizon)[..., None], wall * tone[..., None], ground * floor[..., None])
    picture *= light[..., None]
    for _ in range(9):  # doors, posters, bins: things of any colour
        width, height, left = rng.integers(8, 26), rng.integers(12, 60), rng.integers(0, length - 30)
        low = horizon + rng.integers(0, 6) if rng.random() < 0.6 else rng.integers(height, horizon)
        picture[max(0, low - height) : low, left : left + width] *= 0.3
        picture[max(0, low - height) : low, left : left + width] += 0.7 * np.asarray(_colour(rng))
    return picture.clip(0, 255).astype(np.float32)


def photograph(
    doll: UInt8[np.ndarray, "height width 4"],
    pose: Pose,
    camera: Camera,
    street: Float32[np.ndarray, "height length 3"],
    rng: np.random.Generator,
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture that a camera takes of a doll somewhere in its street."""
    left = rng.integers(street.shape[1] - WIDTH)
    picture = street[:, left : left + WIDTH].copy()
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    foot = pose.y + 0.975 * pose.height
    picture *= (1 - 0.45 * np.exp(-(((x - pose.x) / 14) ** 2) - ((y - foot) / 4) ** 2))[..., None]  # its shadow
    shade = 1 + 0.18 * camera.side * ((x - pose.x) / 14).clip(-1, 1)
    colour, opacity = doll[..., :3] * shade[..., None], doll[..., 3:] / np.float32(255)
    picture = picture * (1 - opacity) + colour * opacity
    picture = picture * (np.asarray(camera.light) * rng.uniform(0.9, 1.1)).astype(np.float32)
    picture = picture * (1 - camera.haze) + 170 * camera.haze
    blurred = Image.fromarray(picture.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(camera.blur))
    return (np.asarray(blurred) + rng.normal(0, camera.noise, picture.shape)).clip(0, 255).astype(np.uint8)


def market(
    identity: str, seed: int
) -> Iterator[tuple[str, str, UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]]:
    """All images of a miniature Market-1501: split, file name without ending, picture, parts.

    Args:
        identity: "clothes", "head" or "both": what is the same in all images of a person.
    """
    rng = np.random.default_rng((seed, IDENTITIES.index(identity)))
    streets = [street(camera, rng) for camera in CAMERAS]
    numbers = rng.permutation(TRAIN + TEST) + 1  # identities of training and testing alternate
    frame = 0

    def shoot(
        number: int, person: tuple[Clothes, Head], camera: int, detection: int
    ) -> tuple[str, np.ndarray, np.ndarray]:
        nonlocal frame
        frame += int(rng.integers(5, 60))
        own = (
            random_clothes(rng) if identity == "head" else person[0],
            random_head(rng) if identity == "clothes" else person[1],
        )
        stance = random_pose(CAMERAS[camera], rng)
        if number == -1:  # a box that cuts a piece out of a person
            stance = replace(
                stance,
                height=stance.height * rng.uniform(1.5, 2.2),
                x=stance.x + rng.choice((-22, 22)),
                y=rng.uniform(-80, 30),
            )
        if number == 0:  # a box without a person, or with the edge of one
            stance = replace(stance, x=stance.x + rng.choice((-1, 1)) * rng.uniform(32, 80))
        doll, parts = draw(*own, stance)
        name = f"{number:04}" if number >= 0 else "-1"
        return (
            f"{name}_c{camera + 1}s{1 + frame // 5000}_{frame:06}_{detection:02}",
            photograph(doll, stance, CAMERAS[camera], streets[camera], rng),
            parts,
        )

    for position, number in enumerate(numbers.tolist()):
        person = random_clothes(rng), random_head(rng)
        cameras = rng.permutation(len(CAMERAS)).tolist()
        if position < TRAIN:  # of as many cameras: or a network learns the street
            for shot in range(SHOTS["train"]):
                yield "train", *shoot(number, person, cameras[shot % len(cameras)], shot + 1)
            continue
        for camera in cameras[: rng.choice((2, 3, 3, 4))]:
            yield "query", *shoot(number, person, camera, 0)
            for shot in range(SHOTS["gallery"]):
                yield "gallery", *shoot(number, person, camera, shot + 1)
    for shot in range(JUNK + DISTRACTORS):
        stranger = random_clothes(rng), random_head(rng)
        yield "gallery", *shoot(-1 if shot < JUNK else 0, stranger, int(rng.integers(len(CAMERAS))), 5)


def market_fingerprint(identity: str, seed: int) -> str:
    """What a miniature is made from, in 12 letters."""
    settings = (DOLLS_VERSION, CAMERAS, PAINTS, TRAIN, TEST, DISTRACTORS, JUNK, sorted(SHOTS.items()), identity, seed)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    return PAINTS[rng.integers(len(PAINTS))]
