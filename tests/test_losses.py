"""Losses: slow obvious twins, pytorch-metric-learning as a second opinion, and batches with nothing to compare."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.metric_learning import losses
from course_lib.metric_learning.losses import (
    batch_hard_triplet,
    batch_prototype_softmax,
    center_loss,
    distances,
    prototype_softmax,
)

pytestmark = pytest.mark.figures

METRICS = ("l1", "l2", "cosine")
BATCHES = st.tuples(st.integers(2, 12), st.integers(1, 5), st.integers(2, 9), st.integers(0, 10_000))


def sample(images, classes, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, channels, generator=generator) + 1,
        torch.randint(classes, (images,), generator=generator),
    )


def distance(a, b, metric):
    """One pair, in float64."""
    a, b = a.double(), b.double()
    if metric == "cosine":
        return 1 - (a @ b) / (a.norm() * b.norm())
    return (a - b).abs().sum() if metric == "l1" else ((a - b) ** 2).sum()


# slow twins -----------------------------------------------------------------------------------------------------------


def batch_prototypes_in_loops(features, labels, metric, scale):
    terms = []
    for i, label in enumerate(labels):
        others = [j for j in range(len(labels)) if labels[j] == label and j != i]
        if not others:
            continue
        logits, right = [], None
        for rival in labels.unique():
            members = others if rival == label else [j for j in range(len(labels)) if labels[j] == rival]
            if rival == label:
                right = len(logits)
            logits.append(-scale * distance(features[i], features[members].double().mean(0), metric))
        terms.append(torch.logsumexp(torch.stack(logits), 0) - logits[right])
    return torch.stack(terms).mean() if terms else torch.tensor(0.0)


def triplet_in_loops(features, labels, margin):
    terms = []
    for i, label in enumerate(labels):
        far = [(features[i] - features[j]).double().norm() for j in range(len(labels)) if labels[j] == label and j != i]
        near = [(features[i] - features[j]).double().norm() for j in range(len(labels)) if labels[j] != label]
        if far and near:
            difference = float(max(far) - min(near))
            terms.append(math.log1p(math.exp(difference)) if margin is None else max(0.0, margin + difference))
    return torch.tensor(sum(terms) / len(terms) if terms else 0.0)


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=30)
@given(BATCHES)
def test_batch_prototypes_are_those_of_the_others(metric, shape):
    features, labels = sample(*shape)
    found = batch_prototype_softmax(features, labels, metric, 0.7)
    torch.testing.assert_close(
        found, batch_prototypes_in_loops(features, labels, metric, 0.7).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("margin", [0.3, None])
@settings(deadline=None, max_examples=30)
@given(BATCHES)
def test_hardest_triplets(margin, shape):
    features, labels = sample(*shape)
    expected = triplet_in_loops(features, labels, margin).float()
    torch.testing.assert_close(batch_hard_triplet(features, labels, margin), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_distances_and_given_prototypes(metric):
    (query, labels), (reference, _) = sample(5, 4, 7), sample(4, 4, 7, seed=1)
    expected = torch.stack([torch.stack([distance(q, r, metric) for r in reference]) for q in query])
    torch.testing.assert_close(distances(query, reference, metric).double(), expected, rtol=1e-5, atol=1e-5)
    loss = F.cross_entropy(-2 * expected, labels).float()
    torch.testing.assert_close(prototype_softmax(query, labels, reference, metric, 2.0), loss, rtol=1e-5, atol=1e-5)


# pytorch-metric-learning ----------------------------------------------------------------------------------------------


def test_triplet_is_that_of_pytorch_metric_learning():
    features, labels = sample(24, 6, 8)
    plain = LpDistance(normalize_embeddings=False)
    other = theirs.TripletMarginLoss(margin=0.3, distance=plain, reducer=MeanReducer())
    triplets = BatchHardMiner(distance=plain)(features, labels)
    torch.testing.assert_close(batch_hard_triplet(features, labels), other(features, labels, triplets))


def test_prototype_softmax_is_that_of_pytorch_metric_learning():
    """Given prototypes are proxies: their ProxyNCA for squared Euclidean distance, NormalizedSoftmax for cosine."""
    (features, labels), (prototypes, _) = sample(10, 4, 8), sample(4, 4, 8, seed=1)
    proxy = theirs.ProxyNCALoss(4, 8, softmax_scale=3, distance=LpDistance(normalize_embeddings=False, power=2))
    softmax = theirs.NormalizedSoftmaxLoss(4, 8, temperature=0.05)
    with torch.no_grad():
        proxy.proxies.copy_(prototypes)
        softmax.W.copy_(prototypes.T)
        for other, metric, scale in ((proxy, "l2", 3.0), (softmax, "cosine", 20.0)):
            torch.testing.assert_close(
                prototype_softmax(features, labels, prototypes, metric, scale), other(features, labels)
            )


def test_distances_of_close_pairs_are_exact():
    """By |a|^2 - 2ab + |b|^2 they would be rounding."""
    query = torch.full((1, 64), 100.0)
    assert distances(query, query + 0.125, "l2").item() == 1
    three = torch.cat((query, query + 0.125, query + 0.25))  # 0 - 1 - 2, in a line
    assert batch_hard_triplet(three, torch.tensor([0, 0, 1]), margin=1.0).item() == 0.5


# centers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, way", [(64, 1 / 16), (8, 1 / 2)])
def test_center_moves_by_its_share_of_the_batch(batch, way):
    """Four samples of each class in a batch; plain descent at rate 0.5, the factor before the loss divided out."""
    labels = torch.arange(batch // 4).repeat_interleave(4)
    features, _ = sample(batch, 2, 5)
    centers = torch.nn.Parameter(torch.randn(batch // 4 + 1, 5))
    before, means = centers.detach().clone(), features.view(-1, 4, 5).mean(1)
    (5e-4 * center_loss(features, labels, centers)).backward()
    torch.optim.SGD([centers], lr=0.5 / 5e-4).step()
    torch.testing.assert_close(centers[:-1].detach(), before[:-1] + way * (means - before[:-1]))
    assert torch.equal(centers[-1], before[-1])  # a class that is not in the batch stays where it is


def test_center_loss_by_hand():
    features, centers = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert center_loss(features, torch.tensor([0, 1]), centers).item() == (5 + 25) / 2


# nothing to compare, and other degenerate batches ---------------------------------------------------------------------

LOSSES = [
    *(lambda f, y, metric=metric: batch_prototype_softmax(f, y, metric) for metric in METRICS),
    batch_hard_triplet,
    lambda f, y: batch_hard_triplet(f, y, None),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("labels", [[3], [0, 1, 2, 3]])
def test_nothing_to_compare_gives_a_zero_with_a_graph(loss, labels):
    features = torch.randn(len(labels), 6, requires_grad=True)
    found = loss(features, torch.tensor(labels))
    found.backward()
    assert found.item() == 0 and torch.equal(features.grad, torch.zeros_like(features))


def test_one_class_has_no_negatives():
    features = torch.randn(4, 6, requires_grad=True)
    found = batch_hard_triplet(features, torch.zeros(4, dtype=torch.long))
    found.backward()
    assert found.item() == 0 and not features.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_collapsed_features_have_finite_gradients(loss, value):
    features = torch.full((6, 4), value, requires_grad=True)
    found = loss(features, torch.tensor([0, 0, 1, 1, 2, 2]))
    found.backward()
    assert found.isfinite() and features.grad.isfinite().all()
    if loss is batch_hard_triplet:
        assert found.item() == pytest.approx(0.3) and not features.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
@settings(deadline=None, max_examples=25)
@given(BATCHES)
def test_neither_order_nor_names_of_classes_matter(loss, shape):
    features, labels = sample(*shape)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        loss(features[order], 50 - 7 * labels[order]), loss(features, labels), rtol=1e-4, atol=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(BATCHES)
def test_distance_losses_do_not_see_the_origin(shape):
    features, labels = sample(*shape)
    for loss in (*LOSSES[:2], *LOSSES[3:]):
        torch.testing.assert_close(loss(features + 3, labels), loss(features, labels), rtol=1e-3, atol=1e-4)
    cosine = LOSSES[2]  # does not see the scale instead
    torch.testing.assert_close(cosine(3 * features, labels), cosine(features, labels), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    """In float32, as the losses are: central differences of a wide step, with no hinge or other hardest pair near."""
    features, labels = sample(8, 3, 4, seed=4)
    for loss in LOSSES:
        at = features.clone().requires_grad_()
        loss(at, labels).backward()
        direction = F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)), dim=0)
        slope = (loss(features + 1e-2 * direction, labels) - loss(features - 1e-2 * direction, labels)) / 2e-2
        torch.testing.assert_close((at.grad * direction).sum(), slope, rtol=2e-2, atol=2e-3)


# speed ----------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a number was fetched from the device"
        return operation(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    features, labels = sample(8, 3, 4)
    with NoWaiting():
        for loss in LOSSES:
            loss(features.requires_grad_(), labels).backward()
        center_loss(features, labels, torch.zeros(3, 4))


@pytest.mark.parametrize("loss", LOSSES)
def test_it_compiles_into_one_graph(loss, monkeypatch):
    for name, own in inspect.getmembers(losses, inspect.isfunction):
        monkeypatch.setattr(losses, name, inspect.unwrap(own))  # without the shape checks of the tests
    plain = {batch_hard_triplet: losses.batch_hard_triplet}.get(loss, loss)
    monkeypatch.setitem(globals(), "batch_prototype_softmax", losses.batch_prototype_softmax)
    monkeypatch.setitem(globals(), "batch_hard_triplet", losses.batch_hard_triplet)
    features, labels = sample(8, 3, 4)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, labels), plain(features, labels))


def test_half_precision_around_them_changes_nothing():
    features, labels = sample(8, 3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [loss(features * 30, labels) for loss in LOSSES]
    torch.testing.assert_close(inside, [loss(features * 30, labels) for loss in LOSSES])


@pytest.mark.parametrize(
    "loss",
    [
        losses.batch_hard_triplet,
        lambda features, labels: losses.batch_hard_triplet(features, labels, None),
        losses.batch_prototype_softmax,
        lambda features, labels: losses.prototype_softmax(features, labels, torch.randn(3, 4)),
        lambda features, labels: losses.prototype_softmax(features, labels, torch.randn(3, 4), "cosine"),
        lambda features, labels: losses.center_loss(features, labels, torch.randn(3, 4)),
    ],
)
def test_an_empty_batch_gives_a_zero_with_a_graph(loss):
    features = torch.zeros(0, 4, requires_grad=True)
    found = loss(features, torch.zeros(0, dtype=torch.long))
    found.backward()
    assert float(found.detach()) == 0 and features.grad.shape == (0, 4)
