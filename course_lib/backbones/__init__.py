"""Backbones: any network that ends in global average pooling and one linear layer, in the two parts that maps need.

A 1 x 1 convolution behind (or in front of) the pooling is a linear layer as well, and becomes one here.

    model = backbones.create("tf_efficientnet_lite0")              # real ImageNet weights, no download
    features = model.features(model.normalise(photographs))        # b 1280 h w
    heat = maps.cam(features, model.classifier.weight)             # b 1000 h w

Networks come from timm; `split_classifier` also takes apart networks of torchvision. Nothing is hooked: the parts are
called one after another, and one batch proves that they are the network:  linear(GAP(features(x))) == model(x).
"""

import copy
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import timm
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models import DenseNet

from course_lib.backbones.weights import LITE0, fetch, fill_from_file, fill_lite0
from course_lib.backbones.weights import imagenet_classes as imagenet_classes


class Colours(nn.Module):
    """A network that knows the colours it was trained on.

    Args:
        colours: "mean" and "std" of red, green and blue in 0..1.
    """

    def __init__(self, colours: dict) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(colours[name]).view(3, 1, 1), persistent=False)

    def normalise(
        self, images: UInt8[Tensor, "*batch 3 h w"] | Float[Tensor, "*batch 3 h w"]
    ) -> Float[Tensor, "*batch 3 h w"]:
        """Images as this network wants them: (image - mean) / std for each colour.

        Args:
            images: RGB, of any size; uint8 in 0..255 or float in 0..1.
        Raises:
            ValueError: floats outside 0..1 (looked at on the CPU only: on a GPU the look would stall a training step).
        """
        if images.dtype == torch.uint8:
            images = images / 255
        elif images.device.type == "cpu" and not torch.compiler.is_compiling() and images.numel():
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"Float images are expected in 0..1, but values from {low:.3g} to {high:.3g} came. Pass "
                    "uint8 or divide by 255; images that are normalised already go straight into the model."
                )
        return (images - self.mean) / self.std


class Backbone(Colours):
    """A network as class activation maps see it: a feature map, global average pooling, one linear layer.

    Args:
        network: of timm, or one with the same methods; its classifier is moved out of it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network.pretrained_cfg)
        _, self.classifier = split_classifier(network)
        network.reset_classifier(0)
        self.network = network

    def features(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The last feature map, the one that global average pooling sees."""
        return feature_map(self.network, images)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c"]:
        """Logits: the linear layer on the mean of the feature map."""
        return self.classifier(self.features(images).mean((-2, -1)))


def create(name: str, pretrained: bool | str | Path = True, num_classes: int | None = None) -> Backbone:
    """A network of timm in evaluation mode, with `.features(x)`, `.classifier` and `.normalise(images)`.

    Args:
        name: as in `timm.list_models()`. `tf_efficientnet_lite0` has its ImageNet weights in a Python package and needs
            no network; other weights are downloaded once. torchvision's weights carry a tag, as in "resnet50.tv_in1k".
        pretrained: True for ImageNet weights, False for random ones, or the path of a .safetensors or .pth checkpoint
            that fits `num_classes`: timm's names, or the state_dict of a module that `create` returned.
        num_classes: rows of a new, random classifier; None keeps the 1000 classes of ImageNet.
    Raises:
        ValueError: an unknown name, or a network without GAP and one linear layer at its end.
        RuntimeError: weights that could not be downloaded or do not fit.
    """
    network = load_network(name, pretrained is True)
    if num_classes is not None:
        network.reset_classifier(num_classes)
    model = Backbone(network).eval()
    if not isinstance(pretrained, bool):
        fill_from_file(model, pretrained)
    return model


