"""ResNet-12: its size and shape, its twin, and what DropBlock takes away."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from course_lib import maps
from course_lib.backbones import resnet12
from course_lib.backbones.resnet12 import ANNEALED, DropBlock
from course_lib.metric_learning.features import extract


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = resnet12.create(64)
    with torch.no_grad():  # statistics and shifts of their own, not 0 and 1
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(0.5 + torch.rand_like(tensor))
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1)
    return model


def photographs(count=2, side=84):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_it_has_the_published_size(model):
    assert sum(weight.numel() for weight in model.network.parameters()) == 12_424_320
    assert model.classifier.weight.shape == (64, 640)


@torch.no_grad()
def test_the_last_map_is_640_x_5_x_5_and_goes_below_zero(model):
    features = model.features(model.normalise(photographs()))
    assert features.shape == (2, 640, 5, 5)
    assert features.min() < 0


@torch.no_grad()
def test_maps_and_embeddings_work_on_it(model):
    images = photographs()
    features = model.features(model.normalise(images))
    mean = maps.cam(features, model.classifier.weight).mean((-2, -1)) + model.classifier.bias
    torch.testing.assert_close(mean, model(model.normalise(images)), rtol=1e-4, atol=1e-4)
    pooled = extract(
        lambda batch: model.features(model.normalise(batch)).mean((-2, -1)),
        [(image, 0) for image in images],
        (84, 84),
        progress=False,
    )
    torch.testing.assert_close(pooled, features.mean((-2, -1)), rtol=1e-4, atol=1e-5)


def test_colours_are_those_of_the_base_classes(model):
    grey = torch.full((1, 3, 1, 1), 120, dtype=torch.uint8)
    expected = [(120 - mean) / std for mean, std in ((120.396, 70.682), (115.594, 68.276), (104.540, 72.545))]
    torch.testing.assert_close(model.normalise(grey).flatten(), torch.tensor(expected), rtol=0, atol=1e-4)


def plain_twin(state, images):
    """The network line by line, from its tensors in their order."""
    tensors = iter(
        [tensor for name, tensor in state.items() if name.startswith("network.blocks") and "drop" not in name]
    )

    def convolve(x, padding):
        weight = next(tensors)
        scale, offset, mean, variance, _ = (next(tensors) for _ in range(5))
        x = F.conv2d(x, weight, padding=padding)
        return (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt() * scale[:, None, None] + offset[
            :, None, None
        ]

    def leaky(x):
        return torch.where(x > 0, x, 0.1 * x)

    x = images
    for _ in range(4):
        inner = leaky(convolve(leaky(convolve(x, 1)), 1))
        x = F.max_pool2d(leaky(convolve(inner, 1) + convolve(x, 0)), 2)
    return x


@torch.no_grad()
def test_it_is_its_plain_twin(model):
    images = model.normalise(photographs())
    torch.testing.assert_close(model.features(images), plain_twin(model.state_dict(), images), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_it_is_the_network_of_feat(model):
    twin = pytest.importorskip("easyfsl.modules.feat_resnet12").feat_resnet12().eval()
    ours = [
        tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("network.blocks") and "drop" not in name
    ]
    twin.load_state_dict(dict(zip(twin.state_dict(), ours, strict=True)))
    images = model.normalise(photographs())
    torch.testing.assert_close(model.features(images).mean((-2, -1)), twin(images), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_brings_it_back(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = resnet12.create(64, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(
        RuntimeError,
        match=r"does not fit Backbone: .* classifier.weight \(64, 640\) instead of \(5, 640\)",
    ):
        resnet12.create(5, tmp_path / "model.safetensors")


def test_there_are_no_imagenet_weights():
    with pytest.raises(ValueError, match="There is no ResNet-12 with ImageNet weights"):
        resnet12.create(5, "pretrained")


# DropBlock -----------------------------------------------------------------------------------------------------------


def annealed(drop, block=5):
    layer = DropBlock(drop, block)
    layer.passes.fill_(ANNEALED)
    return layer.train()


def block_by_block(x, drop, block):
    """Ghiasi et al., one block after another, with the same random numbers."""
    b, k, h, w = x.shape
    gamma = drop / block**2 * h * w / ((h - block + 1) * (w - block + 1))
    corners = torch.rand(b, k, h - block + 1, w - block + 1) < gamma
    kept = torch.ones_like(x)
    for image, channel, top, left in corners.nonzero().tolist():
        kept[image, channel, top : top + block, left : left + block] = 0
    return x * kept * kept.numel() / kept.sum()


@pytest.mark.parametrize("shape", [(2, 7, 10, 10), (3, 40, 5, 5), (2, 3, 9, 6)])
def test_blocks_are_dropped_as_one_by_one(shape):
    x = torch.randn(shape)
    torch.manual_seed(3)
    found = annealed(0.3)(x)
    torch.manual_seed(3)
    expected = block_by_block(x, 0.3, 5)
    assert (expected == 0).any()
    torch.testing.assert_close(found, expected)


def test_the_share_that_is_kept_is_what_overlapping_blocks_leave():
    torch.manual_seed(0)
    found = annealed(0.1)(torch.ones(64, 640, 10, 10))
    gamma = 0.1 / 25 * 100 / 36
    assert abs(gamma - 0.0111) < 1e-4
    covering = torch.tensor([min(i, 5, 9 - i, 4) + 1 for i in range(10)])  # blocks of a row that cover place i
    expected = (1 - gamma) ** (covering[:, None] * covering)
    torch.testing.assert_close((found > 0).float().mean((0, 1)), expected, rtol=0, atol=0.01)
    assert abs(expected.mean() - 0.9) < 0.01
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))  # what is left is scaled up


def test_on_the_last_map_whole_channels_go():
    torch.manual_seed(0)
    found = annealed(0.1)(torch.ones(32, 640, 5, 5))
    gone = (found == 0).flatten(2)
    assert torch.equal(gone.any(2), gone.all(2))
    assert abs(gone.float().mean() - 0.1) < 0.01


def test_a_map_smaller_than_the_block_loses_whole_channels_too():
    torch.manual_seed(0)
    gone = (annealed(0.5)(torch.ones(8, 200, 2, 2)) == 0).flatten(2)
    assert torch.equal(gone.any(2), gone.all(2)) and 0.4 < gone.float().mean() < 0.6


def test_the_share_grows_with_the_passes_and_evaluation_keeps_all():
    layer, x = DropBlock(0.4).train(), torch.ones(16, 640, 5, 5)
    torch.manual_seed(0)
    shares = []
    for passes in (0, ANNEALED // 2, ANNEALED, 5 * ANNEALED):
        layer.passes.fill_(passes)
        shares.append(float((layer(x) == 0).float().mean()))
    assert shares == pytest.approx([0, 0.2, 0.4, 0.4], abs=0.02)
    assert int(layer.passes) == 5 * ANNEALED + 1 and "passes" in layer.state_dict()
    assert layer.eval()(x) is x


def test_all_dropped_is_zero_and_not_nan():
    assert torch.equal(annealed(1.0)(torch.ones(1, 2, 5, 5)), torch.zeros(1, 2, 5, 5))


def test_half_precision_counts_right():
    torch.manual_seed(0)
    found = annealed(0.1)(torch.ones(64, 640, 5, 5, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16 and abs(found.float().mean() - 1) < 0.01


def test_training_compiles_into_one_graph():
    layer, x = annealed(0.3), torch.randn(2, 8, 10, 10)
    compiled = torch.compile(inspect.unwrap(DropBlock.forward), fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = layer(x)
    layer.passes.fill_(ANNEALED)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(layer, x), expected)
