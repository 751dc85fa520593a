"""CMC, mAP, mINP, Recall@K, R-precision, MAP@R: loops and pytorch-metric-learning as oracles, and what has no rank."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from course_lib.evaluate import ranking
from course_lib.evaluate.ranking import cmc_map, nearest, retrieval

pytestmark = pytest.mark.figures


def slow_cmc_map(distances, query_ids, gallery_ids, query_cameras, gallery_cameras, ranks):
    """Query by query, image by image, as one would do it with a pencil."""
    curves, precisions, penalties = [], [], []
    for row, identity, camera in zip(distances.tolist(), query_ids.tolist(), query_cameras.tolist()):
        order = sorted(range(len(row)), key=lambda image: (row[image], image))
        rank, found = 0, []
        for image in order:
            other = gallery_ids[image].item()
            if other == -1 or (other == identity and gallery_cameras[image].item() == camera):
                continue
            rank += 1
            if other == identity:
                found.append(rank)
        if found:
            curves.append([float(found[0] <= k) for k in range(1, ranks + 1)])
            precisions.append(sum(number / rank for number, rank in enumerate(found, 1)) / len(found))
            penalties.append(len(found) / found[-1])
    return np.mean(curves, 0), np.mean(precisions), np.mean(penalties), len(curves)


def world(seed: int, queries: int = 30, gallery: int = 80, identities: int = 8, levels: int | None = None):
    """Random distances (of a few levels, so that many are equal) and labels; identity 0 is in the gallery only."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.randn(queries, gallery, generator=generator)
    if levels:
        distances = (distances * levels).round() / levels
    query_ids = torch.randint(1, identities, (queries,), generator=generator)
    gallery_ids = torch.randint(-1, identities, (gallery,), generator=generator)
    query_cameras, gallery_cameras = (torch.randint(3, (count,), generator=generator) for count in (queries, gallery))
    return distances, query_ids, gallery_ids, query_cameras, gallery_cameras


def small_world(seed: int):
    """Six queries, at least one with a match, and a gallery of 20."""
    distances, query_ids, gallery_ids, query_cameras, gallery_cameras = world(seed, 6, 20)
    same = query_ids[:, None] == gallery_ids
    assume((same & (query_cameras[:, None] != gallery_cameras)).any())
    return distances, query_ids, gallery_ids, query_cameras, gallery_cameras


def assert_same(found, other):
    torch.testing.assert_close(found.cmc, other.cmc, rtol=0, atol=1e-12)
    assert (found.map, found.minp) == pytest.approx((other.map, other.minp), abs=1e-12)
    assert (found.queries, found.without_match) == (other.queries, other.without_match)


# re-identification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_the_pencil(seed, levels, monkeypatch):
    monkeypatch.setattr(ranking, "CACHED", 200)  # two rows at a time
    part = world(seed, levels=levels)
    found = cmc_map(*part, ranks=20)
    cmc, mean_precision, penalty, queries = slow_cmc_map(*part, 20)
    np.testing.assert_allclose(found.cmc.numpy(), cmc, rtol=0, atol=1e-12)
    assert (found.map, found.minp, found.queries) == pytest.approx((mean_precision, penalty, queries), abs=1e-12)
    assert found.queries + found.without_match == 30


def test_an_example_by_hand():
    """Ranks of the kept: wrong 1, match 2, distractor 3, match 4. The junk and the image of the own camera are out."""
    distances = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    gallery_ids, gallery_cameras = torch.tensor([-1, 9, 7, 7, 0, 7]), torch.tensor([1, 1, 0, 1, 1, 2])
    found = cmc_map(distances, torch.tensor([7]), gallery_ids, torch.tensor([0]), gallery_cameras, ranks=4)
    assert found.cmc.tolist() == [0, 1, 1, 1]
    assert found.map == pytest.approx((1 / 2 + 2 / 4) / 2) and found.minp == pytest.approx(2 / 4)
    assert found.average_precision.tolist() == pytest.approx([0.5])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_only_the_order_counts(seed):
    distances, *labels = small_world(seed)
    ranks = distances.argsort(dim=1, stable=True).argsort(dim=1).float()  # exact, as no function that rounds would be
    assert_same(cmc_map(distances, *labels), cmc_map(ranks, *labels))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_what_leaves_the_gallery_changes_nothing(seed):
    distances, query_ids, gallery_ids, query_cameras, gallery_cameras = small_world(seed)
    same = (query_ids[:, None] == gallery_ids) & (query_cameras[:, None] == gallery_cameras)
    moved = torch.where(same | (gallery_ids == -1), distances - 10, distances)
    labels = query_ids, gallery_ids, query_cameras, gallery_cameras
    assert_same(cmc_map(distances, *labels), cmc_map(moved, *labels))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_the_order_of_the_gallery_does_not_matter(seed):
    distances, query_ids, gallery_ids, query_cameras, gallery_cameras = small_world(seed)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    assert_same(
        cmc_map(distances, query_ids, gallery_ids, query_cameras, gallery_cameras),
        cmc_map(distances[:, order], query_ids, gallery_ids[order], query_cameras, gallery_cameras[order]),
    )


