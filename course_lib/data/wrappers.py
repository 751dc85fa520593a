"""Data sets around data sets: each item changed on its way."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

Images = Sequence | Dataset  # of items (image 3 h w as uint8, label)


class Changed(Dataset):
    """Items of a data set after a function of (image, label). It draws by torch's generator, which the engine seeds."""

    def __init__(self, data: Images, change: Callable[[Tensor, Any], Any]) -> None:
        self.data, self.change = data, change

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.change(*self.data[index])
