"""What the networks of weakly supervised segmentation stand on: a trunk with feature maps of three depths on one grid.

    trunk = resnet38.create("ilsvrc-cls_rna-a1_cls1000_ep-0001.params")   # as published: stride 8, 4096 channels
    trunk = Timm("tf_efficientnet_lite0")                                 # or one of timm that is a chain of parts
    taps = trunk.taps(trunk.normalise(photographs))                       # {"conv4": b 512 h w, "conv5", "conv6"}
    head = nn.Conv2d(trunk.channels["conv6"], 21, 1, bias=False)
    optimiser = torch.optim.SGD(parameter_groups(trunk, [head], lr=0.01, weight_decay=5e-4), lr=0.01, momentum=5e-4)

Batch normalisation is frozen everywhere (batches are small, and the weights are used to their statistics), and so are
the first parts of a trunk: `taps(x)` is `trained(frozen(x))`. What `frozen` returns depends on the image alone, not on
what was learned, so it may be computed once for a whole data set and kept.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from course_lib.backbones import Colours, load_network

TAPS = ("conv4", "conv5", "conv6")  # the published names of the three depths
Maps = dict[str, Float[Tensor, "b _ _ _"]]


class Dense(Colours):
    """A trunk with frozen batch normalisation and frozen first parts. ResNet38 and Timm are such. They add two methods:

    frozen(images)       what the frozen parts make of normalised images, without gradient: "trunk", where `trained`
                         goes on, and the taps among them
    trained(features)    the taps, from what `frozen` returned

    Attributes:
        channels: of each tap.
        stride: how many pixels of the image lie on one pixel of the taps' grid, which is rounded up: 448 -> 56 at
            stride 8.
        still: modules that neither learn nor leave evaluation mode.
    """

    channels: dict[str, int]
    stride: int

    def taps(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """Feature maps conv4, conv5 and conv6 of normalised images, from shallow to deep, all on the grid of conv6."""
        return self.trained(self.frozen(images))

    def freeze(self, parts: Iterable[nn.Module]) -> None:
        """From now on these parts and all batch normalisation are still."""
        self.still = [
            *parts,
            *(layer for layer in self.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)),
        ]
        for part in self.still:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Dense":
        """Training or evaluation mode for all that is not frozen; returns the trunk."""
        super().train(mode)
        for part in self.still:
            part.eval()
        return self


class Timm(Dense):
    """A trunk of timm: any convolutional network that is one part after another (EfficientNet, ResNet, DenseNet, ...).

    The parts are called in their order, up to the deepest tap; what comes after it is left out. One batch proves that
    the parts are the network. Taps of a finer grid than the last are averaged down to it.

    Args:
        name: as in `timm.list_models()`.
        pretrained: ImageNet weights, as in `backbones.create`, or random ones.
        taps: names of the parts whose outputs are conv4, conv5 and conv6, such as ("blocks.2", "blocks.4",
            "blocks.5.0"); None for the last map that timm's `forward_features` gives, and two of its levels before it.
        frozen: the last frozen part, such as "blocks.4"; "" for none.
        output_stride: 32, or 16 or 8 for networks that timm can dilate.
    Raises:
        ValueError: a network that is not a chain of parts; a part that is not there.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        taps: tuple[str, str, str] | None = None,
        frozen: str = "",
        output_stride: int = 16,
    ) -> None:
        try:
            # Networks that timm cannot dilate do not know the option; None is not passed on.
            network = load_network(name, pretrained, output_stride=output_stride if output_stride != 32 else None)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                f"timm cannot dilate {name} to an output stride of {output_stride}: {error}. Take 32, or another "
                "network."
            ) from error
        super().__init__(network.pretrained_cfg)
        parts = _chain(name, network.eval())
        taps = taps or (*(level["module"] for level in network.feature_info[-3:-1]), [*parts][-1])
        ends = [_last(parts, tap) for tap in taps]
        if ends != sorted(set(ends)):
            raise ValueError(f"Taps are named from shallow to deep, but {', '.join(taps)} came.")
        self.tapped = dict(zip(ends, TAPS))
        self.first = _last(parts, frozen) + 1 if frozen else 0  # the first part that is trained
        self.parts = nn.ModuleList([*parts.values()][: ends[-1] + 1])
        self.freeze(self.parts[: self.first])
        with torch.no_grad():
            maps = self.taps(torch.zeros(1, 3, 256, 256))
        self.channels = {tap: features.shape[1] for tap, features in maps.items()}
        self.stride = 256 // maps["conv6"].shape[-1]

    def frozen(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """See Dense."""
        with torch.no_grad():
            return self._run({"trunk": images}, 0, self.first)

    def trained(self, features: Maps) -> Maps:
        """See Dense."""
        maps = self._run(features, self.first, len(self.parts))
        return {tap: maps[tap] for tap in TAPS}

    def _run(self, maps, start, stop):
        """The maps after the parts start to stop, with every tap on the grid of the deepest map so far."""
        maps = dict(maps)
        for number in range(start, stop):
            maps["trunk"] = self.parts[number](maps["trunk"])
            if number in self.tapped:
                maps[self.tapped[number]] = maps["trunk"]
        grid = maps["trunk"].shape[2:]
        return {
            name: features if features.shape[2:] == grid else nn.functional.adaptive_avg_pool2d(features, grid)
            for name, features in maps.items()
        }


def parameter_groups(
    trunk: nn.Module, new: Iterable[nn.Module], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The four groups of published training: weights of the trunk, its biases, new weights, new biases.

    Their learning rates are 1, 2, 10 and 20 times `lr`; biases do not decay. The groups hold convolutions, linear
    layers and group normalisation only: scales of batch normalisation are in none. Frozen parameters are in theirs,
    without consequence: they have no gradient.

    Args:
        new: layers that start from random weights.
    """
    groups = []
    for modules, rate in (([trunk], lr), (new, 10 * lr)):
        layers = nn.ModuleList(modules).modules()
        layers = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear, nn.GroupNorm))]
        groups += [
            {"params": [layer.weight for layer in layers], "lr": rate, "weight_decay": weight_decay},
            {"params": [layer.bias for layer in layers if layer.bias is not None], "lr": 2 * rate, "weight_decay": 0.0},
        ]
    return groups


def _chain(name, network):
    """The parts of a network of timm in their order, Sequentials taken apart, up to its `forward_features`."""
    if network.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(
            f"{name} takes images of one size only, while the views of an image have several. Take a network of "
            "convolutions, such as tf_efficientnet_lite0 or resnet50."
        )
    features = images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    parts, reason = {}, "what comes out is not what its forward_features returns"
    with torch.no_grad():
        expected = network.forward_features(images)
        for part, module in _leaves("", network):
            try:
                features = module(features)
            except (RuntimeError, TypeError) as error:
                reason = error
                break
            parts[part] = module
            if features.shape == expected.shape and torch.allclose(features, expected, rtol=1e-4, atol=1e-4):
                return parts
    raise ValueError(
        f"The parts of {name} cannot be called one after another ({part}: {reason}). Take a network that is a chain of "
        "parts, such as tf_efficientnet_lite0, resnet50 or densenet121."
    )


def _leaves(prefix, module):
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential):
            yield from _leaves(f"{prefix}{name}.", child)
        else:
            yield f"{prefix}{name}", child


def _last(parts, wanted):
    """Position of the last part that is `wanted` or lies in it."""
    found = [number for number, name in enumerate(parts) if f"{name}.".startswith(f"{wanted}.")]
    if not found:
        raise ValueError(f"The network has no part {wanted!r}; its parts are: {', '.join(parts)}.")
    return found[-1]
