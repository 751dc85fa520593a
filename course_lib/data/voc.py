"""PASCAL VOC 2012 with SBD, read from its real layout; the miniature has the same one.

    JPEGImages/2007_000032.jpg
    Annotations/2007_000032.xml                    tags: the classes of all objects, difficult ones included
    SegmentationClass/2007_000032.png              class indices 0..20 as a palette, 255 = void; these score seeds
    SegmentationClassAug/2007_000032.png           masks of SBD in the same coding, for all images of trainaug
    ImageSets/Segmentation/{train,val,trainaug}.txt     trainaug is not in VOC's archive: SBD's lists bring it along;
                                                        SEAM and EPS call it train_aug.txt
    SALImages/2007_000032.png                      saliency, grey 0..255; EPS's authors offer it (made by PFAN)
    Tracks/2007_000032.png                         the miniature only, see `tagged`: ground of the confounded class
    miniature.json                                 not in the real archive: names of other classes than VOC's

Class 0 is the background everywhere. Tags come from the boxes, not from the masks, as in published work: a class may be
tagged and have no pixel. A file with tags as a pickle (cls_labels.npy) is not needed, and not read.
"""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from course_lib import paths
from course_lib.data.files import BrokenFile, existing, read_lines, read_xml, refuse_twice
from course_lib.data.images import load, load_grey
from course_lib.data.miniature import about, check_counts
from course_lib.evaluate.segmentation import IGNORE

CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
# Published counts: images of a split, and of those the ones with each class, in the order of CLASSES.
VOC_COUNTS = {
    "train": (1464, (88, 65, 105, 78, 87, 78, 128, 131, 148, 64, 82, 121, 68, 81, 442, 82, 63, 93, 83, 84)),
    "val": (1449, (90, 79, 103, 72, 96, 74, 127, 119, 123, 71, 75, 128, 79, 76, 445, 85, 57, 90, 84, 74)),
    "trainaug": (
        10582,
        (590, 504, 705, 468, 714, 393, 1150, 1005, 1228, 267, 613, 1188, 445, 492, 4155, 522, 300, 649, 503, 567),
    ),
}


