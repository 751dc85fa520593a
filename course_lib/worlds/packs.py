"""A pack: one small archive of the photographs as scenes use them, for machines where no package is to be had.

Every photograph is a PNG of at most 1000 pixels, so that scenes made from a pack are those made from the packages, bit
for bit. Licences and origins are inside. `photographs` verifies each one by its pixels, as if it came from a package.
"""

import io
import os
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm import tqdm

from course_lib import paths
from course_lib.worlds.folders import FULL, full_disk
from course_lib.worlds.photographs import Photographs, manifest, normalised, pixel_hash


def write(photographs: Photographs, file: Path) -> str:
    """Write the photographs that are there into a new .zip; returns what was written, in a sentence.

    The same photographs give the same members, and with the same version of Pillow the same bytes.

    Raises:
        FileExistsError: there is such a file; nothing is ever overwritten.
        ValueError: not a .zip, or JPEGs are decoded here to other pixels than the manifest's.
        OSError: the disk is full, or nothing can be written there; nothing is left behind.
    """
    if file.suffix != ".zip":
        raise ValueError(f"{file}: expected a name that ends in .zip; choose one, such as photographs.zip.")
    if file.exists():
        raise FileExistsError(f"{file} exists; move it away, or choose another name.")
    members = {
        f"photographs/{p.source}/{PurePosixPath(p.file).with_suffix('.png')}": p
        for p in (*photographs.cutouts, *photographs.backgrounds, *photographs.examples)
    }
    texts = {"LICENCES.md": _licences(), "photographs.json": (paths.shelf() / "photographs.json").read_bytes()}
    texts |= {f"licences/{path.name}": path.read_bytes() for path in (paths.shelf() / "licences").glob("*.txt")}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=paths.PART)
    try:
        with open(handle, "wb") as stream, zipfile.ZipFile(stream, "w") as archive:
            for path, content in sorted(texts.items()):
                _add(archive, path, content, zipfile.ZIP_DEFLATED)
            for path, photograph in tqdm(sorted(members.items()), "Packing photographs"):
                _add(archive, path, _png(photographs.path(photograph), photograph.pixels), zipfile.ZIP_STORED)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and error.errno in FULL:
            raise full_disk(file.parent, file.name) from error
        raise
    return (
        f"{file}: {len(members)} photographs, {file.stat().st_size / 1e6:.1f} MB, fingerprint {photographs.fingerprint}"
    )


def _png(path: Path, pixels: list[str]) -> bytes:
    with Image.open(path) as image:
        mode = "RGBA" if image.has_transparency_data else "RGB"
    image, stream = normalised(path, mode), io.BytesIO()
    if pixel_hash(image) not in pixels:
        raise ValueError(
            f"{path}: expected the manifest's pixels, got others: this machine decodes JPEG in another way. Write the "
            "pack on a machine with Pillow's own build (pip install pillow)."
        )
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _add(archive: zipfile.ZipFile, path: str, content: bytes, packing: int) -> None:
    entry = zipfile.ZipInfo(path)  # of 1980: a pack does not tell when it was made
    entry.external_attr, entry.create_system, entry.compress_type = 0o100644 << 16, 3, packing
    archive.writestr(entry, content)


def _licences() -> bytes:
    """Who made the photographs, under which licence, and where they come from."""
    lines = ["# Photographs of the course: licences and origins", ""]
    for source, about in manifest()["sources"].items():
        lines += [f"## {source}", "", *(f"- {name}: {value}" for name, value in about.items() if name != "via"), ""]
    lines.append(
        "Each one is at most 1000 pixels long. Notices of the packages: licences/. What each shows: photographs.json."
    )
    return "\n".join([*lines, ""]).encode()
