"""The photographs of the course: found or fetched, verified by hash, never trusted.

`photographs()` looks, in this order, for: files prepared earlier in DATA_ROOT/photographs, an installed package, a package
file in DATA_ROOT/downloads, and `apt-get download` (no root needed). Only the files of the manifest are taken out of a
package, nothing in it is ever executed, and each file counts only if its sha256 is the manifest's. Distributions ship
different versions: a photograph that is missing or different is left out, listed, and changes the fingerprint.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from course_lib import paths


@dataclass(frozen=True)
class Photograph:
    """One file of the manifest: where it comes from and what it shows."""

    file: str  # path inside its source
    source: str  # a package
    bytes: int
    sha256: str
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
    """The parsed data/photographs.json: sources with licences, kinds, and every photograph with its hash."""
    return json.loads((paths.shelf() / "photographs.json").read_text(encoding="utf-8"))


def photographs(root: str | Path = "") -> Photographs:
    """The course's photographs, fetched if need be; safe to interrupt, to repeat and to run twice at once.

    Args:
        root: the data folder; "" for the default one (see `paths.data_root`).
    Raises:
        FileNotFoundError: no cut-out or no background could be found; the message says what to do.
    """
    root = paths.data_root(root)
    folder = root / "photographs"
    known = manifest()
    wanted = {part: [Photograph(**entry) for entry in known[part]] for part in ("cutouts", "backgrounds", "examples")}
    everything = {(p.source, p.file): p for part in wanted.values() for p in part}.values()
    if any(not _verified(folder, p) for p in everything):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".photographs.lock"):
            for source, about in known["sources"].items():
                _fetch_source(source, about, [p for p in everything if p.source == source], folder, root / "downloads")
    found = {part: tuple(p for p in members if _verified(folder, p)) for part, members in wanted.items()}
    if not found["cutouts"] or not found["backgrounds"]:
        raise FileNotFoundError(_what_to_do(root, known["sources"]))
    there = {p.sha256 for members in found.values() for p in members}
    missing = tuple(p for p in everything if p.sha256 not in there)
    return Photographs(
        folder, **found, missing=missing, fingerprint=hashlib.sha256("".join(sorted(there)).encode()).hexdigest()[:12]
    )


def example(name: str, root: str | Path = "") -> Path:
    """Path of one example photograph: they come with Python packages of the course and are there at once.

    Args:
        name: "chelsea" (a cat), "coffee", "rocket", "motorcycle_left", "astronaut", "flower" or "china".
        root: the data folder; "" for the default one.
    """
    folder = paths.data_root(root) / "photographs"
    known = {Path(entry["file"]).stem: Photograph(**entry) for entry in manifest()["examples"]}
    if name not in known:
        raise KeyError(f"There is no example photograph {name!r}; there are: {', '.join(known)}.")
    photograph = known[name]
    if not _verified(folder, photograph):
        _take_installed("wheel", {photograph.file: photograph}, folder)
    if not _verified(folder, photograph):
        raise FileNotFoundError(
            f"The photograph {name!r} comes with {photograph.source}, which is missing or of another version "
            f"here: `pip install -U {photograph.source}`."
        )
    return folder / photograph.source / photograph.file


def _verified(folder: Path, photograph: Photograph) -> bool:
    path = folder / photograph.source / photograph.file
    return (
        path.is_file()
        and path.stat().st_size == photograph.bytes
        and hashlib.sha256(path.read_bytes()).hexdigest() == photograph.sha256
    )


def _fetch_source(source: str, about: dict, members: list[Photograph], folder: Path, downloads: Path) -> None:
    """Try one place after the other until every file of the source is there or no place is left."""

    def lacking() -> dict[str, Photograph]:
        return {p.file: p for p in members if not _verified(folder, p)}

    _take_installed(about["via"], lacking(), folder)
    if about["via"] != "deb":
        return
    for package in sorted(downloads.glob(f"{source}_*.deb")) if lacking() else []:
        _take_deb(package, lacking(), folder)
    if lacking():
        with tempfile.TemporaryDirectory() as scratch:
            package = _apt_download(source, Path(scratch))
            if package:
                _take_deb(package, lacking(), folder)


def _take_installed(via: str, wanted: dict[str, Photograph], folder: Path) -> None:
    """Copy from an installed Debian package (files under /) or an installed wheel (files beside its top module)."""
    for file, photograph in wanted.items():
        if via == "wheel":
            spec = importlib.util.find_spec(file.split("/")[0])
            place = Path(spec.origin).parents[1] / file if spec and spec.origin else None
        else:
            place = Path("/") / file
        if place and place.is_file():
            with open(place, "rb") as stream:
                _store(stream, photograph, folder)


def _take_deb(package: Path, wanted: dict[str, Photograph], folder: Path) -> None:
    """Store the wanted files of a .deb; the archive is streamed, and nothing else of it touches the disk."""
    with _data_archive(package) as archive:
        for member in archive:
            file = _safe_name(member.name, package)
            if member.isfile() and file in wanted and member.size == wanted[file].bytes:
                _store(archive.extractfile(member), wanted[file], folder)


def _safe_name(name: str, package: Path) -> str:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        raise ValueError(
            f"{package} holds a file named {name!r}, which would leave the data folder. Nothing more of it is "
            "read: delete the package and get it from your distribution."
        )
    return "/".join(parts)


def _store(stream: io.IOBase, photograph: Photograph, folder: Path) -> None:
    """Write one file whole or not at all, and only if it is the manifest's, byte for byte."""
    content = stream.read(photograph.bytes + 1)
    if hashlib.sha256(content).hexdigest() != photograph.sha256:
        return
    place = folder / photograph.source / photograph.file
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".part-", delete=False) as part:
        part.write(content)
    os.replace(part.name, place)