class Voc(Dataset):
    """One split; `data[i]` is an image and its tags, `print` shows a table of what was found.

    Attributes:
        ids, images: name and file of each image.
        tags: images x classes, bool, without the background.
        classes: names; classes[0] is the background.
        confounded: name of the class that stands on tracks, in the miniature; None elsewhere.

    Args:
        root: the folder that holds JPEGImages/, in VOC's archive VOCdevkit/VOC2012.
        split: "train" or "val", whose masks are of VOC, or "trainaug" with those of SBD.
        saliency: folder of saliency maps, in `root` or anywhere else.
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or what is not VOC's number.
    """

    def __init__(self, root: str | Path, split: str = "train", saliency: str | Path = "SALImages"):
        self.root, self.split = Path(root), split
        if split not in VOC_COUNTS:
            raise ValueError(f"split is one of {', '.join(VOC_COUNTS)}, but {split!r} came.")
        pictures = self.root / "JPEGImages"
        if not pictures.is_dir():
            raise FileNotFoundError(
                f"{pictures} is missing: PASCAL VOC 2012 was expected at {self.root}. Give the folder "
                "VOCdevkit/VOC2012 of its archive, or write the miniature with `python -m course_lib data`."
            )
        note = about(self.root)
        self.classes = note.get("classes", list(CLASSES))
        if not isinstance(self.classes, list) or not all(isinstance(name, str) for name in self.classes[1:] or [0]):
            raise BrokenFile(f"{self.root / 'miniature.json'}: expected names of classes; write the miniature again.")
        self.confounded = note.get("confounded")
        listed = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        other = listed.with_name("train_aug.txt")
        self.ids = _read_list(other if split == "trainaug" and not listed.exists() and other.exists() else listed)
        sentence = f"is missing, which the list of {split} names. Unpack the archive again."
        self.images = [existing(pictures / f"{name}.jpg", sentence) for name in self.ids]
        self.tags = torch.tensor(
            [_read_tags(self.root / "Annotations" / f"{name}.xml", self.classes) for name in self.ids]
        )
        self.masks = self.root / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
        self.saliencies = self.root / saliency
        published, each = VOC_COUNTS[split]
        counted = [f"images of {split}", *(f"images with {name}" for name in CLASSES[1:])]
        found = dict(zip(counted, [len(self), *self.tags.sum(0).tolist()]))  # a miniature has classes of its own
        check_counts(self.root, "PASCAL VOC 2012", found, dict(zip(counted, [published, *each])))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Float[Tensor, " c"]]:
        return load(self.images[index]), self.tags[index].float()

    def mask(self, index: int) -> UInt8[Tensor, "h w"]:
        """Class of each pixel: 0 = background, 255 = void (at the edges of objects, and where nobody could tell)."""
        mask = self._grey(index, self.masks, "mask", "P")
        unknown = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
        if len(unknown):
            raise BrokenFile(
                f"{self.masks / self.ids[index]}.png holds the class {int(unknown[0])}, but there are "
                f"{len(self.classes)} with the background. Masks hold class indices, not colours or grey values."
            )
        return mask

    def saliency(self, index: int) -> UInt8[Tensor, "h w"]:
        """How much each pixel stands out, 0..255, whatever it shows."""
        return self._grey(index, self.saliencies, "saliency map")

    def track(self, index: int) -> Bool[Tensor, "h w"]:
        """Where the ground of the confounded class is seen (the miniature only)."""
        return self._grey(index, self.root / "Tracks", "track") > 0

    def _grey(self, index, folder, what, mode="L"):  # h w
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder {folder} is missing: this copy has no {what} for this split.")
        return load_grey(folder / f"{self.ids[index]}.png", mode)

    def __str__(self) -> str:
        each = self.tags.sum(1)
        counts = zip(self.classes[1:], self.tags.sum(0).tolist())
        return (
            f"PASCAL VOC, {self.split}: {self.root}\n"
            f"  images    {len(self):6,}   of {len(self.classes) - 1} classes and background\n"
            f"  tags      {each.float().mean():6.2f}   an image, at most {int(each.max())}; "
            f"{100 * (each > 1).float().mean():.0f} % of the images have several\n"
            f"  masks     {'yes' if self.masks.is_dir() else 'no':>6}\n"
            f"  saliency  {'yes' if self.saliencies.is_dir() else 'no':>6}\n"
            "  " + ", ".join(f"{name} {count:,}" for name, count in counts)
        )


def palette() -> UInt8[np.ndarray, "256 3"]:
    """VOC's colours of class indices: bits 0, 3, 6 of an index make red (128, 64, 32), 1, 4, 7 green, 2, 5 blue."""
    bits = (np.arange(256)[:, None] >> np.arange(9)) & 1  # 256 9
    return ((128, 64, 32) @ bits.reshape(256, 3, 3)).astype(np.uint8)  # index, which of its bits, colour


def write_mask(path: Path, mask: UInt8[np.ndarray, "h w"]) -> None:
    """Write class indices as a PNG with VOC's palette, whole or not at all.

    It is what the test server takes, and image viewers show it in colour.
    """
    picture, content = Image.fromarray(mask), io.BytesIO()
    picture.putpalette(palette().tobytes())
    picture.save(content, "PNG")
    paths.write_bytes(path, content.getvalue())


def _read_list(path):
    lines = read_lines(
        path,
        "is missing. train and val come with VOC's archive. As to trainaug, VOC's archive has none of that name: it "
        "comes with SBD's masks for VOC (SegmentationClassAug), 10,582 lines, also as train_aug.txt.",
    )
    # Bare ids, or "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", as older code wants them.
    names = [Path(line.split()[0]).stem for line in lines.values()]
    if not names:
        raise BrokenFile(f"{path}: expected the name of an image in each line, got 0 lines; unpack it again.")
    refuse_twice(path, names)
    return names


def _read_tags(path, classes):
    tree = read_xml(path, "is missing, from which the tags are read. Unpack the archive again.")
    # Of objects alone: owners and the parts of a person have names as well. Some tools write capitals.
    names = [" ".join(node.findtext("name", "").split()).lower() for node in tree.iterfind("object")]
    known = [name.lower() for name in classes[1:]]
    if not names or not {*names} <= {*known}:
        raise BrokenFile(
            f"{path}: expected objects of the {len(known)} classes, got {sorted({*names} - {*known}) or 'no object'}. "
            "No image is without a tag, and no object without a class: unpack it again."
        )
    return [name in names for name in known]
