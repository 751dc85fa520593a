"""ILSVRC 2012 classification and localisation (CLS-LOC), read from its real layout; the miniature has the same one.

    LOC_synset_mapping.txt                                       one line a class, in label order: n01440764 tench, ...
    ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_18.JPEG        class folders
    ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG         flat (folders by class are read as well)
    ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml   PASCAL style boxes; in train only for some images
    ILSVRC/Masks/CLS-LOC/val/ILSVRC2012_val_00000001.png         the miniature only: exact object masks

Training needs the class alone, and some of its boxes reach over the border or have their corners swapped: they are
clamped and swapped back, or dropped where nothing is left, and counted in one warning. A box of val must be right.
Labels are positions in the synset file, which is sorted by WordNet id as in torchvision and timm (the devkit's own
ILSVRC2012_ID is another order). Boxes are x0 y0 x1 y1 in pixels, 0-based and inclusive.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from course_lib.data.files import BrokenFile, existing, read_lines, read_xml, refuse_twice
from course_lib.data.images import load, load_grey, open_image
from course_lib.data.miniature import check_counts
from course_lib.evaluate.localization import squash_boxes

SYNSETS = "LOC_synset_mapping.txt"
ILSVRC_COUNTS = {"train": 1_281_167, "val": 50_000}  # as published: images of 1000 classes


@dataclass(frozen=True)
class Photo:
    """One image of the benchmark; a train image without a box file has no boxes."""

    image: Path
    label: int
    size: tuple[int, int] | None  # width, height as its annotation says
    boxes: tuple[tuple[int, int, int, int], ...]
    mask: Path | None


@dataclass(frozen=True)
class Batch:
    """Images squashed to one size, as the WSOL benchmark does it: no crop, the aspect ratio changes, boxes go along."""

    images: UInt8[Tensor, "b 3 size size"]
    labels: Int[Tensor, "b"]
    boxes: list[Int[Tensor, "_ 4"]]  # in pixels of the squashed image
    masks: UInt8[Tensor, "b size size"] | None  # 1 = object; None where the data set has no masks


class Ilsvrc(Dataset):
    """One split; `print` it for a table of what was found.

    Attributes:
        photos: every `Photo` of the split.
        classes: WordNet id -> name, in label order.

    Args:
        root: the folder that holds LOC_synset_mapping.txt and ILSVRC/.
        split: "train" or "val".
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or the number of images if
            the synset file lists the 1000 classes of ILSVRC and it is not the published one.
    """

    def __init__(self, root: str | Path, split: str = "val"):
        self.root, self.split = Path(root), split
        images, annotations, masks = (
            self.root / "ILSVRC" / part / "CLS-LOC" / split for part in ("Data", "Annotations", "Masks")
        )
        files = sorted(images.glob("*.JPEG")) + sorted(images.glob("*/*.JPEG"))
        if not files:
            raise FileNotFoundError(
                f"{images} is missing or holds no .JPEG file: expected an ILSVRC 2012 tree in the CLS-LOC layout at "
                f"{self.root}. Give the folder that holds {SYNSETS} and ILSVRC/, or write the miniature with "
                "`python -m course_lib data`."
            )
        self.classes = read_synsets(self.root / SYNSETS)
        if list(self.classes) != sorted(self.classes):
            raise BrokenFile(
                f"{self.root / SYNSETS} is not sorted by WordNet id: labels would not be the network's outputs. "
                "Sort its lines."
            )
        labels = {wnid: label for label, wnid in enumerate(self.classes)}
        exact = masks.is_dir()
        self.photos, odd = [], []
        for file in files:
            inside = file.relative_to(images)
            wnid, size, boxes = _read_annotation(annotations, inside, required=split != "train")
            if split == "train" and boxes and _repaired(boxes, *size) != boxes:
                size = open_image(file, "RGB").size  # that of the annotation may be what is wrong
                right = _repaired(boxes, *size)
                odd += {*boxes} - {*right}
                boxes = right
            wnid = wnid if file.parent == images else file.parent.name
            if wnid not in labels:
                raise BrokenFile(
                    f"{file} belongs to class {wnid!r}, which {self.root / SYNSETS} does not list; unpack both again."
                )
            mask = (
                existing(masks / inside.with_suffix(".png"), "is missing, though others are there.") if exact else None
            )
            self.photos.append(Photo(file, labels[wnid], size, boxes, mask))
        if odd:
            warnings.warn(
                f"{annotations}: {len(odd):,} boxes reached over the border, had their corners swapped or no area in "
                "their image; they were repaired, or dropped where nothing was left. All images stay.",
                stacklevel=2,
            )
        if len(labels) == 1000:  # other classes are a data set of one's own in this layout
            published = {"images": ILSVRC_COUNTS[split]}
            check_counts(self.root, f"ILSVRC 2012 ({split})", {"images": len(files)}, published)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Photo]:
        photo = self.photos[index]
        image = load(photo.image)
        height, width = image.shape[1:]
        if self.split == "train":  # an annotation that is right in itself may be of an image of another size
            return image, replace(photo, boxes=_repaired(photo.boxes, width, height))
        _check_boxes(photo.boxes, width, height, photo.image)
        return image, photo

    def __str__(self) -> str:
        boxes = [len(photo.boxes) for photo in self.photos]
        shares = [
            (x1 - x0 + 1) * (y1 - y0 + 1) / prod(photo.size) for photo in self.photos for x0, y0, x1, y1 in photo.boxes
        ]
        low, middle, high = 100 * np.quantile(shares or np.nan, (0.05, 0.5, 0.95))
        known = len({photo.label for photo in self.photos})
        return (
            f"ILSVRC CLS-LOC, {self.split}: {self.root}\n"
            f"  images   {len(self):6,}   of {known} classes ({len(self.classes)} known)\n"
            f"  boxes    {sum(boxes):6,}   at most {max(boxes)} an image; {boxes.count(0):,} images without\n"
            f"  area     {middle:6.0f} % of the image in the median box (5-95 %: {low:.0f}-{high:.0f} %)\n"
            f"  masks    {'exact' if self.photos[0].mask else 'none':>6}"
        )

    def batches(self, size: int = 224, batch_size: int = 16) -> DataLoader:
        """A loader of `Batch`, in file order."""
        return DataLoader(self, batch_size, collate_fn=partial(squash, size=size))


def squash(items: list[tuple[Tensor, Photo]], size: int) -> Batch:
    """Images, boxes and masks resized to `size` x `size` without a crop.

    Images are resized bilinearly and antialiased, masks by their nearest pixel; boxes are truncated.
    """
    square = [size, size]
    masks = None
    if all(photo.mask for _, photo in items):
        nearest = transforms.InterpolationMode.NEAREST
        masks = [transforms.resize(load_grey(photo.mask)[None], square, nearest) for _, photo in items]  # 1 size size
        masks = (torch.cat(masks) > 0).to(torch.uint8)
    return Batch(
        torch.stack([transforms.resize(image, square) for image, _ in items]),
        torch.tensor([photo.label for _, photo in items]),
        [
            squash_boxes(
                torch.tensor(photo.boxes, dtype=torch.long).reshape(-1, 4),
                (image.shape[2], image.shape[1]),
                (size, size),
            )
            for image, photo in items
        ],
        masks,
    )


def read_synsets(path: Path) -> dict[str, str]:
    """WordNet id -> name of the classes that a synset file lists, in its order."""
    lines = read_lines(path, "is missing. It lists the classes in label order, one a line: a WordNet id and a name.")
    classes = [line.split(maxsplit=1) for line in lines.values()]
    for (number, line), fields in zip(lines.items(), classes):
        if len(fields) < 2:
            raise BrokenFile(f"{path}, line {number}: expected a WordNet id and a name, got {line!r}; unpack it again.")
    refuse_twice(path, (wnid for wnid, _ in classes))
    return dict(classes)


def _read_annotation(folder, image, required):
    """Class, (width, height) and boxes of an image's XML file; nothing if it has none and needs none."""
    path = folder / image.with_suffix(".xml")
    if not path.is_file():  # images sorted into class folders, XML left flat
        path = folder / path.name
    if not (required or path.is_file()):
        return None, None, ()
    tree = read_xml(path, f"is missing: it holds the boxes of {image}. Unpack the archive of box annotations too.")
    try:
        size = tuple(round(float(tree.findtext(f"size/{side}"))) for side in ("width", "height"))
        boxes = tuple(
            tuple(round(float(node.findtext(f"bndbox/{corner}"))) for corner in ("xmin", "ymin", "xmax", "ymax"))
            for node in tree.iterfind("object")
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise BrokenFile(f"{path} is not a complete box annotation ({error}). Unpack it again.") from None
    if required:
        if not boxes:
            raise BrokenFile(f"{path} holds no object: expected at least one box; unpack it again.")
        _check_boxes(boxes, *size, path)
    return tree.findtext("object/name", "").strip(), size, boxes


def _check_boxes(boxes, width, height, path):
    for x0, y0, x1, y1 in boxes:
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):  # <=: a part of the released files counts from 1
            raise BrokenFile(
                f"{path}: the box ({x0}, {y0}, {x1}, {y1}) does not lie in the image of {width} x {height} pixels. "
                "Boxes are x0 y0 x1 y1; is the annotation of another image?"
            )


def _repaired(boxes, width, height):
    """Boxes with their corners in order, clamped to the image; without those that have no area there."""
    inside = np.clip(np.array(boxes, float).reshape(-1, 2, 2), 0, (width, height)).astype(int)
    inside.sort(1)
    return tuple(tuple(box) for box in inside.reshape(-1, 4).tolist() if box[0] < box[2] and box[1] < box[3])
