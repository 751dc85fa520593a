"""Pixel-to-prototype contrast: published numbers, released arithmetic and paper in loops, and two processes."""

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import prototypes, wsss
from course_lib.prototypes import pixel_prototypes
from course_lib.wsss import View, contrast, seam
from course_lib.wsss import views as second_views
from course_lib.wsss.contrast import (
    ContrastConfig,
    contrast_loss,
    contrast_terms,
    min_max,
    mined,
    pixel_to_prototype,
    pseudo_labels,
)
from course_lib.wsss.views import Warp

pytestmark = pytest.mark.figures

CODE, PAPER = ContrastConfig.code(), ContrastConfig.paper()
TERMS = ("cross-prototype", "cross-cam", "intra")
DIFFERENCES = [
    field.name for field in fields(ContrastConfig) if getattr(CODE, field.name) != getattr(PAPER, field.name)
]


def sample(seed=0, images=3, classes=6, channels=8, sides=(9, 7), dtype=torch.float64, tagged=0.5):
    """Two views, tags and noise. Maps are coarse, so that classes hold regions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    views = []
    for side in sides:
        cam, refined = (F.interpolate(draw(images, classes, 4, 4), (side, side), mode="bicubic") for _ in range(2))
        pixels = draw(images, channels, side, side).relu() + 0.01  # the twins' F.normalize has gradients of 1e12 at 0
        views.append(View(cam, refined, pixels.requires_grad_()))
    tags = (torch.rand(images, classes - 1, generator=generator) < tagged).to(dtype)
    return *views, tags, torch.rand(2, images, sides[1], sides[1], generator=generator, dtype=dtype)


def moved(views, change):
    """The same views with other maps."""
    return [view._replace(cam=change(view.cam), refined=change(view.refined)) for view in views]


def outcome(terms, views):
    loss = sum(terms.values())
    return [*terms.values(), *torch.autograd.grad(loss, [view.embeddings for view in views])]


# published numbers ----------------------------------------------------------------------------------------------------


def golden():
    """Maps and embeddings in closed form, 2 images on 16 x 16."""
    n, c, d, y = (torch.arange(size, dtype=torch.float64) for size in (2, 21, 128, 16))
    n, c, d, y, x = n[:, None, None, None], c[:, None, None], d[:, None, None], y[:, None], y
    views = []
    for phase in (0.0, 0.25):
        cam = torch.sin(0.37 * n + 1.1 * c + 0.23 * y * (1 + 0.1 * c) + 0.71 * x * (1 + 0.05 * n) + phase)
        pixels = torch.sin(0.9 * n + 0.5 * d + 0.31 * y * (1 + 0.02 * d) + 0.17 * x * (1 + 0.03 * d) + phase).relu()
        views.append(View(cam, cam, pixels))
    tags = torch.zeros(2, 20, dtype=torch.float64)
    tags[0, 4] = tags[0, 14] = tags[1, 7] = 1
    return *views, tags, torch.rand(2, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_labels_and_prototypes_of_the_released_code():
    *views, tags, _ = golden()
    counts = ({0: 250, 5: 73, 8: 111, 15: 78}, {0: 248, 5: 73, 8: 110, 15: 81})
    for view, count, total in zip(views, counts, (229.157868, 228.610141)):
        labels, confidence = pseudo_labels(view.refined, tags, CODE)
        assert {int(c): int(k) for c, k in zip(*labels.unique(return_counts=True))} == count
        found = pixel_prototypes(confidence, view.embeddings, 32)
        assert found.sum().item() == pytest.approx(total, abs=1e-6)
        if view is views[0]:
            assert found[5, :3].tolist() == pytest.approx([0.0909263, 0.0920553, 0.0869670], abs=1e-7)


def test_terms_of_the_released_code():
    *views, tags, noise = golden()
    terms = contrast_terms(*views, tags, CODE, noise)
    assert terms["cross-prototype"].tolist() == pytest.approx([3.158417, 3.154214], abs=1e-6)
    assert terms["cross-cam"].tolist() == pytest.approx([3.168537, 3.160808], abs=1e-6)
    plain, classes = (
        contrast_terms(*views, tags, replace(CODE, mine_pixels=False, class_mean=mean), noise)["intra"]
        for mean in (False, True)
    )
    assert plain.tolist() == pytest.approx([2.577236, 2.560943], abs=1e-6)
    assert classes.tolist() == pytest.approx([2.493341, 2.467534], abs=1e-6)  # what the random half is on average
    # With the noise of the hard half, both halves are the hard one.
    hard = []
    for v, view in enumerate(views):
        labels, confidence = pseudo_labels(view.refined, tags, CODE)
        of = pixel_prototypes(confidence, view.embeddings, 32)
        similarity = torch.einsum("ndhw,cd->nhwc", F.normalize(view.embeddings, dim=1), of)
        own = similarity.gather(3, labels[..., None])[..., 0]
        chance = own.flatten()
        for c in labels.unique():  # the hardest tenth is passed over
            mine = (labels == c).flatten().nonzero().flatten()
            ranked = mine[chance[mine].argsort()]
            chance = chance.clone()
            chance[ranked[: 6 * len(mine) // 10 - len(mine) // 2]] = 2
        both = noise.clone()
        both[v] = chance.view_as(own)
        hard.append(contrast_terms(*views, tags, CODE, both)["intra"][v].item())
    assert hard == pytest.approx([2.667183, 2.640138], abs=1e-6)
    assert ((classes + torch.tensor(hard)) / 2).tolist() == pytest.approx([2.580262, 2.553836], abs=1e-6)
    total = contrast_loss(*views, tags, CODE, noise)
    assert total["cross-prototype"].item() == pytest.approx(0.05 * (3.158417 + 3.154214), abs=1e-7)
    everywhere = contrast_loss(*views, tags, replace(CODE, mine_pixels=False), noise)
    assert everywhere["intra"].item() == pytest.approx(0.05 * (2.493341 + 2.467534), abs=1e-7)


def test_scaled_maps_are_those_of_the_released_code():
    maps = torch.tensor([[0.2, 0.5, 0.8, 1.0], [0.0, 0.5, 0.8, 1.0], [0.0] * 4, [0.3] * 4], dtype=torch.float64)
    found = min_max(maps.view(1, 4, 2, 2)).flatten(2)[0]
    torch.testing.assert_close(found[0].tolist(), [-0.25, 0.375, 0.75, 1.0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1].tolist(), [-1e-5, 0.49998, 0.79998, 0.99998], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2].tolist(), [-1.0] * 4)
    assert found[3].tolist() == pytest.approx([-30001] * 4, rel=1e-4)


# slow twins -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 9999),
    st.integers(1, 4),
    st.sampled_from([(9, 7), (6, 6), (7, 11)]),
    st.sampled_from([0.0, 0.2, 0.9]),
)
def test_the_code_preset_is_the_released_arithmetic(seed, images, sides, tagged):
    from course_lib.course.bench import released_contrast  # here, since the processes below need no benchmark

    *views, tags, noise = sample(seed, images, 21, 8, sides, tagged=tagged)
    views = moved(views, lambda cam: cam + 1.5)  # which of equal confidences it takes is open
    expected = released_contrast(*views, tags, noise, draw=False)
    torch.testing.assert_close(outcome(contrast_loss(*views, tags, CODE, noise), views), outcome(expected, views))


def paper_in_loops(view1, view2, tags, noise):
    """Eq. 1 and 4-9, pixel by pixel."""
    sides = []
    for view in (view1, view2):
        cam, pixels = (
            F.interpolate(part, view2.cam.shape[2:], mode="bilinear", align_corners=True)
            for part in (view.cam, view.embeddings)
        )
        labels, confidence = [], []
        for image, listed in zip(cam.relu(), tags):
            image = image * F.pad(listed, (1, 0), value=1)[:, None, None]  # classes without a tag are no labels
            highest = image[1:].max()
            for scores in image.flatten(1).T:
                best = int(scores[1:].argmax()) + 1
                labels.append(best if scores[best] > 0.2 * highest else 0)
                confidence.append(scores[best] if labels[-1] else 1 - scores[best] / highest.clamp_min(1e-12))
        pixels = [F.normalize(v, dim=0) for image in pixels for v in image.flatten(1).T]
        means = {}
        for c in set(labels):
            mine = [i for i, label in enumerate(labels) if label == c]
            last = sorted(confidence[i] for i in mine)[-32:][0]
            mine = [i for i in mine if confidence[i] >= last]
            means[c] = F.normalize(sum(confidence[i] * pixels[i].detach() for i in mine), dim=0)
        sides.append((pixels, labels, means))

    def contrast(pixel, label, means, rivals):
        logits = torch.stack([pixel @ means[c] / 0.1 for c in (label, *rivals)])
        return logits.logsumexp(0) - logits[0]

    def mined(pixel, label, means):
        rivals = sorted((c for c in means if c != label), key=lambda c: -float(pixel.detach() @ means[c]))
        end = math.ceil(0.6 * len(rivals) - 1e-9)
        return contrast(pixel, label, means, rivals[end - max(1, len(rivals) // 2) : end] if rivals else [])

    terms = dict.fromkeys(TERMS, 0.0)
    for v in (0, 1):
        (pixels, labels, means), (_, theirs, other) = sides[v], sides[1 - v]
        for name, guide, of in ((TERMS[0], labels, other), (TERMS[1], theirs, means)):
            losses = [contrast(p, c, of, set(of) - {c}) for p, c in zip(pixels, guide) if c in of]
            terms[name] += 0.1 * sum(losses) / max(1, len(losses))
        chosen, chance = [], noise[v].flatten()
        for c in set(labels):
            mine = [i for i, label in enumerate(labels) if label == c]
            half = len(mine) // 2
            chosen += sorted(mine, key=lambda i: chance[i])[:half]
            chosen += sorted(mine, key=lambda i: float(pixels[i].detach() @ means[c]))[:half]
        losses = [mined(pixels[i], labels[i], means) for i in chosen]
        terms["intra"] += 0.1 * sum(losses) / max(1, len(losses))
    return terms


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 9999), st.integers(1, 2), st.sampled_from([(6, 5), (4, 4)]), st.integers(2, 7))
def test_the_paper_preset_is_the_paper(seed, images, sides, classes):
    *views, tags, noise = sample(seed, images, classes, 5, sides)
    expected = paper_in_loops(*views, tags, noise)
    torch.testing.assert_close(outcome(contrast_loss(*views, tags, PAPER, noise), views), outcome(expected, views))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9999), st.integers(1, 40), st.booleans())
def test_prototypes_are_weighted_means_of_the_first_pixels(seed, top_k, coarse):
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    cam = cam.round() if coarse else cam  # many ties, also of 0
    cam = torch.where(torch.rand(cam.shape, generator=generator) < 0.3, -torch.inf, cam)
    cam[:, 3] = -torch.inf
    pixels = torch.randn(2, 5, 3, 3, generator=generator, dtype=torch.float64)
    found = pixel_prototypes(cam, pixels, top_k)
    rows = pixels.movedim(1, -1).flatten(0, 2)
    for c in range(4):
        confidence = cam[:, c].flatten().tolist()
        last = sorted(confidence)[-top_k:][0]
        picks = [i for i in range(18) if -math.inf < confidence[i] >= last]
        total = sum(confidence[i] for i in picks)
        mean = sum((confidence[i] * rows[i] for i in picks), torch.zeros(5, dtype=torch.float64)) / (total or 1)
        torch.testing.assert_close(found[c], F.normalize(mean, dim=0), rtol=1e-5, atol=1e-6)


def test_one_pixel_against_the_prototypes():
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(2, 4, 3, 2, generator=generator), torch.randint(3, (2, 3, 2), generator=generator)
    pixels[1, :, 2, 1] = 0
    of = F.normalize(torch.randn(3, 4, generator=generator), dim=1)
    found = pixel_to_prototype(pixels, labels, of, 0.2)
    for n, y, x in ((0, 0, 0), (1, 1, 0), (0, 2, 1)):
        scores = [math.exp(float(F.normalize(pixels[n, :, y, x], dim=0) @ p) / 0.2) for p in of]
        assert found[n, y, x].item() == pytest.approx(-math.log(scores[labels[n, y, x]] / sum(scores)), rel=1e-4)
    assert found[1, 2, 1].item() == pytest.approx(math.log(3))  # a zero resembles all of them


# presets --------------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_two_ends():
    assert CODE == ContrastConfig() and len(DIFFERENCES) == 10
    assert replace(CODE, **{name: getattr(PAPER, name) for name in DIFFERENCES}) == PAPER
    saliency = ContrastConfig.code(saliency=True)
    assert (saliency.top_k, saliency.background) == (16, 0.1) and replace(saliency, top_k=32, background=0.2) == CODE


@pytest.mark.parametrize(
    "name", [*DIFFERENCES, "tagged", "mine_prototypes", "mine_pixels", "top_k", "background", "temperature"]
)
@pytest.mark.parametrize("preset", [CODE, PAPER], ids=["code", "paper"])
def test_every_field_changes_something(preset, name):
    *views, tags, noise = sample(5, images=4, classes=9, sides=(8, 8), tagged=0.25)
    views = moved(views, lambda cam: cam - 9 * (torch.arange(9) == 3)[:, None, None])  # a class that is nowhere
    value = getattr(preset, name)
    changed = replace(preset, **{name: not value if isinstance(value, bool) else value * 2})
    terms, others = contrast_loss(*views, tags, preset, noise), contrast_loss(*views, tags, changed, noise)
    assert any(not torch.isclose(terms[term], others[term], rtol=1e-6) for term in TERMS)
    assert all(term.isfinite() for term in others.values())


def test_a_term_without_weight_is_left_out():
    *views, tags, noise = sample()
    whole = contrast_loss(*views, tags, CODE, noise)
    assert tuple(whole) == TERMS
    for name in TERMS:
        rest = contrast_loss(*views, tags, replace(CODE, **{name.replace("-", "_"): 0.0}), noise)
        assert rest == {other: term for other, term in whole.items() if other != name}
    doubled = contrast_loss(*views, tags, replace(CODE, intra=0.2), noise)
    torch.testing.assert_close(doubled["intra"], 2 * whole["intra"])
    added = contrast_loss(*views, tags, replace(CODE, sum_views=True), noise)
    torch.testing.assert_close(added, {name: 2 * term for name, term in whole.items()})


def test_without_mining_intra_is_the_plain_contrast():
    """Eq. 9, and the row of Table 5 that comes before mining: the positive is not among its negatives."""
    *views, tags, noise = sample(sides=(7, 7))
    plain = replace(CODE, mine_prototypes=False, mine_pixels=False, class_mean=False)
    for found, view in zip(contrast_terms(*views, tags, plain, noise)["intra"], views):
        labels, confidence = pseudo_labels(view.refined, tags, plain)
        torch.testing.assert_close(
            found, pixel_to_prototype(view.embeddings, labels, pixel_prototypes(confidence, view.embeddings, 32)).mean()
        )


def test_only_embeddings_get_gradients():
    *views, tags, noise = sample()
    views = [view._replace(cam=view.cam.requires_grad_(), refined=view.refined.requires_grad_()) for view in views]
    for config in (CODE, PAPER):
        loss = sum(contrast_loss(*views, tags, config, noise).values())
        grads = torch.autograd.grad(loss, [part for view in views for part in view], allow_unused=True)
        assert [grad is not None and bool(grad.any()) for grad in grads] == [False, False, True] * 2


@pytest.mark.parametrize("preset", [CODE, PAPER], ids=["code", "paper"])
def test_the_refined_maps_or_the_classifiers_are_read(preset):
    *views, tags, noise = sample()
    hidden = "cam" if preset.refined else "refined"
    blind = [view._replace(**{hidden: torch.full_like(view.cam, torch.nan)}) for view in views]
    torch.testing.assert_close(contrast_loss(*blind, tags, preset, noise), contrast_loss(*views, tags, preset, noise))


# invariants -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999), st.booleans())
def test_the_order_of_images_does_not_matter(seed, paper):
    config = PAPER if paper else replace(CODE, ranked_background=True)  # the code takes the background's first pixels
    *views, tags, noise = sample(seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    shuffled = [View(*(part[order] for part in view)) for view in views]
    torch.testing.assert_close(
        contrast_loss(*shuffled, tags[order], config, noise[:, order]), contrast_loss(*views, tags, config, noise)
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999), st.sampled_from([CODE, PAPER]))
def test_the_order_of_classes_does_not_matter(seed, config):
    *views, tags, noise = sample(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    channels = torch.cat((torch.tensor([0]), order + 1))
    torch.testing.assert_close(
        contrast_loss(*moved(views, lambda cam: cam[:, channels]), tags[:, order], config, noise),
        contrast_loss(*views, tags, config, noise),
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999), st.sampled_from([CODE, PAPER]), st.integers(-8, 8))
def test_scales_do_not_matter(seed, config, power):
    """The scale of all embeddings in both presets; of the maps, and of each pixel's embedding, in the paper."""
    *views, tags, noise = sample(seed)
    expected = contrast_loss(*views, tags, config, noise)
    longer = [view._replace(embeddings=view.embeddings * 2.0**power) for view in views]
    torch.testing.assert_close(contrast_loss(*longer, tags, config, noise), expected)
    if config is PAPER:
        torch.testing.assert_close(
            contrast_loss(*moved(views, lambda cam: cam * 2.0**power), tags, config, noise), expected
        )
        factors = 2.0 ** torch.randint(-3, 3, (3, 1, 9, 9), generator=torch.Generator().manual_seed(seed))
        one = views[0]._replace(
            embeddings=views[0].embeddings * factors
        )  # both views on one grid: resizing would mix pixels
        torch.testing.assert_close(
            contrast_loss(one, one, tags, config, torch.rand(2, 3, 9, 9))["cross-cam"],
            contrast_loss(views[0], views[0], tags, config, torch.rand(2, 3, 9, 9))["cross-cam"],
        )


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9999))
def test_a_class_that_is_nowhere_changes_nothing_in_the_paper(seed):
    *views, tags, noise = sample(seed)
    wider = moved(views, lambda cam: torch.cat((cam, -torch.ones_like(cam[:, :1])), 1))
    more = F.pad(tags, (0, 1))
    torch.testing.assert_close(contrast_loss(*wider, more, PAPER, noise), contrast_loss(*views, tags, PAPER, noise))
    more = contrast_terms(*wider, more, CODE, noise)["cross-cam"]
    assert (more > contrast_terms(*views, tags, CODE, noise)["cross-cam"]).all()  # in the code it competes all the same


