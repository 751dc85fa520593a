"""Pedestrians of Market-1501: the scores of the protocol, and images in which parts of a person are painted over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.data.market1501 import PARTS, Market1501
from course_lib.evaluate.ranking import cmc_map
from course_lib.settings import check_settings

RANKS = (1, 5, 10)


def parts_on_trial(
    measure: Callable[[tuple[str, ...]], float], energy: Mapping[str, float]
) -> tuple[dict[str, float], list[str], float]:
    """What hiding each part alone costs, the parts by that cost, and how often a map agrees with it.

    The agreement is the share of the pairs of parts of which the one that costs more is the hotter one: 0.5 is chance.

    Args:
        measure: a score, higher is better, with the named parts hidden; of () it is that of whole images.
        energy: of the map on each part, per area.
    Raises:
        ValueError: all parts cost the same.
    """
    whole = measure(())
    costs = {part: whole - measure((part,)) for part in energy}
    pairs = [(more, less) for more in energy for less in energy if costs[more] > costs[less]]
    if not pairs:
        raise ValueError(f"Expected parts of different costs, got {costs}; hide parts that differ.")
    agree = sum(energy[more] > energy[less] for more, less in pairs) / len(pairs)
    return costs, sorted(costs, key=costs.__getitem__, reverse=True), agree


def market_scores(distances: Float[Tensor, "q g"], query: Market1501, gallery: Market1501) -> dict[str, float]:
    """Rank-1, -5, -10 and mAP of the protocol, in percent, from distances of any kind."""
    found = cmc_map(distances, query.identities, gallery.identities, query.cameras, gallery.cameras, max(RANKS))
    return {f"rank-{rank}": 100 * float(found.cmc[rank - 1]) for rank in RANKS} | {"mAP": 100 * found.map}


@dataclass(frozen=True)
class Occluded(Dataset):
    """Images of a data set that has part masks (the miniature), with parts painted over.

    The colour is the mean of all that stays visible, so that nothing of the parts leaks.
    """

    data: Market1501
    parts: Annotated[tuple[str, ...], PARTS]  # names of PARTS

    def __post_init__(self) -> None:
        check_settings(self)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        image, label = self.data[index]
        parts = torch.tensor([PARTS.index(name) for name in self.parts], dtype=torch.uint8)
        hidden = torch.isin(self.data.parts(index), parts)  # h w
        colour = image[:, ~hidden].float().mean(1).nan_to_num().round().to(torch.uint8)
        return torch.where(hidden, colour[:, None, None], image), label
