"""Features of whole data sets, made once: what few-shot, retrieval and re-identification compare afterwards."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

Images = Sequence | Dataset  # of items (image 3 h w as uint8, label)


class Resized(Dataset):
    """Images of a data set, resized without a crop, as uint8; labels are left out."""

    def __init__(self, data: Images, size: tuple[int, int]):
        self.data, self.size = data, list(size)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 height width"]:
        return transforms.resize(self.data[index][0], self.size, antialias=True)


def extract(
    function: Callable[[UInt8[Tensor, "b 3 height width"]], Float[Tensor, "b *feature"]],
    data: Images,
    size: tuple[int, int],
    *,
    batch_size: int = 8,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Float[Tensor, "n *feature"]:
    """`function` of every image in order, on the CPU; one pass, without gradients.

    Args:
        function: of a uint8 batch on the device, such as `lambda x: model.features(model.normalise(x)).mean((-2, -1))`.
        data: items are (image, label); `size`: height and width of the resized images, pixels.
        batch_size: on a CPU larger batches are slower; take 64 or more on a GPU.
    Raises:
        ValueError: a data set without images.
    """
    if not len(data):
        raise ValueError("Features of at least one image were asked for, but the data set is empty.")
    parts = []
    with torch.inference_mode():
        for batch in tqdm(
            DataLoader(Resized(data, size), batch_size, num_workers=workers), "features", disable=not progress
        ):
            parts.append(function(batch.to(device, non_blocking=True)).cpu())
    return torch.cat(parts).clone()  # a clone may be trained on, inference tensors not
