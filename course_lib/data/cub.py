"""CUB-200-2011 (Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011), read from its real layout, split for retrieval.

    images.txt                 1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
    image_class_labels.txt     1 1                                 image, class; both count from 1
    classes.txt                1 001.Black_footed_Albatross
    bounding_boxes.txt         1 60.0 27.0 325.0 304.0             image, x, y, width, height
    train_test_split.txt       1 0                                 of the classification benchmark: not used here
    images/001.Black_footed_Albatross/*.jpg

Retrieval is measured on classes that training never saw (Oh Song et al., CVPR 2016): the first half of the classes is for
training (100 classes, 5,864 images), the second half for testing (100 and 5,924). Labels count from 0 in both. Every test
image is a query against all others. A few photographs are greyscale; they come as RGB.
"""

from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.data.counts import check_counts
from course_lib.data.images import BrokenFile, load

ARCHIVE = "CUB_200_2011"
PUBLISHED = {"train": {"images": 5_864, "classes": 100}, "test": {"images": 5_924, "classes": 100}}


class Cub(Dataset):
    """One half of the classes; `data[i]` is (image, label), and `print` shows a table of what was found.

    Args:
        root: the folder that holds images.txt, or the one above it.
        split: "train" (first half of the classes) or "test" (second half).
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or a count that is not the published
            one.
    """

    images: list[Path]
    labels: Int[Tensor, " n"]  # 0-based within the split
    classes: list[str]  # names in label order, such as "Black footed Albatross"
    boxes: list[tuple[int, int, int, int]]  # x0 y0 x1 y1 in pixels, x1 = x + width as in the WSOL benchmark

    def __init__(self, root: str | Path, split: str = "train"):
        if split not in PUBLISHED:
            raise ValueError(
                f'split is "train" (first half of the classes) or "test" (second half), but {split!r} came.'
            )
        root = Path(root)
        self.root = root / ARCHIVE if (root / ARCHIVE).is_dir() else root
        self.split = split
        names, files, classes, boxes = (
            _table(self.root / f"{name}.txt", fields)
            for name, fields in (("classes", 1), ("images", 1), ("image_class_labels", 1), ("bounding_boxes", 4))
        )
        order = sorted(names)
        half = len(order) // 2
        chosen = order[:half] if split == "train" else order[half:]
        label = {number: position for position, number in enumerate(chosen)}
        self.classes = [names[number][0].partition(".")[2].replace("_", " ") for number in chosen]
        self.images, labels, self.boxes = [], [], []
        for image in sorted(files):
            for table, rows in (("image_class_labels", classes), ("bounding_boxes", boxes)):
                if image not in rows:
                    raise BrokenFile(
                        f"{self.root / table}.txt has no line for image {image} ({files[image][0]}). Unpack it again."
                    )
            number = _number(classes[image][0], int, f"{self.root / 'image_class_labels.txt'}, image {image}")
            if number not in names:
                raise BrokenFile(
                    f"{self.root / 'image_class_labels.txt'} puts image {image} into class {number}, which "
                    f"classes.txt does not list; it lists {order[0]}-{order[-1]}. Unpack it again."
                )
            if number not in label:
                continue
            path = self.root / "images" / files[image][0]
            if not path.is_file():
                raise FileNotFoundError(
                    f"The image {path} is listed in images.txt, but missing. Unpack the archive again."
                )
            self.images.append(path)
            labels.append(label[number])
            x, y, width, height = (
                _number(field, float, f"{self.root / 'bounding_boxes.txt'}, image {image}") for field in boxes[image]
            )
            self.boxes.append((round(x), round(y), round(x + width), round(y + height)))
        self.labels = torch.tensor(labels)
        counts = {"images": len(labels), "classes": len(chosen)}
        check_counts(
            self.root, f"CUB-200-2011 ({split})", {what: (counts[what], n) for what, n in PUBLISHED[split].items()}
        )

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
        return "\n".join(
            [
                f"CUB-200-2011, {self.split}: {self.root}",
                f"  images   {len(self):6,}   of {len(self.classes)} classes, {each.min()}-{each.max()} each",
                f"  boxes    {len(self.boxes):6,}   one an image",
            ]
        )


def _table(path: Path, fields: int) -> dict[int, list[str]]:
    """Rows of one of the archive's lists by their leading number."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: CUB-200-2011 was expected. Give the folder that holds images.txt, or "
            "write the miniature with `python -m course_lib data`."
        )
    rows = {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        number, *rest = text.split() or [""]
        if len(rest) != fields:
            raise BrokenFile(
                f"{path}, line {line}: a number and {fields} more field(s) were expected, but {text!r} came. "
                "Unpack it again."
            )
        rows[_number(number, int, f"{path}, line {line}")] = rest
    return rows


def _number(text: str, kind: type, where: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise BrokenFile(f"{where}: a number was expected, but {text!r} came. Unpack it again.") from None
