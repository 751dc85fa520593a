"""Rectified prototypes: the equations class by class, many episodes at once, and where they fail."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from course_lib import prototypes
from course_lib.prototypes import class_prototypes, rectify, shift, surest_queries

pytestmark = pytest.mark.figures


def episode(ways=3, shots=2, queries=6, k=5, seed=0, batch=()):
    """Directions around class centres, close enough to each other that some queries get the wrong label."""
    generator = Generator().manual_seed(seed)
    centres = torch.randn(*batch, ways, k, generator=generator)
    labels, truth = (torch.arange(ways).repeat_interleave(number) for number in (shots, queries))
    support, query = (
        centres[..., rows, :] + torch.randn(*batch, len(rows), k, generator=generator) for rows in (labels, truth)
    )
    return F.normalize(support, dim=-1), labels, F.normalize(query, dim=-1)


def class_by_class(support, labels, query, ways, surest, epsilon):
    """Liu et al., sentence by sentence."""
    basic = torch.stack([support[labels == c].mean(0) for c in range(ways)])

    def cosine(a, b):
        return float(a @ b / (a.norm() * b.norm()))

    guesses = [max(range(ways), key=lambda c: cosine(x, basic[c])) for x in query]
    rectified = []
    for c in range(ways):
        joined = sorted((x for x, guess in zip(query, guesses) if guess == c), key=lambda x: -cosine(x, basic[c]))[
            :surest
        ]
        if not joined:
            rectified.append(basic[c])
            continue
        samples = torch.stack([*support[labels == c], *joined])
        weights = torch.tensor([epsilon * cosine(x, basic[c]) for x in samples]).exp()
        rectified.append((weights[:, None] * samples).sum(0) / weights.sum())
    return torch.stack(rectified)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from([0.0, 1.0, 10.0]),
    st.integers(0, 99),
)
def test_rectified_prototypes_are_those_of_the_loop(ways, shots, queries, surest, epsilon, seed):
    support, labels, query = episode(ways, shots, queries, seed=seed)
    query = shift(support, query)
    found = rectify(support, labels, query, ways, surest, epsilon)
    torch.testing.assert_close(
        found, class_by_class(support, labels, query, ways, surest, epsilon), rtol=1e-4, atol=1e-5
    )


def test_many_episodes_at_once_are_one_after_the_other():
    support, labels, query = episode(batch=(2, 4))
    moved = shift(support, query)
    found = rectify(support, labels, moved, 3)
    assert found.shape == (2, 4, 3, 5)
    for i in range(2):
        for j in range(4):
            torch.testing.assert_close(moved[i, j], shift(support[i, j], query[i, j]))
            torch.testing.assert_close(found[i, j], rectify(support[i, j], labels, moved[i, j], 3))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99))
def test_after_the_shift_support_and_queries_have_one_mean(seed):
    support, _, query = episode(seed=seed)
    torch.testing.assert_close(shift(support, query).mean(0), support.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shift(support, query + 3), shift(support, query), rtol=1e-4, atol=1e-5)


def test_order_of_samples_and_names_of_classes_do_not_matter():
    support, labels, query = episode()
    order, names = torch.randperm(6, generator=Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    found = rectify(support[order], names[labels[order]], query.flip(0), 3)
    torch.testing.assert_close(found[names], rectify(support, labels, query, 3))


def test_a_class_that_no_query_is_nearest_to_keeps_its_prototype():
    support = F.normalize(
        torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2], [0, 0, 1], [0.1, 0, 1]]), dim=1
    )
    labels = torch.arange(3).repeat_interleave(2)
    query = support[:4] + 0.01  # none of class 2
    basic, found = class_prototypes(support, labels, 3), rectify(support, labels, query, 3)
    assert torch.equal(found[2], basic[2])
    assert not torch.isclose(found[:2], basic[:2]).all(1).any()


def test_classes_may_have_different_numbers_of_samples():
    support, _, query = episode()
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    torch.testing.assert_close(
        rectify(support, labels, query, 3), class_by_class(support, labels, query, 3, 8, 10.0), rtol=1e-4, atol=1e-5
    )


def test_only_the_surest_join():
    support, labels = torch.eye(2), torch.arange(2)
    query = F.normalize(torch.tensor([[1, 0.1], [1, 0.2], [1, 0.9]]), dim=1)  # all nearest to class 0
    one = rectify(support, labels, query, 2, surest=1, epsilon=0.0)
    torch.testing.assert_close(one[0], (support[0] + query[0]) / 2)
    every = rectify(support, labels, query, 2, surest=99, epsilon=0.0)
    torch.testing.assert_close(every[0], torch.cat((support[:1], query)).mean(0))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_features_stay_finite(value):
    support, query = torch.full((4, 3), value), torch.full((6, 3), value)
    found = rectify(support, torch.tensor([0, 0, 1, 1]), shift(support, query), 2)
    torch.testing.assert_close(found, torch.full((2, 3), value))


def test_the_shift_helps_balanced_queries_and_harms_unbalanced_ones():
    """A bias common to all queries is taken away; but so is the mean of a class that has more of them."""
    support = torch.eye(2)
    clean = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    query = clean + torch.tensor([0.0, 2.0])  # biased towards class 1

    def answers(query):
        return (F.normalize(query, dim=1) @ support.T).argmax(1).tolist()

    assert answers(query) == [1, 1, 1, 1] and answers(shift(support, query)) == [0, 0, 1, 1]
    unbalanced = torch.tensor([[1.0, 0], [0.9, 0.5], [1, 0.1], [0.9, 0], [0.1, 0.9]])
    assert answers(unbalanced) == [0, 0, 0, 0, 1]
    moved = shift(support, unbalanced)
    assert answers(moved) != [0, 0, 0, 0, 1]


def test_it_agrees_with_easyfsl_where_that_takes_all_queries():
    """There epsilon is 1, all queries join, and features are not scaled; the prototypes are overwritten in place."""
    model = pytest.importorskip("easyfsl.methods").BDCSPN()
    support, labels, query = episode(shots=1)
    model.process_support_set(support, labels)
    model.rectify_prototypes(query)
    ours = rectify(support, labels, shift(support, query), 3, surest=len(query), epsilon=1.0)
    torch.testing.assert_close(ours, model.prototypes, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_round():
    support, labels, query = episode()
    with torch.autocast("cpu", torch.bfloat16):
        found = rectify(support, labels, query, 3)
    torch.testing.assert_close(found, rectify(support, labels, query, 3))


def test_it_compiles_into_one_graph(monkeypatch):
    for name in ("_cosine", "surest_queries"):
        monkeypatch.setattr(prototypes, name, inspect.unwrap(getattr(prototypes, name)))
    support, labels, query = episode(batch=(2,))
    compiled = torch.compile(inspect.unwrap(rectify), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(support, labels, query, 3), rectify(support, labels, query, 3))


def test_what_cannot_be_rectified_is_explained():
    support, labels, query = episode()
    with pytest.raises(ValueError, match="at least one query to join a class, got surest = 0"):
        rectify(support, labels, query, 3, surest=0)
    with pytest.raises(ValueError, match="1 of 4 classes have no sample"):
        rectify(support, labels, query, 4)
    with pytest.raises(ValueError, match="Labels from 0 to 1 were expected"):
        rectify(support, labels, query, 2)


def test_queries_join_their_nearest_class_the_surest_first():
    cosines = torch.tensor([[[0.9, 0.8, 0.7, 0.1], [0.2, 0.1, 0.3, 0.5], [0.0, 0.0, 0.0, 0.4]]])
    assert surest_queries(cosines, 2).int().tolist() == [[[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]]
    assert surest_queries(cosines, 9).sum(-2).eq(1).all()
    with pytest.raises(ValueError, match="at least one query"):
        surest_queries(cosines, 0)
