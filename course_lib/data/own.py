"""Photographs of your own with tags: a folder and a file tags.csv, read into VOC's layout, which all else reads.

    holiday/                       file,tags
      tags.csv                     beach/IMG_0012.jpg,dog;ball
      beach/IMG_0012.jpg           IMG_0013.png,dog
      IMG_0013.png                 IMG_0014.jpg,                      no tags: its masks are predicted, not learned from
      masks/IMG_0012.png           if you have some: indices of classes, 0 = background, in the order of the names

Photographs are turned upright as their EXIF says, since phones store them as the sensor lay. Nothing is written into
your folder.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from course_lib import paths
from course_lib.data.files import BrokenFile, read_lines
from course_lib.data.images import open_image
from course_lib.data.voc import write_mask

TAG_FILE = "tags.csv"
EXAMPLE = 'expected lines such as "file,tags" and "beach/IMG_0012.jpg,dog;ball"'
SHOWN = 5  # faults named at a time


@dataclass(frozen=True)
class OwnPhotographs:
    """What was found in a folder of photographs.

    Attributes:
        files: tags of each photograph by its path in the folder; none for one without.
        unlisted: photographs in the folder that the file of tags does not name.
        masks: how many photographs have one.
    """

    root: Path
    files: dict[str, tuple[str, ...]]
    unlisted: int
    masks: int

    @property
    def classes(self) -> list[str]:
        """Names in alphabetical order, the background in front."""
        return ["background", *sorted({tag for tags in self.files.values() for tag in tags})]

    def __str__(self) -> str:
        counts = Counter(tag for tags in self.files.values() for tag in tags)
        several = sum(len(tags) > 1 for tags in self.files.values())
        without = sum(not tags for tags in self.files.values())
        return (
            f"Photographs: {self.root}\n"
            f"  with tags    {len(self.files) - without:6,}   {several} with several\n"
            f"  without tags {without:6,}   their masks are predicted\n"
            f"  not listed   {self.unlisted:6,}   left out\n"
            f"  masks        {self.masks:6,}   {'' if self.masks else 'so nothing can be scored'}\n"
            "  " + ", ".join(f"{name} {counts[name]:,}" for name in self.classes[1:])
        )


def own_photographs(root: str | Path) -> OwnPhotographs:
    """What a folder with a file of tags holds.

    Raises:
        FileNotFoundError: there is no file of tags.
        BrokenFile: lines that say something else, or photographs that are not there; all faults in one sentence.
    """
    root = Path(root)
    lines = read_lines(root / TAG_FILE, f"is missing: {EXAMPLE} there, one line for each photograph.")
    rows = {number: row for number, text in lines.items() for row in csv.reader([text])}
    first = next(iter(rows.values()), [])
    if [cell.strip().lower() for cell in first[:2]] == ["file", "tags"]:
        rows.pop(next(iter(rows)))
    files: dict[str, tuple[str, ...]] = {}
    faults = []
    for number, row in rows.items():
        name = PurePosixPath(row[0].strip())
        if len(row) > 2:
            faults.append(f"line {number} has {len(row)} columns, 2 are expected: tags are separated by ;")
        elif name.is_absolute() or ".." in name.parts:
            faults.append(f"line {number} names {name}, which is outside of the folder")
        elif str(name) in files:
            faults.append(f"line {number} names {name} a second time")
        elif not (root / name).is_file():
            faults.append(f"line {number} names {name}, where nothing is")
        else:
            words = (" ".join(word.split()).lower() for word in (row[1] if len(row) > 1 else "").split(";"))
            files[str(name)] = tuple(sorted({word for word in words if word}))
            if "background" in files[str(name)]:
                faults.append(f'line {number} has the tag "background", which no photograph needs')
    if not faults and not any(files.values()):
        faults.append("no photograph has a tag")
    if faults:
        more = f" and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise BrokenFile(f"{root / TAG_FILE}: {'; '.join(faults[:SHOWN])}{more}. Correct it: {EXAMPLE}.")
    pictures = {
        path.relative_to(root).as_posix()
        for suffix in ("jpg", "jpeg", "png", "JPG", "JPEG", "PNG")
        for path in root.rglob(f"*.{suffix}")
        if path.relative_to(root).parts[0] != "masks"
    }
    masks = sum(_mask_of(root, name).is_file() for name in files)
    return OwnPhotographs(root, files, len(pictures - files.keys()), masks)


def as_voc(found: OwnPhotographs, target: Path) -> Path:
    """Write photographs in VOC's layout into a folder below `target`, named after their content; returns that folder.

    Those with tags are listed in trainaug and in train, those without in test. What is there already is left alone.

    Raises:
        BrokenFile: photographs or masks that cannot be read, named.
    """
    digest = hashlib.sha256(json.dumps(sorted(found.files.items())).encode())
    for name in sorted(found.files):
        for path in (found.root / name, _mask_of(found.root, name)):
            digest.update(hashlib.sha256(path.read_bytes() if path.is_file() else b"").digest())
    folder = target / f"photographs-{digest.hexdigest()[:12]}"
    if (folder / "miniature.json").is_file():  # written last
        return folder
    ids: dict[str, list[str]] = {"trainaug": [], "test": []}
    for number, (name, tags) in enumerate(sorted(found.files.items())):
        own = f"{number:05d}-{''.join(letter if letter.isalnum() else '-' for letter in PurePosixPath(name).stem)[:40]}"
        ids["trainaug" if tags else "test"].append(own)
        picture, content = open_image(found.root / name, "RGB", upright=True), io.BytesIO()
        picture.save(content, "JPEG", quality=95)
        paths.write_bytes(folder / "JPEGImages" / f"{own}.jpg", content.getvalue())
        if tags:
            paths.write_bytes(folder / "Annotations" / f"{own}.xml", _annotation(tags))
        mask = _mask_of(found.root, name)
        if tags and mask.is_file():
            labels = open_image(mask, "P")
            if labels.size != picture.size:
                raise BrokenFile(
                    f"{mask}: expected a mask of {picture.width} x {picture.height} pixels like its photograph, got "
                    f"{labels.width} x {labels.height}; draw it on the upright photograph."
                )
            for kind in ("SegmentationClass", "SegmentationClassAug"):
                write_mask(folder / kind / f"{own}.png", np.array(labels))
    for split, names in {"trainaug": ids["trainaug"], "train": ids["trainaug"], "test": ids["test"]}.items():
        if names:
            text = "".join(f"{own}\n" for own in names)
            paths.write_text(folder / "ImageSets" / "Segmentation" / f"{split}.txt", text)
    note = {"world": digest.hexdigest()[:12], "classes": found.classes, "source": "photographs of your own"}
    paths.write_text(folder / "miniature.json", json.dumps(note) + "\n")
    return folder


def _mask_of(root, name):
    return root / "masks" / f"{PurePosixPath(name).stem}.png"


def _annotation(tags):
    """The part of VOC's XML that is read: an object for each tag."""
    tree = ElementTree.Element("annotation")
    for tag in tags:
        ElementTree.SubElement(ElementTree.SubElement(tree, "object"), "name").text = tag
    return ElementTree.tostring(tree, encoding="utf-8")