def test_equal_distances_rank_in_the_order_of_the_gallery():
    ids, cameras = torch.tensor([5]), torch.tensor([0])
    for zero in (0.0, -0.0):  # the same number in two codings
        distances = torch.tensor([[zero, 0.0, 0.0]])
        first = cmc_map(distances, ids, torch.tensor([5, 6, 6]), cameras, torch.tensor([1, 1, 1]))
        last = cmc_map(distances, ids, torch.tensor([6, 6, 5]), cameras, torch.tensor([1, 1, 1]))
        assert (first.map, last.map) == pytest.approx((1, 1 / 3))


def test_duplicates_in_the_gallery_are_two_matches():
    found = cmc_map(
        torch.tensor([[1.0, 1.0, 2.0]]),
        torch.tensor([3]),
        torch.tensor([3, 3, 4]),
        torch.tensor([0]),
        torch.tensor([1, 1, 1]),
    )
    assert found.map == 1 and found.minp == 1


def test_negative_infinite_and_double_distances_have_an_order():
    labels = torch.tensor([1]), torch.tensor([2, 1, 3, 4]), torch.tensor([0]), torch.tensor([1, 1, 1, 1])
    for dtype in (torch.float64, torch.float32, torch.float16):
        found = cmc_map(torch.tensor([[-torch.inf, -2.0, -1.0, torch.inf]], dtype=dtype), *labels)
        assert found.map == pytest.approx(1 / 2)


def test_a_query_without_a_match_is_left_out_and_counted():
    distances = torch.tensor([[0.1, 0.2], [0.1, 0.2]])
    found = cmc_map(distances, torch.tensor([1, 8]), torch.tensor([1, 2]), torch.tensor([0, 0]), torch.tensor([1, 1]))
    assert (found.queries, found.without_match, found.map) == (1, 1, 1.0)
    assert found.average_precision[0] == 1 and found.average_precision[1].isnan()


def test_the_curve_is_flat_behind_a_short_gallery():
    found = cmc_map(
        torch.tensor([[0.2, 0.1]]), torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([1, 1])
    )
    assert found.cmc.tolist() == [0.0] + [1.0] * 49


@pytest.mark.parametrize("gallery", [4, 0])
def test_one_camera_only_is_named(gallery):
    ids, cameras = torch.arange(4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"None of 4 queries has a match.*all images from one camera"):
        cmc_map(torch.rand(4, gallery), ids, ids[:gallery], cameras, cameras[:gallery])


def test_distances_that_are_nan_are_named():
    ids = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="NaN have no order"):
        cmc_map(torch.tensor([[0.1, torch.nan], [0.1, 0.2]]), ids, ids, torch.tensor([0, 0]), torch.tensor([1, 1]))


# retrieval ------------------------------------------------------------------------------------------------------------


