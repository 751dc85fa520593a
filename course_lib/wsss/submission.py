"""The archive that VOC's test server takes, written from predictions and checked as the server would.

    write_submission(predictions, voc_folder, Path("results.tgz"))      # predictions: a folder of ID.png

    results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png         one for each image of the list test: indices
                                                                        0..20 with VOC's palette, in its size
comp6: data from elsewhere were used too, such as the weights of ImageNet; comp5: those of VOC alone.
"""

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from course_lib import paths
from course_lib.data.files import BrokenFile, existing, read_lines
from course_lib.data.voc import CLASSES, palette

SHOWN_FAULTS = 5
LARGEST = 64 << 20  # bytes of one picture in an archive


def write_submission(
    predictions: Path, data: Path, target: Path, competition: Literal["comp5", "comp6"] = "comp6"
) -> int:
    """Write an archive, whole or not at all, and check it; returns the number of its images.

    The same predictions give the same bytes.

    Args:
        predictions: folder of label images ID.png.
        data: folder in VOC's layout with ImageSets/Segmentation/test.txt and the images.
        target: a .tgz file.
    Raises:
        FileNotFoundError, BrokenFile: a prediction or image is missing or not what the server takes.
    """
    names, archive = _names(data), io.BytesIO()
    with gzip.GzipFile(fileobj=archive, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name in names:
            path = existing(predictions / f"{name}.png", "is missing: every image of the list test needs a prediction.")
            content = path.read_bytes()
            if fault := _fault(content, _size(data, name)):
                raise BrokenFile(f"{path}: {fault}; predict it again.")
            entry = tarfile.TarInfo(f"results/VOC2012/Segmentation/{competition}_test_cls/{name}.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    paths.write_bytes(target, archive.getvalue())
    return check_submission(target, data)


def check_submission(archive: Path, data: Path) -> int:
    """Look at an archive as the server would; returns the number of its images.

    Raises:
        BrokenFile: all that the server would refuse, the first of it named.
    """
    names, faults, seen = _names(data), [], set()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                place = Path(entry.name)
                if not entry.isfile() or entry.size > LARGEST:
                    continue
                parts = ("results", "VOC2012", "Segmentation")
                if place.parts[:3] != parts or place.parts[3:4] not in (("comp5_test_cls",), ("comp6_test_cls",)):
                    faults.append(f"{entry.name} lies elsewhere than results/VOC2012/Segmentation/comp6_test_cls")
                elif place.stem not in names or place.suffix != ".png":
                    faults.append(f"{entry.name} belongs to no image of the list test")
                else:
                    seen.add(place.stem)
                    if fault := _fault(tar.extractfile(entry).read(), _size(data, place.stem)):
                        faults.append(f"{entry.name}: {fault}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BrokenFile(f"{archive}: expected a .tgz archive, got something else ({error}); write it again.") from None
    if missing := [name for name in names if name not in seen]:
        faults.append(f"{len(missing)} of {len(names)} images are missing, the first is {missing[0]}")
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise BrokenFile(f"{archive} would be refused: {'; '.join(faults[:SHOWN_FAULTS])}{more}.")
    return len(seen)


def _names(data: Path) -> Sequence[str]:
    listed = data / "ImageSets" / "Segmentation" / "test.txt"
    return [
        Path(line.split()[0]).stem for line in read_lines(listed, "is missing: VOC's test archive has it.").values()
    ]


def _size(data, name):
    with Image.open(existing(data / "JPEGImages" / f"{name}.jpg", "is missing, which the list test names.")) as image:
        return image.size


def _fault(content, size):
    """What the server would not take of a picture; None if it takes it."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            if image.mode != "P":
                return f"expected a palette of indices, got the mode {image.mode}"
            if image.size != size:
                return f"expected {size[0]} x {size[1]} pixels like the image, got {image.width} x {image.height}"
            highest, colours = int(np.array(image).max()), image.getpalette()
    except Exception as error:  # broken bytes raise nearly anything
        return f"expected a PNG, got something else ({error})"
    if highest >= len(CLASSES):
        return f"expected classes 0 to {len(CLASSES) - 1}, got {highest}"
    if colours[: 3 * len(CLASSES)] != palette()[: len(CLASSES)].flatten().tolist():
        return "expected VOC's palette, got other colours"
    return None
