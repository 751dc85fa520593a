"""ResNet38, the trunk on which CAM, SEAM, EPS and pixel-to-prototype contrast were published.

    Model A1 of Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", Pattern
    Recognition 2019; levels 5 and 6 dilated instead of strided, as in Ahn and Kwak, CVPR 2018 (PSA): output stride 8.

    unit         x + conv(relu(bn(conv(relu(bn(x))))))        normalisation and ReLU come before a convolution; where
                                                              the shape changes, the shortcut is a 1 x 1 convolution of
                                                              relu(bn(x))
    bottleneck   three convolutions 1 x 1, 3 x 3, 1 x 1 and channel dropout in front of the last two (levels 6 and 7)

    tap      what                                       channels   side of a 448 px image
    conv4    relu(bn(x)) at the entrance of level 5       512      56
    conv5    relu(bn(x)) at the entrance of level 6      1024      56
    conv6    relu(bn7(x)) at the end                     4096      56

Names of modules and tensors are those of the released checkpoints (`released`), 228 tensors, 105,070,912 parameters.
The first convolution and level 2 are frozen, and all batch normalisation. No convolution has a bias, nothing is pooled.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from course_lib import checkpoints
from course_lib.backbones import mxnet, released
from course_lib.backbones.dense import Dense, Maps

_COLOURS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # 0..1
# Units of a level, and channels inside and at the end of a unit, in multiples of the first convolution's.
LEVELS = {2: (3, 2, 2), 3: (3, 4, 4), 4: (6, 8, 8), 5: (3, 8, 16)}
BOTTLENECKS = {6: (32, 0.3), 7: (64, 0.5)}  # channels at the end, likewise, and dropout
ENTRANCES = {"b5": "conv4", "b6": "conv5"}  # first units of levels, and the taps there
BRANCHES = ("branch2a", "branch2b1", "branch2b2")  # published names of the convolutions of a unit


def create(weights: str | Path = "random", width: int = 64) -> "ResNet38":
    """ResNet38 in evaluation mode; see `Dense` for what it offers.

    Args:
        weights: "random" (of torch's generator), or a path: the ImageNet weights of MXNet (.params), the state_dict of
            a ResNet38, or a released checkpoint, of which the trunk is taken.
        width: channels of the first convolution: 64 as published. Less makes a network for trials.
    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it does not fit.
    """
    trunk = ResNet38(width)
    if weights != "random":
        path = Path(weights)
        state = mxnet.resnet38_state(path) if path.suffix == ".params" else released.read(path)[1]
        checkpoints.fill(trunk, state, path.name)
    return trunk.eval()


class ResNet38(Dense):
    """The trunk; `frozen` is the first convolution and level 2."""

    stride = 8

    def __init__(self, width: int = 64) -> None:
        super().__init__(_COLOURS)
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels = width
        for level, (units, inner, outer) in LEVELS.items():
            for number in range(units):
                stride = 2 if level < 5 and not number else 1
                # Level 5 lost its stride of 2: all convolutions that came after it see every second pixel instead.
                first, second = (1, 1) if level < 5 else (2, 2) if number else (1, 2)
                unit = Unit(channels, [(inner * width, 3, stride, first), (outer * width, 3, 1, second)])
                self.add_module(f"b{level}_{number}" if number else f"b{level}", unit)
                channels = outer * width
        for level, (outer, dropout) in BOTTLENECKS.items():
            layers = [(outer * width // 4, 1, 1, 1), (outer * width // 2, 3, 1, 4), (outer * width, 1, 1, 1)]
            self.add_module(f"b{level}", Unit(channels, layers, dropout))
            channels = outer * width
        self.bn7 = nn.BatchNorm2d(channels)
        self.channels = {"conv4": 8 * width, "conv5": 16 * width, "conv6": 64 * width}
        self.freeze([*self.children()][:4])  # conv1a and level 2

    def frozen(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """See Dense."""
        with torch.no_grad():
            x = self.conv1a(images)
            for unit in [*self.children()][1:4]:
                x = unit(x, activate(unit.bn_branch2a, x))
        return {"trunk": x}

    def trained(self, features: Maps) -> Maps:
        """See Dense."""
        x, taps = features["trunk"], {}
        for name, unit in [*self.named_children()][4:-1]:  # between level 2 and bn7
            ready = activate(unit.bn_branch2a, x)
            if name in ENTRANCES:
                taps[ENTRANCES[name]] = ready
            x = unit(x, ready)
        return taps | {"conv6": activate(self.bn7, x)}


class Unit(nn.Module):
    """Convolutions beside a shortcut, with normalisation and ReLU in front of each.

    Args:
        layers: (channels, side, stride, dilation) of each convolution.
        dropout: share of the channels that are dropped in front of each convolution but the first.
    """

    def __init__(self, channels: int, layers: Sequence[tuple[int, int, int, int]], dropout: float = 0.0) -> None:
        super().__init__()
        before, self.dropout, self.later = channels, dropout, BRANCHES[1 : len(layers)]
        for branch, (outer, side, stride, dilation) in zip(BRANCHES, layers):
            self.add_module(f"bn_{branch}", nn.BatchNorm2d(before))
            padding = side // 2 * dilation
            self.add_module(f"conv_{branch}", nn.Conv2d(before, outer, side, stride, padding, dilation, bias=False))
            before = outer
        stride = layers[0][2]
        if channels != outer or stride > 1:
            self.conv_branch1 = nn.Conv2d(channels, outer, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b j H W"], ready: Float[Tensor, "b j H W"]) -> Float[Tensor, "b k h w"]:
        """The sum of shortcut and branch.

        Args:
            ready: relu(bn(x)), made outside, since it is also what the taps show.
        """
        shortcut = self.conv_branch1(ready) if hasattr(self, "conv_branch1") else x
        y = self.conv_branch2a(ready)
        for branch in self.later:
            y = F.dropout2d(activate(self.get_submodule(f"bn_{branch}"), y), self.dropout, self.training)
            y = self.get_submodule(f"conv_{branch}")(y)
        return shortcut + y


def activate(norm: nn.BatchNorm2d, x: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """relu(bn(x)); the ReLU overwrites what the normalisation made, which no gradient asks for."""
    return F.relu(norm(x), inplace=True)
