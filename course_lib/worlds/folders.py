"""How data folders are written: by one process at a time, whole or not at all. Who only reads needs none of this."""

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

DAY = 86_400  # seconds; no writer takes that long
FULL = (errno.ENOSPC, errno.EDQUOT)


class NotWritable(OSError):
    """Something is to be written into a data folder, and this user may not; the message says what to do."""


@contextmanager
def writing(root: Path, name: str) -> Iterator[Path]:
    """An empty folder inside the data folder, for the one process that now writes what is called `name`.

    Others wait, with a bar; a process that dies is waited for no longer. The folder and what a killed process left
    are removed. All users who may write into the data folder may lock.

    Raises:
        NotWritable: the data folder is read-only for this user.
        OSError: the disk is full; nothing is left behind.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.writing", mode=0o666)
        _wait(lock, name)
    except OSError as error:
        raise NotWritable(
            f"{root}: expected {name}, complete, or a folder to write it into, got a folder without it that this user "
            f"may not write to ({error.strerror}); set COURSE_DATA (in a lesson DATA_ROOT) to a folder of your own."
        ) from error
    try:
        for left in root.glob(".writing-*"):
            own = left.name.startswith(f".writing-{name}.")  # we hold its lock: its writer is dead
            with suppress(FileNotFoundError):
                if own or ("." not in left.name[1:] and time.time() - left.stat().st_mtime > DAY):  # earlier editions'
                    shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".writing-{name}.", ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)
    except OSError as error:
        if error.errno in FULL:
            raise full_disk(root, name) from error
        raise
    finally:
        lock.release()


def full_disk(root: Path, name: str) -> OSError:
    """What to say when there is no room."""
    return OSError(
        f"{root}: expected room for {name}, got a full disk; free some space, or set COURSE_DATA (in a lesson "
        "DATA_ROOT) to a folder on another disk."
    )


def _wait(lock: FileLock, name: str) -> None:
    with suppress(Timeout):
        lock.acquire(timeout=0.3)
        return
    with tqdm(desc=f"Waiting for {name}, which another process writes", bar_format="{desc} ({elapsed})") as bar:
        while not lock.is_locked:
            with suppress(Timeout):
                lock.acquire(timeout=1)
            bar.update()
