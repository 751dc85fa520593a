"""Rules: the right reference is chosen whatever is left out, and every map is that of its pair alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from course_lib import maps
from course_lib.evaluate import controls
from course_lib.metric_learning.rules import NAMES, NONE, RULES, neighbours, pair_maps, random_wrong, ranked

pytestmark = pytest.mark.figures


def seeded(seed=0):
    return Generator().manual_seed(seed)


def problem(queries, gallery, classes, seed, kept=0.7):
    g = seeded(seed)
    distances = torch.randint(6, (queries, gallery), generator=g) / 4  # with many ties
    ids = [torch.randint(classes, (n,), generator=g) for n in (queries, gallery)]
    return distances, *ids, torch.rand(queries, gallery, generator=g) < kept


# neighbours -----------------------------------------------------------------------------------------------------------


def slow_neighbours(distances, query_ids, gallery_ids, keep):
    found = []
    for q in range(len(query_ids)):
        kept = [g for g in range(len(gallery_ids)) if keep[q, g]]
        kept.sort(key=lambda g: float(distances[q, g]))  # stable: of equal ones the first
        right = [g for g in kept if gallery_ids[g] == query_ids[q]]
        wrong = [g for g in kept if gallery_ids[g] != query_ids[q]]
        found.append([names[0] if names else NONE for names in (kept, right, wrong)])
    return torch.tensor(found).T


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6), st.integers(1, 8), st.integers(1, 4), st.integers(0, 999), st.sampled_from([0.0, 0.3, 0.8, 1.0])
)
def test_neighbours_are_those_of_a_search_one_by_one(queries, gallery, classes, seed, kept):
    distances, query_ids, gallery_ids, keep = problem(queries, gallery, classes, seed, kept)
    found = neighbours(distances, query_ids, gallery_ids, keep)
    assert torch.equal(torch.stack(tuple(found)), slow_neighbours(distances, query_ids, gallery_ids, keep))
    everything = neighbours(distances, query_ids, gallery_ids)
    assert torch.equal(
        torch.stack(tuple(everything)), slow_neighbours(distances, query_ids, gallery_ids, torch.ones_like(keep))
    )
    either = [{int(r), int(w)} for r, w in zip(found.correct, found.wrong)]
    assert all(int(n) in both for n, both in zip(found.nearest, either))  # the nearest is one of the other two


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(1, 10), st.integers(0, 999), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_rank_list_holds_what_is_kept_in_stable_order(queries, gallery, k, seed, kept):
    distances, _, _, keep = problem(queries, gallery, 2, seed, kept)
    found = ranked(distances, keep, k)
    for q in range(queries):
        order = sorted((g for g in range(gallery) if keep[q, g]), key=lambda g: float(distances[q, g]))
        assert found[q].tolist() == (order + [NONE] * gallery)[: min(k, gallery)]
    labels = torch.zeros(queries).long(), torch.zeros(gallery).long()
    assert torch.equal(found[:, 0], neighbours(distances, *labels, keep).nearest)
    assert torch.equal(ranked(distances, None, k), ranked(distances, torch.ones_like(keep), k))


def test_a_query_in_its_own_gallery_must_be_left_out():
    features = torch.eye(4)
    distances, ids = torch.cdist(features, features), torch.tensor([0, 0, 1, 2])
    assert neighbours(distances, ids, ids).nearest.tolist() == [0, 1, 2, 3]
    found = neighbours(distances, ids, ids, ~torch.eye(4, dtype=torch.bool))
    assert (found.nearest != torch.arange(4)).all()
    assert found.correct.tolist() == [1, 0, NONE, NONE]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_distances_that_are_not_numbers_are_refused(value):
    with pytest.raises(ValueError, match="said by `keep`"):
        neighbours(torch.tensor([[value, 1.0]]), torch.tensor([0]), torch.tensor([0, 1]))


def test_a_random_wrong_reference_is_wrong_kept_and_any_of_them():
    query_ids, gallery_ids = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1, 2, 2, 2])
    keep = torch.ones(3, 6, dtype=torch.bool)
    keep[0, 5], keep[2, :3] = False, False  # the last query keeps its own class only
    drawn = torch.stack([random_wrong(query_ids, gallery_ids, keep, seeded(seed)) for seed in range(300)])
    assert set(drawn[:, 0].tolist()) == {1, 2, 3, 4} and set(drawn[:, 1].tolist()) == {0, 3, 4, 5}
    assert set(drawn[:, 2].tolist()) == {NONE}
    assert (drawn[:, 0].bincount()[1:] > 50).all()  # about 75 each
    assert torch.equal(drawn[7], random_wrong(query_ids, gallery_ids, keep, seeded(7)))


# maps of pairs --------------------------------------------------------------------------------------------------------

BY_HAND = {  # one pooled query, one reference, mean reference
    "uniform": lambda q, p, mean: torch.ones_like(q),
    "dist-cam": lambda q, p, mean: 1 / (p - q).abs(),
    "match-activity": lambda q, p, mean: p / (p - q).abs().clamp_min((p - q).abs().mean()),
    "intersection": lambda q, p, mean: torch.minimum(p, q),
    "prototype": lambda q, p, mean: p,
    "prototype-centred": lambda q, p, mean: p - mean,
}


def images(b=3, g=5, k=7, seed=0):
    g_ = seeded(seed)
    return torch.rand(b, k, 3, 4, generator=g_), torch.rand(g, k, generator=g_)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_each_map_is_that_of_its_pair_made_by_hand(b, r, g, seed):
    features, references = images(b, g, seed=seed)
    chosen = torch.randint(g, (b, r), generator=seeded(seed))
    found = pair_maps(features, references, chosen, seeded())
    assert list(found) == [*BY_HAND, "random"]
    for name, rule in BY_HAND.items():
        for i in range(b):
            for j in range(r):
                weights = rule(features[i].mean((-2, -1)), references[chosen[i, j]], references.mean(0))
                expected = (weights[:, None, None] * features[i]).sum(0)
                if name == "prototype-centred":  # its scale is that of small differences
                    torch.testing.assert_close(found[name][i, j], expected, rtol=1e-4, atol=1e-5)
                else:  # only the shape has a meaning
                    torch.testing.assert_close(
                        found[name][i, j] / found[name][i, j].max(), expected / expected.max(), rtol=1e-4, atol=1e-5
                    )


def test_rules_are_those_of_lesson_02():
    features, references = images()
    query, labels = features.mean((-2, -1)), torch.tensor([2, 0, 4])
    for name, all_weights in {
        "cam": references,
        "cam-positive": maps.positive_weights(references),
        "cam-centred": maps.centred_weights(references),
    }.items():
        source, rule = RULES[name]
        assert source == "classifier"
        assert torch.equal(rule(query, references, labels), all_weights[labels][:, None])
    chosen = torch.tensor([[0, 4], [1, 1], [2, 3]])
    found = pair_maps(features, references, chosen, seeded())
    torch.testing.assert_close(found["dist-cam"], maps.dist_cam(features, references[chosen]))
    torch.testing.assert_close(found["prototype"], maps.weighted_map(features, references[chosen]))


def test_a_missing_reference_gives_an_empty_map_and_touches_no_other():
    features, references = images()
    whole = pair_maps(features, references, torch.tensor([[0], [1], [2]]), seeded())
    part = pair_maps(features, references, torch.tensor([[0], [NONE], [2]]), seeded())
    for name in whole:
        assert not part[name][1].any()
        torch.testing.assert_close(part[name][[0, 2]], whole[name][[0, 2]])
    with pytest.warns(UserWarning, match="1 of 3 maps are constant"):
        assert not maps.heatmap(part["prototype"], 8)[1].any()


def test_an_image_that_is_its_own_reference_shows_the_sum_of_its_channels():
    features, _ = images()
    found = pair_maps(features, features.mean((-2, -1)), torch.arange(3)[:, None], seeded(), ["dist-cam", "uniform"])
    torch.testing.assert_close(found["dist-cam"], found["uniform"], rtol=1e-3, atol=1e-4)


def test_random_weights_are_fresh_for_each_pair_and_repeat_with_their_seed():
    features, references = images()
    chosen = torch.zeros(3, 2, dtype=torch.long)
    first, again, other = (
        pair_maps(features, references, chosen, seeded(seed), ["random"])["random"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert not torch.allclose(first[:, 0], first[:, 1])


def test_both_sides_of_a_pair():
    features, _ = images()
    pooled = features.mean((-2, -1))
    pair = torch.tensor([1, 2, 0])
    here = pair_maps(features, pooled, pair[:, None], seeded(), ["prototype"])["prototype"][:, 0]
    there = pair_maps(features[pair], pooled, torch.arange(3)[:, None], seeded(), ["prototype"])["prototype"][:, 0]
    torch.testing.assert_close(here.mean((-2, -1)), there.mean((-2, -1)))  # both average to the product P . q
    assert (controls.map_correlation(here, there) < 0.999).all()


def test_half_precision_features_give_finite_maps():
    features, references = images()
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_maps(features.bfloat16(), references, torch.zeros(3, 1, dtype=torch.long), seeded())
    assert all(map.dtype == torch.float32 and map.isfinite().all() for map in found.values())


def test_an_unknown_rule_is_refused_with_the_names_there_are():
    features, references = images()
    with pytest.raises(ValueError, match="no rule 'cam'; there are: uniform, dist-cam,"):
        pair_maps(features, references, torch.zeros(3, 1, dtype=torch.long), seeded(), ["cam"])
    assert set(NAMES) == {*BY_HAND, "random"}
