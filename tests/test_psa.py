"""PSA: published counts, the released steps as loops and dense matrices, and a walk that equals them."""

import gc
import inspect
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from course_lib.backbones import dense, released, resnet38
from course_lib.course.bench import memory_rise
from course_lib.wsss import affinity, cam_net, psa
from course_lib.wsss.affinity import (
    fitting_radius,
    near_pixels,
    pair_kinds,
    pair_loss,
    pair_mean,
    random_walk,
    shifted,
    widened,
)
from course_lib.wsss.cam_net import Architecture
from course_lib.wsss.psa import (
    WalkConfig,
    affinity_labels,
    affinity_loss,
    feature_affinity,
    fused_labels,
    grid_affinity,
    refine_with_affinity,
    scored_background,
)

IGNORE = 255


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shares(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(*shape, seed=0, classes=3):
    """Labels in patches, some of them ignored."""
    coarse = numbers(shape[0], classes + 1, 3, 3, seed=seed)
    labels = F.interpolate(coarse, shape[1:], mode="bilinear").argmax(1)
    return torch.where(labels == classes, IGNORE, labels)


# slow twins -----------------------------------------------------------------------------------------------------------


def slow_pairs(h, w, radius):
    """Sources and their neighbours (flat pixels), neighbour by neighbour, as the released code lists them."""
    reach = radius - 1
    ways = [(0, x) for x in range(1, radius)]
    ways += [(y, x) for y in range(1, radius) for x in range(-reach, radius) if x * x + y * y < radius**2]
    grid = torch.arange(h * w).view(h, w)
    return [
        [(int(grid[y, x]), int(grid[y + down, x + right])) for y in range(h - reach) for x in range(reach, w - reach)]
        for down, right in ways
    ]


def slow_affinity(features, radius):
    """All pairs gathered at once."""
    h, w = features.shape[2:]
    first, second = torch.tensor(slow_pairs(h, w, radius)).unbind(-1)  # o sources
    flat = features.flatten(2)
    return (-(flat[:, :, first] - flat[:, :, second]).abs().mean(1)).exp()


def slow_loss(strength, labels, radius):
    """The three terms, pair by pair."""
    sums, counts = dict.fromkeys(("background", "foreground", "different"), 0.0), {}
    for image, own in enumerate(labels.flatten(1).tolist()):
        for number, pairs in enumerate(slow_pairs(*labels.shape[1:], radius)):
            for place, (i, j) in enumerate(pairs):
                if max(own[i], own[j]) == IGNORE:
                    continue
                kind = "different" if own[i] != own[j] else "foreground" if own[i] else "background"
                a = strength[image, number, place]
                sums[kind] = sums[kind] - (1 + 1e-5 - a if kind == "different" else a + 1e-5).log()
                counts[kind] = counts.get(kind, 0) + 1
    weights = {"background": 0.25, "foreground": 0.25, "different": 0.5}
    return {kind: weights[kind] * total / (counts.get(kind, 0) + 1e-5) for kind, total in sums.items()}


def slow_walk(maps, strength, radius, beta, steps):
    """One image: the whole matrix, to its power by squaring as released where that is possible."""
    h, w = maps.shape[1:]
    matrix = torch.eye(h * w, dtype=torch.float64)
    for number, (down, right) in enumerate(near_pixels(radius)):
        for y in range(h - down):
            for x in range(max(0, -right), w - max(0, right)):
                i, j = y * w + x, (y + down) * w + x + right
                matrix[i, j] = matrix[j, i] = strength[number, y, x]
    matrix = matrix**beta
    matrix = matrix / matrix.sum(0, keepdim=True)
    assert torch.allclose(matrix.sum(0), torch.ones(h * w, dtype=torch.float64))
    return (maps.flatten(1).double() @ torch.linalg.matrix_power(matrix, steps)).view(maps.shape)


# pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "count", "side", "sources"), [(5, 34, 56, 2496), (10, 152, 128, 13090)])
def test_published_counts(radius, count, side, sources):
    near = near_pixels(radius)
    assert len(near) == len({*near}) == count
    assert shifted(torch.zeros(1, side, side), (0, 0), radius).numel() == sources
    assert pair_kinds(torch.zeros(1, side, side, dtype=torch.long), radius).sum() == count * sources  # 84,864 at 5
    every = {(y, x) for y in range(-radius, radius) for x in range(-radius, radius) if 0 < x * x + y * y < radius**2}
    assert {*near} | {(-y, -x) for y, x in near} == every and len(every) == 2 * count  # each pair once


def test_small_grids_have_a_smaller_radius():
    assert [fitting_radius(side, 60) for side in (60, 11, 10, 9, 7, 5)] == [5, 5, 4, 4, 3, 2]
    assert fitting_radius(100, 100, 10) == 10 and fitting_radius(60, 12, 10) == 5
    with pytest.raises(ValueError, match="at least 5 x 9 pixels for pairs within a radius of 5, got 4 x 9"):
        shifted(torch.zeros(4, 9), (0, 0), 5)
    with pytest.raises(ValueError, match="radius of at least 2.* got 1"):
        near_pixels(1)


@pytest.mark.parametrize("radius", [2, 3, 5])
def test_pairs_are_those_of_the_released_lists(radius):
    h, w = 9, 13
    grid = torch.arange(h * w).view(1, h, w)
    first = shifted(grid, (0, 0), radius).flatten().tolist()
    for by, pairs in zip(near_pixels(radius), slow_pairs(h, w, radius)):
        assert pairs == [*zip(first, shifted(grid, by, radius).flatten().tolist())]


def test_wide_borders_make_every_pixel_a_source():
    wide = widened(torch.zeros(1, 2, 3), 3, 7.0)
    assert wide.shape == (1, 4, 7) and shifted(wide, (0, 0), 3).shape == (1, 2, 3)
    assert (wide == 7).sum() == 4 * 7 - 6 and (shifted(wide, (0, 0), 3) == 0).all()


# labels ---------------------------------------------------------------------------------------------------------------


def test_labels_of_a_row_of_pixels():
    low = torch.tensor([[0, 0, 2, 2, 1, 0]])  # strong background
    high = torch.tensor([[0, 1, 2, 0, 1, 2]])  # weak background
    assert fused_labels(low, high).tolist() == [[0, IGNORE, 2, 0, 1, IGNORE]]


@given(st.integers(1, 3), st.integers(1, 21), st.integers(1, 21), st.integers(0, 9))
@settings(max_examples=25)
def test_labels_are_block_means_of_both_score_maps(stride, h, w, seed):
    low, high = shares(2, 4, h, w, seed=seed), shares(2, 4, h, w, seed=seed + 10)
    low[:, :, h // 2 :, w // 3 :] = high[:, :, h // 2 :, w // 3 :] = 0  # outside of the image
    found = affinity_labels(low, high, stride)
    assert found.shape == (2, -(-h // stride), -(-w // stride))
    for image in range(2):
        for y in range(found.shape[1]):
            for x in range(found.shape[2]):
                block = (image, slice(None), slice(y * stride, (y + 1) * stride), slice(x * stride, (x + 1) * stride))
                means = [scores[block].sum((1, 2)) / stride**2 for scores in (low, high)]
                best = [int(mean.argmax()) for mean in means]
                expected = IGNORE if best[0] == 0 else best[0]
                expected = 0 if best[1] == 0 else expected
                if max(mean.max() for mean in means) < 1e-5:
                    expected = IGNORE
                assert found[image, y, x] == expected


@given(st.integers(5, 9), st.integers(7, 12), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=20)
def test_kinds_of_pairs(h, w, radius, seed):
    labels = some_labels(2, h, w, seed=seed)
    background, foreground, different = pair_kinds(labels, radius)
    for image, own in enumerate(labels.flatten(1).tolist()):
        for number, pairs in enumerate(slow_pairs(h, w, radius)):
            kinds = [
                (own[i] == own[j] == 0, own[i] == own[j] != 0, own[i] != own[j])
                if max(own[i], own[j]) < IGNORE
                else (False, False, False)
                for i, j in pairs
            ]
            for found, expected in zip((background, foreground, different), zip(*kinds)):
                assert found[image, number].flatten().tolist() == [*expected]


# affinities and loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [2, 4, 5])
def test_affinities_are_those_of_gathered_pairs(radius):
    features = numbers(2, 6, 9, 12, seed=radius).requires_grad_()
    found, expected = feature_affinity(features, radius), slow_affinity(features, radius)
    torch.testing.assert_close(found.flatten(2), expected, rtol=0, atol=1e-14)
    weight = numbers(*found.shape, seed=9)
    gradients = [
        torch.autograd.grad((part.reshape(found.shape) * weight).sum(), features) for part in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_gradients_are_those_of_differences():
    features = numbers(1, 2, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(partial(feature_affinity, radius=2), features)


def test_affinity_is_the_mean_over_channels():
    features = torch.zeros(1, 4, 2, 3)
    features[0, :, 0, 2] = torch.tensor([1.0, -2.0, 0.0, 5.0])
    found = feature_affinity(features, 2).flatten()  # of one source, in the middle above
    assert near_pixels(2) == ((0, 1), (1, -1), (1, 0), (1, 1))
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 0.0, 0.0]).exp())


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_pair_by_pair(seed):
    features, labels = numbers(2, 5, 7, 10, seed=seed).requires_grad_(), some_labels(2, 7, 10, seed=seed)
    found = affinity_loss(features, labels, 3)
    expected = slow_loss(slow_affinity(features, 3), labels, 3)
    assert list(found) == ["background", "foreground", "different"]
    for name, term in found.items():
        assert term.item() == pytest.approx(float(torch.as_tensor(expected[name]).detach()), abs=1e-12)
    gradients = [torch.autograd.grad(sum(terms.values()), features)[0] for terms in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("label", [0, 2, IGNORE])
def test_kinds_without_a_pair_are_zero_and_keep_the_graph(label):
    features = numbers(1, 5, 7, 10).requires_grad_()
    terms = affinity_loss(features, torch.full((1, 7, 10), label), 3)
    given = {0: "background", 2: "foreground"}.get(label)
    assert {name for name, term in terms.items() if term > 0} == ({given} if given else set())
    (gradient,) = torch.autograd.grad(sum(terms.values()), features)
    assert gradient.isfinite().all() and bool(gradient.any()) == bool(given)


def test_ignored_pixels_teach_nothing():
    labels = some_labels(1, 9, 12, seed=3)
    labels[0, 4, 6] = IGNORE
    features = numbers(1, 5, 9, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(sum(affinity_loss(features, labels, 3).values()), features)
    assert not gradient[0, :, labels[0] == IGNORE].any() and gradient.any()


def test_extreme_affinities_stay_finite():
    features = torch.zeros(1, 3, 7, 10)
    features[..., 5:] = 1e6  # two worlds apart
    features.requires_grad_()
    labels = torch.arange(10).expand(1, 7, 10).remainder(2) + 1
    terms = affinity_loss(features, labels, 3)
    assert all(term.isfinite() for term in terms.values())
    assert torch.autograd.grad(sum(terms.values()), features)[0].isfinite().all()


def test_pairs_at_the_border_come_back():
    features, labels = numbers(1, 4, 7, 8), some_labels(1, 7, 8, seed=1)
    found = affinity_loss(features, labels, 3, borders=True)
    strength, kinds = [], []
    for y in range(7):
        for x in range(8):
            for down, right in near_pixels(3):
                if y + down < 7 and 0 <= x + right < 8:
                    strength.append(
                        (features[0, :, y, x] - features[0, :, y + down, x + right]).abs().mean().neg().exp()
                    )
                    a, b = labels[0, y, x], labels[0, y + down, x + right]
                    known = bool(a < IGNORE and b < IGNORE)
                    kinds.append((known and bool(a == b == 0), known and bool(a == b != 0), known and bool(a != b)))
    expected = pair_loss(torch.stack(strength).view(1, 1, 1, -1), torch.tensor(kinds).T.reshape(3, 1, 1, 1, -1))
    for name, term in expected.items():
        assert float(found[name]) == pytest.approx(float(term), abs=1e-12)


def test_labels_of_another_grid_are_refused():
    with pytest.raises(ValueError, match="labels on the grid of the features.*reduce the labels by the stride"):
        inspect.unwrap(pair_loss)(shares(1, 4, 9, 12), torch.ones(3, 1, 4, 8, 12, dtype=torch.bool))


def test_two_processes_have_the_loss_of_the_whole_batch(monkeypatch):
    strength, kinds = shares(4, 3, 2, 5), pair_kinds(some_labels(4, 4, 9, seed=2), 3)[:, :, :3]
    strength = shares(*kinds.shape[1:])
    whole = pair_mean(strength, kinds[1])
    counts = torch.stack([part.sum() for part in kinds[1].split((1, 3))])
    assert counts[0] != counts[1]  # else the mean of means would do
    monkeypatch.setattr(affinity, "processes", lambda: 2)
    monkeypatch.setattr(affinity, "gathered", lambda count: counts)
    found = [pair_mean(*parts) for parts in zip(strength.split((1, 3)), kinds[1].split((1, 3)))]
    torch.testing.assert_close(sum(found) / 2, whole)


@pytest.fixture
def unchecked(monkeypatch):
    """The modules without the shape checks of the tests, which do not compile."""
    for module in (psa, affinity):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))
    for name in ("forward", "backward"):
        own = inspect.unwrap(getattr(psa._MeanDistance, name))
        monkeypatch.setattr(psa._MeanDistance, name, staticmethod(own))


def test_it_compiles_into_one_graph(unchecked):
    features, labels = numbers(2, 5, 7, 10).requires_grad_(), some_labels(2, 7, 10)
    compiled = torch.compile(psa.affinity_loss, fullgraph=True, backend="eager")
    outcomes = []
    for loss in (compiled, psa.affinity_loss):
        terms = loss(features, labels, 3)
        outcomes.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), features)])
    torch.testing.assert_close(*outcomes)