def features(seed: int, count: int = 60, classes: int = 7, dimensions: int = 8):
    """Points around class centres. With seeds 0 to 2, no two distances are so close that rounding changes a rank."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, dimensions, generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, dimensions, generator=generator), labels


def oracle(values, labels):
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        device=torch.device("cpu"),
    )
    return calculator.get_accuracy(values, labels, ref_includes_query=True)


@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_pytorch_metric_learning(seed, lone, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 500)
    values, labels = features(seed)
    if lone:
        labels[:3] = torch.tensor([100, 101, 102])  # classes of a single image
    found, expected = retrieval(values, labels), oracle(values, labels)
    assert found.recall[1] == pytest.approx(expected["precision_at_1"], abs=1e-7)
    assert found.r_precision == pytest.approx(expected["r_precision"], abs=1e-6)
    assert found.map_at_r == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)
    assert found.without_match == 3 * lone and found.queries == 60 - 3 * lone


def test_recall_is_that_of_a_loop():
    values, labels = features(0)
    distances = torch.cdist(values, values)
    for k in (1, 2, 4, 8, 100):
        hits = []
        for query in range(60):
            order = [image for image in distances[query].argsort().tolist() if image != query]
            hits.append(any(labels[image] == labels[query] for image in order[:k]))
        assert retrieval(values, labels, (k,)).recall == {k: pytest.approx(np.mean(hits))}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(4, 40), st.integers(1, 6))
def test_figures_keep_their_order(seed, count, classes):
    values, labels = features(seed, count, classes)
    try:
        found = retrieval(values, labels)
    except ValueError:
        assert labels.bincount().max() == 1
        return
    assert 0 <= found.map_at_r <= found.r_precision <= 1
    assert 0 <= found.recall[1] <= found.recall[2] <= found.recall[4] <= found.recall[8] <= 1
    assert found.average_precision.nanmean() == pytest.approx(found.map_at_r)


def test_cosine_is_the_distance_of_features_of_length_1():
    values, labels = features(1)
    scaled = F.normalize(values) @ F.normalize(values).T
    scaled.fill_diagonal_(-2)
    assert retrieval(F.normalize(values), labels).recall[1] == pytest.approx(
        float((labels[scaled.argmax(1)] == labels).double().mean())
    )


def test_all_equal_features_give_shares_and_no_nan():
    found = retrieval(torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found.recall[8] == 1 and 0 < found.map_at_r < 1 and not found.average_precision.isnan().any()


def test_classes_of_one_image_only_are_named():
    with pytest.raises(ValueError, match="None of 5 images has another one of its class"):
        retrieval(torch.rand(5, 2), torch.arange(5))


def test_features_that_are_nan_are_named():
    values, labels = features(0)
    values[3, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN have no order"):
        retrieval(values, labels)


# search ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_is_the_sorted_whole_matrix(offset, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", 100)
    query, gallery = (features(seed, count)[0].double() for seed, count in ((0, 13), (1, 29)))
    expected = torch.cdist(query, gallery).argsort(1)[:, :7]
    assert torch.equal(nearest(query + offset, gallery + offset, 7), expected)  # far from zero, rounding must not tell


def test_an_image_finds_its_copy_and_not_itself():
    values = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0], [0.0, 1.0]])
    assert nearest(values, None, 2).tolist() == [[1, 3], [0, 3], [0, 1], [0, 1]]


def test_no_query_finds_nothing():
    assert nearest(torch.zeros(0, 4), torch.zeros(3, 4), 2).shape == (0, 2)


@pytest.mark.parametrize("count", [0, 3])
def test_more_images_than_there_are_is_named(count):
    with pytest.raises(ValueError, match=f"{count} nearest images were asked for, but there are 2"):
        nearest(torch.rand(3, 2), None, count)


def test_arrays_of_numpy_are_ranked_as_tensors_are():
    draw = np.random.default_rng(0)
    distances, labels = draw.random((20, 30)), [draw.integers(0, 5, n) for n in (20, 30)]
    cameras = [draw.integers(1, 4, n) for n in (20, 30)]
    found = cmc_map(distances, *labels, *cameras)
    expected = cmc_map(*(torch.from_numpy(part) for part in (distances, *labels, *cameras)))
    assert torch.equal(found.cmc, expected.cmc) and (found.map, found.minp) == (expected.map, expected.minp)


def trapezoids(hits):
    """Average precision as the Matlab tool of Market-1501 computes it, line by line."""
    recall, precision, area, found = 0.0, 1.0, 0.0, 0
    for place, hit in enumerate(hits, 1):
        found += hit
        area += (found / sum(hits) - recall) * (precision + found / place) / 2
        recall, precision = found / sum(hits), found / place
    return area


@pytest.mark.parametrize("hits", [[1], [0, 1], [1, 1, 0], [0, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0]])
def test_trapezoids_are_those_of_the_first_tool(hits):
    ids, camera = torch.tensor(hits), torch.zeros(len(hits), dtype=torch.long)
    found = cmc_map(torch.arange(len(hits)).float()[None], torch.tensor([1]), ids, torch.tensor([1]), camera)
    assert found.map_trapezoid == pytest.approx(trapezoids(hits), abs=1e-12) and found.map_trapezoid <= found.map


@pytest.mark.parametrize("seed", range(5))
def test_retrieval_by_distance_is_that_of_features(seed):
    values, labels = features(seed)
    distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(-1)
    by_distance, by_features = ranking.retrieval_by_distance(distance, labels), retrieval(values, labels)
    assert by_distance.recall == by_features.recall and by_distance.map_at_r == by_features.map_at_r


def test_k_occurrence_counts_the_lists_that_an_image_is_in():
    spots = torch.tensor([[0.0], [1.0], [3.0], [9.0], [10.0]])
    assert ranking.k_occurrence(spots, 1).tolist() == [1, 2, 0, 1, 1]
    assert ranking.k_occurrence(torch.randn(40, 5), 7).double().mean() == 7


def test_a_hub_by_its_length_is_none_by_its_direction():
    rays = F.normalize(torch.randn(60, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    rays[1:] *= 3  # the first one is near to the centre
    found = ranking.largest_hubs(rays, 5)
    assert found["Euclidean"] == 59 and found["cosine"] < 30


def test_a_shared_offset_makes_hubs_that_centring_takes_away():
    cloud = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 3, 60)[:, None]
    found = ranking.largest_hubs(cloud + 50, 5)
    assert found["cosine, centred"] < found["cosine"]


def test_reciprocal_neighbours_have_each_other():
    spots = torch.tensor([0.0, 1.0, 2.5, 2.6, 7.0, 9.5])
    found = ranking.reciprocal_neighbours((spots[:, None] - spots).abs(), 2)
    groups = [{0, 1}, {0, 1}, {2, 3, 1}, {2, 3}, {4, 5}, {4, 5}]
    assert torch.equal(found, found.T) and [set(row.nonzero().flatten().tolist()) for row in found] == [
        groups[0], {0, 1, 2}, groups[2], groups[3], groups[4], groups[5]
    ]  # fmt: skip


def test_jaccard_distances_are_one_minus_the_common_share():
    sets = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    assert torch.allclose(ranking.jaccard_distances(sets), torch.tensor([[0, 2 / 3, 1], [2 / 3, 0, 1], [1, 1, 0.0]]))
