"""k-reciprocal re-ranking: a dense twin in loops, invariants, duplicates and degenerate galleries."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from course_lib.evaluate import ranking
from course_lib.evaluate.ranking import cmc_map, rerank

pytestmark = pytest.mark.figures


def slow_rerank(query, gallery, k1, k2, lam):
    """The definition in float64: sets of Python, dense matrices, a loop for everything."""
    x = torch.cat((query, gallery)).double().numpy()
    n = len(x)
    squared = np.square(x[:, None] - x).sum(2)
    d = squared / np.maximum(squared.max(1, keepdims=True), 1e-300)
    order = [[i] + [j for j in np.argsort(squared[i], kind="stable") if j != i] for i in range(n)]

    def reciprocal(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    v = np.zeros((n, n))
    for i in range(n):
        own = reciprocal(i, k1)
        members = set(own)
        for c in own:
            theirs = reciprocal(c, int(np.around(k1 / 2)))
            if 3 * len(theirs & own) > 2 * len(theirs):
                members |= theirs
        for j in members:
            v[i, j] = np.exp(-d[i, j])
        v[i] /= v[i].sum()
    if k2 > 1:
        v = np.stack([v[order[i][:k2]].mean(0) for i in range(n)])
    result = np.zeros((len(query), len(gallery)))
    for i in range(len(query)):
        for g in range(len(gallery)):
            other = len(query) + g
            jaccard = 1 - np.minimum(v[i], v[other]).sum() / np.maximum(v[i], v[other]).sum()
            result[i, g] = (1 - lam) * jaccard + lam * d[i, other]
    return torch.from_numpy(result)


def world(
    seed: int, queries: int = 12, gallery: int = 48, identities: int = 6, dimensions: int = 8, noise: float = 1.0
):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(identities, dimensions, generator=generator)
    own = torch.randint(identities, (queries + gallery,), generator=generator)
    x = F.normalize(centres[own] + noise * torch.randn(queries + gallery, dimensions, generator=generator), dim=1)
    return x[:queries], x[queries:], own[:queries], own[queries:]


def near_ties(query, gallery):
    """Are two distances of an image closer than float32 can tell? Then their order is a matter of the processor."""
    x = torch.cat((query, gallery)).double()
    gaps = (x[:, None] - x).square().sum(2).sort(1).values.diff(dim=1)
    return bool(((gaps > 0) & (gaps < 2e-6)).any())


def assert_is_the_twin(query, gallery, *settings):
    torch.testing.assert_close(
        rerank(query, gallery, *settings).double(), slow_rerank(query, gallery, *settings), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("chunk", [200, 2**20])
@pytest.mark.parametrize(
    "setting", [(20, 6, 0.3), (7, 3, 0.6), (5, 2, 0.0), (25, 1, 0.3), (1, 1, 0.5), (20, 30, 0.3), (20, 6, 1.0)]
)
def test_it_is_the_dense_twin(setting, chunk, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    monkeypatch.setattr(ranking, "CACHED", chunk)
    query, gallery, *_ = world(4)
    assert not near_ties(query, gallery)
    assert_is_the_twin(query, gallery, *setting)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 20),
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.2, 3),
)
def test_it_is_the_dense_twin_for_any_size(seed, queries, gallery, k1, k2, noise):
    query, others, *_ = world(seed, queries, gallery, noise=noise)
    assume(not near_ties(query, others))
    assert_is_the_twin(query, others, k1, k2, 0.3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 8))
def test_of_equal_distances_the_lower_index_comes_first(seed, k1, k2):
    """64 points of a small grid, in random order, symmetric about zero: float32 is exact, most distances are equal."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-2, 3, (32, 2), generator=generator).float()
    x = torch.cat((half, -half))[torch.randperm(64, generator=generator)]
    assert_is_the_twin(x[:10], x[10:], k1, k2, 0.3)


def test_half_of_an_odd_k1_is_rounded_to_even(monkeypatch):
    seen = []
    mutual = ranking._mutual
    monkeypatch.setattr(
        ranking, "_mutual", lambda neighbours: (seen.append(neighbours.shape[1]), mutual(neighbours))[1]
    )
    for k1 in (25, 23, 1):
        rerank(*world(0)[:2], k1)
    assert seen == [26, 13, 24, 13, 2, 1]


