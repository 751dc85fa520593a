"""The photographs of the course: found or fetched, verified by what they show, never trusted.

`photographs()` looks, in this order, for: files prepared earlier in DATA_ROOT/photographs, a pack (COURSE_PACK, a .zip
in DATA_ROOT/downloads, the address in pyproject.toml), an installed package, a .deb in DATA_ROOT/downloads, and
`apt-get download` (no root needed). Only files of the manifest are taken out of an archive, and nothing is executed.

Distributions pack the same photograph differently, so its identity is that of its pixels: a file counts if its bytes
are the manifest's, or if its decoded pixels are. (Every decoder gives the same pixels of a PNG. Those of a JPEG may
differ in the last bit: then a JPEG that was packed anew is left out, but never is another one taken for it.) What is
missing or different is left out, listed, and changes the fingerprint.
"""

import functools
import hashlib
import importlib.util
import io
import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from course_lib import paths
from course_lib.data.images import open_image
from course_lib.worlds import archives, downloads
from course_lib.worlds.folders import FULL, NotWritable, writing

LONGEST = 1000  # pixels; nothing is ever drawn larger
MOST_PIXELS = 16_000_000  # of a file that is decoded to be compared; the largest of the manifest has 15 million
NOTES = ".verified.json"


@dataclass(frozen=True)
class Photograph:
    """One file of the manifest: where it comes from and what it shows."""

    file: str  # path inside its source
    source: str  # a package
    bytes: int
    sha256: str  # of the file in Debian 12: the photograph's identity, and part of every fingerprint
    pixels: Sequence[str] = field(default=(), hash=False)  # `pixel_hash` of it, whole and normalised
    also: Sequence[str] = field(default=(), hash=False)  # paths that it has in other versions of its source
    group: str | None = None  # cut-outs: one of 12 broad groups, e.g. "furry"
    kind: str | None = None  # cut-outs: a coarse class with at least three photographs, e.g. "cat"
    wnid: str | None = None  # the ImageNet class, where it is certain


@dataclass(frozen=True)
class Photographs:
    """What is there: every photograph lies at `folder / photograph.source / photograph.file`, verified."""

    folder: Path
    cutouts: tuple[Photograph, ...]
    backgrounds: tuple[Photograph, ...]
    examples: tuple[Photograph, ...]
    missing: tuple[Photograph, ...]
    fingerprint: str  # of all hashes that are there; every result carries it

    def path(self, photograph: Photograph) -> Path:
        """Where the file lies."""
        return self.folder / photograph.source / photograph.file

    def __str__(self) -> str:
        lines = [
            f"photographs {self.fingerprint} in {self.folder}",
            f"  cut-outs     {len(self.cutouts):4}  in {len({p.kind for p in self.cutouts} - {None})} kinds, "
            f"{len({p.wnid for p in self.cutouts} - {None})} ImageNet classes",
            f"  backgrounds  {len(self.backgrounds):4}",
            f"  examples     {len(self.examples):4}",
        ]
        if self.missing:
            names = ", ".join(f"{p.source}/{Path(p.file).name}" for p in self.missing[:5])
            lines.append(
                f"  left out     {len(self.missing):4}  missing or different in this distribution: {names}"
                + (", ..." if len(self.missing) > 5 else "")
            )
        return "\n".join(lines)


def manifest() -> dict:
    """The parsed data/photographs.json: sources with licences, kinds, and every photograph with its hashes."""
    return json.loads((paths.shelf() / "photographs.json").read_text(encoding="utf-8"))