@pytest.mark.parametrize("classes", [3, 7, 21])
def test_what_is_mined_makes_the_intra_term_of_the_paper(classes):
    generator = torch.Generator().manual_seed(classes)
    cosine, noise = (
        torch.rand(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 50, classes), (2, 50))
    )
    labels = torch.stack([torch.randperm(50, generator=generator) % classes for _ in range(2)])
    counts = torch.stack([own.bincount(minlength=classes) for own in labels])
    found = contrast._intra(cosine / 0.1, labels, counts, counts > 0, noise, PAPER, torch.ones(50, dtype=torch.bool))
    for term, *view in zip(found, cosine, labels, noise):
        negatives, times = mined(*view)
        logits, own = view[0] / 0.1, (view[0] / 0.1).gather(1, view[1][:, None])
        losses = torch.cat((own, logits.masked_fill(~negatives, -torch.inf)), 1).logsumexp(1) - own[:, 0]
        torch.testing.assert_close(term, (times * losses).sum() / times.sum())
        assert (negatives.sum(1) == (classes - 1) // 2).all() and not negatives.gather(1, view[1][:, None]).any()


def test_half_of_a_class_is_random_and_half_hard():
    """Of 10 pixels: the 5 of smallest noise, and ranks 1 to 5 of the least similar (paper 0 to 4)."""
    labels = torch.tensor([[1] * 10 + [0] * 3 + [2]] * 2)
    similarity = torch.cat((torch.arange(10.0), torch.arange(4.0))).expand(2, -1)
    noise = torch.cat((torch.arange(10.0).flip(0), torch.arange(4.0))).expand(2, -1)
    counts, everywhere = torch.tensor([[3, 10, 1, 0]] * 2), torch.ones(14, dtype=torch.bool)
    for config, hard in ((CODE, [1, 2, 3, 4, 5]), (PAPER, [0, 1, 2, 3, 4])):
        weights = contrast._pixel_weights(
            labels, similarity, noise, counts, replace(config, class_mean=True), everywhere
        )
        times = torch.zeros(14)
        times[hard] += 1 / 10
        times[5:10] += 1 / 10
        times[10] = 1  # of 3 pixels: one, twice
        assert weights[0].tolist() == pytest.approx((times / 3).tolist()) and torch.equal(*weights)
    sizes = {2: (0, 1), 3: (0, 1), 4: (0, 2), 5: (1, 3), 7: (1, 4), 10: (1, 6)}  # hard ranks of classes of these sizes
    for size, (first, end) in sizes.items():
        ranks = torch.arange(float(size)).expand(2, -1)
        whole = torch.ones(size, dtype=torch.bool)
        of, counts = torch.zeros(2, size).long(), torch.tensor([[size]] * 2)
        weights = contrast._pixel_weights(of, ranks, -ranks, counts, CODE, whole)[0]
        random_half = torch.arange(size) >= size - size // 2
        assert ((weights * size).round() > 0).tolist() == (
            (torch.arange(size) >= first) & (torch.arange(size) < end) | random_half
        ).tolist()


# nothing to compare ---------------------------------------------------------------------------------------------------

DEGENERATE = {
    "zero maps": lambda views, tags: (moved(views, torch.zeros_like), tags),
    "constant maps": lambda views, tags: (moved(views, lambda cam: torch.full_like(cam, 0.3)), tags),
    "negative maps": lambda views, tags: (moved(views, lambda cam: -cam.abs() - 1), tags),
    "no tags": lambda views, tags: (views, torch.zeros_like(tags)),
    "all tags": lambda views, tags: (views, torch.ones_like(tags)),
    "zero embeddings": lambda views, tags: (
        [view._replace(embeddings=torch.zeros_like(view.embeddings).requires_grad_()) for view in views],
        tags,
    ),
    "huge embeddings": lambda views, tags: (
        [view._replace(embeddings=(view.embeddings.detach() * 1e15).requires_grad_()) for view in views],
        tags,
    ),
    "huge maps": lambda views, tags: (moved(views, lambda cam: cam * 1e30), tags),
    "tiny maps": lambda views, tags: (moved(views, lambda cam: cam * 1e-30), tags),
    "one map is zero": lambda views, tags: (
        moved(views, lambda cam: cam * (torch.arange(cam.shape[1]) != 2)[:, None, None]),
        torch.ones_like(tags),
    ),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("config", [CODE, PAPER, replace(PAPER, class_mean=True)], ids=["code", "paper", "mix"])
def test_degenerate_inputs_give_finite_losses_and_gradients(case, config):
    *views, tags, noise = sample(1, dtype=torch.float32)
    views, tags = DEGENERATE[case](views, tags)
    found = outcome(contrast_loss(*views, tags, config, noise), views)
    assert all(part.isfinite().all() for part in found)
    assert all(term >= -1e-6 for term in found[:3])


@pytest.mark.parametrize("config", [CODE, PAPER], ids=["code", "paper"])
def test_one_pixel_of_one_image(config):
    *views, tags, noise = sample(2, images=1, sides=(1, 1), tagged=1.1)
    found = outcome(contrast_loss(*views, tags, config, noise), views)
    assert all(part.isfinite().all() for part in found)
    assert found[2] == 0  # a class of one pixel has no half


def test_without_foreground_there_is_one_class_in_the_paper():
    """Nothing competes with the background: the losses are zero, and so are their gradients."""
    *views, tags, noise = sample(3)
    found = outcome(contrast_loss(*moved(views, torch.zeros_like), tags, PAPER, noise), views)
    assert all(not part.any() for part in found)


# speed ----------------------------------------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for the device: a number is read, or a shape depends on values."""

    waiting = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.bincount.default,
        torch.ops.aten._unique2.default,
    )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in self.waiting, f"{operation} waits for the device"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [CODE, PAPER], ids=["code", "paper"])
