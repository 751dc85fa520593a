"""What is downloaded: packages by apt-get, without root, and a pack by pooch; both with a bar of size and time left."""

import errno
import functools
import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

from tqdm import tqdm

from course_lib.worlds.folders import full_disk

ROOM = 64 << 20  # bytes that must stay free beside a package: the photographs of all packages take 31 million
PATIENCE = 180  # seconds without a byte after which a download is given up
CRUMBS = 1 << 20  # bytes; a disk with less is full
PACK = "pack.zip"


def pack(address: str, scratch: Path) -> Path:
    """Download a pack into a folder.

    Args:
        address: of http or https; what follows #sha256= is the hash that the file must have.
    Raises:
        OSError, ValueError: unreachable, or of another hash.
    """
    import pooch  # 0.2 s that only a download needs

    url, _, known = address.partition("#sha256=")
    pooch.get_logger().setLevel("WARNING")
    fetcher = pooch.create(scratch, base_url="", registry={PACK: known or None}, urls={PACK: url}, retry_if_failed=2)
    return Path(fetcher.fetch(PACK, downloader=pooch.HTTPDownloader(progressbar=True, timeout=30)))


@functools.cache
def offer(package: str, options: tuple[str, ...] = ()) -> tuple[str, int, str] | None:
    """File name, bytes and hash of the version that apt offers, or None; asks for what is known, not the network."""
    command = ["apt-get", *options, "-qq", "--print-uris", "download", package]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    fields = shlex.split(done.stdout) if done.returncode == 0 else []
    return (fields[1], int(fields[2]), fields[3]) if len(fields) == 4 else None


@functools.cache  # one update for all packages
def private_lists(scratch: Path) -> tuple[str, ...] | None:
    """Options with which apt-get knows newly fetched lists of packages in a private folder; None if unreachable."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (scratch / part).mkdir(parents=True, exist_ok=True)
    options = (f"-oDir::State={scratch}/state", f"-oDir::Cache={scratch}/cache", "-oDebug::NoLocking=1")
    done = apt_get([*options, "update", "--error-on=any"], scratch, "Downloading lists of packages")
    return options if done else None


def package(name: str, options: tuple[str, ...], scratch: Path) -> Path | None:
    """Download the version that is on offer into a folder; None if that fails.

    Raises:
        OSError: the disk is or becomes full.
    """
    file, size, _ = offer(name, options)
    if shutil.disk_usage(scratch).free < size + ROOM:
        raise full_disk(scratch.parent, f"{file} ({size / 1e6:.0f} MB)")
    if apt_get([*options, "download", name], scratch, f"Downloading {name} (photographs, once)", size):
        return next((path for path in scratch.glob("*.deb") if path.name == file), None)
    if shutil.disk_usage(scratch).free < CRUMBS:
        raise full_disk(scratch.parent, file)
    return None


def apt_get(arguments: list[str], scratch: Path, title: str, size: int | None = None) -> bool:
    """Whether apt-get did it; what it downloads grows in `scratch`, and the bar with it."""
    before = _bytes(scratch)
    command = ["apt-get", "-q", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        tqdm(desc=title, total=size, unit="B", unit_scale=True) as bar,
        subprocess.Popen(command, cwd=scratch, **streams) as process,
    ):
        last = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - last < PATIENCE:
                time.sleep(0.1)
                grown = _bytes(scratch) - before - bar.n
                if grown:
                    last = time.monotonic()
                    bar.update(grown)
        finally:
            process.kill()
    return process.returncode == 0


def _bytes(folder: Path) -> int:
    """Size of all files below, some of which vanish meanwhile."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    return total