def load_network(name: str, pretrained: bool, **options: int | None) -> nn.Module:
    """timm's own network; `pretrained_cfg` names the mean and std of the colours that it wants. Errors as in `create`.

    Args:
        options: of `timm.create_model`, such as output_stride.
    """
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
        raise ValueError(
            f"timm knows no network called {name!r}. Did you mean {' or '.join(near) or 'one of timm.list_models()'}?"
        )
    if not pretrained or name == LITE0:
        network = timm.create_model(name, pretrained=False, **options)
    else:
        network = fetch(partial(timm.create_model, name, pretrained=True, **options), name)
    if name == LITE0:
        # Its authors trained on (image - 127) / 128; timm says otherwise.
        network.pretrained_cfg.update(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        if pretrained:
            fill_lite0(network)
    return network


def feature_map(model: nn.Module, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
    """What global average pooling sees in a network of timm or torchvision.

    timm says where that is. In torchvision it is what the parts in front of the pooling make, called in their order.
    """
    if hasattr(model, "forward_features"):
        features = model.forward_features(images)
        if features.ndim == 4 and getattr(model, "output_fmt", None) == "NHWC":  # Swin
            features = features.movedim(-1, 1)
    else:
        features = images
        for part in _parts(model)[0]:
            features = part(features)
        if isinstance(model, DenseNet):
            features = features.relu()  # hidden in its forward: no module of its own
    if features.ndim != 4:
        raise ValueError(
            f"{_name(model)} has no feature map: its features are tokens of shape {tuple(features.shape)}, while "
            f"(b, k, h, w) was expected. {_ADVICE}"
        )
    return features


def split_classifier(
    model: nn.Module, images: Float[Tensor, "b 3 H W"] | None = None
) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    """The two parts of a network, (features, linear), proved equal to it:  linear(GAP(features(x))) == model(x).

    The proof runs without gradients and leaves parameters, training flags and random numbers as they were.

    Args:
        model: a network of timm or torchvision that ends in global average pooling and one linear layer, which may be
            a 1 x 1 convolution. The linear layer that comes back shares the convolution's weights.
        images: a batch to prove it on; by default two images of noise.
    Raises:
        ValueError: for networks that end otherwise (VGG, MobileNetV3, ConvNeXt, ViT, ...), naming the reason.
    """
    linear, network = _linear(model), copy.deepcopy(model).eval()  # flags and statistics of the model stay
    if images is None:
        config = getattr(model, "pretrained_cfg", {})
        # 96 pixels are enough for every stride, and quick.
        side = config["input_size"][-1] if config.get("fixed_input_size") else 96
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)).to(linear.weight)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        try:
            features = feature_map(network, images)
        except RuntimeError as error:  # as with the side heads of GoogLeNet
            raise ValueError(
                f"The parts of {_name(model)} cannot be called one after another up to the pooling: {error}. {_ADVICE}"
            ) from error
        if features.shape[1] != linear.in_features:
            raise ValueError(
                f"{_name(model)} has a hidden layer between pooling and classifier: the feature map has "
                f"{features.shape[1]} channels, the linear layer takes {linear.in_features}. {_ADVICE}"
            )
        expected, logits = network(images), linear(features.mean((-2, -1))).float()
    if not isinstance(expected, Tensor) or expected.flatten(1).shape != logits.shape:
        came = getattr(expected, "shape", type(expected).__name__)
        raise ValueError(f"{_name(model)}: expected logits of shape {tuple(logits.shape)}, got {came}. {_ADVICE}")
    expected = expected.flatten(1).float()
    tolerance = 1e-4 if linear.weight.dtype in (torch.float32, torch.float64) else 3e-2
    error, scale = (logits - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * scale:
        raise ValueError(
            f"{_name(model)} is not GAP and one linear layer on its feature map: the logits differ by "
            f"{error:.2g}, where they reach {scale:.2g}. {_between(model, linear)} {_ADVICE}"
        )
    return partial(feature_map, model), linear


_ADVICE = (
    "Class activation maps are exact only for global average pooling and one linear layer: take such a network "
    "(tf_efficientnet_lite0, resnet50, densenet161, ...), or put a new head on the feature map."
)


def _name(model):
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def _linear(model):
    """The one linear layer at the end of the network, or its one convolution as such a layer."""
    if hasattr(model, "class_token"):  # torchvision's ViT
        raise ValueError(f"{_name(model)} has no feature map: its features are tokens. {_ADVICE}")
    head = [model.get_classifier()] if hasattr(model, "get_classifier") else _parts(model)[1]
    layers = [layer for layer in nn.ModuleList(head).modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if len(layers) != 1:
        raise ValueError(
            f"One linear layer was expected at the end of {_name(model)}, but its head holds {len(layers)}: "
            f"{'hidden layers come before the logits' if layers else 'nothing there classifies'}. {_ADVICE}"
        )
    (layer,) = layers
    if isinstance(layer, nn.Linear):
        return layer
    if layer.kernel_size != (1, 1) or layer.groups > 1:
        raise ValueError(
            f"{_name(model)} ends in a convolution of {layer.kernel_size[0]} x {layer.kernel_size[1]} pixels in "
            f"{layer.groups} group(s); expected 1 x 1 in one group, which is a linear layer. {_ADVICE}"
        )
    linear = nn.utils.skip_init(nn.Linear, layer.in_channels, layer.out_channels, layer.bias is not None)
    linear.weight, linear.bias = nn.Parameter(layer.weight.detach().flatten(1)), layer.bias  # the same memory
    return linear


def _parts(model):
    """The parts of a network in front of the pooling, and those from there on; the last one classifies at any rate."""
    parts = [*model.children()]
    ends = [number for number, part in enumerate(parts) if isinstance(part, (nn.AdaptiveAvgPool2d, nn.Dropout))]
    end = min([*ends, len(parts) - 1])
    return parts[:end], parts[end:]


def _between(model, linear):
    """The likely reason why the parts are not the network."""
    head = next((part for part in model.modules() if linear in part.children()), model)
    norms = [type(part).__name__ for part in head.children() if "Norm" in type(part).__name__]
    if norms and head is not model:
        return f"Its head has a normalisation ({norms[0]}) after the pooling."
    return "Something lies between: an activation, a normalisation, or a pooling that is not the mean."