def test_two_thirds_are_not_enough():
    near = torch.tensor([[0, 1, 2], [1, 0, -1], [2, 0, -1], [3, -1, -1]])  # R(i, k1)
    close = torch.tensor([[0, 1, 3], [1, -1, -1], [2, -1, -1], [3, -1, -1]])  # R(i, k1/2): two of three lie in R(0, k1)
    row, column, _ = ranking._encode(torch.zeros(4, 2), near, close, torch.ones(4))
    assert column[row == 0].tolist() == [0, 1, 2]
    near[0, 2] = -1  # two of two
    close[0] = torch.tensor([0, 1, -1])
    close[1] = torch.tensor([1, 0, -1])
    near[1, 2] = 3
    row, column, _ = ranking._encode(torch.zeros(4, 2), near, close, torch.ones(4))
    assert column[row == 0].tolist() == [0, 1]
    assert column[row == 1].tolist() == [0, 1, 3]


def test_lam_1_is_the_squared_distance_over_its_largest():
    query, gallery, *_ = world(1)
    squared = torch.cdist(query, torch.cat((query, gallery))).square()
    torch.testing.assert_close(
        rerank(query, gallery, lam=1.0), (squared / squared.amax(1, keepdim=True))[:, len(query) :], rtol=0, atol=1e-6
    )


def test_it_lies_between_0_and_1():
    for setting in ((20, 6, 0.0), (4, 1, 0.3)):
        found = rerank(*world(2, noise=0.3)[:2], *setting)
        assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


def test_it_helps_where_k1_is_the_number_of_matches():
    """Ten images of each identity, so noisy that neighbours need each other's word."""
    query, gallery, query_ids, gallery_ids = world(3, 60, 540, 60, 32, 1.6)
    cameras = torch.zeros(60, dtype=torch.long), torch.ones(540, dtype=torch.long)
    before, after = (
        cmc_map(distances, query_ids, gallery_ids, *cameras).map
        for distances in (torch.cdist(query, gallery), rerank(query, gallery, 10, 4, 0.3))
    )
    assert after > before + 0.02


def test_the_features_stay_as_they_are():
    query, gallery, *_ = world(0)
    kept = query.clone(), gallery.clone()
    assert not rerank(query.requires_grad_(), gallery).requires_grad
    assert torch.equal(query, kept[0]) and torch.equal(gallery, kept[1])


def test_duplicates_are_each_others_nearest():
    query, gallery, *_ = world(4)
    gallery = torch.cat((gallery, query))  # a copy of every query
    found = rerank(query, gallery)
    assert torch.equal(found.argmin(1), torch.arange(len(query)) + len(gallery) - len(query))
    assert found[:, -len(query) :].diagonal().max() < 0.05


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_all_equal_features_give_no_nan(value):
    found = rerank(torch.full((5, 4), value), torch.full((50, 4), value))
    assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()


@pytest.mark.parametrize("queries, gallery", [(1, 1), (2, 3), (3, 0), (0, 3)])
def test_fewer_images_than_k1_will_do(queries, gallery):
    query, others = torch.randn(queries, 4), torch.randn(gallery, 4)
    found = rerank(query, others)
    assert found.shape == (queries, gallery)
    if queries and gallery:
        assert_is_the_twin(query, others, 20, 6, 0.3)


def test_half_precision_features_are_taken():
    query, gallery, *_ = world(0)
    torch.testing.assert_close(
        rerank(query.half(), gallery.half()), rerank(query.half().float(), gallery.half().float())
    )


@pytest.mark.parametrize("setting", [(0, 6, 0.3), (20, 0, 0.3), (20, 6, 1.5), (20, 6, -0.1)])
def test_settings_that_mean_nothing_are_named(setting):
    with pytest.raises(ValueError, match=r"The paper takes 20, 6 and 0\.3"):
        rerank(*world(0)[:2], *setting)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_named(value):
    query, gallery, *_ = world(0)
    gallery[3, 1] = value
    with pytest.raises(ValueError, match="NaN have no order"):
        rerank(query, gallery)
