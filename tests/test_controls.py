"""Controls: what is random is so in the right way, each measure knows chance, the best and the degenerate case."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from course_lib import maps
from course_lib.evaluate import controls
from course_lib.prototypes import class_prototypes

pytestmark = pytest.mark.figures


def seeded(seed=0):
    return Generator().manual_seed(seed)


# wrong class, random weights ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 12), st.integers(0, 40), st.integers(0, 999), st.sampled_from([torch.int64, torch.int32]))
def test_no_image_keeps_its_class_and_each_class_is_wrong_once(classes, images, seed, integer):
    labels = torch.randint(classes, (images,), generator=seeded(seed)).to(integer)
    wrong = controls.wrong_classes(labels, classes, seeded(seed))
    assert wrong.shape == labels.shape and (wrong != labels).all()
    every = controls.wrong_classes(torch.arange(classes), classes, seeded(seed))
    assert sorted(every.tolist()) == list(range(classes))
    assert torch.equal(wrong, every[labels.long()])


def test_the_wrong_class_is_drawn_and_repeats_with_its_seed():
    labels = torch.arange(4)
    drawn = [tuple(controls.wrong_classes(labels, 4, seeded(seed)).tolist()) for seed in range(200)]
    assert len(set(drawn)) == 6  # all circles of four classes
    assert drawn[7] == tuple(controls.wrong_classes(labels, 4, seeded(7)).tolist())


def test_wrong_classes_needs_a_second_class_and_labels_in_range():
    with pytest.raises(ValueError, match="at least 2 classes, of which one is wrong, got 1"):
        controls.wrong_classes(torch.zeros(3).long(), 1, seeded())
    with pytest.raises(ValueError, match="Labels from 0 to 2 were expected, but -1 to 0 came"):
        controls.wrong_classes(torch.tensor([0, -1]), 3, seeded())


def test_random_weights_have_the_tail_of_a_reciprocal():
    weights = controls.random_weights(200, 1000, seeded())
    assert weights.shape == (200, 1, 1000) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(200, 1))
    relative = weights / weights.amin(-1, keepdim=True)  # 1/U in units of its minimum, which is nearly 1
    for t in (2, 10, 100):
        assert (relative > t).float().mean() == pytest.approx(1 / t, rel=0.1)  # P(1/U > t) = 1/t
    assert not torch.equal(weights[0], weights[1])
    torch.testing.assert_close(controls.random_weights(200, 1000, seeded()), weights, rtol=0, atol=0)
    features = torch.rand(200, 1000, 2, 2)
    assert maps.weighted_map(features, weights).shape == (200, 1, 2, 2)


# split half -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 15), st.integers(0, 99))
def test_halves_are_disjoint_complete_and_split_every_class(classes, more, seed):
    labels = torch.cat((torch.arange(classes).repeat(2), torch.randint(classes, (more,), generator=seeded(seed))))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed + 1))]
    ones = torch.eye(len(labels))  # a prototype tells which samples it is the mean of
    first, second = controls.split_half_prototypes(ones, labels, classes, seeded(seed))
    assert not ((first > 0) & (second > 0)).any()
    for c in range(classes):
        members, a, b = labels == c, int((first[c] > 0).sum()), int((second[c] > 0).sum())
        assert torch.equal((first[c] > 0) | (second[c] > 0), members) and a - b in (0, 1)
    counts = labels.bincount()[:, None]
    whole = (first * ((counts + 1) // 2) + second * (counts // 2)) / counts
    torch.testing.assert_close(whole, class_prototypes(ones, labels, classes))


def test_halves_are_drawn():
    features, labels = torch.randn(40, 3), torch.arange(40) % 2
    first = [controls.split_half_prototypes(features, labels, 2, seeded(seed))[0] for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.allclose(first[0], first[2])


def test_a_class_with_one_sample_cannot_be_split():
    with pytest.raises(ValueError, match="class 1 has fewer"):
        controls.split_half_prototypes(torch.randn(3, 2), torch.tensor([0, 0, 1]), 2, seeded())


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 99), st.floats(-25, 10))
def test_correlation_is_pearsons_whatever_scale_and_offset(h, w, seed, exponent):
    a, b = torch.randn(2, 3, 2, h, w, generator=seeded(seed))
    found = controls.map_correlation(a * 10**exponent, b + 2)
    assert found.shape == (3, 2)
    for i in range(3):
        for c in range(2):
            expected = torch.corrcoef(torch.stack((a[i, c].flatten(), b[i, c].flatten())).double())[0, 1]
            assert found[i, c] == pytest.approx(float(expected), abs=1e-4)
    torch.testing.assert_close(controls.map_correlation(a, -a), -torch.ones(3, 2).double())


def test_a_constant_map_correlates_with_nothing():
    a = torch.randn(3, 4, 4)
    flat = torch.stack((torch.zeros(4, 4), torch.full((4, 4), 0.1), 7 + 1e-7 * torch.randn(4, 4)))
    assert (controls.map_correlation(a, flat) == 0).all() and (controls.map_correlation(flat, flat) == 0).all()


# two objects ----------------------------------------------------------------------------------------------------------


def planted(b=6, k=5, classes=4, seed=0):
    """Features, prototypes, and rules of which the first hears nothing but the class and the last nothing of it."""
    features = torch.rand(b, k, 4, 5, generator=seeded(seed))
    own = torch.arange(b) % classes
    prototypes = torch.rand(classes, k, generator=seeded(seed + 1))
    rules = {
        "P": lambda y: prototypes[y][:, None],
        "uniform": lambda y: torch.ones(b, 1, k),
        "P - mean P": lambda y: 1e4 * maps.centred_weights(prototypes)[y][:, None],
    }
    return features, rules, own, (own + 1) % classes


def test_class_agreement_is_its_definition_lowest_first():
    features, rules, own, other = planted()
    found = controls.class_agreement(features, rules, own, other)
    assert list(found) == ["P - mean P", "P", "uniform"] and found["uniform"] == pytest.approx(1)
    for name, rule in rules.items():
        slow = []
        for i in range(len(own)):
            a, b = ((rule(y)[i, 0, :, None, None] * features[i]).sum(0).double().flatten() for y in (own, other))
            slow.append(torch.corrcoef(torch.stack((a, b)))[0, 1].item())
        assert found[name] == pytest.approx(sum(slow) / len(slow), abs=1e-5)


def test_same_answers_is_a_share_of_classes():
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [2, 1, 0]])
    assert controls.same_answers(lambda x: x, images, lambda x: 2 * x) == 1
    assert controls.same_answers(lambda x: x, images, lambda x: x.flip(1)) == 0.25
    assert controls.same_answers(lambda x: -x, images, lambda x: -x) == 0


@given(st.floats(-1, 1), st.floats(-1, 1), st.sampled_from([0.3, 0.01, 1e-4]))
def test_crossing_is_found_within_the_tolerance_by_halving(at, step, tolerance):
    calls = []

    def error_at(shift):
        calls.append(shift)
        return 60.0 if shift < at else 50.0 - step  # a step, as errors of a few images are

    found = controls.crossing(error_at, 55.0, -1.0, 1.0, tolerance)
    assert abs(found - at) <= tolerance and len(calls) <= math.ceil(math.log2(2 / tolerance)) + 1
    assert all(-1 < shift < 1 for shift in calls)


def test_crossing_refuses_what_has_no_middle():
    for low, high, tolerance in ((0.0, 0.0, 0.1), (1.0, 0.0, 0.1), (0.0, 1.0, 0.0)):
        with pytest.raises(ValueError, match="Expected low < high and a tolerance above 0"):
            controls.crossing(lambda shift: shift, 0.5, low, high, tolerance)


def two_objects(b=3, seed=0):
    masks = torch.zeros(b, 2, 6, 8, dtype=torch.bool)
    masks[:, 0, 1:4, :3], masks[:, 1, 2:6, 5:] = True, True
    return torch.rand(b, 2, 6, 8, generator=seeded(seed)), masks


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99))
def test_own_object_hotter_is_its_definition(seed):
    heat, masks = two_objects(4, seed)
    found = controls.own_object_hotter(heat, masks)
    for i in range(4):
        for o in range(2):
            assert found[i, o] == (heat[i, o][masks[i, o]].mean() > heat[i, o][masks[i, 1 - o]].mean())


def test_a_perfect_pair_an_exchanged_pair_and_a_map_without_class():
    heat, masks = two_objects()
    assert controls.own_object_hotter(masks.float(), masks).all()
    assert not controls.own_object_hotter(masks.flip(1).float(), masks).any()
    same = controls.own_object_hotter(heat[:, :1].expand(-1, 2, -1, -1), masks)
    assert (same.sum(1) == 1).all()  # one of two right, never both
    assert not controls.own_object_hotter(torch.zeros(3, 2, 6, 8), masks).any()


# energy ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99))
def test_energy_is_its_definition(seed):
    heat, masks = two_objects(2, seed)
    energy = controls.energy_per_area(heat, masks)
    for i in range(2):
        for o in range(2):
            inside, area = float(heat[i, o][masks[i, o]].sum() / heat[i, o].sum()), float(masks[i, o].float().mean())
            assert energy[i, o] == pytest.approx(inside / area, rel=1e-5)


def test_chance_and_the_best():
    masks = two_objects()[1]
    area = masks.float().mean((-2, -1))
    torch.testing.assert_close(controls.energy_per_area(masks.float(), masks), 1 / area)
    assert not controls.energy_per_area((~masks).float(), masks).any()
    for constant in (0.0, 0.3):
        flat = torch.full(masks.shape, constant)
        torch.testing.assert_close(controls.energy_per_area(flat, masks), torch.ones(3, 2))


@pytest.mark.parametrize("measure", [controls.own_object_hotter, controls.energy_per_area])
def test_wrong_input_is_refused_with_the_reason(measure):
    heat, masks = two_objects()
    with pytest.raises(ValueError, match="outside it or NaN"):
        measure(heat * 3, masks)
    with pytest.raises(ValueError, match="outside it or NaN"):
        measure(torch.full_like(heat, float("nan")), masks)
    masks[1, 0] = False
    with pytest.raises(ValueError, match="A mask is empty"):
        measure(heat, masks)


def test_masks_of_numbers_or_of_another_size_are_refused():
    """Behind the checks of the tests: what a notebook meets."""
    energy = inspect.unwrap(controls.energy_per_area)
    heat, masks = two_objects()
    with pytest.raises(ValueError, match="pass `mask == 1`"):
        energy(heat, masks.to(torch.uint8) * 255)
    with pytest.raises(ValueError, match=r"\(3, 2, 3, 8\) came"):
        energy(heat, masks[:, :, :3])


# energy by part -------------------------------------------------------------------------------------------------------


def random_parts(b, seed, num_parts=5):
    return torch.randint(num_parts, (b, 6, 8), generator=seeded(seed)).to(torch.uint8)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_energy_by_part_is_its_definition(images, num_parts, seed):
    heat, parts = torch.rand(images, 6, 8, generator=seeded(seed)), random_parts(images, seed, num_parts)
    found = controls.energy_by_part(heat, parts, num_parts + 1)  # the last part occurs in no image
    torch.testing.assert_close(found.share.sum(1), torch.ones(images).double())
    torch.testing.assert_close(found.area.sum(1), torch.ones(images).double())
    for p in range(num_parts + 1):
        ratios = []
        for i in range(images):
            mask = parts[i] == p
            assert found.share[i, p] == pytest.approx(float(heat[i][mask].sum() / heat[i].sum()), abs=1e-6)
            assert found.area[i, p] == pytest.approx(float(mask.float().mean()))
            if mask.any():
                ratios.append(float(controls.energy_per_area(heat[i], mask)))
        assert int((found.area[:, p] > 0).sum()) == len(ratios)
        assert found.per_area[p] == pytest.approx(sum(ratios) / len(ratios) if ratios else 0.0, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.0, 1e-6, 0.3, 1.0]))
def test_a_uniform_or_empty_map_gives_every_part_its_area(images, seed, constant):
    parts = random_parts(images, seed)
    found = controls.energy_by_part(torch.full(parts.shape, constant), parts, 5)
    torch.testing.assert_close(found.per_area, (found.area > 0).any(0).double())
    torch.testing.assert_close(found.share, found.area)


def test_all_heat_on_one_part_and_parts_that_are_absent():
    parts = torch.tensor([[[0, 0], [0, 1]], [[0, 0], [0, 0]]], dtype=torch.uint8)
    found = controls.energy_by_part((parts == 1).float(), parts, 3)
    assert found.share.tolist() == [[0, 1, 0], [1, 0, 0]]  # the second heatmap is empty: as a constant one
    assert found.per_area.tolist() == [0.5, 4, 0]  # means over 2, 1 and 0 images


def test_energy_by_part_refuses_parts_without_a_number_and_raw_maps():
    with pytest.raises(ValueError, match="Parts from 0 to 3 were expected, but 4 came"):
        controls.energy_by_part(torch.rand(1, 2, 2), torch.full((1, 2, 2), 4, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="Pass maps through maps.heatmap"):
        controls.energy_by_part(torch.full((1, 2, 2), 3.0), torch.zeros(1, 2, 2, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="Up-sample the map"):
        inspect.unwrap(controls.energy_by_part)(torch.rand(1, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8), 4)