def test_a_step_of_published_size_looks_at_no_number(unchecked):
    """Tensors without numbers at 448 px and batch 16: what would wait for the device raises."""
    with FakeTensorMode():
        features = torch.empty(16, 448, 56, 56, requires_grad=True)
        terms = psa.affinity_loss(features, torch.empty(16, 56, 56, dtype=torch.long))
        (gradient,) = torch.autograd.grad(sum(terms.values()), features)
        assert gradient.shape == features.shape
        with pytest.raises(Exception, match="_local_scalar_dense"):
            terms["background"].item()
        with torch.no_grad():
            walked = psa.random_walk(torch.empty(16, 21, 56, 56), psa.grid_affinity(features), 5, 8.0, 256)
        assert walked.shape == (16, 21, 56, 56)


def test_autocast_does_not_reach_the_loss():
    features, labels = numbers(2, 5, 7, 10, dtype=torch.float32), some_labels(2, 7, 10)
    expected = affinity_loss(features, labels, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = affinity_loss(features, labels, 3)
    assert all(torch.equal(term, expected[name]) for name, term in found.items())
    half = affinity_loss(features.bfloat16(), labels, 3)
    assert all(term.dtype == torch.float32 for term in half.values())


# the walk -------------------------------------------------------------------------------------------------------------


def test_the_walk_of_the_fact_sheet():
    """14 x 17 pixels, 8 channels, beta 8, 64 steps: the released construction, to rounding."""
    features, maps = numbers(1, 8, 14, 17), shares(1, 5, 14, 17)
    strength = grid_affinity(features, 5)
    expected = slow_walk(maps[0], strength[0], 5, 8, 64)
    assert (random_walk(maps, strength, 5, 8.0, 64)[0] - expected).abs().max() < 1e-13


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(2, 6),
    st.integers(0, 300),
    st.floats(0.5, 12),
    st.integers(0, 99),
)
@settings(max_examples=12)
def test_the_walk_is_the_power_of_the_dense_matrix(h, w, radius, steps, beta, seed):
    maps, strength = numbers(2, 3, h, w, seed=seed), shares(2, len(near_pixels(radius)), h, w, seed=seed)
    strength[:, :, h // 2 :, : w // 2] = 0  # pairs that do not exist
    found = random_walk(maps, strength, radius, beta, steps)
    for image in range(2):
        expected = slow_walk(maps[image], strength[image], radius, beta, steps)
        assert (found[image] - expected).abs().max() < 1e-10
    quick = random_walk(maps.float(), strength.float(), radius, beta, steps)
    assert (quick - found).abs().max() < 1e-3 and quick.dtype == torch.float32


def test_steps_follow_each_other_and_nothing_is_lost():
    maps, strength = shares(1, 2, 11, 13), shares(1, 34, 11, 13, seed=1)
    walk = partial(random_walk, affinity=strength, radius=5, beta=3.0)
    torch.testing.assert_close(walk(walk(maps, steps=5), steps=8), walk(maps, steps=13), rtol=0, atol=1e-13)
    torch.testing.assert_close(walk(maps, steps=0), maps, rtol=0, atol=1e-14)
    ones = torch.ones_like(maps)
    torch.testing.assert_close(walk(ones, steps=256), ones, rtol=0, atol=1e-12)  # columns of T sum to 1
    after = walk(maps, steps=256)
    assert after.amin() >= maps.amin() - 1e-12 and after.amax() <= maps.amax() + 1e-12
    assert after.std() < maps.std() / 3


def test_where_nothing_is_alike_nobody_walks():
    maps = shares(1, 2, 11, 13)
    torch.testing.assert_close(random_walk(maps, torch.zeros(1, 34, 11, 13).double(), 5, 8.0, 256), maps)


def test_half_precision_walks_in_float32():
    maps, strength = shares(1, 2, 11, 13).bfloat16(), shares(1, 34, 11, 13, seed=1).bfloat16()
    found = random_walk(maps, strength, 5, 8.0, 64)
    assert found.dtype == torch.float32
    assert torch.equal(found, random_walk(maps.float(), strength.float(), 5, 8.0, 64))


def test_affinities_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 34, 11, 13\).* got \(1, 34, 7, 5\); give every pixel its pairs"):
        inspect.unwrap(random_walk)(shares(1, 2, 11, 13), shares(1, 34, 7, 5), 5, 8.0, 4)