def photographs(root: str | Path = "") -> Photographs:
    """The course's photographs, fetched if need be; safe to interrupt, to repeat and to run twice at once.

    What is complete is only read. What no source has is asked for again when a source changes.

    Args:
        root: the data folder; "" for the default one (see `paths.data_root`).
    Raises:
        FileNotFoundError: no cut-out or no background could be found; the message says what to do.
        BrokenArchive: the same, and an archive that might have them is damaged.
        OSError: the disk is full.
    """
    root = paths.data_root(root)
    known = manifest()
    wanted = {part: [Photograph(**entry) for entry in known[part]] for part in ("cutouts", "backgrounds", "examples")}
    everything = list({(p.source, p.file): p for part in wanted.values() for p in part}.values())
    store = _Store(root / "photographs")
    if store.lacking(everything):
        try:
            with writing(root, "photographs") as scratch:
                store.clean()
                _fetch(store, known["sources"], everything, scratch)
        except NotWritable as error:
            store.report(str(error))
    store.remember()
    found = {part: tuple(p for p in members if store.has(p)) for part, members in wanted.items()}
    if not found["cutouts"] or not found["backgrounds"]:
        broken = archives.BrokenArchive if store.broken else FileNotFoundError
        packages = [name for name, about in known["sources"].items() if about["via"] == "deb"]
        raise broken(
            f"The course's photographs are not in {store.folder}, and no package that holds them was found. Do one "
            "of:\n  - on Debian, Ubuntu or Colab: check the network and run again, or "
            f"`sudo apt-get install {' '.join(packages[:2])}`;\n"
            f"  - elsewhere: download the .deb files of {', '.join(packages)} from Debian's package pages, or a pack "
            f"that `python -m course_lib data --pack` wrote, put them into {root / 'downloads'} and run again;\n"
            '  - without any photographs: ask for the procedural world by name, source="creatures".'
            + "".join(f"\nTried: {trouble}" for trouble in store.troubles)
        )
    there = {p.sha256 for members in found.values() for p in members}
    missing = tuple(p for p in everything if p.sha256 not in there)
    return Photographs(
        store.folder,
        **found,
        missing=missing,
        fingerprint=hashlib.sha256("".join(sorted(there)).encode()).hexdigest()[:12],
    )


def example(name: str, root: str | Path = "") -> Path:
    """Path of one example photograph: they come with Python packages of the course and are there at once.

    Args:
        name: "chelsea" (a cat), "coffee", "rocket", "motorcycle_left", "astronaut", "flower" or "china".
        root: the data folder; "" for the default one.
    """
    root = paths.data_root(root)
    known = {Path(entry["file"]).stem: Photograph(**entry) for entry in manifest()["examples"]}
    if name not in known:
        raise KeyError(f"There is no example photograph {name!r}; there are: {', '.join(known)}.")
    photograph, store = known[name], _Store(root / "photographs")
    if not store.has(photograph):
        place = _installed(photograph.file)
        try:
            _take_installed("wheel", [photograph], store)
        except OSError:  # nothing can be written: it is read where it is
            if place and store.is_it(place.read_bytes(), photograph):
                return place
            raise
    if not store.has(photograph):
        raise FileNotFoundError(
            f"The photograph {name!r} comes with {photograph.source}, which is missing or of another version "
            f"here: `pip install -U {photograph.source}`."
        )
    return store.path(photograph)


def normalised(path: Path, mode: str) -> Image.Image:
    """A photograph as scenes use it: in PIL mode "RGB" or "RGBA", at most 1000 pixels long."""
    image = open_image(path, mode)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return image


def pixel_hash(image: Image.Image) -> str:
    """Identity of what an image shows: the sha256 of its size and its pixels, RGBA, 0 where nothing is seen."""
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    return hashlib.sha256(f"{image.width} {image.height} ".encode() + pixels.tobytes()).hexdigest()


