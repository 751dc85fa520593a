"""ResNet-12, the network of few-shot learning, in its wide form, with DropBlock.

    model = resnet12.create(num_classes=64)
    features = model.features(model.normalise(photographs))               # b 640 5 5 for photographs of 84 x 84 pixels

Lee et al., "Meta-Learning with Differentiable Convex Optimization" (MetaOptNet), CVPR 2019, section 4.1, after Oreshkin
et al. (TADAM, NeurIPS 2018): four blocks of three 3 x 3 convolutions and a 1 x 1 shortcut, each halving the map, no
stem, 64, 160, 320 and 640 channels, LeakyReLU(0.1). Other networks of this name have other widths (64, 128, 256, 512),
other blocks, or a stem: their figures do not compare. The last map is pooled, as maps need it; MetaOptNet itself
flattens it to 16,000 numbers.

    DropBlock    gamma = (1 - keep) / s^2 * f^2 / (f - s + 1)^2           Ghiasi et al., NeurIPS 2018, Eq. 1

The released DropBlock places its blocks by lists of indices, on one fixed GPU; here a block is a max-pooled point of
the Bernoulli mask. Nothing waits for the device: the forward passes that anneal the keep rate are counted there.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from course_lib.backbones import Backbone
from course_lib.backbones.weights import fill_from_file

CHANNELS = (64, 160, 320, 640)
SLOPE = 0.1  # of the LeakyReLU
DROP = 0.1  # share that dropout (blocks 1, 2) and DropBlock (blocks 3, 4) take away in the end
ANNEALED = 20 * 2000  # forward passes after which DropBlock takes all of its share
BLOCK = 5  # side of what DropBlock takes away; on the last map of 5 x 5 that is a whole channel
_COLOURS = {  # of miniImageNet's base classes, as MetaOptNet has them
    "mean": (120.39586422 / 255, 115.59361427 / 255, 104.54012653 / 255),
    "std": (70.68188272 / 255, 68.27635443 / 255, 72.54505529 / 255),
}


def create(num_classes: int, weights: str | Path = "random", drop: float = DROP) -> Backbone:
    """A wide ResNet-12 in evaluation mode: 12,424,320 parameters and a linear layer; `.features` and `.classifier`.

    Args:
        num_classes: rows of the classifier: 64 base classes in miniImageNet.
        weights: "random" (of torch's generator), or the path of a checkpoint as `train fewshot` writes it.
        drop: see DROP; it matters in training only.
    Raises:
        ValueError: "pretrained", which there is not.
        FileNotFoundError, RuntimeError: no checkpoint there, or it does not fit.
    """
    if weights == "pretrained":
        raise ValueError(
            "There is no ResNet-12 with ImageNet weights, since the novel classes of miniImageNet are among "
            'ImageNet\'s. Take "random" or the path of a checkpoint: python -m course_lib train fewshot makes one.'
        )
    model = Backbone(ResNet12(num_classes, drop)).eval()
    if weights != "random":
        fill_from_file(model, weights)
    return model


class ResNet12(nn.Sequential):
    """The network: four blocks, the mean of their map, one linear layer. `backbones.Backbone` makes maps of it.

    The last map is 640 x H / 16 x W / 16, rounded down. LeakyReLU leaves it values below zero.
    """

    def __init__(self, num_classes: int, drop: float = DROP) -> None:
        super().__init__()
        self.pretrained_cfg = {"architecture": "resnet12", "classifier": "classifier", **_COLOURS}
        self.blocks = nn.Sequential(
            *[
                Residual(inner, outer, nn.Dropout(drop) if number < 2 else DropBlock(drop))
                for number, (inner, outer) in enumerate(zip((3, *CHANNELS), CHANNELS))
            ]
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, SLOPE, mode="fan_out", nonlinearity="leaky_relu")
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.classifier = nn.Linear(CHANNELS[-1], num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Another linear layer, or none for 0 classes."""
        self.classifier = nn.Linear(CHANNELS[-1], num_classes) if num_classes else nn.Identity()


class Residual(nn.Module):
    """Three convolutions beside a shortcut, then half the side, then what is taken away in training."""

    def __init__(self, inner: int, outer: int, drop: nn.Module) -> None:
        super().__init__()
        layers = []
        for channels in (inner, outer, outer):
            layers += [nn.Conv2d(channels, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(SLOPE)]
        self.convolutions = nn.Sequential(*layers[:-1])  # the last LeakyReLU comes after the sum
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.drop = drop

    def forward(self, x: Float[Tensor, "b j H W"]) -> Float[Tensor, "b k h w"]:
        """The map at half the side, rounded down."""
        x = F.leaky_relu(self.convolutions(x) + self.shortcut(x), SLOPE)
        return self.drop(F.max_pool2d(x, 2))


class DropBlock(nn.Module):
    """Zeroes squares of `block` x `block` in training, channel by channel, and scales the rest up  (Ghiasi et al.).

    Squares lie inside the map and may overlap. Where the map is smaller than the block, the block is as large as the
    map. The share grows from 0 to `drop` in the first ANNEALED forward passes; their count is saved with the weights,
    so that a training that goes on drops as before.
    """

    def __init__(self, drop: float, block: int = BLOCK) -> None:
        super().__init__()
        self.drop, self.block = drop, block
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        """The map, without what was dropped."""
        if not self.training or not self.drop:
            return x
        self.passes += 1
        b, k, h, w = x.shape
        side = min(self.block, h, w)
        rows, columns = h - side + 1, w - side + 1
        # Eq. 1 (Ghiasi et al.)
        gamma = self.drop * (self.passes / ANNEALED).clamp(max=1) / side**2 * h * w / (rows * columns)
        corners = torch.rand(b, k, rows, columns, device=x.device) < gamma
        dropped = F.max_pool2d(F.pad(corners.float(), (side - 1,) * 4), side, stride=1)  # b k h w, in 0, 1
        kept = 1 - dropped  # fp32 island: half precision cannot count so far
        return x * (kept * (kept.numel() / kept.sum().clamp_min(1))).to(x.dtype)