# seeds ----------------------------------------------------------------------------------------------------------------


def test_both_rules_for_the_background():
    scores = shares(2, 3, 4, 5)
    by_alpha, constant = scored_background(scores, alpha=6.0), scored_background(scores, background=0.27)
    torch.testing.assert_close(by_alpha[:, 0], (1 - scores.amax(1)) ** 6)
    assert (constant[:, 0] == 0.27).all()
    assert torch.equal(by_alpha[:, 1:], scores) and torch.equal(constant[:, 1:], scores)


@pytest.mark.parametrize(
    ("alpha", "threshold"), [(4, 0.276), (6, 0.222), (8, 0.188), (16, 0.123), (24, 0.094), (32, 0.077)]
)
def test_an_alpha_acts_like_a_threshold(alpha, threshold):
    scores = torch.tensor([threshold - 1e-3, threshold + 1e-3]).view(1, 1, 1, 2)
    assert scored_background(scores, alpha=float(alpha)).argmax(1).flatten().tolist() == [0, 1]


def test_presets_are_those_of_the_papers():
    assert (WalkConfig.psa().alpha, WalkConfig.psa().steps, WalkConfig.psa().beta) == (16, 256, 8)
    assert (WalkConfig.seam().alpha, WalkConfig.seam().steps, WalkConfig.seam().background) == (6, 64, None)
    assert (WalkConfig.p2p().background, WalkConfig.p2p().steps) == (0.27, 64)
    with pytest.raises(ValueError, match="beta must be from"):
        WalkConfig(beta=0.0)


