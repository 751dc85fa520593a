"""IRN: published counts, labels, losses pair by pair, and the walk between boundaries as released."""

import gc
import inspect
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from course_lib.course.bench import memory_rise
from course_lib.wsss import affinity, irn
from course_lib.wsss.affinity import near_pixels, pair_kinds, shifted
from course_lib.wsss.irn import (
    BoundaryWalk,
    IRNet,
    confident_labels,
    displacement_errors,
    fit_mean,
    irn_loss,
    path,
    path_affinity,
    propagate_to_edge,
    reduced_labels,
    refine_with_boundaries,
)

IGNORE = 255


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shares(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_labels(*shape, seed=0, classes=3):
    """Labels in patches, some of them ignored."""
    labels = F.interpolate(numbers(shape[0], classes + 1, 3, 3, seed=seed), shape[1:], mode="bilinear").argmax(1)
    return torch.where(labels == classes, IGNORE, labels)


def pictures(*shape, seed=5):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# slow twins -----------------------------------------------------------------------------------------------------------


def slow_affinity(boundary, radius):
    """1 - the highest boundary on each path, pixel by pixel: h w -> o y x."""
    h, w = boundary.shape
    reach, found = radius - 1, []
    for down, right in near_pixels(radius):
        on_path = [
            (y, x)
            for y in range(down + 1)
            for x in range(min(0, right), max(0, right) + 1)
            if abs(down * x - right * y) / (down**2 + right**2) ** 0.5 < 1
        ]
        for y in range(h - reach):
            for x in range(reach, w - reach):
                found.append(1 - max(boundary[y + dy, x + dx].item() for dy, dx in on_path))
    return torch.tensor(found, dtype=boundary.dtype).view(-1, h - reach, w - 2 * reach)


def slow_propagation(maps, boundary, radius, beta, squarings):
    """As released: a border of ones, the matrix of all pixels with their border, cut, to a power, squared."""
    h, w = boundary.shape
    wide_w, wide_h = w + 2 * radius, h + radius
    wide = F.pad(boundary, (radius, radius, 0, radius), value=1.0)
    matrix = torch.eye(wide_h * wide_w, dtype=torch.float64)
    strength, reach = slow_affinity(wide, radius), radius - 1
    for number, (down, right) in enumerate(near_pixels(radius)):
        for y in range(wide_h - reach):
            for x in range(reach, wide_w - reach):
                i, j = y * wide_w + x, (y + down) * wide_w + x + right
                matrix[i, j] = matrix[j, i] = strength[number, y, x - reach]
    matrix = matrix.view(wide_h, wide_w, wide_h, wide_w)[:h, radius:-radius, :h, radius:-radius].reshape(h * w, h * w)
    matrix = matrix**beta
    matrix = matrix / matrix.sum(0, keepdim=True)
    for _ in range(squarings):
        matrix = matrix @ matrix
    return ((maps * (1 - boundary)).flatten(1) @ matrix).view(maps.shape)


def slow_loss(boundary, displacement, labels, radius):
    """One image, pair by pair; boundary as probabilities."""
    h, w = labels.shape
    reach, strength = radius - 1, slow_affinity(boundary, radius)
    sums, counts = dict.fromkeys(("bg", "fg", "neg", "dp bg", "dp fg"), 0.0), dict.fromkeys(("bg", "fg", "neg"), 0)
    for number, (down, right) in enumerate(near_pixels(radius)):
        for y in range(h - reach):
            for x in range(reach, w - reach):
                first, second = labels[y, x].item(), labels[y + down, x + right].item()
                if IGNORE in (first, second):
                    continue
                a = strength[number, y, x - reach].item()
                difference = displacement[:, y, x] - displacement[:, y + down, x + right]
                if first != second:
                    counts["neg"] += 1
                    sums["neg"] -= np.log(1 + 1e-5 - a)
                    continue
                kind = "fg" if first else "bg"
                counts[kind] += 1
                sums[kind] -= np.log(a + 1e-5)
                way = torch.tensor([down, right]) if first else torch.zeros(2)
                sums[f"dp {kind}"] += (difference - way).abs().sum().item()
    means = {kind: sums[kind] / (count + 1e-5) for kind, count in counts.items()}
    return {
        "background": means["bg"] / 4,
        "foreground": means["fg"] / 4,
        "different": means["neg"] / 2,
        "displacement-foreground": sums["dp fg"] / (2 * counts["fg"] + 1e-5) / 2,
        "displacement-background": sums["dp bg"] / (2 * counts["bg"] + 1e-5) / 2,
    }


# paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("radius", "count", "lengths"), [(5, 34, 9), (10, 152, 20)])
def test_published_counts(radius, count, lengths):
    paths = [path(to) for to in near_pixels(radius)]
    assert len(paths) == count and len({len(points) for points in paths}) == lengths
    for to, points in zip(near_pixels(radius), paths):
        assert points[0] == (0, 0) or (0, 0) in points
        assert to in points and len(points) == len({*points})


def test_paths():
    assert path((0, 3)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert path((2, 0)) == [(0, 0), (1, 0), (2, 0)]
    assert path((1, -1)) == [(0, -1), (0, 0), (1, -1), (1, 0)]  # corners of a diagonal step are 0.7 away
    assert path((1, 2)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for down, right in near_pixels(10):
        assert {(y, -x) for y, x in path((down, right))} == {*path((down, -right))}


@given(st.integers(4, 8), st.integers(7, 11), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=10)
def test_affinity_ends_at_the_strongest_boundary(h, w, radius, seed):
    boundary = shares(2, 1, h, w, seed=seed)
    found = path_affinity(boundary, radius)
    for image in range(2):
        torch.testing.assert_close(found[image], slow_affinity(boundary[image, 0], radius), rtol=0, atol=1e-15)


def test_gradients_reach_the_strongest_boundary():
    boundary = shares(1, 1, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(partial(path_affinity, radius=3), boundary)
    (gradient,) = torch.autograd.grad(path_affinity(boundary, 3).sum(), boundary)
    pairs = shifted(boundary, (0, 0), 3).numel() * len(near_pixels(3))
    assert gradient.sum().item() == pytest.approx(-pairs) and (gradient <= 0).all()


# labels ---------------------------------------------------------------------------------------------------------------


def test_confident_labels():
    strong, weak = torch.tensor([[0, 0, 2, 2, 1]]), torch.tensor([[0, 1, 2, 0, 3]])
    assert confident_labels(strong, weak).tolist() == [[0, IGNORE, 2, 2, 1]]


@pytest.mark.parametrize("size", [(16, 24), (448, 448)])
def test_labels_are_reduced_as_by_pillow(size):
    labels = torch.randint(0, 21, (1, *size), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(labels[0].byte().numpy())
    theirs = image.resize((size[1] // 4, size[0] // 4), Image.Resampling.NEAREST)
    assert torch.equal(reduced_labels(labels)[0], torch.from_numpy(np.array(theirs)).long())


def test_labels_beyond_the_border_are_ignored():
    assert reduced_labels(torch.ones(1, 5, 7, dtype=torch.long)).tolist() == [[[1, 1], [IGNORE, IGNORE]]]


# losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_pair_by_pair(seed):
    logits, displacement = numbers(1, 1, 6, 9, seed=seed), 3 * numbers(1, 2, 6, 9, seed=seed + 9)
    labels = some_labels(1, 6, 9, seed=seed)
    found = irn_loss(logits, displacement, labels, 4)
    expected = slow_loss(logits[0, 0].sigmoid(), displacement[0], labels[0], 4)
    assert found.keys() == expected.keys()
    for name, term in found.items():
        # Mean over 2 n + 1e-5 there, half of that over n + 1e-5 here.
        assert term.item() == pytest.approx(expected[name], rel=1e-5, abs=1e-12)


def test_a_batch_counts_its_pairs_together():
    logits, displacement = numbers(3, 1, 6, 9), numbers(3, 2, 6, 9)
    labels = some_labels(3, 6, 9, seed=2)
    found, counts = irn_loss(logits, displacement, labels, 3), pair_kinds(labels, 3).flatten(2).sum(2).double()
    alone = [irn_loss(*(part[image, None] for part in (logits, displacement, labels)), 3) for image in range(3)]
    for kind, name in enumerate(("background", "foreground", "different")):
        shares_ = torch.stack([terms[name] for terms in alone]) @ counts[kind] / counts[kind].sum()
        assert found[name].item() == pytest.approx(shares_.item(), rel=1e-5)


def test_the_way_to_the_centre_is_without_error():
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(12.0), indexing="ij")
    to_centre = torch.stack((4 - y, 6 - x))[None]  # everything is one object
    moving = torch.ones(1, len(near_pixels(3)), 7, 8, dtype=torch.bool)
    assert not displacement_errors(to_centre, moving, 3).any()
    assert not displacement_errors(torch.full_like(to_centre, 5.0), ~moving, 3).any()  # background stays
    ways = torch.tensor(near_pixels(3)).abs().sum(1)
    assert torch.equal(displacement_errors(to_centre, ~moving, 3)[0, :, 0, 0], ways.float())


@pytest.mark.parametrize("label", [0, 2, IGNORE])
def test_kinds_without_a_pair_are_zero_and_keep_the_graph(label):
    parts = numbers(1, 1, 6, 9).requires_grad_(), numbers(1, 2, 6, 9).requires_grad_()
    terms = irn_loss(*parts, torch.full((1, 6, 9), label), 3)
    given = {0: "background", 2: "foreground"}.get(label, "nothing")
    assert {name for name, term in terms.items() if term > 0} == {name for name in terms if given in name}
    for gradient in torch.autograd.grad(sum(terms.values()), parts):
        assert gradient.isfinite().all() and bool(gradient.any()) == (label != IGNORE)


def test_certain_boundaries_stay_finite():
    logits = torch.full((1, 1, 6, 9), 200.0)
    logits[..., 4:] = -200
    logits.requires_grad_()
    terms = irn_loss(logits, torch.zeros(1, 2, 6, 9), some_labels(1, 6, 9), 3)
    assert all(term.isfinite() for term in terms.values())
    assert torch.autograd.grad(sum(terms.values()), logits)[0].isfinite().all()


def test_pairs_at_the_border_come_back():
    logits, displacement, labels = numbers(1, 1, 6, 9), numbers(1, 2, 6, 9), torch.zeros(1, 6, 9, dtype=torch.long)
    labels[..., 7:] = 1  # in the last columns, which are no sources
    assert irn_loss(logits, displacement, labels, 3)["foreground"] == 0
    terms = irn_loss(logits, displacement, labels, 3, borders=True)
    assert terms["foreground"] > 0 and all(term.isfinite() for term in terms.values())


@pytest.fixture
def unchecked(monkeypatch):
    """The modules without the shape checks of the tests, which do not compile."""
    for module in (irn, affinity):
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))


def test_it_compiles_into_one_graph(unchecked):
    parts = numbers(1, 1, 6, 9).requires_grad_(), numbers(1, 2, 6, 9).requires_grad_()
    labels, outcomes = some_labels(1, 6, 9), []
    for loss in (torch.compile(irn.irn_loss, fullgraph=True, backend="eager"), irn.irn_loss):
        terms = loss(*parts, labels, 2)
        outcomes.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), parts)])
    torch.testing.assert_close(*outcomes)


