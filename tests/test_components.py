"""Regions at all levels against a slow twin that labels, fills and measures every thresholded copy by itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from course_lib.components import contour_boxes, largest_boxes

pytestmark = pytest.mark.figures

EIGHT = np.ones((3, 3), int)


def twin(image: np.ndarray, level: int) -> tuple[list[int], list[tuple[int, ...]]]:
    """Box of the largest region and sorted boxes of all contours of {image > level}."""
    height, width = image.shape
    labels, _ = ndimage.label(image > level, EIGHT)

    def box(rows: slice, columns: slice, grow: int = 0) -> tuple[int, ...]:
        return (
            columns.start - grow,
            rows.start - grow,
            min(columns.stop + grow, width - 1),
            min(rows.stop + grow, height - 1),
        )

    largest, best, every = [0, 0, 0, 0], None, []
    for label, extent in enumerate(ndimage.find_objects(labels), 1):
        region = ndimage.binary_fill_holes(labels == label)
        cells = sum(region[y : height - 1 + y, x : width - 1 + x].astype(int) for y in (0, 1) for x in (0, 1))
        area = ((cells == 4) + 0.5 * (cells == 3)).sum()
        rank = (area, np.flatnonzero(labels == label)[0])
        if best is None or rank > best:
            largest, best = list(box(*extent)), rank
        every.append(box(*extent))
    dark, _ = ndimage.label(np.pad(image <= level, 1, constant_values=True))
    for label, extent in enumerate(ndimage.find_objects(dark), 1):
        if label != dark[0, 0]:
            every.append(box(*(slice(s.start - 1, s.stop - 1) for s in extent), grow=1))
    return largest, sorted(every)


def agree(image: np.ndarray, levels=range(256)) -> None:
    largest, owner, level, box = contour_boxes(torch.from_numpy(image)[None])
    assert torch.equal(largest, largest_boxes(torch.from_numpy(image)[None]))
    assert not owner.any()
    for at in levels:
        expected, every = twin(image, at)
        assert largest[0, at].tolist() == expected, f"level {at}"
        assert sorted(map(tuple, box[level == at].tolist())) == every, f"level {at}"


def rings(size: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    distance = np.maximum(abs(y), abs(x))
    return np.where(distance % 3 == 0, 250 - 10 * distance, 40 + distance).astype(np.uint8)


def smooth(seed: int, cells: int, size: int, steps: int = 255) -> np.ndarray:
    noise = torch.rand(1, 1, cells, cells, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(noise, size, mode="bicubic")[0, 0]
    image = (image - image.min()) / (image.max() - image.min())
    return ((image * steps).int() * (255 // steps)).to(torch.uint8).numpy()


diamond = np.zeros((7, 8), np.uint8)
diamond[[1, 2, 2, 3], [3, 2, 4, 3]] = 200  # closed by its diagonals alone
line = np.zeros((9, 9), np.uint8)
line[4, 1:8] = line[range(9), range(9)] = 90
twins = np.zeros((5, 11), np.uint8)
twins[1:4, 1:4] = twins[1:4, 7:10] = 50  # equal areas, same first row


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((6, 5), np.uint8),
        np.full((6, 5), 255, np.uint8),
        np.full((1, 1), 7, np.uint8),
        np.array([[0, 3, 3, 0, 9, 255, 1]], np.uint8),
        np.array([[0, 3, 3, 0, 9, 255, 1]], np.uint8).T.copy(),
        rings(17),
        rings(23)[:, :20].copy(),
        diamond,
        line,
        twins,
        np.rot90(twins).copy(),
        np.indices((8, 8)).sum(0).astype(np.uint8) % 2 * 255,
    ],
    ids="empty full pixel row column rings cut-rings diamond lines twins stacked-twins chequered".split(),
)
def test_special_images(image):
    agree(image)


@pytest.mark.parametrize("seed", range(3))
def test_noise(seed):
    agree(np.random.default_rng(seed).integers(0, 256, (14, 17)).astype(np.uint8), range(0, 256, 7))


@pytest.mark.parametrize("steps", [3, 17, 255])
def test_smooth_maps_and_terraces(steps):
    agree(smooth(steps, 7, 40, steps), range(0, 256, 9))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_small_images_of_few_levels(height, width, top, seed):
    agree(np.random.default_rng(seed).integers(0, top + 1, (height, width)).astype(np.uint8), range(top + 1))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(0, 1))
def test_flipping_the_image_flips_the_boxes(seed, axis):
    """In coordinates that end on the last pixel; a dark border keeps the rule for borders away."""
    image = np.pad(smooth(seed, 5, 20), 2)
    box, flipped = (
        largest_boxes(torch.from_numpy(i.copy())[None])[0, ::5].numpy() for i in (image, np.flip(image, axis))
    )
    low, high = (1, 3) if axis == 0 else (0, 2)
    expected = box.copy()
    expected[:, low], expected[:, high] = 24 - box[:, high], 24 - box[:, low]
    some = [twin(image, level)[0] != [0] * 4 and len(twin(image, level)[1]) == 1 for level in range(0, 256, 5)]
    np.testing.assert_array_equal(flipped[some], expected[some])  # several regions may tie, and ties have an order


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 20), st.floats(0, 30), st.floats(1, 8))
def test_boxes_of_a_single_peak_shrink_as_the_level_rises(y, x, width):
    row, column = np.mgrid[:21, :31]
    image = (255 * np.exp(-((row - y) ** 2 + (column - x) ** 2) / width**2 / 2)).astype(np.uint8)
    box = largest_boxes(torch.from_numpy(image)[None])[0, : image.max()]
    assert (box[1:, :2] >= box[:-1, :2]).all() and (box[1:, 2:] <= box[:-1, 2:]).all()


def test_a_batch_is_its_images():
    images = torch.from_numpy(np.stack([smooth(seed, 7, 30) for seed in range(4)]))
    largest, owner, level, box = contour_boxes(images)
    for i in range(4):
        alone = contour_boxes(images[i : i + 1])
        assert torch.equal(largest[i], alone[0][0])
        assert torch.equal(level[owner == i], alone[2]) and torch.equal(box[owner == i], alone[3])


def test_no_images():
    largest, *rows = contour_boxes(torch.zeros(0, 5, 5, dtype=torch.uint8))
    assert largest.shape == (0, 256, 4) and all(len(row) == 0 for row in rows)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="Expected heatmaps of 1 x 1 to 2894 x 2894 pixels, got 0 x 4"):
        largest_boxes(torch.zeros(2, 0, 4, dtype=torch.uint8))


def test_agrees_with_opencv():
    import cv2

    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (24, 24)).astype(np.uint8)
    for image in [smooth(0, 7, 112), smooth(1, 14, 56, 17), noise, twins, line, rings(17)]:
        height, width = image.shape
        largest, _, level, box = contour_boxes(torch.from_numpy(image)[None])
        for at in range(0, 256, 3):
            contours, _ = cv2.findContours((image > at).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
            boxes = [
                (x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in map(cv2.boundingRect, contours)
            ]
            areas = [cv2.contourArea(contour) for contour in contours]
            assert tuple(largest[0, at].tolist()) == (boxes[int(np.argmax(areas))] if boxes else (0, 0, 0, 0))
            assert sorted(map(tuple, box[level == at].tolist())) == sorted(boxes)
