"""Scenes: same seed, same pixels; masks, instances and boxes say the same; nothing leaks from train to validation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.worlds import creatures, scenes

CREATURES = scenes.creature_world()


@pytest.fixture(scope="module", params=["kind", "group"])
def world(request, photos):
    return scenes.photo_world(photos, request.param)


def equal(a, b):
    return all(
        np.array_equal(getattr(a, field), getattr(b, field))
        for field in ("image", "mask", "instances", "labels", "boxes")
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.sampled_from([(96, 96), (160, 120), (90, 200)]))
def test_same_seed_same_pixels_and_everything_agrees(seed, size):
    scene = scenes.random_scene(CREATURES, "train", size, seed)
    assert equal(scene, scenes.random_scene(CREATURES, "train", size, seed))
    assert scene.image.shape == (size[1], size[0], 3) and scene.image.dtype == np.uint8
    assert 1 <= len(scene.labels) == len(scene.boxes) == scene.instances.max() <= 3
    assert ((scene.mask > 0) == (scene.instances > 0)).all()
    for i, (label, (x0, y0, x1, y1)) in enumerate(zip(scene.labels, scene.boxes, strict=True), 1):
        rows, columns = np.nonzero(scene.instances == i)
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == (x0, y0, x1, y1)
        assert set(scene.mask[scene.instances == i]) == {label + 1}


def test_other_seed_other_scene():
    assert not equal(
        scenes.random_scene(CREATURES, "train", (96, 96), 1), scenes.random_scene(CREATURES, "train", (96, 96), 2)
    )


def test_photographs_and_backgrounds_are_split(world):
    train, val = ({p.sha256 for _, p in world.items[split]} for split in ("train", "val"))
    assert train and val and not train & val
    assert not {p.sha256 for p in world.grounds["train"]} & {p.sha256 for p in world.grounds["val"]}
    for split in ("train", "val"):
        assert {label for label, _ in world.items[split]} == set(range(len(world.classes))), (
            f"a class has no photograph in {split}"
        )


def test_split_follows_its_seed(photos):
    one, other = (scenes.photo_world(photos, "kind", seed) for seed in (0, 1))
    assert one.items == scenes.photo_world(photos, "kind", 0).items
    assert one.items != other.items and one.fingerprint != other.fingerprint


def test_imagenet_world_is_for_validation_only(photos):
    world = scenes.photo_world(photos, "wnid")
    assert not world.items["train"] and len(world.items["val"]) == sum(p.wnid is not None for p in photos.cutouts)
    assert list(world.classes) == sorted(world.classes)


def test_photo_scene(world):
    """Objects keep to the limits of the compositor: size, enlargement, overlap."""
    rng = np.random.default_rng(0)
    for seed in range(10):
        scene = scenes.random_scene(world, "val", (200, 160), seed)
        assert scene.image.std() > 5
        for x0, y0, x1, y1 in scene.boxes:
            assert 0 <= x0 <= x1 < 200 and 0 <= y0 <= y1 < 160
    _, photograph = world.items["train"][0]
    cutout = world.draw(photograph, rng)
    turned = scenes._turn(cutout, 5000.0, (8000, 8000), rng)
    assert max(turned.size) <= scenes.ENLARGE * max(cutout.size) + 1, "a cut-out was enlarged beyond the limit"


def test_later_objects_hide_little():
    full = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        picks = [(0, creatures.TEXTURES[0]), (1, creatures.TEXTURES[1]), (2, creatures.TEXTURES[2])]
        scene = scenes.compose(CREATURES, "train", picks, (224, 224), rng)
        full += len(scene.labels) == 3
        areas = np.bincount(scene.instances.ravel(), minlength=4)[1 : 1 + len(scene.labels)]
        assert (areas > 150).all()
    assert full >= 20, "three objects should nearly always find their places"


@pytest.mark.parametrize("texture", creatures.TEXTURES)
def test_creature_is_drawn(texture):
    picture = np.asarray(creatures.creature(texture, 96, np.random.default_rng(0)))
    share = (picture[..., 3] > 0).mean()
    assert picture.shape == (96, 96, 4) and 0.2 < share < 0.7
