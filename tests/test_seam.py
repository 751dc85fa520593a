"""SEAM: published numbers, loops in the order of the released code, and PCM in blocks of any size."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import prototypes, wsss
from course_lib.wsss import View, seam, tag_loss
from course_lib.wsss import views as second_views
from course_lib.wsss.seam import (
    adaptive_min_pooling,
    cross_regularisation,
    min_max_scaled,
    pixel_correlation,
    seam_loss,
    winners,
    winning_maps,
    with_background,
)
from course_lib.wsss.views import resize

pytestmark = pytest.mark.figures


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sample(seed=0, images=2, classes=5, sides=(8, 5), dtype=torch.float64):
    views = [
        View(
            *(
                F.interpolate(
                    draw(images, classes, 3, 3, seed=4 * seed + 2 * v + part, dtype=dtype), (side, side), mode="bicubic"
                ).requires_grad_()
                for part in (0, 1)
            )
        )
        for v, side in enumerate(sides)
    ]
    tags = (torch.rand(images, classes - 1, generator=torch.Generator().manual_seed(seed)) < 0.5).to(dtype)
    return *views, tags


def maps_of(views):
    return [maps for view in views for maps in view[:2]]


def outcome(terms, views):
    return [*terms.values(), *torch.autograd.grad(sum(terms.values()), maps_of(views))]


# published numbers ----------------------------------------------------------------------------------------------------


def test_published_numbers():
    x = torch.sin(0.13 * torch.arange(2 * 21 * 64, dtype=torch.float64)).view(2, 21, 8, 8)
    assert adaptive_min_pooling(x[:, 1:]).item() == pytest.approx(0.90656346, abs=1e-8)
    assert min_max_scaled(x).sum().item() == pytest.approx(861.91807215, abs=1e-7)
    assert min_max_scaled(x).max().item() == pytest.approx(0.99998, abs=1e-6)
    features = torch.sin(0.37 * torch.arange(80, dtype=torch.float64)).view(1, 5, 4, 4)
    maps = torch.sin(0.21 * torch.arange(48, dtype=torch.float64)).abs().view(1, 3, 4, 4)
    for block in (1, 40, 10**6):
        spread = pixel_correlation(maps, features, block).flatten(2)
        assert spread.sum().item() == pytest.approx(29.27105175, abs=1e-7)
        assert (spread[0, 0, 0].item(), spread[0, 2, 15].item()) == pytest.approx((0.19691141, 0.31245192), abs=1e-8)
    constant = pixel_correlation(torch.ones_like(maps), features)  # the sums of the columns of the affinities
    assert constant.min().item() == pytest.approx(0.999998, abs=1e-6) and constant.max() < 1


@pytest.mark.parametrize(("side", "hard", "least"), [(128, 68812, 4096), (134, 75415, 4489), (448, 0, 50176)])
def test_published_counts(side, hard, least, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k, *args, **kwargs: taken.append(k) or torch.topk(self, 1))
    if hard:
        cross_regularisation(torch.zeros(1, 21, side, side), torch.zeros(1, 21, side, side))
    adaptive_min_pooling(torch.zeros(1, 20, side, side))
    assert taken == ([hard] if hard else []) + [least]


# pixel correlation ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 200))
def test_pcm_is_a_weighted_mean_of_similar_pixels(seed, images, height, width, block):
    maps, features = draw(images, 3, height, width, seed=seed), draw(images, 4, height, width, seed=seed + 1)
    found = pixel_correlation(maps, features, block)
    for n in range(images):
        pixels, values = features[n].flatten(1).T, maps[n].flatten(1).T
        for j, mine in enumerate(pixels):
            weights = [max(0.0, float(f @ mine / ((f.norm() + 1e-5) * (mine.norm() + 1e-5)))) for f in pixels]
            mean = sum(w * q for w, q in zip(weights, values)) / (sum(weights) + 1e-5)
            torch.testing.assert_close(found[n].flatten(1)[:, j], mean)


@pytest.mark.parametrize("block", [1, 30, 100])
def test_blocks_change_neither_result_nor_gradient(block):
    maps, features = draw(2, 3, 4, 5).requires_grad_(), draw(2, 4, 4, 5, seed=1).requires_grad_()

    def run(block):
        spread = pixel_correlation(maps, features, block)
        return [spread, *torch.autograd.grad((spread * draw(2, 3, 4, 5, seed=2)).sum(), (maps, features))]

    expected = run(10**6)
    torch.testing.assert_close(run(block), expected)
    with torch.no_grad():
        torch.testing.assert_close(pixel_correlation(maps, features, block), expected[0])


def test_gradients_of_blocks_are_those_of_finite_differences():
    inputs = draw(1, 2, 2, 3).requires_grad_(), draw(1, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda maps, features: pixel_correlation(maps, features, 12), inputs)


class Largest(TorchDispatchMode):
    """The most elements that any operation made."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return made


