"""Archives read with suspicion: a .deb and a pack are streams of (name, size, content), and nothing is unpacked.

No name in an archive ever becomes a path. Sizes are bounded before anything is read: a gigabyte that claims to be a
header, or that grows out of a kilobyte, ends in a sentence that names the archive.
"""

import bz2
import gzip
import io
import lzma
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

MAX_MEMBER = 32 << 20  # bytes of one file; the largest photograph has 5 million
MAX_UNPACKED = 4 << 30  # bytes of one archive; the largest package has 0.3 billion
MAX_MEMORY = 256 << 20  # bytes that a decompressor may take; `xz -9` needs 65 million
CHUNK = 1 << 20
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
DAMAGED = (  # what the unpackers raise, one or the other
    OSError, EOFError, ValueError, RuntimeError, MemoryError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError,
    zlib.error,
)  # fmt: skip


class BrokenArchive(ValueError):
    """An archive that cannot be read or must not be; the message names it and says what to do."""


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the files that are wanted of a .deb, or of a .zip (a pack), one after the other.

    Args:
        wanted: of a path such as "usr/share/bird.png"; only for these is content read, of at most MAX_MEMBER bytes.
    Raises:
        BrokenArchive: no such archive, damaged, of sizes that no such archive has, or with a name that would leave a
            folder.
    """
    if not archive.is_file():
        came = "a folder or pipe" if archive.exists() else "nothing"
        raise BrokenArchive(f"{archive}: expected an archive, got {came}; put the file there.")
    try:
        for name, size, read in (_zip if archive.suffix == ".zip" else _deb)(archive):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise BrokenArchive(
                    f"{archive} holds a file named {name!r}, which would leave the data folder. Nothing more of "
                    "it is read: delete the archive and get it from where it is published."
                )
            if size <= MAX_MEMBER and wanted(str(path)):
                yield str(path), read()
    except BrokenArchive:
        raise
    except DAMAGED as error:
        raise BrokenArchive(
            f"{archive}: expected a whole archive, got a damaged one ({error or type(error).__name__}); delete it and "
            "download it again."
        ) from error


def _zip(archive: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    if archive.stat().st_size > MAX_MEMORY:  # zipfile reads the list of members at once
        raise BrokenArchive(
            f"{archive}: expected a pack of at most {MAX_MEMORY:,} bytes, got a larger file; delete it."
        )
    with zipfile.ZipFile(archive) as pack:
        entries = [entry for entry in pack.infolist() if not entry.is_dir()]
        for entry in entries:
            plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
            packing = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not plain or not packing or entry.flag_bits & 1 or entry.file_size > MAX_MEMBER:
                raise BrokenArchive(
                    f"{archive}: expected plain files of at most {MAX_MEMBER:,} bytes, got {entry.filename!r}, which "
                    "is a link, encrypted, oddly packed or larger; delete the archive."
                )
        if sum(entry.file_size for entry in entries) > MAX_MEMORY:
            raise BrokenArchive(
                f"{archive} would unpack to more than {MAX_MEMORY:,} bytes, which no pack does; delete it."
            )
        for entry in entries:
            with pack.open(entry) as member:  # read(size), not read(): the size may be a lie
                yield entry.filename, entry.file_size, partial(member.read, entry.file_size)


def _deb(archive: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Files of a package's data archive. Extended headers are passed over: they hold names longer than any of ours."""
    with _data(archive) as file:
        stream, total = _Exactly(file), 0
        while any(header := stream.read(tarfile.BLOCKSIZE)):
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            total += entry.size
            if entry.size < 0 or total > MAX_UNPACKED:
                raise BrokenArchive(f"{archive} claims sizes that no package has. Delete it and download it again.")
            end = stream.position + entry.size + -entry.size % tarfile.BLOCKSIZE
            if entry.type not in EXTENDED:
                size = entry.size if entry.isreg() else MAX_MEMBER + 1  # a link has no content and is not wanted
                yield entry.name, size, partial(stream.read, entry.size)
            while stream.position < end:
                stream.read(min(end - stream.position, CHUNK))


class _Exactly:
    """A stream that gives as many bytes as are asked for, or ends."""

    def __init__(self, file):
        self.file, self.position = file, 0

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.file.read(min(size, CHUNK))
            if not part:
                raise EOFError("it ends too early")
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)


class _Unpacked(io.RawIOBase):
    """What a decompressor makes of a file."""

    def __init__(self, file, decompressor):  # files may be wrapped by a bar
        self.file, self.decompressor = file, decompressor

    def read(self, size: int = -1) -> bytes:
        data = b""
        while not data and not self.decompressor.eof:
            packed = self.file.read(CHUNK) if self.decompressor.needs_input else b""
            if self.decompressor.needs_input and not packed:
                raise EOFError("it ends too early")
            data = self.decompressor.decompress(packed, size)
        return data


@contextmanager
def _data(archive: Path) -> Iterator:
    """The data archive of a .deb as a stream. A .deb is an ar archive: a magic line, members with 60-byte headers."""
    about = {"desc": f"Reading {archive.name}", "total": archive.stat().st_size, "unit_scale": True, "delay": 2}
    with open(archive, "rb") as packed, tqdm.wrapattr(packed, "read", **about) as file:
        if file.read(8) != b"!<arch>\n":
            raise BrokenArchive(f"{archive} is not a Debian package (no ar header). Delete it and download it again.")
        while (header := file.read(60))[58:] == b"`\n":
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
            if not size.isdigit():
                break
            if name == "data.tar":
                yield file
            elif name == "data.tar.gz":
                yield gzip.GzipFile(fileobj=file)
            elif name == "data.tar.bz2":
                yield _Unpacked(file, bz2.BZ2Decompressor())
            elif name == "data.tar.xz":
                yield _Unpacked(file, lzma.LZMADecompressor(memlimit=MAX_MEMORY))
            elif name == "data.tar.zst":
                with _zstandard(archive, file) as stream:
                    yield stream
            else:
                file.seek(int(size) + int(size) % 2, io.SEEK_CUR)
                continue
            return
    raise BrokenArchive(f"{archive} is truncated or holds no data archive. Delete it and download it again.")


@contextmanager
def _zstandard(archive: Path, file) -> Iterator:
    """Ubuntu's packing. Before Python 3.14, dpkg-deb unpacks it; it runs nothing of the package."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        yield _Unpacked(file, zstd.ZstdDecompressor())
    elif shutil.which("dpkg-deb"):
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                yield process.stdout
            finally:
                process.kill()
    else:
        raise BrokenArchive(
            f"{archive} is compressed with zstd: unpacking it needs dpkg-deb or Python 3.14. "
            "Debian's package of the same name uses xz and works everywhere."
        )