class _Store:
    """The folder of prepared photographs, with notes: hashes of pixels that were decoded, archives that were tried."""

    def __init__(self, folder: Path):
        self.folder, self.there = folder, set()
        self.troubles, self.broken = [], False  # sentences; whether some are of archives
        self.notes = {"pixels": {}, "tried": {}}  # sha256 -> pixel hash; archive -> [sha256 that it lacks, trouble]
        with suppress(OSError, ValueError):  # none yet, or damaged: they only save time, and are written anew
            noted = json.loads((folder / NOTES).read_text("utf-8"))
            if isinstance(noted, dict) and all(isinstance(noted.get(name), dict) for name in self.notes):
                self.notes = noted
        self.noted = json.dumps(self.notes)

    def path(self, photograph: Photograph) -> Path:
        return self.folder / photograph.source / photograph.file

    def is_it(self, content: bytes, photograph: Photograph) -> bool:
        """Whether a file's bytes are the photograph, in the manifest's packing or in another one."""
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 == photograph.sha256:
            return True
        if sha256 not in self.notes["pixels"] and photograph.pixels:
            self.notes["pixels"][sha256] = _decoded_hash(content)
        return self.notes["pixels"].get(sha256) in photograph.pixels

    def has(self, photograph: Photograph) -> bool:
        """Whether the photograph is here, verified once in the life of this object."""
        if photograph not in self.there:
            path = self.path(photograph)
            if path.is_file() and self.is_it(path.read_bytes(), photograph):
                self.there.add(photograph)
        return photograph in self.there

    def lacking(self, members: Iterable[Photograph]) -> list[Photograph]:
        return [p for p in members if not self.has(p)]

    def put(self, content: bytes, photograph: Photograph) -> None:
        """Write one file whole or not at all, and only if it is the photograph."""
        if self.is_it(content, photograph):
            paths.write_bytes(self.path(photograph), content)
            self.there.add(photograph)

    def take(self, archive: Path, members: Iterable[Photograph], key: str = "") -> None:
        """Store what an archive has of these photographs, wherever it keeps them; what is damaged is passed over.

        Args:
            key: name of this state of the source; "" for the file's own name, size and time.
        """
        state = archive.stat() if archive.is_file() else None
        key = key or (f"{archive.name} {state.st_size} {state.st_mtime_ns}" if state else str(archive))
        wanted: dict[str, list[Photograph]] = {}
        for photograph in self.lacking(members):
            wanted.setdefault(PurePosixPath(photograph.file).stem, []).append(photograph)
        if not wanted or self.tried(key, members):
            return
        trouble = ""
        try:
            for path, content in archives.members(archive, lambda path: PurePosixPath(path).stem in wanted):
                for photograph in wanted[PurePosixPath(path).stem]:
                    if photograph not in self.there:
                        self.put(content, photograph)
                if not self.lacking(members):
                    break
        except archives.BrokenArchive as error:
            trouble, self.broken = str(error), True
            self.report(f"{trouble} It is passed over.")
        self.tick(key, members, trouble)

    def tried(self, key: str, members: Iterable[Photograph]) -> bool:
        """Whether this state of a source is known to lack whatever is lacking."""
        lacks, trouble = self.notes["tried"].get(key, ((), ""))
        known = {p.sha256 for p in self.lacking(members)} <= set(lacks)
        if known and trouble:
            self.troubles.append(trouble)
            self.broken = True
        return known

    def tick(self, key: str, members: Iterable[Photograph], trouble: str = "") -> None:
        if lacks := [p.sha256 for p in self.lacking(members)]:
            self.notes["tried"][key] = lacks, trouble
            self.remember()

    def report(self, trouble: str) -> None:
        self.troubles.append(trouble)
        _say(trouble)

    def remember(self) -> None:
        """Write the notes down, where that is possible: without them, other packings are decoded at every call."""
        if (now := json.dumps(self.notes)) != self.noted and os.access(self.folder, os.W_OK):
            with suppress(OSError):
                paths.write_text(self.folder / NOTES, now)
                self.noted = now

    def clean(self) -> None:
        """Remove what a killed process was writing: no file takes ten minutes."""
        for part in self.folder.rglob(f"{paths.PART}*"):
            with suppress(FileNotFoundError):
                if time.time() - part.stat().st_mtime > 600:
                    part.unlink()