def test_a_step_of_published_size_looks_at_no_number(unchecked):
    """Tensors without numbers at 448 px and batch 16: what would wait for the device raises.

    The radius is 4 to be quick: a larger one repeats the same for more neighbours.
    """
    with FakeTensorMode():
        parts = torch.empty(16, 1, 112, 112, requires_grad=True), torch.empty(16, 2, 112, 112, requires_grad=True)
        terms = irn.irn_loss(*parts, torch.empty(16, 112, 112, dtype=torch.long), 4)
        gradients = torch.autograd.grad(sum(terms.values()), parts)
        assert [gradient.shape for gradient in gradients] == [part.shape for part in parts]


def test_autocast_does_not_reach_the_loss():
    parts = numbers(1, 1, 6, 9, dtype=torch.float32), numbers(1, 2, 6, 9, dtype=torch.float32)
    expected = irn_loss(*parts, some_labels(1, 6, 9), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = irn_loss(*parts, some_labels(1, 6, 9), 3)
    assert all(torch.equal(term, expected[name]) for name, term in found.items())


# the walk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w", "radius", "squarings"), [(6, 7, 3, 8), (9, 5, 4, 6), (7, 8, 5, 8), (2, 3, 5, 8)])
def test_the_walk_is_that_of_the_released_matrix(h, w, radius, squarings):
    maps, boundary = shares(3, h, w, seed=h), 0.6 * shares(h, w, seed=w)
    config = BoundaryWalk(radius=radius, steps=2**squarings)
    found = propagate_to_edge(maps[None], boundary[None, None], config)[0]
    assert (found - slow_propagation(maps, boundary, radius, 10, squarings)).abs().max() < 1e-10


def test_nothing_passes_a_closed_boundary():
    boundary = torch.zeros(1, 1, 12, 12)
    boundary[..., 3, 3:9] = boundary[..., 8, 3:9] = boundary[..., 3:9, 3] = boundary[..., 3:9, 8] = 1
    maps = torch.zeros(1, 1, 12, 12)
    maps[..., 5, 5] = 1
    found = propagate_to_edge(maps, boundary, BoundaryWalk())
    inside = torch.zeros_like(found, dtype=torch.bool)
    inside[..., 4:8, 4:8] = True
    assert (found[inside] > 0.02).all() and found[~inside].abs().max() < 1e-6
    assert propagate_to_edge(maps, torch.zeros_like(boundary), BoundaryWalk())[~inside].max() > 1e-3


# the network ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return IRNet("resnet18", pretrained=False).eval()


def test_the_last_level_keeps_the_grid_without_dilation(net):
    assert net.strides == [4, 4, 8, 16, 16]
    convolutions = [part for part in net.backbone.layer4.modules() if isinstance(part, torch.nn.Conv2d)]
    assert all(part.stride == part.dilation == (1, 1) for part in convolutions)
    images = pictures(1, 3, 64, 96)
    prepared = net.prepare(images)
    x = net.backbone.act1(net.backbone.bn1(net.backbone.conv1(net.normalise(images))))
    x = net.backbone.maxpool(x)
    torch.testing.assert_close(prepared["x1"], x)
    for number in range(1, 5):
        x = getattr(net.backbone, f"layer{number}")(x)
        torch.testing.assert_close(prepared[f"x{number + 1}"], x)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv2_050"])
def test_small_backbones(name):
    small = IRNet(name, pretrained=False)
    logits, displacement = small(small.prepare(pictures(1, 3, 90, 100)))
    assert logits.shape == (1, 1, 24, 32) and displacement.shape == (1, 2, 24, 32)  # filled up to 96 x 128
    assert small.strides == [4, 4, 8, 16, 32]


def test_networks_without_levels_are_refused():
    with pytest.raises(ValueError, match="maps of strides 2, 4, 8, 16 and 32, got vit_tiny"):
        IRNet("vit_tiny_patch16_224", pretrained=False)


def test_the_backbone_neither_learns_nor_leaves_evaluation(net):
    prepared = net.train().prepare(pictures(2, 3, 64, 64))
    assert not any(part.training for part in net.backbone.modules()) and net.deep.training
    assert not any(features.requires_grad for features in prepared.values())
    sum(irn_loss(*net(prepared), some_labels(2, 16, 16), 5).values()).backward()
    learned = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in net.named_parameters() if not name.startswith("backbone.")}
    grouped = net.parameter_groups()
    assert sum(len(group["params"]) for group in grouped) == len(learned)
    assert {id(part) for group in grouped for part in group["params"]} == {
        id(part) for name, part in net.named_parameters() if name in learned
    }
    assert [(group["lr"], group["weight_decay"]) for group in grouped] == [(0.1, 1e-4), (1.0, 1e-4)]
    net.zero_grad()
    net.eval()


