"""Segmentation: pooled scores, and all thresholds in one pass against one pass for each."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.evaluate import segmentation
from course_lib.evaluate.segmentation import IGNORE, SEED_THRESHOLDS, ThresholdSweep, sweep

pytestmark = pytest.mark.figures

NAMES = ("background", "bird", "fish", "flower")


def sample(seed=0, images=3, classes=4, height=6, width=5, levels=None):
    """Foreground scores, some classes without a tag, and a truth with void. With levels: scores that hit thresholds."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, classes - 1, height, width, generator=generator) * 0.8
    scores = (scores * levels).round() / levels if levels else scores
    scores = scores * (torch.rand(images, classes - 1, 1, 1, generator=generator) < 0.7)
    truth = torch.randint(0, classes, (images, height, width), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    truth[0, 0, 0] = 0
    return scores, truth.to(torch.uint8)


def confusion_in_loops(labels, truth, classes):
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for label, true in zip(labels.flatten().tolist(), truth.flatten().tolist()):
        if true != IGNORE:
            counts[true, label] += 1
    return counts


def miou_in_loops(counts):
    found = []
    for c in range(len(counts)):
        union = counts[c].sum() + counts[:, c].sum() - counts[c, c]
        if counts[c].sum():
            found.append(float(counts[c, c] / union))
    return sum(found) / len(found)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 4), st.integers(2, 6), st.sampled_from([None, 100, 10, 7]))
def test_one_pass_is_sixty_passes(seed, images, classes, levels):
    scores, truth = sample(seed, images, classes, levels=levels)
    found = sweep(scores, truth, [str(c) for c in range(classes)])
    for i, threshold in enumerate(SEED_THRESHOLDS):
        background = torch.full_like(scores[:, :1], threshold)
        labels = torch.cat((background, scores), 1).argmax(1)  # background wins where it equals
        expected = (
            confusion_in_loops(labels, truth, classes)
            if i % 10 == 0
            else torch.stack([(labels[truth == t][:, None] == torch.arange(classes)).sum(0) for t in range(classes)])
        )
        assert torch.equal(found.confusion[i], expected)
        assert found.miou[i].item() == pytest.approx(miou_in_loops(expected))
    best = max(range(60), key=lambda i: (found.miou[i].item(), -i))
    assert found.best_threshold == SEED_THRESHOLDS[best] and found.best.miou == pytest.approx(found.miou.max().item())
    assert torch.equal(found.at(0.3).confusion, found.confusion[30])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 4))
def test_however_a_set_is_cut_its_pixels_are_pooled(seed, size):
    scores, truth = sample(seed, images=4)
    whole, parts, counts = ThresholdSweep(NAMES), ThresholdSweep(NAMES), 0
    whole.accumulate(scores, truth)
    for part, true in zip(scores.split(size), truth.split(size)):
        parts.accumulate(part, true)
        labels = torch.cat((torch.full_like(part[:, :1], 0.3), part), 1).argmax(1)
        counts = counts + confusion_in_loops(labels, true, 4)
    assert torch.equal(whole.compute().confusion, parts.compute().confusion)
    assert torch.equal(counts, whole.compute().at(0.3).confusion)


def test_pooled_scores_of_a_set_are_not_the_mean_of_its_images():
    pairs = ([0, 0, 1, 1], [0, 0, 1, IGNORE]), ([1, 0, 0, 0], [1, 1, 1, 0])
    counts = sum(confusion_in_loops(torch.tensor(labels), torch.tensor(truth), 4) for labels, truth in pairs)
    found = segmentation.segmentation(counts, NAMES)
    assert found.confusion.tolist() == [[3, 0, 0, 0], [2, 2, 0, 0], [0] * 4, [0] * 4]
    assert found.iou[:2].tolist() == pytest.approx([3 / 5, 2 / 4]) and found.iou[2:].isnan().all()
    assert found.miou == pytest.approx((3 / 5 + 2 / 4) / 2)
    assert found.precision[:2].tolist() == pytest.approx([3 / 5, 1.0])
    assert found.recall[:2].tolist() == pytest.approx([1.0, 2 / 4])
    lines = found.table().splitlines()
    assert lines[0] == "| class | IoU % | precision % | recall % | of all pixels % |"
    assert lines[3] == "| bird | 50.0 | 100.0 | 50.0 | 57.1 |" and lines[4] == "| fish | - | - | - | 0.0 |"
    assert lines[-1] == "| **mean** | 55.0 | 80.0 | 75.0 | 100.0 |"


def test_a_class_that_is_only_predicted_is_left_out_or_counts_with_zero():
    counts = confusion_in_loops(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), 4)
    found = segmentation.segmentation(counts, NAMES)
    assert math.isnan(found.iou[1]) and found.miou == pytest.approx(0.5) and math.isnan(found.recall[1])
    assert segmentation.segmentation(counts, NAMES, "zero").miou == pytest.approx(0.5 / 4)


def test_void_is_nowhere():
    scores, truth = sample()
    plain = sweep(scores, truth, NAMES)
    spoiled = torch.where((truth == IGNORE)[:, None], 5.0, scores)
    assert torch.equal(sweep(spoiled, truth, NAMES).confusion, plain.confusion)
    assert (plain.confusion.sum((1, 2)) == (truth != IGNORE).sum()).all()


def test_other_thresholds_and_higher_scores():
    scores, truth = sample()
    metric = ThresholdSweep(NAMES, (0.005, 0.4, 3.0))
    metric.accumulate(scores * 10, truth)
    found = metric.compute()
    for i, threshold in enumerate((0.005, 0.4, 3.0)):
        labels = torch.where(scores.amax(1) * 10 > threshold, scores.argmax(1) + 1, 0)
        assert torch.equal(found.confusion[i], confusion_in_loops(labels, truth, 4))
    assert found.best_threshold in (0.005, 0.4, 3.0)