@functools.cache
def _say(sentence: str) -> None:
    print(sentence, flush=True)  # once in a process


def _decoded_hash(content: bytes) -> str:
    """The pixel hash of a PNG or JPEG; "" for what is damaged or huge, which is no photograph of the manifest."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
            return pixel_hash(image) if image.width * image.height <= MOST_PIXELS else ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def _fetch(store: _Store, sources: dict[str, dict], everything: list[Photograph], scratch: Path) -> None:
    """Try one place after the other until every file is there or no place is left."""
    place = store.folder.parent / "downloads"
    for pack in (os.environ.get("COURSE_PACK", ""), *sorted(place.glob("*.zip")), _published_pack()):
        if pack and store.lacking(everything):
            _take_pack(str(pack), everything, store, scratch)
    for source, about in sources.items():
        members = [p for p in everything if p.source == source]
        _take_installed(about["via"], members, store)
        if about["via"] == "deb":
            for package in sorted(place.glob(f"{source}_*.deb")):
                store.take(package, members)
            if store.lacking(members):
                _take_apt(source, members, store, scratch)


def _published_pack() -> str:
    """The address in a checkout's pyproject.toml: [tool.course] photographs = "https://...#sha256=..."."""
    home = paths.checkout()
    settings = tomllib.loads((home / "pyproject.toml").read_text("utf-8")) if home else {}
    return settings.get("tool", {}).get("course", {}).get("photographs", "")


def _take_pack(pack: str, members: list[Photograph], store: _Store, scratch: Path) -> None:
    """Store what a pack has: a file, or an address, which is not asked again in this process if it fails."""
    if "://" not in pack:
        store.take(Path(pack).expanduser(), members)
    elif not store.tried(pack, members) and pack not in UNREACHABLE:
        try:
            store.take(downloads.pack(pack, scratch), members, pack)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) in FULL:
                raise
            UNREACHABLE.add(pack)
            store.report(f"{pack}: expected the course's photographs, got no answer or another file ({error}).")


UNREACHABLE: set[str] = set()


def _installed(file: str) -> Path | None:
    """Where a file of an installed wheel lies."""
    spec = importlib.util.find_spec(file.split("/")[0])
    return Path(spec.origin).parents[1] / file if spec and spec.origin else None


def _take_installed(via: str, members: Iterable[Photograph], store: _Store) -> None:
    """Copy from an installed Debian package (files under /) or an installed wheel (files beside its top module)."""
    for photograph in store.lacking(members):
        for file in (photograph.file, *photograph.also):
            place = _installed(file) if via == "wheel" else Path("/") / file
            if place and place.is_file():
                store.put(place.read_bytes(), photograph)


def _take_apt(source: str, members: list[Photograph], store: _Store, scratch: Path) -> None:
    """Store what the package that apt offers has, unless that version was tried; it is downloaded once.

    A machine without lists of packages, or with old ones, gets new ones in a private folder, once a day.
    """
    today = f"{source} in the lists of packages of {date.today()}"
    if not shutil.which("apt-get") or "apt-get" in UNREACHABLE or store.tried(today, members):
        return
    for private in (False, True):
        options = _private_lists(scratch) if private else ()
        if options is None:
            return
        offer = downloads.offer(source, options)
        if offer is None:
            continue
        key = f"{offer[0]} {offer[2]}"
        if store.tried(key, members):
            return
        if package := downloads.package(source, options, scratch):
            store.take(package, members, key)
            package.unlink()
            return
    store.tick(today, members)


def _private_lists(scratch: Path) -> tuple[str, ...] | None:
    """Options of apt-get; it is not asked again in this process if there is no network."""
    options = downloads.private_lists(scratch)
    if options is None:
        UNREACHABLE.add("apt-get")
        _say("apt-get finds no lists of packages: there is no network, or no source that answers.")
    return options