def test_size_of_the_branches(net):
    channels = (64, 64, 128, 256, 512)
    boundary = sum(channels) * 32 + 5 * 64 + 5 * 32 + 1  # convolutions, normalisation, the last one with its bias
    sizes = (64, 128, 256, 256, 256)
    displacement = sum(before * after + 2 * after for before, after in zip(channels, sizes))
    displacement += 768 * 256 + 512 + 448 * 256 + 512 + 2 * 256
    parts = [sum(part.numel() for part in group["params"]) for group in net.parameter_groups()]
    assert parts == [boundary, displacement]
    groups = [layer.num_groups for layer in net.modules() if isinstance(layer, torch.nn.GroupNorm)]
    assert groups == [4] * 5 + [8, 16, 16, 16, 16, 16, 16]


def test_the_mean_displacement_is_subtracted_in_evaluation(net):
    batches = [pictures(2, 3, 64, 64, seed=1), pictures(1, 3, 64, 64, seed=2)]
    fit_mean(net, batches)
    assert net.mean_displacement.any() and not net.training
    means = torch.cat([net(net.prepare(images))[1].mean((2, 3)) for images in batches])
    torch.testing.assert_close(means.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    prepared = net.prepare(batches[0])
    shift = net.train()(prepared)[1] - net.eval()(prepared)[1]
    torch.testing.assert_close(shift, net.mean_displacement[:, None, None].expand_as(shift), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least one batch"):
        fit_mean(net, [])
    net.mean_displacement.zero_()


@pytest.mark.figures
def test_masks_as_released(net):
    """An image of 50 x 70 in 96 x 96 pixels, boundaries with its mirror image, the dense matrix, the global maximum."""
    images, scores = pictures(1, 3, 50, 70), shares(1, 3, 13, 18, dtype=torch.float32)
    scores[:, 1] = 0
    found = refine_with_boundaries(net, images, scores, BoundaryWalk(radius=3, side=96))
    filled = torch.zeros(1, 3, 96, 96)
    filled[..., :50, :70] = net.normalise(images)
    with torch.no_grad():
        logits = [net(net.frozen(part))[0] for part in (filled, filled.flip(-1))]
    boundary = ((logits[0] + logits[1].flip(-1)) / 2).sigmoid()[0, 0, :13, :18].double()
    walked = slow_propagation(scores[0].double(), boundary, 3, 10, 8)
    whole = F.interpolate(walked[None], scale_factor=4, mode="bilinear", align_corners=False)[..., :50, :70]
    torch.testing.assert_close(found[:, 1:], (whole / whole.max()).float(), rtol=1e-3, atol=1e-4)
    assert (found[:, 0] == 0.25).all() and found[:, 1:].amax() == 1 and not found[:, 2].any()


@pytest.mark.figures
def test_a_mirror_image_has_the_mirrored_mask(net):
    images, scores = pictures(2, 3, 64, 96), shares(2, 2, 64, 96, dtype=torch.float32)
    config = BoundaryWalk(side=None)
    found = refine_with_boundaries(net, images, scores, config)
    mirrored = refine_with_boundaries(net, images.flip(-1), scores.flip(-1), config)
    torch.testing.assert_close(mirrored.flip(-1), found, rtol=1e-3, atol=1e-4)


def test_an_image_without_seeds_is_background(net):
    found = refine_with_boundaries(net, pictures(1, 3, 64, 64), torch.zeros(1, 2, 64, 64), BoundaryWalk(side=None))
    assert not found.argmax(1).any() and found.isfinite().all()


def test_large_images_are_refused(net):
    with pytest.raises(ValueError, match="at most 48 x 48 pixels, got 64 x 32"):
        refine_with_boundaries(net, pictures(1, 3, 64, 32), torch.zeros(1, 2, 16, 8), BoundaryWalk(side=48))


# costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_at_448_pixels(capsys):
    """One step of the published network, two crops, on the CPU."""
    torch.manual_seed(0)
    net = IRNet("resnet50", pretrained=False).train()
    assert net.strides == [4, 4, 8, 16, 16]
    optimiser = torch.optim.SGD(net.parameter_groups(), momentum=1e-4)
    images, labels, losses = pictures(2, 3, 448, 448), some_labels(2, 112, 112), []

    def step():
        loss = sum(irn_loss(*net(net.prepare(images)), labels).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())

    gc.collect()
    start = time.process_time()
    rise = memory_rise(step)
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f"\nIRNet, two crops of 448 px: {rise / 1e9:.2f} GB above its weights, {seconds:.0f} s of CPU")
    assert 0 < losses[0] < 50 and all(part.isfinite().all() for part in net.parameters())
