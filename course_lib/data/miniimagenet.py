"""miniImageNet (Vinyals et al., 2016; classes of Ravi & Larochelle, ICLR 2017), read from both layouts in which it circulates.

    split/train.csv     filename,label                    images/n0153282900000005.jpg          84 px, one flat folder
    train.csv           class_name,image_name             n01532829/n01532829_20457.JPEG        in a train tree of ILSVRC 2012

The header tells which. 64 classes train, 16 others validate and 20 others test, 600 images each: nothing that an episode asks
about was ever seen in training. The two layouts do not hold the same images, and full-size images are worth one to two points:
figures of one cannot be compared with figures of the other. Labels count from 0 in the order of first appearance.
"""

import csv
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.backbones import imagenet_classes
from course_lib.data.counts import check_counts
from course_lib.data.images import BrokenFile, load

CLASSES = {"train": 64, "val": 16, "test": 20}
TREES = ("images", "ILSVRC/Data/CLS-LOC/train", "train", ".")  # where class folders are looked for, in this order


class MiniImageNet(Dataset):
    """One split; `data[i]` is (image, label), and `print` shows a table of what was found.

    Args:
        root: the folder that holds the csv files (or split/ with them) and the images.
        split: "train", "val" or "test": other classes each.
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or a count that is not the published
            one.
    """

    images: list[Path]
    labels: Int[Tensor, " n"]  # 0-based within the split
    ids: list[str]  # WordNet ids in label order
    classes: list[str]  # their names, where they are known

    def __init__(self, root: str | Path, split: str = "train"):
        if split not in CLASSES:
            raise ValueError(f"split is one of {', '.join(CLASSES)}, but {split!r} came.")
        self.root, self.split = Path(root), split
        places = [self.root / "split" / f"{split}.csv", self.root / f"{split}.csv"]
        self.list = next((place for place in places if place.is_file()), None)
        if self.list is None:
            raise FileNotFoundError(
                f"{places[0]} is missing, and so is {places[1]}: miniImageNet was expected at {self.root}. "
                "Give the folder with its csv files, or write the miniature with `python -m course_lib data`."
            )
        rows = _rows(self.list)  # (class, path inside a tree)
        tree = next((self.root / tree for tree in TREES if (self.root / tree / rows[0][1]).is_file()), None)
        if tree is None:
            raise FileNotFoundError(
                f"{rows[0][1]}, the first image of {self.list}, was found in none of "
                f"{', '.join(TREES)} of {self.root}. Unpack or link the images there."
            )
        self.ids = list(dict.fromkeys(wnid for wnid, _ in rows))
        names = dict(imagenet_classes()) | _names(self.root / "LOC_synset_mapping.txt")
        self.classes = [names.get(wnid, wnid) for wnid in self.ids]
        label = {wnid: position for position, wnid in enumerate(self.ids)}
        self.images = [tree / file for _, file in rows]
        self.labels = torch.tensor([label[wnid] for wnid, _ in rows])
        missing = [image for image in self.images if not image.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing):,} of the {len(rows):,} images in {self.list} are missing; the first is "
                f"{missing[0]}. Unpack the images again."
            )
        check_counts(
            self.root,
            f"miniImageNet ({split})",
            {"classes": (len(self.ids), CLASSES[split]), "images": (len(rows), 600 * CLASSES[split])},
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        return load(self.images[index]), int(self.labels[index])

    def __str__(self) -> str:
        each = self.labels.bincount()
        return "\n".join(
            [
                f"miniImageNet, {self.split}: {self.list}",
                f"  images   {len(self):6,}   of {len(self.ids)} classes, {each.min()}-{each.max()} each",
            ]
        )


def _rows(path: Path) -> list[tuple[str, str]]:
    """Class and file of every line, whichever of the two headers the list has."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header not in (["filename", "label"], ["class_name", "image_name"]):
        raise BrokenFile(
            f'{path} begins with {",".join(header)!r}; "filename,label" or "class_name,image_name" was expected.'
        )
    for line, row in enumerate(rows, 2):
        if len(row) != 2 or not all(row):
            raise BrokenFile(
                f"{path}, line {line}: two fields ({','.join(header)}) were expected, but {','.join(row)!r} came."
            )
    if not rows:
        raise BrokenFile(f"{path} lists no image.")
    if header[0] == "filename":
        return [(wnid, file) for file, wnid in rows]
    return [(wnid, f"{wnid}/{file}") for wnid, file in rows]


def _names(path: Path) -> dict[str, str]:
    """Names of classes that are none of ImageNet's: the miniature brings them along."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in lines)}
