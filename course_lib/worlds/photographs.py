"""The photographs of the course: found or fetched, verified by hash, never trusted.

`photographs()` looks, in this order, for: files prepared earlier in DATA_ROOT/photographs, an installed package, a
package file in DATA_ROOT/downloads, and `apt-get download` (no root needed). Only the files of the manifest are taken
out of a package, nothing in it is ever executed, and each file counts only if its sha256 is the manifest's.
Distributions ship different versions: a photograph that is missing or different is left out, listed, and changes the
fingerprint.
"""

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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from course_lib import paths

DATA_MEMBERS = ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2", "data.tar.zst")  # of a .deb; Ubuntu's is zst


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
    if _lacking(everything, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".photographs.lock"):
            for source, about in known["sources"].items():
                _fetch_source(source, about, [p for p in everything if p.source == source], folder, root / "downloads")
    found = {part: tuple(p for p in members if _verified(p, folder)) for part, members in wanted.items()}
    if not found["cutouts"] or not found["backgrounds"]:
        packages = [name for name, about in known["sources"].items() if about["via"] == "deb"]
        raise FileNotFoundError(
            f"The course's photographs are not in {folder}, and no package that holds them was found. Do one of:\n"
            "  - on Debian, Ubuntu or Colab: check the network and run again, or "
            f"`sudo apt-get install {' '.join(packages[:2])}`;\n"
            f"  - elsewhere: download the .deb files of {', '.join(packages)} from Debian's package pages, put them "
            f"into {root / 'downloads'} and run again;\n"
            '  - without any photographs: ask for the procedural world by name, source="creatures".'
        )
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
    _take_installed("wheel", _lacking([photograph], folder), folder)
    if not _verified(photograph, folder):
        raise FileNotFoundError(
            f"The photograph {name!r} comes with {photograph.source}, which is missing or of another version "
            f"here: `pip install -U {photograph.source}`."
        )
    return folder / photograph.source / photograph.file


def _verified(photograph: Photograph, folder: Path) -> bool:
    path = folder / photograph.source / photograph.file
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == photograph.sha256


def _lacking(members: Iterable[Photograph], folder: Path) -> dict[str, Photograph]:
    return {p.file: p for p in members if not _verified(p, folder)}


def _fetch_source(source: str, about: dict, members: list[Photograph], folder: Path, downloads: Path) -> None:
    """Try one place after the other until every file of the source is there or no place is left."""
    _take_installed(about["via"], _lacking(members, folder), folder)
    if about["via"] != "deb":
        return
    for package in sorted(downloads.glob(f"{source}_*.deb")):
        _take_deb(package, _lacking(members, folder), folder)
    if _lacking(members, folder):
        with tempfile.TemporaryDirectory() as scratch:
            package = _apt_download(source, Path(scratch))
            if package:
                _take_deb(package, _lacking(members, folder), folder)


def _take_installed(via: str, wanted: dict[str, Photograph], folder: Path) -> None:
    """Copy from an installed Debian package (files under /) or an installed wheel (files beside its top module)."""
    for file, photograph in wanted.items():
        place = Path("/") / file
        if via == "wheel":
            spec = importlib.util.find_spec(file.split("/")[0])
            place = Path(spec.origin).parents[1] / file if spec and spec.origin else None
        if place and place.is_file():
            _store(place.read_bytes(), photograph, folder)


def _take_deb(package: Path, wanted: dict[str, Photograph], folder: Path) -> None:
    """Store the wanted files of a .deb; the archive is streamed, and nothing else of it touches the disk."""
    if not wanted:
        return
    with _data_archive(package) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.name.startswith("/") or ".." in parts:
                raise ValueError(
                    f"{package} holds a file named {member.name!r}, which would leave the data folder. Nothing more of "
                    "it is read: delete the package and get it from your distribution."
                )
            photograph = wanted.get("/".join(parts))
            if photograph and member.isfile() and member.size == photograph.bytes:
                _store(archive.extractfile(member).read(), photograph, folder)


def _store(content: bytes, photograph: Photograph, folder: Path) -> None:
    """Write one file whole or not at all, and only if it is the manifest's, byte for byte."""
    if hashlib.sha256(content).hexdigest() != photograph.sha256:
        return
    place = folder / photograph.source / photograph.file
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".part-", delete=False) as part:
        part.write(content)
    os.replace(part.name, place)


@contextmanager
def _data_archive(package: Path) -> Iterator[tarfile.TarFile]:
    """The data member of a .deb as a stream.

    A .deb is an ar archive: a magic line, then members with 60-byte headers.
    """
    with open(package, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"{package} is not a Debian package (no ar header). Delete it and download it again.")
        while header := file.read(60):
            if header[58:] != b"`\n":
                break
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            if name in DATA_MEMBERS:
                with _unpacked(name, file, package) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
                    yield archive
                return
            file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"{package} is truncated or holds no data archive. Delete it and download it again.")


@contextmanager
def _unpacked(name: str, file: io.IOBase, package: Path) -> Iterator[io.IOBase]:
    """A stream that tarfile reads. Before Python 3.14, dpkg-deb unpacks zstd; it runs nothing of the package."""
    if not name.endswith(".zst") or sys.version_info >= (3, 14):
        yield file
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
    """Download a package with apt-get, without root; a machine without package lists gets some in a private folder."""
    if not shutil.which("apt-get"):
        return None
    print(f"Downloading {source} (photographs, once) ...", flush=True)
    for part in ("state/lists/partial", "cache/archives/partial"):
        (scratch / part).mkdir(parents=True)
    private = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache", "-o", "Debug::NoLocking=1"]
    for commands in ([["download", source]], [["update", *private], ["download", *private, source]]):
        if all(_apt(command, scratch) for command in commands):
            return next(scratch.glob(f"{source}_*.deb"), None)
    return None


def _apt(arguments: list[str], folder: Path) -> bool:
    command = ["apt-get", "-q", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
