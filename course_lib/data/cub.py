"""CUB-200-2011 (Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011) in its real layout, split for retrieval.

    images.txt                 1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
    image_class_labels.txt     1 1                                 image, class; both count from 1
    classes.txt                1 001.Black_footed_Albatross
    bounding_boxes.txt         1 60.0 27.0 325.0 304.0             image, x, y, width, height
    train_test_split.txt       1 0                                 of the classification benchmark: not used here
    images/001.Black_footed_Albatross/*.jpg

Retrieval is measured on classes that training never saw (Oh Song et al., CVPR 2016): the first half of the classes is
for training (100 classes, 5,864 images), the second half for testing (100 and 5,924). Labels count from 0 in both.
Every test image is a query against all others. A few photographs are greyscale; they come as RGB.
"""

from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.data.files import BrokenFile, existing, read_lines, refuse_twice
from course_lib.data.images import load
from course_lib.data.miniature import check_counts

CUB_ARCHIVE = "CUB_200_2011"
CUB_COUNTS = {"train": {"images": 5_864, "classes": 100}, "test": {"images": 5_924, "classes": 100}}  # as published
MAX_SIDE = 100_000  # pixels


class Cub(Dataset):
    """One half of the classes; `data[i]` is (image, label), and `print` shows a table of what was found.

    Attributes:
        images: file of each image.
        labels: n, int; 0-based within the split.
        classes: names in label order, such as "Black footed Albatross".
        boxes: (x0, y0, x1, y1) of each image in pixels, x1 = x + width as in the WSOL benchmark.

    Args:
        root: the folder that holds images.txt, or the one above it.
        split: "train" (first half of the classes) or "test" (second half).
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or a count that is not the
            published one.
    """

    def __init__(self, root: str | Path, split: str = "train"):
        if split not in CUB_COUNTS:
            raise ValueError(
                f'split is "train" (first half of the classes) or "test" (second half), but {split!r} came.'
            )
        root = Path(root)
        self.root = root / CUB_ARCHIVE if (root / CUB_ARCHIVE).is_dir() else root
        self.split = split
        names, files, numbers, boxes = (
            _table(self.root / f"{name}.txt", *fields)
            for name, *fields in (
                ("classes", 1),
                ("images", 1),
                ("image_class_labels", 1, int),
                ("bounding_boxes", 4, _pixels),
            )
        )
        refuse_twice(self.root / "images.txt", (file for (file,) in files.values()))
        order = sorted(names)
        half = len(order) // 2
        chosen = order[:half] if split == "train" else order[half:]
        self.classes = [names[number][0].split(".", 1)[-1].replace("_", " ") for number in chosen]
        self.images, labels, self.boxes = [], [], []
        for image, (file,) in sorted(files.items()):
            for table, rows in (("image_class_labels", numbers), ("bounding_boxes", boxes)):
                if image not in rows:
                    raise BrokenFile(
                        f"{self.root / table}.txt has no line for image {image} ({file}). Unpack it again."
                    )
            (number,) = numbers[image]
            if number not in names:
                raise BrokenFile(
                    f"{self.root / 'image_class_labels.txt'} puts image {image} into class {number}, which "
                    f"classes.txt does not list; it lists {order[0]}-{order[-1]}. Unpack it again."
                )
            if number in chosen:
                path = self.root / "images" / file
                self.images.append(existing(path, "is listed in images.txt, but missing. Unpack the archive again."))
                labels.append(chosen.index(number))
                x, y, width, height = boxes[image]
                self.boxes.append((round(x), round(y), round(x + width), round(y + height)))
        if not labels:
            raise BrokenFile(
                f"{self.root / 'images.txt'}: expected images of the {split} half, got none; unpack it again."
            )
        self.labels = torch.tensor(labels)
        found = {"images": len(labels), "classes": len(chosen)}
        check_counts(self.root, f"CUB-200-2011 ({split})", found, CUB_COUNTS[split])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        image = load(self.images[index])
        height, width = image.shape[1:]
        x0, y0, x1, y1 = self.boxes[index]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise BrokenFile(
                f"The box ({x0}, {y0}, {x1}, {y1}) in bounding_boxes.txt does not lie in {self.images[index]}, "
                f"which has {width} x {height} pixels. Is it the line of another image?"
            )
        return image, int(self.labels[index])

    def __str__(self) -> str:
        each = self.labels.bincount(minlength=len(self.classes))
        return (
            f"CUB-200-2011, {self.split}: {self.root}\n"
            f"  images   {len(self):6,}   of {len(self.classes)} classes, {each.min()}-{each.max()} each\n"
            f"  boxes    {len(self.boxes):6,}   one an image"
        )


def _table(path, fields, kind=str):
    """Rows of one of the archive's lists by their leading number: so many fields more, all of one kind."""
    lines = read_lines(
        path,
        "is missing: CUB-200-2011 was expected. Give the folder that holds images.txt, or write the miniature with "
        "`python -m course_lib data`.",
    )
    rows = []
    for line, text in lines.items():
        number, *rest = text.split()
        if len(rest) != fields:
            raise BrokenFile(
                f"{path}, line {line}: expected a number and {fields} more field(s), got {text!r}; unpack it again."
            )
        try:
            rows.append((int(number), [kind(field) for field in rest]))
        except ValueError:
            raise BrokenFile(f"{path}, line {line}: expected numbers, got {text!r}; unpack it again.") from None
    if not rows:
        raise BrokenFile(f"{path}: expected a line for each entry, got an empty list; unpack it again.")
    refuse_twice(path, (number for number, _ in rows))
    return dict(rows)


def _pixels(text):
    if not abs(number := float(text)) < MAX_SIDE:
        raise ValueError
    return number