def test_the_lowest_of_equal_thresholds_is_the_best():
    truth = torch.tensor([[[0, 1]]])
    found = sweep(torch.tensor([[[[0.1, 0.5]]]]), truth, NAMES[:2])
    assert found.best.miou == 1 and found.best_threshold == 0.1  # 0.1 is not above 0.1
    assert (found.miou == 1).nonzero().flatten().tolist() == list(range(10, 50))


def test_all_processes_are_summed(monkeypatch):
    scores, truth = sample()
    alone = sweep(scores, truth, NAMES)
    monkeypatch.setattr(segmentation, "sum_over_processes", lambda share: 3 * share)
    assert torch.equal(sweep(scores, truth, NAMES).confusion, 3 * alone.confusion)


def test_refused_batches_say_why_and_leave_no_trace():
    scores, truth = sample()
    metric = ThresholdSweep(NAMES)
    for run, sentence in (
        (
            lambda: metric.accumulate(scores[:, :2], truth),
            "3 classes after the background were expected, but 2 channels came",
        ),
        (lambda: metric.accumulate(scores * torch.nan, truth), "Scores hold NaN"),
        (lambda: metric.accumulate(scores, truth + 4), "truth from 0 to 3, or 255 where nothing is counted, were"),
        (lambda: metric.compute(), "no pixel was counted"),
        (lambda: ThresholdSweep(NAMES, (0.2, 0.1)), "ascending order were expected, at least one"),
        (lambda: ThresholdSweep(NAMES, ()), "at least one, but"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run()
    assert not metric.counts.any()


def test_a_class_without_truth_never_moves_the_threshold_by_leaving_the_mean():
    """A tagged class without a pixel: predicted below 0.5, gone above. The mean is over the same classes throughout."""
    truth = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    scores = torch.tensor([[[[0.0, 0.0, 0.6, 0.2]], [[0.5, 0.0, 0.0, 0.0]]]])  # class 2 is not there
    ours = sweep(scores, truth, ["background", "bird", "fish"])
    below, above = (ours.at(threshold) for threshold in (0.1, 0.5))
    assert below.iou[2].isnan() and above.iou[2].isnan()
    assert below.miou == pytest.approx((1 / 2 + 1) / 2) and above.miou == pytest.approx((2 / 3 + 1 / 2) / 2)
    released = ThresholdSweep(["background", "bird", "fish"], absent="zero")
    released.accumulate(scores, truth)
    found = released.compute()
    assert found.at(0.1).miou == pytest.approx((1 / 2 + 1 + 0) / 3) and found.best.miou == found.miou.max()
    assert torch.allclose(found.miou * 3, ours.miou * 2)  # one set of classes each


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.integers(2, 6))
def test_label_images_give_the_confusion_of_loops(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    predicted, truth = torch.randint(0, classes, (2, 2, 4, 5), generator=generator).to(torch.uint8)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    found = segmentation.label_confusion(predicted, truth, classes)
    assert torch.equal(found, confusion_in_loops(predicted, truth, classes))


def test_labels_beyond_the_classes_are_refused():
    ones = torch.ones(1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="0 to 1, got 3"):
        segmentation.label_confusion(3 * ones, ones, 2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999))
def test_what_an_iou_loses_makes_it_whole(seed):
    confusion = torch.randint(1, 50, (4, 4), generator=torch.Generator().manual_seed(seed))
    lost, iou = segmentation.iou_losses(confusion), segmentation.segmentation(confusion, NAMES).iou[1:]
    assert torch.allclose(lost.sum(1) + iou, torch.ones(3, dtype=torch.double))
    for c in range(1, 4):
        union = confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]
        confused = sum(confusion[c, k] + confusion[k, c] for k in range(1, 4) if k != c)
        wanted = torch.stack((confusion[c, 0], confusion[0, c], confused)) / union
        assert torch.allclose(lost[c - 1], wanted.double())


def test_a_class_that_is_nowhere_loses_nothing():
    confusion = torch.zeros(3, 3, dtype=torch.long)
    confusion[0, 0] = confusion[1, 1] = 5
    assert not segmentation.iou_losses(confusion).any()


def test_the_fates_of_errors_are_counted_in_loops():
    truth, labels, predicted = torch.randint(0, 3, (3, 2, 9, 8), generator=torch.Generator().manual_seed(0))
    truth[:, 0] = IGNORE
    counts = dict.fromkeys(("corrected", "repeated", "changed", "spoiled", "right"), 0)
    for t, a, b in zip(*(values.flatten().tolist() for values in (truth, labels, predicted))):
        if t != IGNORE:
            if a == t:
                counts["right"] += 1
                counts["spoiled"] += b != t
            else:
                counts["corrected" if b == t else "repeated" if b == a else "changed"] += 1
    wrong = counts["corrected"] + counts["repeated"] + counts["changed"]
    for name, share in segmentation.error_fates(truth, labels, predicted).items():
        assert share == pytest.approx(counts[name] / (counts["right"] if name == "spoiled" else wrong)), name


def test_the_lowest_threshold_of_a_precision():
    probability = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4]])
    tags = torch.tensor([[1.0, 0], [1, 1], [0, 0]])  # precision down the list: 1, 1/2, 2/3, 3/4, 3/5, 1/2
    found = {wanted: float(segmentation.precision_threshold(probability, tags, wanted)) for wanted in (1.0, 0.7, 0.5)}
    assert found == pytest.approx({1.0: 0.9, 0.7: 0.6, 0.5: 0.4})
    assert segmentation.precision_threshold(probability, 1 - tags, 0.9) == math.inf
