"""The strong baseline of re-identification trick by trick, its protocol on a tiny tree, and what is refused."""

import inspect
import json
import math
import random
import re
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib import __main__, backbones, engine
from course_lib.data.market1501 import PARTS, Market1501
from course_lib.data.wrappers import Changed
from course_lib.evaluate.ranking import cosine_distances
from course_lib.experiments import reid
from course_lib.experiments.reid import (
    TRICKS,
    Baseline,
    Comparison,
    ReidEvaluation,
    ReidTraining,
    ablate_tricks,
    build,
    evaluate,
    fit_baseline,
    idle_tricks,
    last_stride_one,
    learning_rate_factor,
    load,
    mirrored_features,
    named_tricks,
    train,
)
from course_lib.metric_learning.features import trunk
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax
from course_lib.metric_learning.pedestrians import Occluded, market_scores

pytestmark = pytest.mark.figures

SMALL = (64, 32)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Four training and three testing persons, each of a colour, in two cameras; a distractor and a piece of junk."""
    root, generator = tmp_path_factory.mktemp("data") / "market", random.Random(0)

    def write(split, name, colour):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "parts" / split).mkdir(parents=True, exist_ok=True)
        parts = torch.zeros(64, 32, dtype=torch.uint8)
        parts[4:16, 10:22], parts[16:40, 8:24], parts[40:64, 8:24] = 1, 2, 3  # clothes in whole blocks of JPEG
        image = torch.randint(90, 110, (64, 32, 3), dtype=torch.uint8)
        image[parts >= 2] = torch.tensor(
            [min(255, value + generator.randrange(12)) for value in colour], dtype=torch.uint8
        )
        Image.fromarray(image.numpy()).save(root / split / f"{name}.jpg", quality=95, subsampling=0)
        Image.fromarray(parts.numpy()).save(root / "parts" / split / f"{name}.png")

    torch.manual_seed(0)
    colours = [
        (220, 30, 30),
        (30, 220, 30),
        (30, 30, 220),
        (200, 200, 30),
        (20, 200, 200),
        (200, 20, 200),
        (250, 250, 250),
    ]
    for person, colour in enumerate(colours, 1):
        for shot in range(4):
            name = f"{person:04}_c{1 + shot % 2}s1_{shot:06}_00"
            write("bounding_box_train" if person <= 4 else "query" if shot < 2 else "bounding_box_test", name, colour)
    write("bounding_box_test", "0000_c3s1_000001_00", (120, 90, 60))
    write("bounding_box_test", "-1_c2s1_000001_00", colours[4])
    (root / "miniature.json").write_text('{"world": "seven persons"}')
    return root


def small(tree, **changes):
    return ReidTraining(
        **dict(
            data=str(tree), backbone="test_efficientnet", weights="random", epochs=2, classes=3, images=2, size=SMALL
        )
        | changes
    )


def batch(classes=3, images=2):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(classes).repeat_interleave(images)
    return [torch.randint(0, 256, (len(labels), 3, *SMALL), dtype=torch.uint8, generator=generator), labels]


def compared(model, data, **changes):
    """f_i and f_t as an evaluation compares them, n k each: to the last bit, if its batches are the same."""
    return reid._features(model, data, ReidEvaluation(**changes), False).unbind(1)


def at_once(model, data):
    """f_t of all images in one batch, n k: close to what an evaluation compares, but ranks may differ."""
    with torch.no_grad():
        return F.normalize(model.pool(torch.stack([data[index][0] for index in range(len(data))])))


# the network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("resnet50", (16, 8)),
        ("test_resnet", (16, 8)),
        ("tf_efficientnet_lite0", (16, 8)),
        ("test_efficientnet", (16, 8)),
    ],
)
def test_last_stride(name, grid):
    model, images = backbones.create(name, pretrained=False), torch.rand(1, 3, 256, 128)
    weights = list(model.state_dict())
    with torch.no_grad():
        assert model.features(images).shape[2:] == (8, 4)
        last_stride_one(model)
        assert model.features(images).shape[2:] == grid
    assert list(model.state_dict()) == weights


def test_last_stride_of_a_resnet_is_in_convolution_and_shortcut():
    model = backbones.create("resnet26", pretrained=False)
    last_stride_one(model)
    first = model.network.layer4[0]
    assert first.conv2.stride == first.downsample[0].stride == (1, 1)
    assert model.network.layer3[0].conv2.stride == model.network.layer3[0].downsample[0].stride == (2, 2)


def test_unknown_last_stride_is_explained():
    with pytest.raises(ValueError, match=r'neither\. Leave out the trick "stride"'):
        last_stride_one(backbones.create("densenet121", pretrained=False))


def test_bnneck_has_no_shift_whatever_happens(tree, tmp_path):
    model = build(small(tree), 4)
    spread = float(model.backbone.classifier.weight.detach().std())
    assert model.backbone.classifier.bias is None and spread == pytest.approx(0.001, rel=0.1)
    torch.testing.assert_close(model.neck.weight, torch.ones_like(model.neck.weight))
    train(small(tree, learning_rate=0.01), tmp_path, progress=False)
    model = load(tmp_path / "model.safetensors")
    assert not model.neck.bias.any() and not model.neck.bias.requires_grad
    assert (
        not torch.equal(model.neck.weight, torch.ones_like(model.neck.weight)) and model.neck.num_batches_tracked == 4
    )
    model.apply(lambda part: part.reset_parameters() if isinstance(part, nn.BatchNorm1d) else None)
    assert not model.neck.bias.any() and not model.neck.bias.requires_grad


def test_compared_is_the_neck_of_the_pooled_map_at_length_one(tree):
    model, data = build(small(tree), 4).eval(), Market1501(tree)
    model.neck.running_mean.fill_(0.1)
    model.neck.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        images = torch.stack([data[index][0] for index in range(len(data))])
        pooled = model.backbone.features(model.backbone.normalise(images)).mean((2, 3))
        expected = (pooled - model.neck.running_mean) / (model.neck.running_var + 1e-5).sqrt() * model.neck.weight
    behind, before = compared(model, data)
    torch.testing.assert_close(behind, expected / expected.norm(dim=1, keepdim=True))
    torch.testing.assert_close(before, pooled / pooled.norm(dim=1, keepdim=True))


def test_terms_are_those_of_the_paper(tree):
    """From the definitions: smoothed targets, normalised batch, hardest pairs before it, squares to centers."""
    model, (images, labels) = build(small(tree), 4), batch()
    model.backbone.eval()  # so that its statistics stay
    with torch.no_grad():
        model.backbone.classifier.weight.normal_()
        terms = model.step([images, labels])
        pooled = model.backbone.features(model.backbone.normalise(images)).mean((2, 3))
        neck = (pooled - pooled.mean(0)) / (pooled.var(0, unbiased=False) + 1e-5).sqrt()
        log = (neck @ model.backbone.classifier.weight.T).log_softmax(1)
        target = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    assert terms["id"] == pytest.approx(-float((target * log).sum(1).mean()), rel=1e-4)
    assert terms["triplet"] == pytest.approx(float(batch_hard_triplet(pooled, labels, 0.3)), rel=1e-5)
    centers = model.centers.detach()
    center = sum(float((row - centers[label]).square().sum()) for row, label in zip(pooled, labels)) / len(labels)
    assert terms["center"] == pytest.approx(5e-4 * center, rel=1e-5)


def test_without_tricks_nothing_is_there(tree):
    model, (images, labels) = build(small(tree, tricks=()), 4), batch()
    assert isinstance(model.neck, nn.Identity) and model.backbone.classifier.bias is not None
    assert list(model.step([images, labels])) == ["id", "triplet"] and model.centers is None
    assert model.feature_map(images).shape[2:] == (2, 1) != build(small(tree), 4).feature_map(images).shape[2:]


def test_prototypes_take_the_place_of_the_classifier(tree):
    config = small(tree, loss="prototype-cosine", tricks=("bnneck", "smoothing", "center"))
    model, (images, labels) = build(config, 4), batch()
    assert list(model.step([images, labels])) == ["prototype"] and not model.backbone.classifier.weight.requires_grad
    assert set(idle_tricks(config)) == {"smoothing", "center"} and "prototypes of" in idle_tricks(config)["smoothing"]
    model.eval()
    with torch.no_grad():
        expected = batch_prototype_softmax(model.neck(model.feature_map(images).mean((2, 3))), labels, "cosine", 16.0)
        torch.testing.assert_close(model.step([images, labels])["prototype"], expected)


def test_a_step_never_waits(tree):
    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
            return func(*args, **kwargs or {})

    model, (images, labels) = build(small(tree), 4), batch()
    rectangles = torch.tensor([[0, 0, 5, 5]] * len(images))
    with Waiting():
        sum(reid._photograph_step(model, [images, labels, rectangles]).values()).backward()
    with pytest.raises(AssertionError), Waiting():
        sum(reid._photograph_step(model, [images, labels, rectangles]).values()).item()


def test_autocast_keeps_islands_in_float32(tree):
    model, (images, labels) = build(small(tree), 4), batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert {term.dtype for term in model.step([images, labels]).values()} == {torch.float32}
        assert model.pool(images).dtype == torch.float32


# training -------------------------------------------------------------------------------------------------------------


def test_schedule_is_the_released_one(tree, monkeypatch):
    """Through optimiser and scheduler as the engine gets them: the rate is the same for all batches of an epoch."""
    rates = []

    def trainer(model, step, loader, optimizer, plan, *, scheduler, **more):
        for _ in range(plan.epochs):
            epoch = []
            for _ in range(len(loader)):
                epoch.append([group["lr"] for group in optimizer.param_groups])
                optimizer.step()
                scheduler.step()
            assert epoch == [epoch[0]] * len(loader) and len(loader) == 2
            rates.append(epoch[0])
        return []

    monkeypatch.setattr(engine, "train", trainer)
    config = small(tree, epochs=120, last_block=True)
    model, data = build(config, 4), Market1501(tree)
    fit_baseline(model, mirrored_features(model, data, progress=False), data.labels, config)
    found, centers = zip(*rates)
    expected = [3.815e-5, 7.28e-5, 1.074e-4, 1.421e-4, 1.767e-4, 2.114e-4, 2.460e-4, 2.807e-4, 3.153e-4]
    assert found[:9] == pytest.approx(expected, rel=1e-3)
    assert found[9:39] == pytest.approx([3.5e-4] * 30) and found[39:69] == pytest.approx([3.5e-5] * 30)
    assert found[69:] == pytest.approx([3.5e-6] * 51) and len(set(centers)) == 1


def test_schedule_without_warmup_and_stretched(tree):
    factor = partial(learning_rate_factor, small(tree, epochs=120, tricks=()))
    assert [factor(epoch - 1) for epoch in (1, 39, 40, 69, 70, 120)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    half, whole = (partial(learning_rate_factor, small(tree, epochs=epochs)) for epochs in (60, 120))
    assert [half(epoch) for epoch in range(60)] == [whole(2 * epoch + 1) for epoch in range(60)]


def test_centers_learn_as_by_the_released_second_optimiser(tree):
    """Twin: plain gradient descent of rate 0.5, gradients times 1 / 5e-4, beside Adam for all else; three steps."""
    config = small(tree, last_block=True, epochs=3, classes=4, images=4, learning_rate=0.01)
    ours, data = build(config, 4), Market1501(tree)
    dataset = mirrored_features(ours, data, progress=False)
    features = dataset.data.tensors[0]
    features[:, 1] = features[:, 0]  # no chance in it: a batch is all 16 images
    twin = build(config, 4).train()
    before, pooled = twin.centers.detach().clone(), twin.feature_map(features[:, 0]).mean((2, 3))
    fit_baseline(ours, dataset, data.labels, config, progress=False)
    adam = torch.optim.Adam(
        [weight for name, weight in twin.named_parameters() if weight.requires_grad and name != "centers"],
        0.01,
        weight_decay=5e-4,
    )
    descent = torch.optim.SGD([twin.centers], 0.5)
    for epoch in range(3):
        for group in adam.param_groups:
            group["lr"] = 0.01 * learning_rate_factor(config, epoch)
        adam.zero_grad(), descent.zero_grad()
        sum(twin.step([features[:, 0], data.labels]).values()).backward()
        twin.centers.grad *= 1 / 5e-4
        adam.step(), descent.step()
        if epoch == 0:
            means = torch.stack([pooled[data.labels == label].mean(0) for label in range(4)]).detach()
            torch.testing.assert_close(twin.centers.detach(), before + (means - before) * 4 / 16)
    for name, weight in twin.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("backbone", "last_block"), [("test_resnet", False), ("test_efficientnet", True)])
def test_training_goes_on_where_it_was_killed(tree, tmp_path, monkeypatch, backbone, last_block):
    config = small(tree, backbone=backbone, last_block=last_block)
    expected = train(config, tmp_path / "whole", progress=False)
    calls, terms = [], Baseline.terms

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return terms(*args)

    monkeypatch.setattr(Baseline, "terms", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    history = train(config, tmp_path / "killed", progress=False)
    assert [{**row, "seconds": 0} for row in history] == [{**row, "seconds": 0} for row in expected]
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    start = build(config, 4).state_dict()
    moved = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert (
        any(name.startswith(("backbone.network.conv_stem", "backbone.network.conv1")) for name in moved) != last_block
    )
    assert {"backbone.classifier.weight", "neck.weight", "centers"} <= moved and "neck.bias" not in moved


def test_whole_network_learns_the_persons(tree, tmp_path):
    config = small(tree, backbone="test_resnet", epochs=12, classes=4, images=4, learning_rate=0.005, tricks=TRICKS[:1])
    history = train(config, tmp_path, progress=False)
    assert history[-1]["id"] < 0.5 * history[0]["id"]


def test_collapse_is_said(tree, tmp_path, monkeypatch):
    def trainer(model, *args, **more):  # one in which every channel dies
        nn.init.zeros_(model.backbone.network.bn2.weight)
        nn.init.constant_(model.backbone.network.bn2.bias, -10.0)
        return []

    monkeypatch.setattr(engine, "train", trainer)
    with pytest.warns(
        UserWarning, match=r"were 0.\d+ apart before the training and are (0|\S+e-\d+) now, while .* a margin of 0.3"
    ):
        train(small(tree, last_block=True, tricks=()), tmp_path, progress=False)


def test_the_last_block_sees_the_image_or_its_mirror_image(tree):
    config, data = small(tree, last_block=True), Market1501(tree)
    model = build(config, 4).eval()
    dataset = mirrored_features(model, data, progress=False)
    features = dataset.data.tensors[0]
    images = torch.stack([image for image, _ in (data[index] for index in range(len(data)))])
    with torch.no_grad():
        torch.testing.assert_close(features[:, 1], trunk(model.backbone, images.flip(-1)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.pool(features[:, 0]), model.pool(images), rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    seen = [dataset[2][0] for _ in range(20)]
    assert {any(torch.equal(one, view) for one in seen) for view in features[2]} == {True}
    assert dataset[2][1] == data.labels[2] and len(dataset) == len(data)


def test_a_checkpoint_says_what_it_is_of(tree, tmp_path):
    config = small(tree, last_block=True, epochs=1, tricks=("stride", "bnneck"), loss="prototype-cosine")
    train(config, tmp_path, progress=False)
    model = load(tmp_path / "model.safetensors")
    assert model.config.size == SMALL and model.config.loss == "prototype-cosine" and not model.training
    assert model.feature_map(batch()[0]).shape[2:] == (4, 2) and isinstance(model.neck, nn.BatchNorm1d)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors, got nothing"):
        load(tmp_path / "nothing.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"Expected a model\.safetensors of `train reid`, got .*other"):
        load(tmp_path / "other.safetensors")


# photographs ---------------------------------------------------------------------------------------------------------


def released_rectangle(height, width, generator):
    """The loop of the released code, word by word: height and width of a rectangle, or None."""
    if generator.uniform(0, 1) >= 0.5:
        return None
    for _ in range(100):
        area, aspect = generator.uniform(0.02, 0.4) * height * width, generator.uniform(0.3, 1 / 0.3)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return h, w
    return None


def test_rectangles_are_drawn_as_in_the_released_code():
    torch.manual_seed(0)
    generator, count = random.Random(0), 4000
    ours = torch.stack([reid._rectangle(256, 128, 0.5) for _ in range(count)]).double()
    ours = ours[ours.any(1)]
    theirs = torch.tensor([found for found in (released_rectangle(256, 128, generator) for _ in range(count)) if found])
    h, w = ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]
    assert abs(len(ours) / count - 0.5) < 0.03
    assert (
        (ours >= 0).all()
        and (h < 256).all()
        and (w < 128).all()
        and (ours[:, 3] <= 256).all()
        and (ours[:, 2] <= 128).all()
    )
    share, aspect = h * w / (256 * 128), h / w
    assert 0.015 < share.min() < 0.03 and 0.38 < share.max() < 0.41 and 0.28 < aspect.min() and aspect.max() < 3.5
    levels = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for mine, other in ((h, theirs[:, 0]), (w, theirs[:, 1]), (aspect, theirs[:, 0] / theirs[:, 1])):
        torch.testing.assert_close(mine.quantile(levels), other.double().quantile(levels), rtol=0.12, atol=0)
    assert abs((ours[:, 1] / (256 - h)).mean() - 0.5) < 0.03 and abs((ours[:, 0] / (128 - w)).mean() - 0.5) < 0.03


def test_filling_comes_after_normalisation(tree):
    model = build(small(tree, weights="random", backbone="test_resnet", tricks=()), 4)
    images, labels = batch()
    rectangles = torch.tensor([[3, 5, 9, 20], [0, 0, 0, 0], [31, 63, 32, 64]] * 2)
    normalised = model.backbone.normalise(images)
    found = reid._erase(normalised, rectangles, model.backbone.mean)
    expected = normalised.clone()
    for image, (x0, y0, x1, y1) in zip(expected, rectangles.tolist()):
        image[:, y0:y1, x0:x1] = model.backbone.mean
    assert torch.equal(found, expected) and torch.equal(found[1], normalised[1])
    seen = []
    model.backbone.features = lambda images: seen.append(images) or images
    with torch.no_grad(), pytest.raises(RuntimeError):  # photographs are no features
        reid._photograph_step(model, [images, labels, rectangles])
    assert torch.equal(seen[0], expected)
    compiled = torch.compile(inspect.unwrap(reid._erase), fullgraph=True, backend="eager")
    assert torch.equal(compiled(normalised, rectangles, model.backbone.mean), expected)


def test_photographs_are_padded_cropped_and_flipped(tree):
    data = Market1501(tree)
    plain, erasing = (Changed(data, partial(reid._augmented, size=SMALL, erasing=share)) for share in (0.0, 0.5))
    torch.manual_seed(0)
    some = [plain[3][0] for _ in range(40)]
    torch.manual_seed(0)
    assert torch.equal(plain[3][0], some[0]) and some[0].shape == (3, *SMALL) and some[0].dtype == torch.uint8
    image, flips, black = data[3][0], 0, 0
    for view in some:
        matches = []
        for flip in (False, True):
            whole = F.pad(image.flip(-1) if flip else image, (10,) * 4)
            windows = whole.unfold(1, 64, 1).unfold(2, 32, 1)  # 3 21 21 64 32
            matches.append(bool((windows == view[:, None, None]).all((0, 3, 4)).any()))
        assert any(matches)
        flips, black = flips + (matches == [False, True]), black + bool((view == 0).all(0).all(1).any())
    assert 10 < flips < 30 and black > 20
    assert len(plain) == 16 and plain[3][1] == data.labels[3]
    assert not any(plain[3][2].any() for _ in range(20))
    assert any(erasing[3][2].any() for _ in range(20))


# protocol -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_protocol_image_by_image(tree):
    query, gallery = Market1501(tree, "query"), Market1501(tree, "gallery")
    assert (len(query), len(gallery), gallery.junk) == (6, 7, 1)
    distances = torch.rand(6, 7, generator=torch.Generator().manual_seed(0))
    first, precision = [], []
    for row in range(6):
        kept = [
            index
            for index in distances[row].argsort().tolist()
            if not (gallery.identities[index] == query.identities[row] and gallery.cameras[index] == query.cameras[row])
        ]
        ranks = [rank for rank, index in enumerate(kept, 1) if gallery.identities[index] == query.identities[row]]
        assert len(kept) == 6 and len(ranks) == 1
        first.append(ranks[0])
        precision.append(1 / ranks[0])
    found = market_scores(distances, query, gallery)
    assert list(found) == ["rank-1", "rank-5", "rank-10", "mAP"] and found["rank-10"] == 100
    assert found["rank-1"] == pytest.approx(100 * sum(rank == 1 for rank in first) / 6)
    assert found["rank-5"] == pytest.approx(100 * sum(rank <= 5 for rank in first) / 6)
    assert found["mAP"] == pytest.approx(100 * sum(precision) / 6)


def test_evaluation_of_a_trained_network(tree, tmp_path):
    config = small(tree, last_block=True, tricks=("stride",), loss="prototype-cosine")
    train(config, tmp_path, progress=False)
    checkpoint = str(tmp_path / "model.safetensors")
    evaluation = ReidEvaluation(data=str(tree), checkpoint=checkpoint, k1=3, k2=2, batch_size=4)
    result = evaluate(evaluation, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out/reid.json").read_text()) == json.loads(json.dumps(result))
    model, query, gallery = load(tmp_path / "model.safetensors"), Market1501(tree, "query"), Market1501(tree, "gallery")
    features = [compared(model, data, batch_size=4)[0] for data in (query, gallery)]
    for found, data in zip(features, (query, gallery)):
        torch.testing.assert_close(found, at_once(model, data), rtol=0, atol=1e-4)
    distances = cosine_distances(*features)
    torch.testing.assert_close(distances, torch.cdist(*features).square() / 2, rtol=0, atol=1e-5)
    assert result["rows"]["cosine"] == pytest.approx(market_scores(distances, query, gallery))
    assert result["rows"]["re-ranked"]["images of a person"] == 4 and result["rows"]["re-ranked"]["k1"] == 3
    assert result["settings"]["world"] == "seven persons" and str(tmp_path) not in json.dumps(result)
    text = (tmp_path / "out/reid.md").read_text()
    assert (
        "| cosine |" in text
        and "| 94.5 | 85.9 |" in text
        and "| 95.4 | 94.2 |" in text
        and "a person in 4.0 images" in text
    )


def test_flip_adds_the_mirror_image(tree):
    model, data = build(small(tree), 4).eval(), Market1501(tree, "query")
    plain, both = (compared(model, data, flip=flip)[0] for flip in (False, True))
    mirrored = [(image.flip(-1), label) for image, label in (data[index] for index in range(len(data)))]
    torch.testing.assert_close(both, F.normalize(plain + compared(model, mirrored)[0], dim=1))
    assert not torch.allclose(plain, both) and torch.allclose(both.norm(dim=1), torch.ones(6))


def test_ablation_has_one_trick_a_row(tree, tmp_path):
    config = small(tree, last_block=True, epochs=1, tricks=("erasing", "smoothing", "stride", "bnneck"))
    result = ablate_tricks(config, Comparison(k1=3, k2=1), tmp_path, progress=False)
    assert list(result["rows"]) == [
        "none",
        "+ smoothing",
        "+ stride",
        "+ bnneck",
        "+ bnneck, before the neck",
        "+ re-ranking",
    ]
    assert result["paper"]["none"] == (87.7, 74.0) and result["paper"]["+ re-ranking"] == (95.4, 94.2)
    text = (tmp_path / "ablation.md").read_text()
    assert (
        "\n| + bnneck |" in text and "| 94.1 | 85.7 |" in text and "Does not take part: erasing (the features" in text
    )
    assert "\n| + bnneck, before the neck |" in text and "+ bnneck, before the neck" not in result["paper"]
    model, query, gallery = (
        load(tmp_path / "bnneck/model.safetensors"),
        Market1501(tree, "query"),
        Market1501(tree, "gallery"),
    )
    pooled = [compared(model, data)[1] for data in (query, gallery)]
    for found, data in zip(pooled, (query, gallery)):
        torch.testing.assert_close(found, at_once(model, data), rtol=0, atol=1e-4)
    assert result["rows"]["+ bnneck, before the neck"] == pytest.approx(
        market_scores(cosine_distances(*pooled), query, gallery)
    )
    assert load(tmp_path / "stride/model.safetensors").config.tricks == ("smoothing", "stride")
    assert (tmp_path / "ablation.json").is_file()
    assert isinstance(load(tmp_path / "stride/model.safetensors").neck, nn.Identity)


# occlusion ------------------------------------------------------------------------------------------------------------


def test_occluded_parts_take_the_colour_of_what_stays_visible(tree):
    data = Market1501(tree, "query")
    image, parts = data[0][0], data.parts(0)
    found = Occluded(data, ("torso", "legs"))[0][0]
    hidden = (parts == 2) | (parts == 3)
    expected = torch.stack([channel[~hidden].float().mean().round() for channel in image]).to(torch.uint8)
    assert (found[:, hidden] == expected[:, None]).all() and torch.equal(found[:, ~hidden], image[:, ~hidden])
    for nothing in ((), ("bag",)):
        assert torch.equal(Occluded(data, nothing)[0][0], image)
    assert not Occluded(data, PARTS)[0][0].any()
    assert Occluded(data, ("head",))[0][1] == data[0][1]
    with pytest.raises(ValueError, match="no part 'leg'; there are: background, head, torso, legs, bag"):
        Occluded(data, ("leg",))


def test_what_a_network_goes_by_costs_it_ranks(tree):
    """A network that sees mean colours: the clothes are all that tells these persons apart."""

    class Colours(Baseline):
        def feature_map(self, inputs):
            images = inputs.float()
            return images - images.mean(1, keepdim=True) + 1

    model = Colours(backbones.create("test_resnet", False), 4, small(tree, tricks=()))
    query, gallery = Market1501(tree, "query"), Market1501(tree, "gallery")
    (_, references), found = compared(model, gallery), {}
    for parts in ((), ("torso", "legs"), ("head", "bag")):
        _, probes = compared(model, Occluded(query, parts))
        found[parts] = market_scores(cosine_distances(probes, references), query, gallery)["rank-1"]
    assert found["torso", "legs"] < found[()] == found["head", "bag"] == 100


# commands -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tricks"),
    [
        ("none", ()),
        ("all", TRICKS),
        ("center", TRICKS),
        ("warmup", TRICKS[:1]),
        ("stride", TRICKS[:4]),
        ("erasing center", ("erasing", "center")),
        ("strid", ("strid",)),
    ],
)
def test_tricks_by_name(words, tricks):
    assert named_tricks(tuple(words.split())) == tricks


def command(*words):
    return __main__.main([str(word) for word in words])


def test_commands_train_ablate_and_evaluate(tree, tmp_path, capsys):
    data = ["--data", tree, "--backbone", "test_efficientnet"]
    tiny = ["--weights", "random", "--last-block", "--epochs", 1, "--classes", 3, "--images", 2, "--device", "cpu"]
    assert command("train", "reid", *data, *tiny, "--tricks", "smoothing", "--folder", tmp_path) == 0
    assert "epoch   1  id" in (out := capsys.readouterr().out) and "Does not take part: erasing" in out
    model = load(tmp_path / "model.safetensors")
    assert model.config.tricks == TRICKS[:3] and model.config.size == (256, 128)
    results = ["--folder", tmp_path / "out", "--k1", 3, "--flip"]
    assert command("evaluate", "reid", *data, "--checkpoint", tmp_path / "model.safetensors", *results) == 0
    assert "| re-ranked |" in capsys.readouterr().out and (tmp_path / "out/reid.json").is_file()
    rows = ["--tricks", "warmup", "--ablation", "--k1", 3, "--folder", tmp_path / "rows"]
    assert command("train", "reid", *data, *tiny, *rows) == 0
    assert "| + warmup |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--tricks", "strid"], 2, "no trick 'strid'; there are: warmup, "),
        (["--loss", "triplet"], 2, "no loss 'triplet'; there are: id.triplet, prototype-cosine"),
        (["--epochs", "0"], 2, "epochs must be from 1 to 1e\\+09, got 0"),
        (["--k1", "3"], 1, "--k1, --k2, --lam and --batch-size are of an evaluation"),
        (["--backbone", "test_resnet", "--last-block"], 1, "The last block alone can be trained in EfficientNets"),
        (["--classes", "9"], 1, "Batches of 9 classes were asked for, but the data has 4"),
        (["--data", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_what_cannot_be_trained_is_explained(tree, tmp_path, capsys, options, code, sentence):
    common = ["--data", tree, "--weights", "random", "--backbone", "test_efficientnet", "--folder", tmp_path]
    try:
        found = command("train", "reid", *common, *options)
    except SystemExit as stop:  # of an option that is wrong
        found = stop.code
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert found == code and re.search(sentence, said)


def test_missing_checkpoint_is_explained(tree, tmp_path, capsys):
    missing = ["--checkpoint", tmp_path / "x", "--folder", tmp_path / "out"]
    assert command("evaluate", "reid", "--data", tree, *missing) == 1
    assert "x, got nothing" in capsys.readouterr().err


def test_one_camera_only_is_explained(tree, tmp_path):
    alone = shutil.copytree(tree, tmp_path / "alone")
    for file in list(alone.glob("*/*_c2s*.jpg")):
        file.unlink()
    train(small(tree, last_block=True, epochs=1, tricks=(), loss="prototype-cosine"), tmp_path, progress=False)
    evaluation = ReidEvaluation(data=str(alone), checkpoint=str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="None of 3 queries has a match"):
        evaluate(evaluation, tmp_path / "out", progress=False)
