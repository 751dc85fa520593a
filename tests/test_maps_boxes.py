"""maps.box: the rule of the WSOL benchmark, on heatmaps whose boxes can be read off."""

import pytest
import torch

from course_lib import maps

pytestmark = pytest.mark.figures


def test_an_empty_heatmap_gives_zeros():
    for threshold in (0.0, 0.2, 1.0):
        assert maps.box(torch.zeros(3, 3), threshold).tolist() == [0, 0, 0, 0]


def test_corners_lie_one_past_the_last_pixel_except_at_the_border():
    heatmap = torch.zeros(2, 8, 10)
    heatmap[0, 2:5, 3:7] = 1
    heatmap[1, 2:8, 3:10] = 1
    assert maps.box(heatmap, 0.2).tolist() == [[3, 2, 7, 5], [3, 2, 9, 7]]


def test_the_threshold_is_a_share_of_the_maximum_and_strict():
    heatmap = torch.zeros(9, 9)
    heatmap[1:8, 1:8] = 51 / 255  # 51 = int(0.2 * 255) is not above the threshold
    heatmap[3:6, 3:6] = 1
    assert maps.box(heatmap, 0.2).tolist() == [3, 3, 6, 6]
    assert maps.box(heatmap, 0.19).tolist() == [1, 1, 8, 8]
    assert maps.box(heatmap, 1.0).tolist() == [0, 0, 0, 0]
    assert maps.box(heatmap / 2, 0.3).tolist() == [3, 3, 6, 6]


def test_largest_is_measured_with_holes_filled():
    heatmap = torch.zeros(20, 30)
    heatmap[1:13, 1:13] = 1
    heatmap[2:12, 2:12] = 0  # a ring of 44 pixels around 100
    heatmap[10:19, 15:24] = 1  # a block of 81 pixels
    assert maps.box(heatmap, 0.5).tolist() == [1, 1, 13, 13]


def test_leading_dimensions_are_kept():
    heatmap = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    box = maps.box(heatmap, 0.5)
    assert box.shape == (2, 3, 4)
    assert torch.equal(box[1, 2], maps.box(heatmap[1, 2], 0.5))


def test_a_percentage_is_refused():
    with pytest.raises(ValueError, match="A percentage such as 20 is written 0.2"):
        maps.box(torch.zeros(4, 4), 20.0)
