"""Prototypes: means of classes, in one call, as a stream and over two processes."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from course_lib.experiments.localise import ClassPrototypes
from course_lib.prototypes import class_prototypes


def sample(n, k, classes, seed=0):
    """Features, and labels in which every class occurs."""
    generator = Generator().manual_seed(seed)
    labels = torch.cat((torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)))
    return torch.randn(n, k, generator=generator), labels[torch.randperm(n, generator=generator)]


def means_in_loops(features, labels, classes):
    """Eq. 7, class by class."""
    return torch.stack([features[labels == c].double().mean(0) for c in range(classes)])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(1, 5),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_prototypes_are_the_means(classes, more, k, integer, dtype, seed):
    features, labels = sample(classes + more, k, classes, seed)
    features = features.to(dtype)
    found = class_prototypes(features, labels.to(integer), classes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), means_in_loops(features, labels, classes), rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(0, 20), st.integers(1, 9), st.integers(0, 99))
def test_the_stream_is_the_call_however_it_is_cut_and_ordered(classes, more, size, seed):
    features, labels = sample(classes + more, 4, classes, seed)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    stream = ClassPrototypes(classes, 4)
    for part in order.split(size):
        stream.accumulate(features[part], labels[part])
    assert torch.equal(stream.compute(), class_prototypes(features, labels, classes))
    assert torch.equal(stream.counts, labels.bincount(minlength=classes))


def test_small_samples_are_not_lost_beside_many_large_ones():
    """In float32, 2^24 + 1 = 2^24."""
    features = torch.ones(4, 1)
    features[0] = 2.0**24
    stream = ClassPrototypes(1, 1)
    for row in features:
        stream.accumulate(row[None], torch.tensor([0]))
    expected = torch.tensor([[(2.0**24 + 3) / 4]])
    assert torch.equal(stream.compute(), expected)
    assert torch.equal(class_prototypes(features, torch.zeros(4).long(), 1), expected)


def test_half_precision_sums_do_not_overflow():
    features = torch.full((100, 2), 60000.0, dtype=torch.float16)
    assert class_prototypes(features, torch.zeros(100).long(), 1).allclose(features[:1].float())


def test_pooling_and_averaging_commute():
    maps, labels = torch.rand(12, 5, 3, 4), torch.arange(12) % 3
    mean_maps = torch.stack([maps[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(class_prototypes(maps.mean((-2, -1)), labels, 3), mean_maps.mean((-2, -1)))


def test_gradients_pass_to_the_samples_of_the_class():
    features, labels = sample(7, 3, 2)
    features.requires_grad_()
    class_prototypes(features, labels, 2)[1].sum().backward()
    share = (labels == 1) / (labels == 1).sum()
    torch.testing.assert_close(features.grad, share[:, None].expand(-1, 3))


def test_it_compiles_into_one_graph():
    features, labels = sample(7, 3, 2)
    compiled = torch.compile(inspect.unwrap(class_prototypes), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, labels, 2), class_prototypes(features, labels, 2))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_class_without_samples_is_named(streamed):
    features, labels = torch.randn(3, 2), torch.tensor([0, 2, 2])

    def run():
        if not streamed:
            return class_prototypes(features, labels, 4)
        stream = ClassPrototypes(4, 2)
        stream.accumulate(features, labels)
        return stream.compute()

    with pytest.raises(ValueError, match="2 of 4 classes have no sample, and so no prototype: 1, 3[.]"):
        run()


def test_only_the_first_classes_without_samples_are_named():
    with pytest.raises(ValueError, match="1000 of 1000 classes .*: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...[.] Add"):
        ClassPrototypes(1000, 2).compute()


def test_a_refused_batch_leaves_no_trace():
    stream = ClassPrototypes(2, 3)
    stream.accumulate(torch.ones(2, 3), torch.tensor([0, 1]))
    spoiled = torch.ones(3, 3)
    spoiled[1, 2] = float("nan")
    for features, labels, sentence in (
        (torch.ones(1, 4), [0], "features of 3 channels were expected, but 4 came"),
        (torch.ones(2, 3), [0, 2], "Labels from 0 to 1 were expected, but 0 to 2 came"),
        (torch.ones(2, 3), [-1, 0], "but -1 to 0 came"),
        (spoiled, [0, 1, 0], "Sample 1 of the batch, of class 1, holds NaN"),
    ):
        with pytest.raises(ValueError, match=sentence):
            stream.accumulate(features, torch.tensor(labels))
    with pytest.raises(ValueError, match="Labels from 0 to 1 were expected"):
        class_prototypes(torch.ones(2, 3), torch.tensor([0, 2]), 2)
    assert torch.equal(stream.compute(), torch.ones(2, 3)) and stream.counts.tolist() == [1, 1]


def test_an_empty_batch_adds_nothing():
    stream = ClassPrototypes(1, 2)
    stream.accumulate(torch.ones(3, 2), torch.zeros(3).long())
    stream.accumulate(torch.ones(0, 2), torch.zeros(0).long())
    assert stream.counts.tolist() == [3]


def worker(rank, folder):
    """One of two processes: its share of the samples; it asks twice, since an answer must not change what it holds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    features, labels = sample(50, 8, 5)
    stream = ClassPrototypes(5, 8)
    share = labels < 2 if rank == 0 else labels >= 2  # no process has seen all classes
    stream.accumulate(features[share], labels[share])
    first, second = stream.compute(), stream.compute()
    assert torch.equal(first, second) and int(stream.counts.sum()) == int(share.sum())
    torch.save(second, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_together_have_the_prototypes_of_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    features, labels = sample(50, 8, 5)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), class_prototypes(features, labels, 5))
