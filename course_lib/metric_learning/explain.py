"""Where an image resembles another one, for any network that compares images, with the controls that such a map needs.

    net = backbones.create("resnet50.tv_in1k")                      # anything with .features(images) -> b k h w
    found = resemblance(net, net.normalise(photo)[None], net.normalise(others))     # others: r 3 H W
    plots.show(plots.grid([photo] * len(others), heatmaps=found.heatmaps(photo.shape[1:])), alt="...")

torchvision's networks and embeddings of your own become such a module in one line each:

    net = SimpleNamespace(features=split_classifier(torchvision.models.resnet50(weights="DEFAULT"))[0])
    net = SimpleNamespace(features=lambda images: my_embedding.trunk(images))       # the map before global pooling

What it can show: which positions carry the channels that both images share, if the network pools its last feature map
by the mean. What it cannot: that the network decided so. A map that looks right may say nothing of the reference: the
sum of all channels alone is bright on most objects. So three controls come along. `uniform` knows no reference.
`shuffled` is compared with the numbers of the reference in a random order of the channels, so with nothing. `other` is
compared with the next of the references. And `dependence` is a number: 0 for a map that is the same with shuffled
channels, 1 for one that has nothing in common with that.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from course_lib import maps
from course_lib.evaluate.controls import map_correlation
from course_lib.metric_learning.rules import NAMES, pair_maps

SHORT_NAMES = {"p": "prototype", "p-mean": "prototype-centred"}


class Resemblance(NamedTuple):
    """Raw maps of an image beside each of its references, and the same with controls in the place of these."""

    raw: Float[Tensor, "r h w"]
    uniform: Float[Tensor, "h w"]
    shuffled: Float[Tensor, "r h w"]
    other: Float[Tensor, "r h w"] | None  # None for a single reference
    dependence: Float[Tensor, " r"]  # how much of a map is lost if the reference is shuffled, 0..1

    def heatmaps(self, size: tuple[int, int]) -> Float[Tensor, "r H W"]:
        """The maps in 0..1 at the size (height, width) of the image."""
        return maps.heatmap(self.raw, size)


@torch.inference_mode()
def resemblance(
    model: Any,
    image: Float[Tensor, "1 3 H W"],
    references: Float[Tensor, "r 3 _ _"] | list[Float[Tensor, "1 3 _ _"]],
    rule: str = "dist-cam",
    seed: int = 0,
) -> Resemblance:
    """Maps of how an image resembles each reference, by one of the rules of lesson 02, with their controls.

    Args:
        model: has `features(images)`, which returns the last feature map, b k h w; in evaluation mode.
        image: as the model wants it (normalised), on its device.
        references: likewise; of different sizes in a list.
        rule: of `rules.NAMES`; "p" and "p-mean" are short for "prototype" and "prototype-centred".
        seed: of the shuffled channels.
    Raises:
        ValueError: an unknown rule, no reference, or one reference for a rule that subtracts the mean of several.
    """
    rule = SHORT_NAMES.get(rule, rule)
    if rule not in NAMES:
        raise ValueError(f"Expected a rule of {', '.join((*NAMES, *SHORT_NAMES))}, got {rule!r}.")
    batches = references if isinstance(references, list) else list(references[:, None])
    if len(batches) < (2 if rule == "prototype-centred" else 1):
        raise ValueError(
            f"Expected {'two references at least, whose mean is subtracted' if batches else 'a reference'}, got "
            f"{len(batches)}; name more, or take another rule."
        )
    features = model.features(image)
    if not isinstance(features, Tensor) or features.ndim != 4:
        came = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"Expected model.features(images) to return maps b k h w, got {came}; give the map before global pooling."
        )
    pooled = torch.cat([model.features(reference).float().mean((2, 3)) for reference in batches])  # r k
    order = torch.randperm(pooled.shape[1], generator=Generator().manual_seed(seed)).to(pooled.device)
    chosen = torch.arange(len(pooled), device=pooled.device)[None]  # 1 r

    def compared(rows):
        dice = Generator().manual_seed(seed)
        return pair_maps(features, rows, chosen, dice, [rule])[rule][0].float()  # r h w

    raw, shuffled = compared(pooled), compared(pooled[:, order])
    unchanged = (raw - shuffled).abs().amax((1, 2)) <= 1e-5 * raw.abs().amax((1, 2))  # of a flat map, too
    same = torch.where(unchanged, 1.0, map_correlation(raw, shuffled).nan_to_num(0).clamp(0, 1))
    return Resemblance(
        raw,
        features[0].float().mean(0),
        shuffled,
        compared(pooled.roll(-1, 0)) if len(pooled) > 1 else None,
        (1 - same).float(),
    )
