"""Localisation metrics against figures worked out by hand and against slow twins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_components import twin

from course_lib import maps
from course_lib.evaluate import localization
from course_lib.evaluate.localization import (
    CENTRE_SHARES,
    DELTAS,
    HEATMAP_THRESHOLDS,
    MaxBoxAcc,
    PxAP,
    baseline_boxes,
    iou,
    squash_boxes,
)

pytestmark = pytest.mark.figures


def boxes(*rows):
    return torch.tensor(rows)


def scene(images: int = 5, size: int = 28, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    heatmaps = maps.heatmap(torch.randn(images, 7, 7, generator=generator), size)
    low = torch.randint(0, size // 2, (images, 2, 2), generator=generator)
    truth = torch.cat((low, low + torch.randint(4, size // 2, (images, 2, 2), generator=generator)), -1)
    return heatmaps, [t[: 1 + i % 2] for i, t in enumerate(truth)]


def test_iou_counts_both_corners():
    assert iou(boxes([1, 2, 5, 6]), boxes([3, 1, 4, 5])).item() == pytest.approx(8 / 27)
    assert iou(boxes([0, 0, 0, 0]), boxes([0, 0, 0, 0])).item() == 1
    assert iou(boxes([0, 0, 1, 1]), boxes([2, 0, 3, 1])).item() == 0


def test_iou_without_a_union_is_zero():
    assert iou(boxes([0, 0, -1, -1]), boxes([0, 0, -1, 5])).item() == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=2, max_size=2))
def test_iou_is_the_share_of_common_pixels(corners):
    masks = np.zeros((2, 20, 20), bool)
    both = [(x, y, x + w, y + h) for x, y, w, h in corners]
    for mask, (x0, y0, x1, y1) in zip(masks, both):
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert iou(boxes(both[0]), boxes(both[1])).item() == pytest.approx(expected)


def test_squashed_boxes():
    assert squash_boxes(boxes([1, 2, 4, 3]), (10, 20), (35, 10)).tolist() == [[3, 1, 14, 1]]
    assert squash_boxes(boxes([111, 108, 441, 193]), (500, 375), (224, 224)).tolist() == [[49, 64, 197, 115]]


def test_the_grid_of_thresholds_is_the_published_one():
    np.testing.assert_array_equal(HEATMAP_THRESHOLDS.numpy(), np.arange(0, 1, 0.001))


def test_baseline_boxes_are_centred_and_cover_their_share():
    box = baseline_boxes((100, 200)).double()
    assert box[-1].tolist() == [0, 0, 199, 99]
    area = (box[:, 2:] - box[:, :2] + 1).prod(1) / 20000
    torch.testing.assert_close(area, CENTRE_SHARES, rtol=0, atol=0.01)
    assert ((box[:, :2] + box[:, 2:] - torch.tensor([199, 99])).abs() <= 1).all()


def test_curves_equal_those_of_one_box_at_a_time():
    heatmaps, truth = scene()
    metric = MaxBoxAcc()
    metric.accumulate(heatmaps[:2], truth[:2])
    metric.accumulate(heatmaps[2:], truth[2:])
    result = metric.compute()
    for at in range(0, 1000, 37):
        hits = np.zeros((2, len(DELTAS)))
        for heatmap, gold in zip((heatmaps * 255).to(torch.uint8).numpy(), truth):
            largest, every = twin(heatmap, int(HEATMAP_THRESHOLDS[at] * heatmap.max()))
            for mode, found in enumerate(([largest], every or [largest])):
                hits[mode] += iou(torch.tensor(found), gold).max().item() >= np.array(DELTAS)
        np.testing.assert_allclose(result.single[:, at], hits[0] / len(truth))
        np.testing.assert_allclose(result.multi[:, at], hits[1] / len(truth))
    assert result.max_box_acc == result.single[1].max()
    assert result.max_box_acc_v2 == pytest.approx(result.multi.max(1).values.mean().item())
    assert result.gt_known == result.single[1, 200]


def test_the_best_threshold_is_one_for_all_images():
    """Either image can be hit, each at thresholds of its own: half of the set is right at any one threshold."""
    heatmaps = torch.zeros(2, 20, 20)
    heatmaps[0, :, :] = 0.5
    heatmaps[0, 5:9, 5:9] = 1
    heatmaps[1] = heatmaps[0]
    metric = MaxBoxAcc()
    metric.accumulate(heatmaps, [boxes([5, 5, 9, 9]), boxes([0, 0, 19, 19])])
    result = metric.compute()
    assert result.max_box_acc == 0.5
    assert result.best_threshold == 0
    assert result.single[1].tolist() == [0.5] * 1000


def test_all_contours_find_what_the_largest_misses():
    heatmap = torch.zeros(1, 30, 30)
    heatmap[0, 2:6, 2:6] = 1
    heatmap[0, 10:28, 10:28] = 1
    metric = MaxBoxAcc()
    metric.accumulate(heatmap, [boxes([2, 2, 6, 6])])
    result = metric.compute()
    assert (result.max_box_acc, result.max_box_acc_v2) == (0, 1)


def test_top1_needs_the_box_and_the_class():
    heatmap = torch.zeros(4, 20, 20)
    heatmap[:, 5:10, 5:10] = 1
    gold = [boxes([5, 5, 10, 10]), boxes([5, 5, 10, 10]), boxes([15, 15, 19, 19]), boxes([15, 15, 19, 19])]
    metric = MaxBoxAcc()
    metric.accumulate(heatmap, gold, torch.tensor([True, False, True, False]))
    result = metric.compute()
    assert (result.gt_known, result.accuracy, result.top1, result.top1_best) == (0.5, 0.5, 0.25, 0.25)
    assert "| top-1 localisation, threshold 0.2 | 25.0 |" in result.table()


def test_top1_is_unknown_without_classes():
    metric = MaxBoxAcc()
    metric.accumulate(*scene())
    result = metric.compute()
    assert result.top1 is result.top1_best is result.accuracy is None
    assert "top-1" not in result.table() and "| 5 images | % |" in result.table()


def test_baselines_never_look_at_the_heatmap():
    metric = MaxBoxAcc()
    metric.accumulate(torch.zeros(2, 40, 40), [boxes([0, 0, 39, 39]), boxes([8, 8, 31, 31])])
    result = metric.compute()
    assert result.whole_image == 0.5  # the small box is 0.36 of it
    assert result.centre_half == 0.5  # 28 x 28 pixels are 0.49 of the large one
    assert (result.centre_best, result.centre_best_share) == (1, 0.55)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_curves_are_nested(seed):
    metric = MaxBoxAcc()
    metric.accumulate(*scene(3, 24, seed))
    result = metric.compute()
    assert (result.multi >= result.single).all()
    assert (result.single.diff(dim=0) <= 0).all() and (result.multi.diff(dim=0) <= 0).all()


@pytest.mark.parametrize(
    "heatmap, gold, message",
    [
        (torch.full((1, 4, 4), 1.1), [boxes([0, 0, 1, 1])], "must lie in 0..1"),
        (torch.full((1, 4, 4), float("nan")), [boxes([0, 0, 1, 1])], "must lie in 0..1"),
        (torch.zeros(1, 4, 4), [boxes([2, 0, 1, 1])], "Convert \\(x, y, width, height\\) first"),
        (torch.zeros(1, 4, 4), [torch.zeros(0, 4)], "has no ground-truth box"),
        (torch.zeros(2, 4, 4), [boxes([0, 0, 1, 1])], "each of 2 heatmaps was expected, but 1 came"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(heatmap, gold, message):
    metric = MaxBoxAcc()
    with pytest.raises(ValueError, match=message):
        metric.accumulate(heatmap, gold)
    assert metric.images == 0


def test_classes_come_always_or_never():
    metric = MaxBoxAcc()
    heatmaps, gold = scene()
    metric.accumulate(heatmaps, gold)
    with pytest.raises(ValueError, match="class_correct came with some batches"):
        metric.accumulate(heatmaps, gold, torch.ones(5, dtype=torch.bool))


def test_nothing_accumulated_is_refused():
    with pytest.raises(ValueError, match="no image was accumulated"):
        MaxBoxAcc().compute()
    with pytest.raises(ValueError, match="at least one foreground pixel"):
        PxAP().compute()


def px_ap_twin(scores, gold):
    edges = np.append(np.arange(0, 1, 0.001), [1, 2, 3])
    true, false = (np.histogram(scores[gold == value], edges)[0] for value in (1, 0))
    area = true_above = false_above = recall = 0
    for t, f in zip(true[::-1], false[::-1]):
        true_above, false_above = true_above + t, false_above + f
        if true_above + false_above:
            area += true_above / (true_above + false_above) * (true_above / true.sum() - recall)
            recall = true_above / true.sum()
    return area


def test_px_ap_equals_its_definition():
    random = np.random.default_rng(0)
    scores = random.random((3, 16, 16)).astype(np.float32).round(2)  # many scores on an edge between bins
    gold = random.choice([0, 1, 255], (3, 16, 16)).astype(np.uint8)
    metric = PxAP()
    for batch in ([0], [1, 2]):
        metric.accumulate(torch.from_numpy(scores[batch]), torch.from_numpy(gold[batch]))
    assert metric.compute() == pytest.approx(px_ap_twin(scores, gold))


def test_px_ap_of_the_mask_itself_is_one_and_ignored_pixels_do_not_count():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, 2:5, 2:5] = 1
    mask[0, 6] = 255
    heatmap = (mask == 1).float()
    heatmap[0, 6] = 1
    metric = PxAP()
    metric.accumulate(heatmap, mask)
    assert metric.compute() == 1
    metric = PxAP()
    metric.accumulate(heatmap, mask == 1)
    assert metric.compute() == pytest.approx(9 / 17)


def test_masks_of_classes_are_refused():
    with pytest.raises(ValueError, match="Masks hold 0, 1 or 255"):
        PxAP().accumulate(torch.zeros(1, 2, 2), torch.full((1, 2, 2), 7, dtype=torch.uint8))


def test_the_grid_of_thresholds_is_an_argument():
    """A coarser grid has every tenth threshold of the finer one, so its maximum is no higher."""
    torch.manual_seed(0)
    heatmaps = torch.rand(6, 16, 16)
    heatmaps = heatmaps / heatmaps.amax((1, 2), keepdim=True)
    boxes = [torch.tensor([[2, 2, 9, 11]])] * 6
    fine, coarse = MaxBoxAcc(), MaxBoxAcc(localization.BENCHMARK_THRESHOLDS)
    for metric in (fine, coarse):
        metric.accumulate(heatmaps, boxes)
    found, other = fine.compute(), coarse.compute()
    assert other.single.shape == (3, 100) and torch.equal(found.single[:, ::10], other.single)
    assert other.gt_known == found.gt_known and other.max_box_acc <= found.max_box_acc


@pytest.mark.parametrize("thresholds", [[], [0.2, 0.1], [-0.1, 0.5], [0.5, 1.0]])
def test_a_grid_that_is_none_is_refused(thresholds):
    with pytest.raises(ValueError, match="ascending thresholds"):
        MaxBoxAcc(torch.tensor(thresholds))


def test_hits_by_size_go_from_the_smallest_true_box_to_the_largest():
    true = torch.tensor([[0, 0, 40, 40], [0, 0, 9, 19], [5, 5, 15, 15], [0, 0, 60, 60]])
    found = torch.tensor([[0, 0, 40, 40], [0, 0, 9, 9], [50, 50, 90, 90], [0, 0, 9, 9]])  # the second: exactly 0.5
    assert localization.hits_by_size(found, true, 4) == [0, 1, 1, 0]
    assert localization.hits_by_size(found, true, 2) == [0.5, 0.5]
    assert localization.hits_by_size(found[:3].float(), true[:3].float(), 2) == [0.5, 1]  # one image more in the first
