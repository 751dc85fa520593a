"""Episodes: how they are drawn, what is answered rightly in them, and the interval of the mean."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Generator

from course_lib.evaluate import episodes
from course_lib.evaluate.episodes import CLASSIFIERS, TRANSDUCTIVE, accuracies, interval, recalls, sample
from course_lib.prototypes import rectify

pytestmark = pytest.mark.figures


def seeded(seed=0):
    return Generator().manual_seed(seed)


def data(sizes=(12, 9, 15, 10), k=6, seed=0):
    """Features around class centres, and labels in random order, not counted from 0."""
    generator = seeded(seed)
    labels = torch.cat([torch.full((size,), 3 + 2 * c) for c, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(3 + 2 * len(sizes), k, generator=generator)
    return centres[labels] + torch.randn(len(labels), k, generator=generator), labels


# sampling -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(0, 5), min_size=4, max_size=4), st.integers(0, 99))
def test_episodes_hold_different_images_of_the_right_classes(ways, shots, counts, seed):
    counts = tuple(counts[:ways])
    if not sum(counts):
        counts = (1,) * ways
    _, labels = data(seed=seed)
    drawn = sample(labels, ways, shots, counts, 20, seeded(seed))
    assert drawn.support.shape == (20, ways, shots) and drawn.query.shape == (20, sum(counts)) and len(drawn) == 20
    assert drawn.labels.tolist() == [c for c, count in enumerate(counts) for _ in range(count)]
    for support, query in zip(drawn.support, drawn.query):
        images = [*support.flatten().tolist(), *query.tolist()]
        assert len(set(images)) == len(images)
        classes = labels[support]
        assert (classes == classes[:, :1]).all() and len(set(classes[:, 0].tolist())) == ways
        assert torch.equal(labels[query], classes[drawn.labels, 0])


def test_one_number_of_queries_is_that_of_every_class():
    _, labels = data()
    one, each = (sample(labels, 3, 2, queries, 5, seeded()) for queries in (4, (4, 4, 4)))
    assert torch.equal(one.query, each.query) and torch.equal(one.support, each.support)


def test_the_generator_decides():
    _, labels = data()
    first, again, other = (sample(labels, 3, 2, 4, 50, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.support, again.support) and torch.equal(first.query, again.query)
    assert not torch.equal(first.query, other.query)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    sample(labels, 3, 2, 4, 50, seeded(1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_image_is_as_likely_in_every_place():
    """8 images of each of 3 classes, 2 of them drawn for each place: 1/3 x 1/8 for an image to stand in a place."""
    labels = torch.arange(3).repeat_interleave(8)
    drawn = sample(labels, 3, 1, 4, 20_000, seeded())
    places = torch.cat((drawn.support, drawn.query.view(-1, 3, 4)), 2).flatten(1)  # e 15
    counts = torch.stack([place.bincount(minlength=24) for place in places.T]).float() / 20_000
    error = math.sqrt(1 / 24 * 23 / 24 / 20_000)
    assert ((counts - 1 / 24).abs() < 5 * error).all()
    together = torch.zeros(24, 24)  # and every pair is as likely in support and query
    together.index_put_((drawn.support[:, 0, 0], drawn.query[:, 0]), torch.ones(20_000), accumulate=True)
    pairs = together[torch.block_diag(*[torch.ones(8, 8)] * 3).bool()].view(3, 8, 8)
    assert (pairs.diagonal(dim1=1, dim2=2) == 0).all()
    expected = 20_000 / (3 * 8 * 7)
    assert ((pairs - expected).abs()[pairs > 0] < 5 * math.sqrt(expected)).all() and (pairs > 0).sum() == 3 * 8 * 7


def test_all_images_of_a_class_may_be_drawn():
    labels = torch.arange(2).repeat_interleave(5)
    drawn = sample(labels, 2, 2, 3, 10, seeded())
    for support, query in zip(drawn.support, drawn.query):
        assert sorted([*support.flatten().tolist(), *query.tolist()]) == list(range(10))


def test_what_cannot_be_drawn_is_explained():
    labels = torch.tensor([0] * 6 + [1] * 4 + [2] * 6)
    with pytest.raises(ValueError, match=r"up to 5 images of a class \(1 support, 4 queries\), but class 1 has 4"):
        sample(labels, 2, 1, 4, 3, seeded())
    with pytest.raises(ValueError, match="up to 5 images of a class"):
        sample(labels, 2, 1, (4, 1), 3, seeded())  # any class may come first
    with pytest.raises(ValueError, match="Episodes of 4 classes were asked for, but the data has 3"):
        sample(labels, 4, 1, 1, 3, seeded())
    for shots, queries in ((0, 3), (1, (3, 3, 3)), (1, 0), (1, (3, -1))):
        with pytest.raises(ValueError, match="a number of queries for each of 2 classes"):
            sample(labels, 2, shots, queries, 3, seeded())


# answers --------------------------------------------------------------------------------------------------------------


def episode_by_episode(features, drawn, method):
    """Each query for itself, by distances as they are written."""
    rows = []
    for support, query in zip(drawn.support, drawn.query):
        if method in ("cosine", "shift", "rectified"):
            features = F.normalize(features, dim=1)
        prototypes = torch.stack([features[images].mean(0) for images in support])
        shift = torch.zeros(features.shape[1])
        if method in TRANSDUCTIVE:
            shift = features[support.flatten()].mean(0) - features[query].mean(0)
        if method == "rectified":
            ways, shots = support.shape
            prototypes = rectify(
                features[support.flatten()], torch.arange(ways).repeat_interleave(shots), features[query] + shift, ways
            )
        right = torch.zeros(len(support))
        for image, label in zip(query, drawn.labels):
            x = features[image] + shift
            difference = x - prototypes
            far = {"l1": difference.abs().sum(1), "l2": difference.square().sum(1)}
            distances = far.get(method, 1 - F.cosine_similarity(x[None], prototypes)).tolist()
            nearest, next_one = sorted(distances)[:2]
            assert next_one - nearest > 1e-5, "rounding alone decides this answer: draw other episodes"
            right[label] += distances.index(nearest) == label
        rows.append(right / drawn.labels.bincount(minlength=len(support)))
    return torch.stack(rows)


@pytest.mark.parametrize("method", CLASSIFIERS)
@pytest.mark.parametrize("shots,queries", [(1, 4), (3, 4), (2, (4, 1, 1))])
def test_answers_are_those_of_the_loop(method, shots, queries):
    features, labels = data()
    drawn = sample(labels, 3, shots, queries, 15, seeded(1))
    found = recalls(features, drawn, method)
    torch.testing.assert_close(found, episode_by_episode(features, drawn, method))
    assert 0.4 < found.mean() < 1


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_the_pieces_do_not_matter(method, monkeypatch):
    features, labels = data()
    drawn = sample(labels, 3, 2, 3, 11, seeded())
    whole = recalls(features, drawn, method)
    monkeypatch.setattr(episodes, "CHUNK", 3 * 15 * 6)
    assert torch.equal(recalls(features, drawn, method), whole)


@pytest.mark.parametrize("method", CLASSIFIERS)
def test_equal_features_are_chance(method):
    _, labels = data()
    drawn = sample(labels, 4, 2, 3, 7, seeded())
    found = recalls(torch.ones(len(labels), 4), drawn, method)  # scaled to length 1 they are 0.5, without rounding
    assert float(found.mean()) == pytest.approx(0.25), "a quarter of the queries belongs to whichever class wins"


def test_options_reach_the_method():
    features, labels = data()
    drawn = sample(labels, 3, 1, 6, 200, seeded())
    default, same, other = (
        recalls(features, drawn, "rectified", **options)
        for options in ({}, {"surest": 8, "epsilon": 10.0}, {"surest": 1, "epsilon": 0.0})
    )
    assert torch.equal(default, same) and not torch.equal(default, other)


def test_a_function_of_ones_own_is_a_method():
    features, labels = data()
    drawn = sample(labels, 3, 2, 3, 9, seeded())
    mine = recalls(features, drawn, lambda support, query: -torch.cdist(support.mean(2), query))
    assert torch.equal(mine, recalls(features, drawn, "l2"))
    with pytest.raises(ValueError, match="There is no method 'l3'; there are: l1, "):
        recalls(features, drawn, "l3")


def test_accuracy_weighs_queries_and_recall_classes():
    labels = torch.tensor([0, 0, 0, 1])
    share = torch.tensor([[1.0, 0.0], [1 / 3, 1.0]])
    torch.testing.assert_close(accuracies(share, labels), torch.tensor([0.75, 0.5]))
    torch.testing.assert_close(share.mean(1), torch.tensor([0.5, 2 / 3]))


def test_a_class_without_queries_counts_in_neither():
    features, points = data()
    drawn = sample(points, 3, 2, (4, 0, 4), 6, seeded())
    share = recalls(features, drawn, "cosine")
    assert share[:, 1].isnan().all() and not share[:, [0, 2]].isnan().any()
    torch.testing.assert_close(accuracies(share, drawn.labels), share.nanmean(1))


def test_predictions_are_those_of_easyfsl():
    methods = pytest.importorskip("easyfsl.methods")
    features, labels = data()
    drawn = sample(labels, 3, 2, 5, 20, seeded())
    model, right = methods.PrototypicalNetworks(), []
    for support, query in zip(drawn.support, drawn.query):
        model.process_support_set(features[support.flatten()], torch.arange(3).repeat_interleave(2))
        right.append((model(features[query]).argmax(1) == drawn.labels).float().mean())
    torch.testing.assert_close(recalls(features, drawn, "l2").mean(1), torch.stack(right))


# interval -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count,half", [(600, 0.0080), (10_000, 0.0020)])
def test_intervals_of_a_tenth(count, half):
    values = torch.full((count,), 0.6)
    values[::2] += 0.1
    values[1::2] -= 0.1
    mean, margin = interval(values)
    assert mean == pytest.approx(0.6) and margin == pytest.approx(half, abs=5e-5)


def test_the_interval_holds_the_truth_19_times_in_20():
    draws = torch.rand(1000, 200, generator=seeded())
    inside = [abs(mean - 0.5) < margin for mean, margin in map(interval, draws)]
    assert 0.93 < sum(inside) / 1000 < 0.97


def test_one_episode_has_no_interval():
    mean, margin = interval(torch.tensor([0.5]))
    assert mean == 0.5 and math.isnan(margin)


# baselines and uneven queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shots", "penalty"), [(1, 1.0), (5, 1.0), (5, 0.1)])
def test_logistic_regression_is_that_of_scikit_learn(shots, penalty):
    support = F.normalize(torch.randn(2, 4, shots, 12, generator=seeded()), dim=-1)
    query = F.normalize(torch.randn(2, 7, 12, generator=seeded(1)), dim=-1)
    found = episodes.logistic(support, query, penalty)
    assert found.shape == (2, 4, 7)
    for rows, asked, scores in zip(support, query, found):
        other = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-8, max_iter=5000)
        other.fit(rows.flatten(0, 1).double().numpy(), torch.arange(4).repeat_interleave(shots).numpy())
        expected = torch.tensor(other.decision_function(asked.double().numpy())).T
        torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=0)


def test_logistic_regression_needs_a_penalty():
    with pytest.raises(ValueError, match="penalty above 0"):
        episodes.logistic(torch.rand(1, 2, 1, 3), torch.rand(1, 4, 3), 0.0)


def test_shares_of_queries_are_those_of_a_dirichlet_distribution():
    counts = episodes.dirichlet_counts(5, 1000, 4000, seeded())
    assert {sum(row) for row in counts} == {1000} and min(min(row) for row in counts) >= 0
    share = torch.tensor(counts) / 1000
    assert share.mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.01)
    assert share.std(0).tolist() == pytest.approx([(0.2 * 0.8 / 11) ** 0.5] * 5, abs=0.005)  # of Dirichlet(2, ..., 2)


def test_no_class_has_more_queries_than_allowed():
    counts = episodes.dirichlet_counts(3, 12, 200, seeded(), most=6)
    assert max(max(row) for row in counts) == 6 and {sum(row) for row in counts} == {12}
    with pytest.raises(ValueError, match="12 queries of 3 classes, got 3"):
        episodes.dirichlet_counts(3, 12, 1, seeded(), most=3)


def test_gains_of_uneven_episodes_are_paired_and_turn_at_the_smallest_that_gains():
    generator = seeded(1)
    labels = torch.arange(6).repeat_interleave(20)
    features = torch.rand(6, 12, generator=generator)[labels] + 0.9 * torch.rand(120, 12, generator=generator)
    gains, turning = episodes.uneven_gains(features, labels, [1, 15, 4])
    drawn = sample(labels, 5, 1, (15, 4, 4, 4, 4), 200, seeded())
    difference = recalls(features, drawn, "rectified") - recalls(features, drawn, "cosine")
    assert gains[2] == pytest.approx(100 * difference.mean().item())
    assert gains[0] < -3 and gains[1] > gains[2] > 2 and turning == 4
    assert episodes.uneven_gains(features, labels, [1])[1] is None
    assert episodes.uneven_gains(features, labels, [1], epsilon=0.0)[0] != gains[:1]
