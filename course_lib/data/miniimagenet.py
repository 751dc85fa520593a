"""miniImageNet (Vinyals et al., 2016; classes of Ravi & Larochelle, ICLR 2017) in both layouts in which it circulates.

    split/train.csv     filename,label              images/n0153282900000005.jpg      84 px, one flat folder
    train.csv           class_name,image_name       n01532829/n01532829_20457.JPEG    in a train tree of ILSVRC 2012

The header tells which. 64 classes train, 16 others validate and 20 others test, 600 images each: nothing that an
episode asks about was ever seen in training. The two layouts do not hold the same images, and full-size images are
worth one to two points: figures of one cannot be compared with figures of the other. Labels count from 0 in the order
of first appearance.
"""

import csv
import os
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.backbones import imagenet_classes
from course_lib.data.files import BrokenFile, read_lines, refuse_twice
from course_lib.data.ilsvrc import SYNSETS, read_synsets
from course_lib.data.images import load
from course_lib.data.miniature import check_counts

CLASS_COUNTS = {"train": 64, "val": 16, "test": 20}
TREES = ("images", "ILSVRC/Data/CLS-LOC/train", "train", ".")  # where class folders are looked for, in this order


class MiniImageNet(Dataset):
    """One split; `data[i]` is (image, label), and `print` shows a table of what was found.

    Attributes:
        images: file of each image.
        labels: n, int; 0-based within the split.
        ids: WordNet ids in label order.
        classes: their names, where they are known.

    Args:
        root: the folder that holds the csv files (or split/ with them) and the images.
        split: "train", "val" or "test": other classes each.
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or a count that is not the
            published one.
    """

    def __init__(self, root: str | Path, split: str = "train"):
        if split not in CLASS_COUNTS:
            raise ValueError(f"split is one of {', '.join(CLASS_COUNTS)}, but {split!r} came.")
        self.root, self.split = Path(root), split
        places = [self.root / "split" / f"{split}.csv", self.root / f"{split}.csv"]
        self.list = next(filter(os.path.isfile, places), None)
        if self.list is None:
            raise FileNotFoundError(
                f"{places[0]} is missing, and so is {places[1]}: miniImageNet was expected at {self.root}. Give the "
                "folder with its csv files, or write the miniature with `python -m course_lib data`."
            )
        wnids, files = zip(*_rows(self.list))
        tree = next((tree for tree in TREES if os.path.isfile(self.root / tree / files[0])), TREES[0])
        self.images = [self.root / tree / file for file in files]
        missing = [image for image in self.images if not os.path.isfile(image)]
        if missing:
            raise FileNotFoundError(
                f"{len(missing):,} of the {len(files):,} images in {self.list} are missing; the first is {missing[0]}. "
                f"Unpack or link all images into one of the folders {', '.join(TREES)} of {self.root}."
            )
        self.ids = list(dict.fromkeys(wnids))
        self.labels = torch.tensor([self.ids.index(wnid) for wnid in wnids])
        names = dict(imagenet_classes())
        if (self.root / SYNSETS).is_file():  # the miniature brings along names of classes that are none of ImageNet's
            names |= read_synsets(self.root / SYNSETS)
        self.classes = [names.get(wnid, wnid) for wnid in self.ids]
        found = {"classes": len(self.ids), "images": len(files)}
        published = {"classes": CLASS_COUNTS[split], "images": 600 * CLASS_COUNTS[split]}
        check_counts(self.root, f"miniImageNet ({split})", found, published)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        return load(self.images[index]), int(self.labels[index])

    def __str__(self) -> str:
        each = self.labels.bincount()
        return (
            f"miniImageNet, {self.split}: {self.list}\n"
            f"  images   {len(self):6,}   of {len(self.ids)} classes, {each.min()}-{each.max()} each"
        )


def _rows(path):
    """Class, and path inside a tree, of every line, whichever of the two headers the list has."""
    lines = read_lines(path)  # a field never goes on in the next line
    header, *rows = [[field.strip() for field in row] for line in lines.values() for row in csv.reader([line])] or [[]]
    if header not in (["filename", "label"], ["class_name", "image_name"]):
        raise BrokenFile(
            f'{path} begins with {",".join(header)!r}; expected "filename,label" or "class_name,image_name". Unpack '
            "the list again, with commas."
        )
    for line, row in zip([*lines][1:], rows):
        if len(row) != 2 or not all(row):
            raise BrokenFile(
                f"{path}, line {line}: expected two fields ({','.join(header)}), got {','.join(row)!r}; unpack "
                "it again."
            )
    if not rows:
        raise BrokenFile(f"{path} lists no image: expected a line for each one; unpack it again.")
    flat = header[0] == "filename"
    rows = [(wnid, file) for file, wnid in rows] if flat else [(wnid, f"{wnid}/{file}") for wnid, file in rows]
    refuse_twice(path, (file for _, file in rows))
    return rows