@pytest.mark.parametrize("training", [False, True])
def test_memory_stays_within_a_block(training):
    maps, features = draw(1, 3, 30, 40), draw(1, 4, 30, 40, seed=1).requires_grad_(training)
    with Largest() as largest, torch.set_grad_enabled(training):
        spread = pixel_correlation(maps, features, 50_000)
        if training:
            spread.sum().backward()
    assert 1200 * 40 <= largest.elements <= 50_000 < 1200**2


def test_a_pixel_without_features_gets_nothing_and_no_nan():
    maps, features = draw(1, 3, 2, 2).abs(), draw(1, 4, 2, 2, seed=1)
    features[..., 0, 1] = 0
    features.requires_grad_()
    spread = pixel_correlation(maps, features)
    assert not spread[..., 0, 1].any() and spread[..., 1, :].any()
    assert torch.autograd.grad(spread.sum(), features)[0].isfinite().all()


# the pieces -----------------------------------------------------------------------------------------------------------


def test_what_pcm_spreads():
    """Scores as shares of their map's largest; at each pixel one class stays, and the background is what it leaves."""
    cam = torch.zeros(1, 4, 2, 2, dtype=torch.float64)
    cam[0, :, 0, 0] = torch.tensor([9.0, 2.0, 0.5, -1.0])
    cam[0, :, 0, 1] = torch.tensor([9.0, 4.0, 1.0, 1.5])
    cam[0, :, 1, 0] = torch.tensor([9.0, 1.0, 2.0, -2.0])
    cam[0, :, 1, 1] = torch.tensor([9.0, 0.0, 0.0, 3.0])
    found = winning_maps(cam.requires_grad_())
    assert not found.requires_grad
    expected = [[[0.5, 0.0], [0.0, 0.0]], [[0.5, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-5)
    bare = winners(torch.tensor([5.0, 1.0, 3.0, 3.0]).view(1, 4, 1, 1))
    assert bare.flatten().tolist() == [5, 0, 3, 3]  # equals stay, with their values


def test_a_zero_and_a_constant_map_become_zero():
    maps = torch.zeros(1, 3, 4, 4)
    maps[:, 1], maps[:, 2] = 0.7, draw(4, 4, dtype=torch.float32)
    found = min_max_scaled(maps.requires_grad_())
    assert not found[:, :2].any() and 0.99 < found[:, 2].max() <= 1
    assert torch.autograd.grad(found.sum(), maps)[0].isfinite().all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_resizing_is_bilinear_corner_on_corner(seed, side, height, width):
    maps = draw(2, 3, side, side + 1, seed=seed).requires_grad_()
    found = resize(maps, (height, width))
    expected = F.interpolate(maps, (height, width), mode="bilinear", align_corners=True)
    weights = draw(2, 3, height, width, seed=seed + 1)
    torch.testing.assert_close(
        [found, *torch.autograd.grad((found * weights).sum(), maps)],
        [expected, *torch.autograd.grad((expected * weights).sum(), maps)],
    )
    assert resize(maps.bfloat16(), 3).dtype == torch.float32 and resize(maps, (side, side + 1)) is maps


def test_tag_loss_is_binary_cross_entropy():
    logits, tags = draw(3, 4), (draw(3, 4, seed=1) > 0).double()
    expected = (
        -sum(
            math.log(1 / (1 + math.exp(-x if y else x)))
            for x, y in zip(logits.flatten().tolist(), tags.flatten().tolist())
        )
        / 12
    )
    assert tag_loss(logits, tags).item() == pytest.approx(expected)
    assert tag_loss(logits.bfloat16(), tags).dtype == torch.float32


# the loss -------------------------------------------------------------------------------------------------------------


def loss_in_loops(view1, view2, tags, size1, size2):
    """Image by image and class by class, in the order of the released training step."""
    terms = dict.fromkeys(("tags", "min-pool", "equivariance", "cross-equivariance"), 0.0)
    images, foreground = tags.shape
    scaled = []
    for view, size in ((view1, size1), (view2, size2)):
        cam, refined = (F.interpolate(maps, size, mode="bilinear", align_corners=True) for maps in view[:2])
        for n in range(images):
            for c in range(foreground):
                logit = cam[n, c + 1].mean()
                terms["tags"] = terms["tags"] - (logit if tags[n, c] else -logit).sigmoid().log() / (
                    2 * images * foreground
                )
            largest = torch.stack([refined[n, c + 1] * tags[n, c] for c in range(foreground)]).max(0).values.flatten()
            count = len(largest) // 4
            terms["min-pool"] = terms["min-pool"] + largest.sort().values[:count].relu().sum() / (2 * count * images)
        result = []
        for maps in (cam, refined):
            grid = []
            for n in range(images):
                for c in range(foreground + 1):
                    m = maps[n, c].relu()
                    m = (m - m.min() - 1e-5).relu() / (m.max() - m.min() + 1e-5)
                    m = F.interpolate(m[None, None], size2, mode="bilinear", align_corners=True)[0, 0]
                    grid.append(m * (tags[n, c - 1] if c else 1))
            result.append(torch.stack(grid).view(images, foreground + 1, *size2))
        scaled.append(result)
    (cam1, refined1), (cam2, refined2) = scaled
    differences = [(cam1[n, c + 1] - cam2[n, c + 1]).abs().mean() for n in range(images) for c in range(foreground)]
    terms["equivariance"] = sum(differences) / len(differences)
    for cam, refined in ((cam2.detach(), refined1), (cam1.detach(), refined2)):
        for n in range(images):
            best = cam[n, 1:].max(0).values
            guide = torch.stack([1 - best, *(m * (m == best) for m in cam[n, 1:])])
            difference = (guide - refined[n]).abs().flatten().sort(descending=True).values
            hard = difference[: int(len(difference) * 0.2)].mean()
            terms["cross-equivariance"] = terms["cross-equivariance"] + hard / images
    return terms


@settings(deadline=None, max_examples=10)
@given(
    st.integers(0, 9999),
    st.integers(1, 3),
    st.integers(2, 5),
    st.sampled_from([((8, 8), (5, 5)), ((13, 11), (6, 7)), ((4, 4), (9, 9))]),
)
def test_the_loss_is_the_released_arithmetic(seed, images, classes, sizes):
    *views, tags = sample(seed, images, classes)
    found, expected = (outcome(loss(*views, tags, *sizes), views) for loss in (seam_loss, loss_in_loops))
    torch.testing.assert_close(found, expected)


def test_which_term_reaches_which_maps():
    """The guide of cross-equivariance gets no gradient; the background of the classifier is supervised by nothing."""
    *views, tags = sample(images=3)
    terms = seam_loss(*views, tags, 8, 5)
    reached = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, maps_of(views), retain_graph=True, allow_unused=True)
        reached[name] = [grad is not None and bool(grad.any()) for grad in grads]
        assert all(grad is None or not grad[:, 0].any() for grad in grads[::2])
    assert reached == {
        "tags": [True, False] * 2,
        "min-pool": [False, True] * 2,
        "equivariance": [True, False] * 2,
        "cross-equivariance": [False, True] * 2,
    }


def test_views_that_agree_have_nothing_to_regularise():
    _, _, tags = sample()
    sharp = torch.zeros(2, 5, 8, 8, dtype=torch.float64)
    sharp[:, 1, :4], sharp[:, 2, 4:] = 1, 1
    same = View(sharp, with_background(sharp))
    terms = seam_loss(same, same, torch.ones_like(tags), 8, 8)
    assert terms["equivariance"] == 0 and terms["cross-equivariance"].item() == pytest.approx(0, abs=1e-4)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 9999))