@contextlib.contextmanager
def _data_archive(package: Path) -> Iterator[tarfile.TarFile]:
    """The data member of a .deb as a stream. A .deb is an ar archive: a magic line, then members with 60-byte headers."""
    with open(package, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{package} is not a Debian package (no ar header). Delete it and download it again.")
        while header := file.read(60):
            if len(header) < 60 or header[58:] != b"`\n":
                break
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name in ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2"):
                with tarfile.open(fileobj=_Window(file, size), mode="r|*") as archive:
                    yield archive
                return
            if name == "data.tar.zst":  # Ubuntu's compression
                with (
                    _unzstd(package, _Window(file, size)) as stream,
                    tarfile.open(fileobj=stream, mode="r|") as archive,
                ):
                    yield archive
                return
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"{package} is truncated or holds no data archive. Delete it and download it again.")


class _Window(io.RawIOBase):
    """The next `size` bytes of an open file, as a file of its own."""

    def __init__(self, file: io.IOBase, size: int):
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(chunk)
        return chunk


@contextlib.contextmanager
def _unzstd(package: Path, window: _Window) -> Iterator[io.IOBase]:
    """Decompressed bytes: by Python itself from 3.14 on, else by dpkg-deb, which unpacks and runs nothing of the package."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        with zstd.open(window) as stream:
            yield stream
    elif shutil.which("dpkg-deb"):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
            yield process.stdout
            process.stdout.close()
            process.terminate()
    else:
        raise ValueError(
            f"{package} is compressed with zstd: unpacking it needs dpkg-deb or Python 3.14. "
            "Debian's package of the same name uses xz and works everywhere."
        )


def _apt_download(source: str, scratch: Path) -> Path | None:
    """Download a package with apt-get, without root; package lists are made in a private folder if the machine has none."""
    if not shutil.which("apt-get"):
        return None
    print(f"Downloading {source} (photographs, once) ...", flush=True)
    private = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache", "-o", "Debug::NoLocking=1"]
    (scratch / "state/lists/partial").mkdir(parents=True)
    (scratch / "cache/archives/partial").mkdir(parents=True)
    for options, update in (([], False), (private, True)):
        if update and _apt(["update", *options], scratch) != 0:
            continue
        if _apt(["download", *options, source], scratch) == 0:
            return next(scratch.glob(f"{source}_*.deb"), None)
    return None


def _apt(arguments: list[str], folder: Path) -> int:
    try:
        return subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=900,
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def _what_to_do(root: Path, sources: dict) -> str:
    packages = [name for name, about in sources.items() if about["via"] == "deb"]
    return (
        f"The course's photographs are not in {root / 'photographs'}, and no package that holds them was found. Do one of:\n"
        f"  - on Debian, Ubuntu or Colab: check the network and run again, or `sudo apt-get install {' '.join(packages[:2])}`;\n"
        f"  - elsewhere: download the .deb files of {', '.join(packages)} from Debian's package pages, put them into "
        f"{root / 'downloads'} and run again;\n"
        '  - without any photographs: ask for the procedural world by name, source="creatures".'
    )