def test_nothing_waits_for_the_device(config):
    *views, tags, noise = sample()
    with NoWaiting():
        outcome(contrast_loss(*views, tags, config, noise), views)


@pytest.fixture
def unchecked(monkeypatch):
    """The modules without the shape checks of the tests, which do not compile."""
    for module in (contrast, seam, second_views, prototypes, wsss):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))


@pytest.mark.parametrize("config", [CODE, PAPER], ids=["code", "paper"])
def test_it_compiles_into_one_graph(config, unchecked):
    *views, tags, noise = sample()
    compiled = torch.compile(contrast.contrast_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        outcome(compiled(*views, tags, config, noise), views),
        outcome(contrast.contrast_loss(*views, tags, config, noise), views),
    )


# precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CODE, PAPER], ids=["code", "paper"])
def test_half_precision(config):
    *views, tags, noise = sample(4, dtype=torch.float32)
    expected = contrast_loss(*views, tags, config, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(
            torch.equal(term, expected[name]) for name, term in contrast_loss(*views, tags, config, noise).items()
        )
    halves = [View(view.cam, view.refined, view.embeddings.bfloat16()) for view in views]
    found = contrast_loss(*halves, tags, config, noise)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    assert all(term.dtype == torch.float32 for term in found.values())


def test_single_precision_is_close_to_double():
    *views, tags, noise = sample(6)
    singles = [View(*(part.float() for part in view)) for view in views]
    for config in (CODE, PAPER):
        wide, single = contrast_loss(*views, tags, config, noise), contrast_loss(*singles, tags, config, noise)
        torch.testing.assert_close({name: term.double() for name, term in single.items()}, wide, rtol=1e-4, atol=1e-5)


# several processes ----------------------------------------------------------------------------------------------------


def shared():
    """4 images; the first two have other tags than the last two. Their second views may be turned."""
    *views, _, noise = sample(8, images=4, classes=9)
    tags = torch.zeros(4, 8, dtype=torch.float64)
    tags[0, 0] = tags[0, 3] = tags[1, 1] = tags[2, 1] = tags[2, 5] = tags[3, 7] = 1
    warp = Warp(
        torch.tensor([True, False, False, True]), torch.tensor([[0.3, -0.2, 0.0, 0.1], [0.0] * 4, [0.0, 0.0, 0.3, 0.0]])
    )
    return *views, tags, noise, warp


CASES = {"code": (CODE, False), "paper": (PAPER, False), "code, turned": (CODE, True), "paper, turned": (PAPER, True)}


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    *views, tags, noise, warp = shared()
    own = slice(2 * rank, 2 * rank + 2)
    warp = Warp(warp.flip[own], warp.rigid[:, own])
    views = [View(*(part[own].detach() for part in view)) for view in views]
    views = [view._replace(embeddings=view.embeddings.requires_grad_()) for view in views]
    found = {
        name: outcome(contrast_loss(*views, tags[own], config, noise[:, own], warp if turned else None), views)
        for name, (config, turned) in CASES.items()
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_together_are_one(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    *views, tags, noise, warp = shared()
    for name, (config, turned) in CASES.items():
        expected = outcome(contrast_loss(*views, tags, config, noise, warp if turned else None), views)
        first, second = (half[name] for half in halves)
        torch.testing.assert_close([(a + b) / 2 for a, b in zip(first[:3], second[:3])], expected[:3])
        torch.testing.assert_close([torch.cat((a, b)) / 2 for a, b in zip(first[3:], second[3:])], expected[3:])
    assert not torch.isclose(halves[0]["paper"][2], halves[1]["paper"][2])  # each has its own share


# sentences ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    one, two, tags, noise = sample()
    with pytest.raises(ValueError, match="embeddings beside the maps of view 2"):
        contrast_loss(one, two._replace(embeddings=None), tags, CODE, noise)
    with pytest.raises(ValueError, match=r"and of 4 classes for 3 images, got the shape \(3, 6, 9, 9\)"):
        contrast_loss(one, two, tags[:, 1:], CODE, noise)
    with pytest.raises(ValueError, match=r"\(2, 3, 7, 7\), got noise of the shape \(2, 3, 9, 9\)"):
        contrast_loss(one, two, tags, CODE, torch.rand(2, 3, 9, 9))
    with pytest.raises(ValueError, match=r"temperature must be from 1e-12 to 1e\+06, got 0\.0"):
        ContrastConfig(temperature=0.0)