def test_the_order_of_images_and_classes_does_not_matter(seed):
    *views, tags = sample(seed, images=3)
    images, classes = (torch.randperm(k, generator=torch.Generator().manual_seed(seed)) for k in (3, 4))
    channels = torch.cat((torch.tensor([0]), classes + 1))
    shuffled = [View(*(maps[images][:, channels] for maps in view[:2])) for view in views]
    torch.testing.assert_close(seam_loss(*shuffled, tags[images][:, classes], 9, 6), seam_loss(*views, tags, 9, 6))


@pytest.mark.parametrize("fill", [0.0, 0.3, -1.0, 1e-30, 1e30])
@pytest.mark.parametrize("tagged", [False, True])
def test_degenerate_maps_give_finite_losses_and_gradients(fill, tagged):
    *views, tags = sample(dtype=torch.float32)
    views = [View(*(torch.full_like(maps, fill).requires_grad_() for maps in view[:2])) for view in views]
    found = outcome(seam_loss(*views, torch.full_like(tags, float(tagged)), 8, 5), views)
    assert all(part.isfinite().all() for part in found)


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return operation(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    *views, tags = sample()
    with NoWaiting():
        outcome(seam_loss(*views, tags, 9, 5), views)
        pixel_correlation(winning_maps(views[0].cam), draw(2, 4, 8, 8), 100)


def test_it_compiles_into_one_graph(monkeypatch):
    for module in (seam, second_views, prototypes, wsss):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))  # without the shape checks of the tests
    *views, tags = sample()
    features = draw(2, 4, 8, 8).requires_grad_()

    def step(view1, view2, tags, features):
        refined = seam.pixel_correlation(seam.winning_maps(view1.cam), features, 3000)  # in three blocks
        return seam.seam_loss(View(view1.cam, refined), view2, tags, 9, 5)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    found, expected = (run(*views, tags, features) for run in (compiled, step))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(terms["cross-equivariance"], features) for terms in (found, expected))
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*views, tags, features), step(*views, tags, features))


def test_half_precision():
    *views, tags = sample(dtype=torch.float32)
    features = draw(2, 4, 8, 8, dtype=torch.float32)
    expected, spread = seam_loss(*views, tags, 9, 5), pixel_correlation(views[0].cam, features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(term, expected[name]) for name, term in seam_loss(*views, tags, 9, 5).items())
        assert torch.equal(pixel_correlation(views[0].cam, features), spread)
    halves = [View(*(maps.bfloat16() for maps in view[:2])) for view in views]
    torch.testing.assert_close(seam_loss(*halves, tags, 9, 5), expected, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(
        pixel_correlation(views[0].cam.bfloat16(), features.bfloat16()), spread, rtol=5e-2, atol=2e-2
    )


def test_what_does_not_fit_is_said():
    one, two, tags = sample()
    with pytest.raises(ValueError, match=r"of 3 classes for 2 images, got the shape \(2, 5, 8, 8\)"):
        seam_loss(one, two, tags[:, 1:], 8, 5)
