"""ILSVRC 2012 classification and localisation (CLS-LOC), read from its real layout; the miniature has the same one.

    LOC_synset_mapping.txt                                       one line a class, in label order: n01440764 tench, ...
    ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_18.JPEG        class folders
    ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG         flat (folders by class are read as well)
    ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml   PASCAL style boxes; in train only for a part of the images
    ILSVRC/Masks/CLS-LOC/val/ILSVRC2012_val_00000001.png         the miniature only: exact object masks

Labels are positions in the synset file, which is sorted by WordNet id as in torchvision and timm (the devkit's own
ILSVRC2012_ID is another order). Boxes are x0 y0 x1 y1 in pixels, 0-based and inclusive.
"""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as transforms

from course_lib.data.images import BrokenFile, load, open_image
from course_lib.evaluate.localization import squash_boxes


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
    boxes: list[Int[Tensor, "n 4"]]  # in pixels of the squashed image
    masks: UInt8[Tensor, "b size size"] | None  # 1 = object; None where the data set has no masks


class Ilsvrc(Dataset):
    """One split; `print` it for a table of what was found.

    Args:
        root: the folder that holds LOC_synset_mapping.txt and ILSVRC/.
        split: "train" or "val".
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file.
    """

    def __init__(self, root: str | Path, split: str = "val"):
        self.root, self.split = Path(root), split
        images = self.root / "ILSVRC" / "Data" / "CLS-LOC" / split
        if not images.is_dir():
            raise FileNotFoundError(
                f"{images} is missing: an ILSVRC 2012 tree in the CLS-LOC layout was expected at {self.root}. Give the folder "
                "that holds LOC_synset_mapping.txt and ILSVRC/, or write the miniature with `python -m course_lib data`."
            )
        self.classes = _read_synsets(self.root / "LOC_synset_mapping.txt")  # wnid -> name, in label order
        number = {wnid: label for label, wnid in enumerate(self.classes)}
        annotations, masks = (self.root / "ILSVRC" / part / "CLS-LOC" / split for part in ("Annotations", "Masks"))
        files = sorted(images.glob("*.JPEG")) + sorted(images.glob("*/*.JPEG"))
        if not files:
            raise FileNotFoundError(f"{images} holds no .JPEG file; is the archive unpacked?")
        has_masks = masks.is_dir()
        self.photos: list[Photo] = []
        for file in files:
            inside = file.relative_to(images)
            wnid, size, boxes = _read_annotation(annotations, inside, required=split != "train")
            wnid = inside.parts[0] if len(inside.parts) == 2 else wnid
            if wnid not in number:
                raise BrokenFile(
                    f"{file} belongs to class {wnid!r}, which {self.root / 'LOC_synset_mapping.txt'} does not list."
                )
            mask = masks / inside.with_suffix(".png") if has_masks else None
            if mask and not mask.is_file():
                raise FileNotFoundError(
                    f"The mask {mask} is missing, while others are there. Write the data set again."
                )
            self.photos.append(Photo(file, number[wnid], size, boxes, mask))

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Photo]:
        photo = self.photos[index]
        image = load(photo.image)
        for box in photo.boxes:
            _check_box(box, image.shape[2], image.shape[1], photo.image)
        return image, photo

    def __str__(self) -> str:
        boxes = [len(photo.boxes) for photo in self.photos]
        shares = torch.tensor(
            [
                (x1 - x0 + 1) * (y1 - y0 + 1) / (photo.size[0] * photo.size[1])
                for photo in self.photos
                for x0, y0, x1, y1 in photo.boxes
            ]
            or [float("nan")]
        )
        low, middle, high = (100 * shares).quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        return "\n".join(
            [
                f"ILSVRC CLS-LOC, {self.split}: {self.root}",
                f"  images   {len(self):6,}   of {len({p.label for p in self.photos})} classes ({len(self.classes)} known)",
                f"  boxes    {sum(boxes):6,}   at most {max(boxes)} an image; {boxes.count(0):,} images without",
                f"  area     {middle:6.0f} % of the image in the median box (5-95 %: {low:.0f}-{high:.0f} %)",
                f"  masks    {'exact' if self.photos[0].mask else 'none':>6}",
            ]
        )

    def batches(self, size: int = 224, batch_size: int = 16, workers: int = 0) -> DataLoader:
        """A loader of `Batch`, in file order."""
        return DataLoader(self, batch_size, num_workers=workers, collate_fn=lambda items: squash(items, size))


def squash(items: list[tuple[Tensor, Photo]], size: int) -> Batch:
    """Images, boxes and masks resized to `size` x `size` without a crop (bilinear, antialiased; boxes by truncation)."""
    images = [transforms.resize(image, [size, size], antialias=True) for image, _ in items]
    boxes = [
        squash_boxes(torch.tensor(photo.boxes).reshape(-1, 4), (image.shape[2], image.shape[1]), (size, size))
        for image, photo in items
    ]
    masks = None
    if all(photo.mask for _, photo in items):
        masks = torch.stack([read_mask(photo.mask, size) for _, photo in items])
    return Batch(torch.stack(images), torch.tensor([photo.label for _, photo in items]), boxes, masks)


def read_mask(path: Path, size: int) -> UInt8[Tensor, "size size"]:
    """An object mask (1 = object), nearest neighbour."""
    mask = transforms.pil_to_tensor(open_image(path, "L"))
    return (transforms.resize(mask, [size, size], transforms.InterpolationMode.NEAREST) > 0).to(torch.uint8)[0]


def _read_synsets(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. It lists the classes in label order, one a line: a WordNet id and a name."
        )
    classes = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        wnid, _, name = line.partition(" ")
        if not name:
            raise BrokenFile(f"{path}, line {number}: a WordNet id and a name were expected, but {line!r} came.")
        classes[wnid] = name
    if list(classes) != sorted(classes):
        raise BrokenFile(
            f"{path} is not sorted by WordNet id: labels would not be the network's outputs. Sort its lines."
        )
    return classes


def _read_annotation(
    folder: Path, image: Path, required: bool
) -> tuple[str | None, tuple[int, int] | None, tuple[tuple[int, int, int, int], ...]]:
    """Class, (width, height) and boxes of an image's XML file; nothing if it has none and needs none."""
    path = folder / image.with_suffix(".xml")
    if not path.is_file() and (folder / path.name).is_file():  # images sorted into class folders, XML left flat
        path = folder / path.name
    if not path.is_file():
        if required:
            raise FileNotFoundError(
                f"The box file {path} is missing for {image}. Unpack the archive of box annotations too."
            )
        return None, None, ()
    try:
        tree = ElementTree.parse(path)
        width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        names = [node.findtext("name") for node in tree.iter("object")]
        boxes = tuple(
            tuple(int(node.findtext(f"bndbox/{corner}")) for corner in ("xmin", "ymin", "xmax", "ymax"))
            for node in tree.iter("object")
        )
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise BrokenFile(f"{path} is not a complete box annotation ({error}). Unpack it again.") from error
    if not boxes:
        raise BrokenFile(f"{path} holds no object: at least one box was expected.")
    for box in boxes:
        _check_box(box, width, height, path)
    return names[0], (width, height), boxes


def _check_box(box: tuple[int, int, int, int], width: int, height: int, path: Path) -> None:
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):  # <=: a part of the released files counts from 1
        raise BrokenFile(
            f"{path}: the box ({x0}, {y0}, {x1}, {y1}) does not lie in the image of {width} x {height} pixels. "
            "Boxes are x0 y0 x1 y1; is the annotation of another image?"
        )
