"""ResNet38, the trunk on which CAM, SEAM, EPS and pixel-to-prototype contrast were published.

    Model A1 of Wu, Shen, van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for Visual Recognition", Pattern
    Recognition 2019; levels 5 and 6 dilated instead of strided, as in Ahn and Kwak, CVPR 2018 (PSA): output stride 8.

    unit         x + conv(relu(bn(conv(relu(bn(x))))))        normalisation and ReLU come before a convolution; where the shape
                                                              changes, the shortcut is a 1 x 1 convolution of relu(bn(x))
    bottleneck   three convolutions 1 x 1, 3 x 3, 1 x 1 and channel dropout in front of the last two (levels 6 and 7)

    tap      what                                       channels   side of a 448 px image
    conv4    relu(bn(x)) at the entrance of level 5       512      56
    conv5    relu(bn(x)) at the entrance of level 6      1024      56
    conv6    relu(bn7(x)) at the end                     4096      56

Names of modules and tensors are those of the released checkpoints (`released`), 228 tensors, 105,070,912 parameters. The
first convolution and level 2 are frozen, and all batch normalisation. No convolution has a bias, nothing is pooled.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from course_lib.backbones import mxnet, released
from course_lib.backbones.dense import Dense, Maps

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the colours, 0..1
# Units of a level, and channels inside and at the end of a unit, in multiples of the first convolution's.
LEVELS = {2: (3, 2, 2), 3: (3, 4, 4), 4: (6, 8, 8), 5: (3, 8, 16)}
BOTTLENECKS = {6: (32, 0.3), 7: (64, 0.5)}  # channels at the end, likewise, and dropout


def create(weights: str | Path = "random", width: int = 64) -> "ResNet38":
    """ResNet38 in evaluation mode; see `Dense` for what it offers.

    Args:
        weights: "random" (of torch's generator), or a path: the ImageNet weights of MXNet (.params), the state_dict of a
            ResNet38, or a released checkpoint, of which the trunk is taken.
        width: channels of the first convolution: 64 as published. Less makes a network for trials.
    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it does not fit.
    """
    trunk = ResNet38(width)
    if weights != "random":
        path = Path(weights)
        state = mxnet.resnet38_state(path) if path.suffix == ".params" else released.read(path).trunk
        released.fill(trunk, state, path.name)
    return trunk.eval()


class ResNet38(Dense):
    """The trunk; `frozen` is the first convolution and level 2."""

    stride = 8

    def __init__(self, width: int = 64) -> None:
        super().__init__(MEAN, STD)
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels = width
        for level, (units, inner, outer) in LEVELS.items():
            for number in range(units):
                stride = 2 if level < 5 and not number else 1
                # Level 5 lost its stride of 2: all convolutions that came after it see every second pixel instead.
                dilations = (1, 1) if level < 5 else (2, 2) if number else (1, 2)
                unit = Unit(channels, inner * width, outer * width, stride, dilations)
                self.add_module(f"b{level}_{number}" if number else f"b{level}", unit)
                channels = outer * width
        for level, (outer, dropout) in BOTTLENECKS.items():
            self.add_module(f"b{level}", Bottleneck(channels, outer * width, dropout))
            channels = outer * width
        self.bn7 = nn.BatchNorm2d(channels)
        self.channels = {"conv4": 8 * width, "conv5": 16 * width, "conv6": 64 * width}
        self.freeze([self.conv1a, *self._level(2)])

    def frozen(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """See Dense."""
        with torch.no_grad():
            x = self.conv1a(images)
            for unit in self._level(2):
                x = unit(x, activate(unit.bn_branch2a, x))
        return {"trunk": x}

    def trained(self, features: Maps) -> Maps:
        """See Dense."""
        x, taps = features["trunk"], {}
        for level in range(3, 8):
            for number, unit in enumerate(self._level(level)):
                ready = activate(unit.bn_branch2a, x)
                if level in (5, 6) and not number:
                    taps[f"conv{level - 1}"] = ready
                x = unit(x, ready)
        return taps | {"conv6": activate(self.bn7, x)}

    def _level(self, level: int) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name.split("_")[0] == f"b{level}"]


class Unit(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, channels: int, inner: int, outer: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__()
        first, second = dilations
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, inner, 3, stride, first, first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(inner)
        self.conv_branch2b1 = nn.Conv2d(inner, outer, 3, 1, second, second, bias=False)
        if channels != outer or stride != 1:
            self.conv_branch1 = nn.Conv2d(channels, outer, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b j H W"], ready: Float[Tensor, "b j H W"]) -> Float[Tensor, "b k h w"]:
        """The sum of shortcut and branch.

        Args:
            ready: relu(bn(x)), made outside, since it is also what the taps show.
        """
        shortcut = self.conv_branch1(ready) if hasattr(self, "conv_branch1") else x
        return shortcut + self.conv_branch2b1(activate(self.bn_branch2b1, self.conv_branch2a(ready)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 with a dilation of 4, 1 x 1, beside a 1 x 1 shortcut."""

    def __init__(self, channels: int, outer: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(channels)
        self.conv_branch2a = nn.Conv2d(channels, outer // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(outer // 4)
        self.conv_branch2b1 = nn.Conv2d(outer // 4, outer // 2, 3, padding=4, dilation=4, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(outer // 2)
        self.conv_branch2b2 = nn.Conv2d(outer // 2, outer, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(channels, outer, 1, bias=False)
        self.dropout = dropout

    def forward(self, x: Float[Tensor, "b j h w"], ready: Float[Tensor, "b j h w"]) -> Float[Tensor, "b k h w"]:
        """As in Unit; channels are dropped in front of both later convolutions, and the shortcut always starts from `ready`."""
        y = activate(self.bn_branch2b1, self.conv_branch2a(ready))
        y = self.conv_branch2b1(F.dropout2d(y, self.dropout, self.training))
        y = F.dropout2d(activate(self.bn_branch2b2, y), self.dropout, self.training)
        return self.conv_branch1(ready) + self.conv_branch2b2(y)


def activate(norm: nn.BatchNorm2d, x: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    """relu(bn(x)); the ReLU overwrites what the normalisation made, which no gradient asks for."""
    return F.relu(norm(x), inplace=True)