# the network ----------------------------------------------------------------------------------------------------------

SMALL = Architecture("cam", width=2)


def small_net(seed=0):
    torch.manual_seed(seed)
    return psa.build(SMALL)


def pictures(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


@pytest.mark.figures
@pytest.mark.parametrize("config", [WalkConfig.psa(), WalkConfig.p2p(), WalkConfig(steps=9, borders=True)])
def test_the_whole_way_as_released(config):
    """Fill up, average, spread by the dense matrix, enlarge, cut."""
    net, images, scores = small_net(), pictures(1, 3, 90, 101), shares(1, 3, 90, 101, dtype=torch.float32)
    found = refine_with_affinity(net, images, scores, config)
    with torch.no_grad():
        normalised = F.pad((images / 255 - net.trunk.mean) / net.trunk.std, (0, 3, 0, 6))
        features = net(net.trunk.frozen(normalised)).double()
    assert features.shape == (1, 448, 12, 13)
    if config.borders:
        strength = feature_affinity(widened(features, 5, 0.0), 5)
    else:
        strength = torch.zeros(1, 34, 12, 13, dtype=torch.float64)
        pairs = slow_affinity(features, 5).view(1, 34, 8, 5)
        strength[:, :, :8, 4:9] = pairs
    seeds = F.avg_pool2d(F.pad(scored_background(scores, config.alpha, config.background), (0, 3, 0, 6)), 8)
    walked = slow_walk(seeds[0], strength[0], 5, config.beta, config.steps)
    expected = F.interpolate(walked[None], (96, 104), mode="bilinear", align_corners=False)[..., :90, :101]
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)


