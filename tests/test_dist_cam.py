"""Dist-CAM and its relatives: the equations, the invariants, the traps (dead channels, half precision, memory)."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import maps

pytestmark = pytest.mark.figures

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 12), st.integers(1, 4), st.integers(1, 5))


def sample(b, c, k, h, w, seed):
    """ReLU-like features, about a third of them 0, and pooled references."""
    generator = Generator().manual_seed(seed)
    features = (torch.randn(b, k, h, w, generator=generator) + 0.4).relu()
    return features, torch.rand(c, k, generator=generator) + 0.01


def scaled(raw):
    """Each map to 0..1, without up-sampling."""
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    return (raw - low) / (high - low)


def pearson(a, b):
    return torch.corrcoef(torch.stack((a.flatten().double(), b.flatten().double())))[0, 1].item()


# the equations --------------------------------------------------------------------------------------------------------


def dist_cam_in_loops(features, reference):
    """Eq. 4-6, image by image, class by class, channel by channel, in float64 and without any floor."""
    b, k, h, w = features.shape
    found = torch.zeros(b, len(reference), h, w, dtype=torch.float64)
    for i in range(b):
        pooled = features[i].double().mean((-2, -1))
        for c in range(len(reference)):
            weights = [1 / abs(float(reference[c, j]) - float(pooled[j])) for j in range(k)]
            for j in range(k):
                found[i, c] += weights[j] / sum(weights) * features[i, j].double()
    return found


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 99))
def test_dist_cam_is_the_equations(sizes, seed):
    features, reference = sample(*sizes, seed)
    torch.testing.assert_close(
        maps.dist_cam(features, reference).double(), dist_cam_in_loops(features, reference), atol=1e-5, rtol=1e-3
    )


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 99), st.floats(-12, 12))
def test_weights_sum_to_1_and_do_not_know_the_unit_of_the_features(sizes, seed, exponent):
    features, reference = sample(*sizes, seed)
    query, scale = features.mean((-2, -1)), 10**exponent
    weights = maps.channel_weights(query, reference)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert (weights > 0).all()
    torch.testing.assert_close(maps.channel_weights(scale * query, scale * reference), weights, rtol=1e-2, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 99))
def test_the_order_of_channels_does_not_matter(sizes, seed):
    features, reference = sample(*sizes, seed)
    order = torch.randperm(sizes[2], generator=Generator().manual_seed(seed))
    torch.testing.assert_close(
        maps.dist_cam(features[:, order], reference[:, order]), maps.dist_cam(features, reference)
    )


def test_translation_moves_the_map_and_leaves_the_weights():
    features, reference = sample(2, 3, 8, 5, 6, seed=0)
    moved = features.roll((2, 1), (-2, -1))
    torch.testing.assert_close(
        maps.dist_cam(moved, reference), maps.dist_cam(features, reference).roll((2, 1), (-2, -1)), rtol=1e-4, atol=1e-5
    )


def test_distances_after_batch_normalisation_are_scaled_channel_by_channel():
    """|BN(a) - BN(b)| = |gamma / sqrt(var + eps)| |a - b|: after a BN the map is that of rescaled features."""
    features, reference = sample(2, 3, 8, 4, 4, seed=1)
    norm = torch.nn.BatchNorm1d(8).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 2, 8) + 0.1)
        norm.bias.copy_(torch.randn(8)), norm.running_mean.copy_(torch.randn(8)), norm.running_var.copy_(torch.rand(8))
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        query = features.mean((-2, -1))
        after = maps.channel_weights(norm(query), norm(reference))
    torch.testing.assert_close(after, maps.channel_weights(scale * query, scale * reference), rtol=1e-3, atol=1e-5)


def test_each_image_may_bring_its_own_references():
    features, reference = sample(4, 6, 8, 3, 3, seed=2)
    nearest = torch.tensor([5, 0, 0, 2])
    own = maps.dist_cam(features, reference[nearest][:, None])
    torch.testing.assert_close(own[:, 0], maps.dist_cam(features, reference)[range(4), nearest])


# norm and floor -------------------------------------------------------------------------------------------------------


def test_norms_that_only_scale_give_one_heatmap_and_min_max_nearly_the_same():
    features, reference = sample(3, 4, 64, 5, 5, seed=3)
    query, expected = features.mean((-2, -1)), scaled(maps.dist_cam(features, reference))
    weights = 1 / (query[:, None] - reference).abs()
    for same in (weights, weights / weights.norm(dim=-1, keepdim=True), weights / weights.amax(-1, keepdim=True)):
        torch.testing.assert_close(scaled(maps.weighted_map(features, same)), expected, rtol=1e-3, atol=1e-4)
    assert pearson(scaled(maps.dist_cam(features, reference, norm="min-max")), expected) > 0.98
    stretched = maps.channel_weights(query, reference, norm="min-max")
    assert (stretched.amin(-1) == 0).all() and (stretched.amax(-1) == 1).all()


def test_softmax_of_the_reciprocals_keeps_one_channel_and_takes_the_dead_one():
    features, reference = sample(1, 1, 32, 4, 4, seed=4)
    weights = maps.channel_weights(features.mean((-2, -1)), reference, eps=1e-3, norm="softmax")
    torch.testing.assert_close(weights.amax(-1), torch.ones(1, 1), rtol=0, atol=1e-3)
    features[:, 7], reference[:, 7] = 0, 0
    assert not maps.dist_cam(features, reference, norm="softmax").any()


def test_the_floor_leads_from_the_equation_to_the_sum_of_channels():
    features, reference = sample(8, 5, 256, 6, 6, seed=5)
    uniform, literal = features.mean(1, keepdim=True).expand(-1, 5, -1, -1), maps.dist_cam(features, reference)
    near = [
        pearson(scaled(maps.dist_cam(features, reference, eps=eps)), scaled(uniform))
        for eps in (1e-6, 1e-2, 0.1, 1.0, 10.0)
    ]
    assert near == sorted(near) and near[0] < 0.9 and near[-1] == pytest.approx(1)
    torch.testing.assert_close(
        scaled(maps.dist_cam(features, reference, eps=1e-12)), scaled(literal), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_no_floor_is_refused_with_the_reason(eps):
    features, reference = sample(1, 1, 4, 2, 2, seed=0)
    with pytest.raises(ValueError, match="inf \\* 0 = NaN"):
        maps.dist_cam(features, reference, eps=eps)


def test_wrong_norms_and_unpooled_references_are_refused():
    features, reference = sample(2, 3, 4, 2, 3, seed=0)
    channel_weights = inspect.unwrap(maps.channel_weights)  # the checks that remain without those of the tests
    with pytest.raises(ValueError, match="'L2' came"):
        channel_weights(features.mean((-2, -1)), reference, norm="L2")
    with pytest.raises(ValueError, match=r"Pool feature maps by"):
        channel_weights(features.mean((-2, -1)), features)


# traps ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sum", "min-max", "softmax"])
@pytest.mark.parametrize("dead", [1, 5, 8])
def test_dead_channels_take_weight_but_never_a_nan(dead, norm):
    features, reference = sample(2, 3, 8, 4, 4, seed=6)
    features[:, :dead], reference[:, :dead] = 0, 0
    found = maps.dist_cam(features, reference, norm=norm)
    assert found.isfinite().all()
    if norm == "sum" and dead < 8:  # the heatmap is that of the living channels alone
        alone = maps.dist_cam(features[:, dead:], reference[:, dead:])
        torch.testing.assert_close(scaled(found), scaled(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["sum", "min-max", "softmax"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_an_image_that_is_its_own_reference_has_equal_weights(norm, order):
    """Also if it was pooled elsewhere, with other last bits."""
    features = sample(3, 1, 64, 7, 7, seed=7)[0].contiguous(memory_format=order)
    own = features.double().mean((-2, -1)).float()
    found = maps.dist_cam(features, own[:, None], norm=norm)[:, 0]
    torch.testing.assert_close(scaled(found), scaled(features.sum(1)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maps.channel_weights(own, own[:, None]), torch.full((3, 1, 64), 1 / 64))


@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e-35, 1e30])
def test_features_of_any_size_give_finite_weights(factor):
    features, reference = sample(2, 3, 2048, 2, 2, seed=8)
    weights = maps.channel_weights(factor * features.mean((-2, -1)), factor * reference)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_in_float32(dtype):
    features, reference = sample(2, 3, 64, 4, 4, seed=9)
    features, reference = features.to(dtype), reference.to(dtype)
    found = maps.dist_cam(features, reference)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, maps.dist_cam(features.float(), reference.float()))


def test_autocast_does_not_reach_the_maps():
    features, reference = sample(2, 3, 64, 4, 4, seed=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = maps.dist_cam(features, reference), maps.weighted_map(features, reference)
        assert maps.cam(features, reference).dtype == torch.bfloat16  # the autocast is a real one
    torch.testing.assert_close(found[0], maps.dist_cam(features, reference), rtol=0, atol=0)
    torch.testing.assert_close(found[1], maps.cam(features, reference))


def test_empty_batches_and_no_references():
    features, reference = sample(2, 3, 4, 5, 6, seed=0)
    assert maps.dist_cam(features[:0], reference).shape == (0, 3, 5, 6)
    assert maps.dist_cam(features, reference[:0]).shape == (2, 0, 5, 6)


def test_nothing_is_written_into_the_arguments_and_inference_mode_is_enough():
    features, reference = sample(2, 3, 4, 5, 6, seed=0)
    before = features.clone(), reference.clone()
    with torch.inference_mode():
        maps.dist_cam(features, reference)
    assert torch.equal(features, before[0]) and torch.equal(reference, before[1])


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor._base is None:  # a view takes no memory
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_references(monkeypatch):
    monkeypatch.setattr(maps, "CHUNK", 2000)
    features, reference = sample(4, 300, 100, 2, 2, seed=11)  # b k h w = 1600, b c h w = 4800, b c k = 120 000
    expected = maps.weighted_map(features, maps.channel_weights(features.mean((-2, -1)), reference))
    with Largest() as largest:
        found = maps.dist_cam(features, reference)
    assert largest.numel == found.numel() == 4800
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("own", [False, True])
def test_dist_cam_compiles_into_one_graph(own, monkeypatch):
    monkeypatch.setattr(maps, "CHUNK", 64)
    for name in ("weighted_map", "channel_weights"):
        monkeypatch.setattr(maps, name, inspect.unwrap(getattr(maps, name)))  # without the shape checks of the tests
    dist_cam = inspect.unwrap(maps.dist_cam)
    features, reference = sample(2, 9, 8, 7, 7, seed=12)
    reference = reference.expand(2, -1, -1) if own else reference
    compiled = torch.compile(dist_cam, fullgraph=True, backend="eager")
    for norm in ("sum", "min-max", "softmax"):
        torch.testing.assert_close(compiled(features, reference, norm=norm), dist_cam(features, reference, norm=norm))


# relatives ------------------------------------------------------------------------------------------------------------


def test_the_rules_are_their_definitions_number_by_number():
    features, reference = sample(2, 3, 8, 4, 4, seed=13)
    query = features.mean((-2, -1))
    matched, shared = maps.match_activity_weights(query, reference), maps.intersection_weights(query, reference)
    uniform, positive = maps.uniform_weights(reference), maps.positive_weights(reference - 0.5)
    centred = maps.centred_weights(reference)
    for c in range(3):
        for i in range(2):
            distance = [abs(float(reference[c, j] - query[i, j])) for j in range(8)]
            floor = sum(distance) / 8
            row = torch.tensor([float(reference[c, j]) / max(distance[j], floor) for j in range(8)])
            torch.testing.assert_close(matched[i, c] / matched[i, c].sum(), row / row.sum())
        for j in range(8):
            assert uniform[c, j] == 1 / 8 and positive[c, j] == max(float(reference[c, j]) - 0.5, 0)
            assert centred[c, j] == pytest.approx(float(reference[c, j] - sum(reference[:, j]) / 3), abs=1e-6)
            assert all(shared[i, c, j] == min(float(query[i, j]), float(reference[c, j])) for i in range(2))


@settings(deadline=None, max_examples=20)
@given(SIZES, st.integers(0, 99))
def test_one_weighted_sum_serves_every_rule(sizes, seed):
    features, reference = sample(*sizes, seed)
    for weights in (
        maps.uniform_weights(reference),
        maps.centred_weights(reference),
        maps.positive_weights(-reference),
    ):
        found = maps.weighted_map(features, weights)
        torch.testing.assert_close(found, maps.cam(features, weights))
        torch.testing.assert_close(maps.weighted_map(features, weights.expand(len(features), -1, -1)), found)


@settings(deadline=None, max_examples=20)
@given(SIZES, st.integers(0, 99))
def test_any_common_row_keeps_the_predictions_and_centring_takes_it_away(sizes, seed):
    features, weight = sample(*sizes, seed)
    common = 10 * torch.randn(sizes[2], generator=Generator().manual_seed(seed))
    query, moved = features.mean((-2, -1)), weight + common
    for same in (moved, maps.centred_weights(weight)):
        torch.testing.assert_close((query @ same.T).softmax(-1), (query @ weight.T).softmax(-1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(maps.centred_weights(moved), maps.centred_weights(weight), rtol=1e-4, atol=1e-4)


def test_a_common_row_does_change_the_map():
    features, weight = sample(2, 3, 16, 5, 5, seed=14)
    moved = maps.cam(features, weight - 2 * torch.rand(16, generator=Generator().manual_seed(0)))
    assert pearson(scaled(moved), scaled(maps.cam(features, weight))) < 0.5


@settings(deadline=None, max_examples=25)
@given(SIZES, st.integers(0, 99))
def test_the_nearest_prototype_rule_is_a_linear_layer_and_its_map_that_layers_cam(sizes, seed):
    features, prototypes = sample(*sizes, seed)
    features, query = features.double(), features.double().mean((-2, -1))
    weight, bias = maps.euclidean_classifier(prototypes.double())
    logits, closeness = F.linear(query, weight, bias), -torch.cdist(query, prototypes.double()).square()
    common = query.square().sum(-1, keepdim=True)  # |q|^2, the same for all classes
    torch.testing.assert_close(logits, closeness + common)
    torch.testing.assert_close(logits.softmax(-1), closeness.softmax(-1))
    raw = maps.cam(features, weight)
    torch.testing.assert_close(raw.mean((-2, -1)) + bias, logits)
    full = maps.cam(features, weight) - torch.einsum("bkhw,bk->bhw", features, query)[:, None]  # weights 2P - q
    torch.testing.assert_close(full.mean((-2, -1)) + bias, closeness)
    torch.testing.assert_close(full - full[:, :1], raw - raw[:, :1])  # between classes the two decompositions agree
    torch.testing.assert_close(raw - raw.mean(1, keepdim=True), maps.cam(features, maps.centred_weights(weight)))
    torch.testing.assert_close(raw, 2 * maps.cam(features, prototypes.double()))
