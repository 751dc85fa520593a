"""Features of whole data sets."""

import pytest
import torch
from torchvision.transforms.v2.functional import resize

from course_lib import backbones
from course_lib.metric_learning.features import extract, freeze_trunk, tail, trunk, trunk_features


def items(count: int = 5) -> list:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 256, (3, 8 + i, 6), dtype=torch.uint8, generator=generator), i % 2) for i in range(count)]


def mean_colour(batch: torch.Tensor) -> torch.Tensor:
    return batch.float().mean((-2, -1))


def test_order_and_values_do_not_depend_on_the_batch():
    one, three = (extract(mean_colour, items(), (4, 5), batch_size=size, progress=False) for size in (1, 3))
    assert one.shape == (5, 3)
    torch.testing.assert_close(one, three)


def test_images_come_in_the_size_asked_for():
    sizes = []
    extract(
        lambda batch: (sizes.append(tuple(batch.shape)), mean_colour(batch))[1],
        items(),
        (4, 5),
        batch_size=2,
        progress=False,
    )
    assert sizes == [(2, 3, 4, 5), (2, 3, 4, 5), (1, 3, 4, 5)]


def test_features_can_be_trained_on():
    features = extract(mean_colour, items(), (4, 4), progress=False)
    weight = torch.ones(3, requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None


def test_features_are_kept_for_the_same_data_network_and_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    net = backbones.create("test_efficientnet", False).network.conv_stem

    def function(batch):
        return net(batch.float())

    data = items()
    known = extract(function, data, (8, 8), progress=False)
    options = {"progress": False, "keep": "abc", "name": "stem of five"}
    for _ in range(2):
        torch.testing.assert_close(extract(function, data, (8, 8), **options), known)
    assert capsys.readouterr().err.count("read from") == 1
    assert extract(function, data, (8, 10), **options).shape[-1] == 5
    extract(function, data[:3], (8, 8), **options)
    extract(function, data, (8, 8), **options | {"keep": "abd"})
    with torch.no_grad():
        net.weight += 1
    changed = extract(function, data, (8, 8), **options)
    assert not torch.allclose(changed, known) and "read from" not in capsys.readouterr().err
    (changed * torch.ones(1, requires_grad=True)).sum().backward()


def test_empty_data_are_named():
    with pytest.raises(ValueError, match="is empty"):
        extract(mean_colour, [], (4, 4), progress=False)


def test_trunk_and_tail_are_the_network():
    model = backbones.create("test_efficientnet", False)
    with torch.no_grad():
        images = torch.stack([resize(image, [64, 64]) for image, _ in items()])
        whole = model.features(model.normalise(images))
        torch.testing.assert_close(tail(model, trunk(model, images)), whole)
        found = tail(model, trunk_features(model, items(), 64, progress=False))
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)


def test_behind_a_frozen_trunk_the_tail_still_learns():
    model = backbones.create("test_efficientnet", False)
    freeze_trunk(model)
    images = torch.stack([resize(image, [64, 64]) for image, _ in items()])
    before = trunk(model, images)
    assert not before.requires_grad and tail(model, before).requires_grad and model.classifier.weight.requires_grad
    with pytest.raises(ValueError, match=r"EfficientNets of timm; expected one of them, got a ResNet\."):
        freeze_trunk(backbones.create("test_resnet", False))
