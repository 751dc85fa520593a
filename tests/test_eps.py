"""EPS: published numbers, loops, and the railroad that is not salient."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import prototypes
from course_lib.wsss import eps
from course_lib.wsss.eps import explanations, overlaps, saliency_loss

pytestmark = pytest.mark.figures


def sample(seed=0, images=3, classes=5, side=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cam = 4 * torch.randn(images, classes, side, side, generator=generator, dtype=dtype)
    saliency = torch.rand(images, 1, 2 * side, 2 * side, generator=generator, dtype=dtype)
    tags = (torch.rand(images, classes - 1, generator=generator) < 0.6).to(dtype)
    return cam.requires_grad_(), saliency, tags


def golden():
    """Maps with the background last, as published, and put first."""
    cam = 4 * torch.sin(0.7 * torch.arange(2 * 21 * 16, dtype=torch.float64)).view(2, 21, 4, 4)
    saliency = (0.5 * torch.sin(0.3 * torch.arange(128, dtype=torch.float64)) + 0.5).view(2, 1, 8, 8)
    tags = torch.zeros(2, 20, dtype=torch.float64)
    tags[0, 3] = tags[0, 9] = tags[1, 0] = tags[1, 19] = 1
    return cam, saliency, tags, lambda cam: torch.cat((cam[:, 20:], cam[:, :20]), 1)


def test_published_numbers():
    cam, saliency, tags, background_first = golden()
    assert saliency_loss(background_first(cam), saliency, tags).item() == pytest.approx(0.12262217, abs=1e-8)
    p = background_first(cam).softmax(1)
    assert not (overlaps(p, F.interpolate(saliency, (4, 4))) * tags).any()
    cam[0, 3, 0:2, :] += 9
    cam[0, 9, 3, :] += 9
    cam[1, 0, :, 1:3] += 9
    cam[:, 20] += 2
    assert saliency_loss(background_first(cam), saliency, tags).item() == pytest.approx(0.20535743, abs=1e-8)
    p = background_first(cam).softmax(1)
    found = overlaps(p, F.interpolate(saliency, (4, 4)))
    assert [found[0, 3].item(), found[0, 9].item(), found[1, 0].item(), found[1, 19].item()] == pytest.approx(
        [0.499867, 0.999467, 0.428473, 0.0], abs=1e-6
    )
    front, back = explanations(p, tags, found > 0.4)
    assert (front.sum().item(), back.sum().item()) == pytest.approx((16.844572, 28.711311), abs=1e-6)


def loss_in_loops(cam, saliency, tags, tau, balance):
    images, channels, height, width = cam.shape
    total = 0.0
    for n in range(images):
        p = cam[n].softmax(0)
        small = torch.stack(
            [
                saliency[n, 0, int(y * saliency.shape[2] / height), int(x * saliency.shape[3] / width)]
                for y in range(height)
                for x in range(width)
            ]
        ).view(height, width)
        front, back = torch.zeros_like(small), 1 - p[0]
        for c in range(1, channels):
            if not tags[n, c - 1]:
                continue
            confident = (p[c] > 0.5).double()
            overlap = (confident * (small > 0.5)).sum() / (confident.sum() + 1e-4 * height * width)
            if overlap > tau:
                front = front + p[c]
            else:
                back = back - p[c]
        total = total + ((balance * front + (1 - balance) * back - small) ** 2).mean() / images
    return total


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 9999),
    st.integers(1, 3),
    st.integers(2, 6),
    st.sampled_from([0.0, 0.4, 0.9]),
    st.sampled_from([0.5, 0.8]),
)
def test_the_loss_is_the_released_arithmetic(seed, images, classes, tau, balance):
    cam, saliency, tags = sample(seed, images, classes)
    found, expected = saliency_loss(cam, saliency, tags, tau, balance), loss_in_loops(cam, saliency, tags, tau, balance)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, cam) for loss in (found, expected)))


def test_exactly_half_is_not_confident():
    p = torch.full((1, 2, 1, 1), 0.5)
    assert overlaps(p, torch.ones(1, 1, 1, 1)).item() == 0


def test_a_tagged_class_that_is_not_salient_may_stay():
    """The train (1) is salient, the railroad (2) is not. Where the maps say so, there is nothing to pay."""
    cam = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    cam[:, 1, :2] = cam[:, 2, 2:] = 50
    saliency = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    saliency[:, :, :2] = 1
    tags = torch.ones(1, 2, dtype=torch.float64)
    assert saliency_loss(cam, saliency, tags).item() < 1e-9
    claimed = cam.clone()
    claimed[:, 1, 2:] = 100  # the train takes the railroad too
    assert saliency_loss(claimed, saliency, tags).item() > 0.4


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999))
def test_the_order_of_images_and_classes_does_not_matter(seed):
    cam, saliency, tags = sample(seed)
    images, classes = (torch.randperm(k, generator=torch.Generator().manual_seed(seed)) for k in (3, 4))
    channels = torch.cat((torch.tensor([0]), classes + 1))
    torch.testing.assert_close(
        saliency_loss(cam[images][:, channels], saliency[images], tags[images][:, classes]),
        saliency_loss(cam, saliency, tags),
    )


@pytest.mark.parametrize("saliency", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("tagged", [0.0, 1.0])
def test_degenerate_inputs_give_finite_losses_and_gradients(saliency, fill, tagged):
    cam = torch.full((2, 4, 3, 3), fill).requires_grad_()
    loss = saliency_loss(cam, torch.full((2, 1, 7, 5), saliency), torch.full((2, 3), tagged))
    assert loss.isfinite() and torch.autograd.grad(loss, cam)[0].isfinite().all()


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operation(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    cam, saliency, tags = sample()
    with NoWaiting():
        saliency_loss(cam, saliency, tags).backward()


def test_it_compiles_into_one_graph(monkeypatch):
    for module in (eps, prototypes):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))  # without the shape checks of the tests
    cam, saliency, tags = sample()
    compiled = torch.compile(eps.saliency_loss, fullgraph=True, backend="eager")
    found, expected = (run(cam, saliency, tags) for run in (compiled, eps.saliency_loss))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, cam) for loss in (found, expected)))


def test_half_precision():
    cam, saliency, tags = sample(dtype=torch.float32)
    expected = saliency_loss(cam, saliency, tags)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(saliency_loss(cam, saliency, tags), expected)
    torch.testing.assert_close(saliency_loss(cam.bfloat16(), saliency, tags), expected, rtol=2e-2, atol=2e-3)


def test_what_does_not_fit_is_said():
    cam, saliency, tags = sample()
    with pytest.raises(ValueError, match=r"and of 3 classes for 3 images, got the shape \(3, 5, 4, 4\)"):
        saliency_loss(cam, saliency, tags[:, 1:])


def test_pushes_are_what_a_small_step_gains():
    """A region moved a little along its push lowers the loss by that much; the rule turns the push on a track round."""
    cam, saliency, tags, background_first = golden()
    maps = background_first(cam)
    regions = {"left": torch.zeros(2, 4, 4, dtype=torch.bool), "all": torch.ones(2, 4, 4, dtype=torch.bool)}
    regions["left"][:, :, :2] = True
    found = eps.saliency_pushes(maps, saliency, tags, regions, overlap=-1.0)
    for name, where in regions.items():
        step = 1e-5 * tags[:, :, None, None] * where[:, None]
        moved = torch.cat((maps[:, :1], maps[:, 1:] + step), 1)
        gain = saliency_loss(maps, saliency, tags, -1.0) - saliency_loss(moved, saliency, tags, -1.0)
        assert found[name] == pytest.approx(float(gain / 1e-5 / where.sum()), rel=1e-3)


def test_a_class_that_fails_the_rule_is_not_pushed_off_its_track():
    cam = torch.tensor([[-0.3, 0.0], [0.0, 3.0], [-2.0, 0.0]])[None, :, None]  # background, tagged, untagged
    salient, tags = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[1.0, 0.0]])
    parts = {"object": torch.tensor([[[True, False]]]), "track": torch.tensor([[[False, True]]])}
    fails, passes = (eps.saliency_pushes(cam, salient, tags, parts, overlap) for overlap in (0.9, -1.0))
    assert fails["object"] < 0 < passes["object"] and passes["track"] < 0
    assert abs(fails["track"]) < 0.1 * abs(fails["object"])