def test_scores_of_another_size_are_refused():
    with pytest.raises(ValueError, match="scores of the size of the images"):
        inspect.unwrap(refine_with_affinity)(small_net(), pictures(1, 3, 96, 96), shares(1, 2, 48, 48), WalkConfig())


def test_a_batch_is_its_images():
    net, images, scores = small_net(), pictures(3, 3, 96, 96), shares(3, 2, 96, 96, dtype=torch.float32)
    together = refine_with_affinity(net, images, scores, WalkConfig.psa())
    for image in range(3):
        alone = refine_with_affinity(net, images[image, None], scores[image, None], WalkConfig.psa())
        torch.testing.assert_close(together[image], alone[0], rtol=1e-4, atol=1e-5)


def test_the_trunk_learns_and_its_frozen_parts_do_not():
    net = small_net().train()
    features = net(net.prepare(pictures(1, 3, 96, 96)))
    sum(affinity_loss(features, some_labels(1, 12, 12)).values()).backward()
    missing = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert all(".bn_" in name or "bn7" in name or name.startswith(("trunk.conv1a", "trunk.b2")) for name in missing)
    assert all(getattr(net.trunk, f"b{level}").conv_branch2a.weight.grad.any() for level in range(3, 8))
    assert all(head.weight.grad.any() for head in net.heads().values())
    groups = dense.parameter_groups(net.trunk, net.heads().values(), 0.01, 5e-4)
    assert [len(group["params"]) for group in groups] == [43, 0, 4, 0] and groups[2]["lr"] == 0.1
    assert all(head.bias is None for head in net.heads().values())


