"""What this process may use of the machine: a container often gets less than there is."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def cores(root: Path = Path("/")) -> int:
    """Whole processor cores that this process may keep busy, at least 1.

    Args:
        root: of the file system in which Linux tells about control groups, version 1 or 2.
    """
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        limit = _numbers(folder / "cpu.max") or (
            _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        )
        if len(limit) == 2 and limit[1]:  # microseconds, in so many
            known = min(known, limit[0] // limit[1])
    return max(1, known)


def memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may use, None where nobody says.

    Args:
        root: as of `cores`.
    """
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else []
    for folder in _control_groups(root, "memory"):
        known += _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
    return min(known, default=None)


def threads(variable: str = "OMP_NUM_THREADS") -> int:
    """Threads of one lesson as the environment says: the first number of a list such as "2,1"; without one, 1."""
    found = re.match(r"\s*\+?(\d{1,4})\b", os.environ.get(variable, ""))
    return max(1, int(found[1])) if found else 1


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the whole machine."""
    mounted = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = mounted / controllers if controllers else mounted
        own = base / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == base or base in folder.parents)


def _numbers(file: Path) -> tuple[int, ...]:
    """The numbers in a file of the kernel; none if it is missing or says that there is no limit ("max", -1)."""
    try:
        words = file.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(map(int, words)) if words and all(word.isdigit() for word in words) else ()
