"""Features of whole data sets, made once: what few-shot, retrieval and re-identification compare afterwards.

The last block of an EfficientNet can be trained alone, on features of everything in front of it. That is its `trunk`,
which is frozen, so that they are made once, too. What is made may be kept for the next run of a lesson:

    known_t = extract(lambda images: trunk(before, images), known, (224, 224), keep=fingerprint(root))
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from timm.models import EfficientNet
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from course_lib.backbones import Backbone
from course_lib.cache import cached
from course_lib.data.wrappers import Images


def extract(
    function: Callable[[UInt8[Tensor, "b 3 height width"]], Float[Tensor, "b *feature"]],
    data: Images,
    size: tuple[int, int],
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    keep: str = "",
    name: str = "features",
) -> Float[Tensor, "n *feature"]:
    """`function` of every image in order, on the CPU; one pass, without gradients.

    Args:
        function: of a uint8 batch on the device, such as `lambda x: model.features(model.normalise(x)).mean((-2, -1))`.
        data: items are (image, label); `size`: height and width of the images, resized without a crop, pixels.
        batch_size: on a CPU larger batches are slower; take 64 or more on a GPU.
        keep: the `fingerprint` of the data set, if the features shall be kept for the next time (see `cached`); "": no.
        name: what they are, for the bar and the messages.
    Raises:
        ValueError: a data set without images.
    """
    if not len(data):
        raise ValueError("Features of at least one image were asked for, but the data set is empty.")

    def once():
        loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=partial(_squashed, size=list(size)))
        with torch.inference_mode():
            bar = tqdm(loader, name, disable=not progress)
            parts = [function(batch.to(device, non_blocking=True)).cpu() for batch in bar]
        return torch.cat(parts).clone()  # a clone may be trained on, inference tensors not

    if not keep:
        return once()
    return cached(name, once, data=keep, settings=[size, batch_size, str(device), data], code=[function])


def _squashed(items, size):
    return torch.stack([resize(image, size) for image, _ in items])


def trunk(backbone: Backbone, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b j *grid"]:
    """Features in front of the last block of an EfficientNet: 192 x 7 x 7 for Lite0."""
    network = backbone.network
    return network.blocks[:-1](network.bn1(network.conv_stem(backbone.normalise(images))))


def tail(backbone: Backbone, features: Float[Tensor, "b j *grid"]) -> Float[Tensor, "b k h w"]:
    """The last feature map from those of the `trunk`."""
    network = backbone.network
    return network.bn2(network.conv_head(network.blocks[-1](features)))


def freeze_trunk(backbone: Backbone) -> None:
    """Of the feature map, only the `tail` learns from here on.

    Raises:
        ValueError: the network is not built as `trunk` and `tail` want it.
    """
    network = backbone.network
    if not isinstance(network, EfficientNet):
        raise ValueError(
            "The last block alone can be trained in EfficientNets of timm; expected one of them, got a "
            f"{type(network).__name__}. Leave out last_block to train all of it, or take tf_efficientnet_lite0."
        )
    network.requires_grad_(False)
    for part in (network.blocks[-1], network.conv_head, network.bn2):
        part.requires_grad_(True)


def trunk_features(
    backbone: Backbone, data: Images, size: int, *, device: str | torch.device = "cpu", **options: Any
) -> Float[Tensor, "n j *grid"]:
    """Features of the `trunk` of all images, squashed to a square: 38 KB an image for Lite0 and 224 pixels.

    Args:
        options: of `extract`.
    """
    backbone.to(device, memory_format=torch.channels_last)
    return extract(partial(trunk, backbone), data, (size, size), device=device, **options)