@pytest.mark.parametrize(
    ("architecture", "side"),
    [(Architecture("cam", backbone="small"), 12), (Architecture("cam", backbone="mobilenetv2_050"), 6)],
)
def test_small_trunks(architecture, side):
    net = psa.build(architecture)
    features = net(net.prepare(pictures(1, 3, 90, 96)))
    assert features.shape == (1, 448, side, side)
    found = refine_with_affinity(
        net, pictures(1, 3, 90, 96), shares(1, 2, 90, 96, dtype=torch.float32), WalkConfig(borders=True)
    )
    assert found.shape == (1, 3, 90, 96) and found.isfinite().all()


def test_tensors_of_the_released_checkpoint():
    with torch.device("meta"):
        net = psa.AffinityNet(resnet38.ResNet38(), Architecture("cam"))
    assert {name: tuple(head.weight.shape) for name, head in net.heads().items()} == {
        name: (*size, 1, 1) for name, size in released.LAYOUTS["affinity"].items()
    }
    assert len(net.trunk.state_dict()) == 228 and len(net.state_dict()) == 232
    heads = sum(head.weight.numel() for head in net.heads().values())
    assert heads == 64 * 512 + 128 * 1024 + 256 * 4096 + 448 * 448


def test_released_and_own_checkpoints(tmp_path, monkeypatch):
    """At width 2, to be quick."""
    monkeypatch.setattr(psa, "Architecture", lambda method, **known: Architecture(method, **{"width": 2} | known))
    sizes = {"f8_3": (64, 16), "f8_4": (128, 32), "f8_5": (256, 128), "f9": (448, 448)}
    monkeypatch.setattr(released, "LAYOUTS", {"trunk": {}, "cam": {"fc8": (20, 128)}, "affinity": sizes})
    net, images = small_net(1), pictures(1, 3, 64, 64)
    expected = net(net.prepare(images))
    state = net.trunk.state_dict() | {f"{name}.weight": head.weight.detach() for name, head in net.heads().items()}
    state = {f"module.{name}": part for name, part in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet38_aff.pth")
    again = psa.load(tmp_path / "resnet38_aff.pth")
    assert torch.equal(again(again.prepare(images)), expected)
    torch.save({"fc8.weight": torch.zeros(20, 128, 1, 1)}, tmp_path / "cls.pth")
    with pytest.raises(RuntimeError, match="of AffinityNet at .*got one of cam"):
        psa.load(tmp_path / "cls.pth")
    monkeypatch.setattr(psa, "Architecture", lambda **known: Architecture(**known))
    psa.write(net, tmp_path / "own.safetensors")
    again = psa.load(tmp_path / "own.safetensors")
    assert again.architecture == net.architecture and torch.equal(again(again.prepare(images)), expected)


def test_it_starts_as_released(monkeypatch):
    monkeypatch.setattr(cam_net.resnet38, "create", lambda weights, width: resnet38.ResNet38(2))
    net = small_net()
    for head in (net.reduce4, net.reduce5, net.reduce6):  # Kaiming normal
        assert head.weight.std().item() == pytest.approx((2 / head.in_channels) ** 0.5, rel=0.1)
    bound = 4 * (6 / (2 * 448)) ** 0.5  # Xavier uniform, gain 4
    assert bound * 0.99 < net.mix.weight.abs().max() <= bound


def test_it_learns():
    """Colours that tell two halves apart: within a few steps pairs across are less alike than pairs within."""
    torch.manual_seed(0)
    net = psa.build(Architecture("cam", backbone="small")).train()
    images = torch.full((2, 3, 96, 96), 60, dtype=torch.uint8)
    images[..., 48:] = 200
    images += pictures(2, 3, 96, 96) // 16
    labels = (torch.arange(12) >= 6).long().expand(2, 12, 12)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = sum(affinity_loss(net(net.prepare(images)), labels).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_of_the_loss(capsys):
    """16 crops of 448 px: the differences of all pairs would take 4.9 GB."""
    features = numbers(16, 448, 56, 56, dtype=torch.float32).requires_grad_()
    labels = some_labels(16, 56, 56)

    def step():
        torch.autograd.grad(sum(affinity_loss(features, labels).values()), features)

    step()
    rise, size = memory_rise(step), features.numel() * 4
    with capsys.disabled():
        print(f"\nloss and gradient, batch 16: {rise / 1e6:.0f} MB above features of {size / 1e6:.0f} MB")
    assert rise < 5 * size


@pytest.mark.slow
def test_a_step_at_448_pixels(capsys):
    """One step of the published network, one crop, on the CPU."""
    torch.manual_seed(0)
    net = psa.build(Architecture("cam")).train()
    groups = dense.parameter_groups(net.trunk, net.heads().values(), 0.01, 5e-4)
    optimiser = torch.optim.SGD(groups, lr=0.01, momentum=5e-4)
    images, labels, losses = pictures(1, 3, 448, 448), some_labels(1, 56, 56), []

    def step():
        loss = sum(affinity_loss(net(net.prepare(images)), labels).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    gc.collect()
    start = time.process_time()
    rise = memory_rise(step)
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f"\nAffinityNet, one crop of 448 px: {rise / 1e9:.2f} GB above its weights, {seconds:.0f} s of CPU")
    assert 0 < losses[0] < 20 and all(part.isfinite().all() for part in net.parameters())
