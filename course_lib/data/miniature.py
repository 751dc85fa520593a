"""Benchmark or miniature? A folder that holds miniature.json says what it is; any other must be the whole benchmark."""

import os
from pathlib import Path

from course_lib.data.files import BrokenFile, read_json


def about(folder: Path) -> dict:
    """What miniature.json says; nothing if there is none.

    Raises:
        BrokenFile: it is damaged, or says no "world".
    """
    note = folder / "miniature.json"
    found = read_json(note) if os.path.lexists(note) else {}
    if found and not isinstance(found.get("world"), str):
        raise BrokenFile(
            f'{note}: expected {{"world": "its name", ...}}, got {found!s:.80}; write the miniature again.'
        )
    return found


def fingerprint(folder: Path) -> str:
    """What a miniature was made from, in 12 letters, or "real data" for a folder that is not a miniature."""
    return about(folder).get("world", "real data")


def check_counts(root: Path, benchmark: str, found: dict[str, int], published: dict[str, int]) -> None:
    """Nothing if every published count was found, or if `root` is a miniature (it holds miniature.json).

    An archive that lacks images gives figures that mean nothing, so it is refused.

    Args:
        found, published: what is counted -> how many there are, and how many there should be.
    Raises:
        BrokenFile: a sentence with what was expected, what was found and what to do.
    """
    wrong = [
        f"{count:,} {what} were expected, {found.get(what, 0):,} found"
        for what, count in published.items()
        if found.get(what) != count
    ]
    if wrong and not about(root):
        raise BrokenFile(
            f"{root} is not the whole of {benchmark}: {'; '.join(wrong)}. Unpack the archive again. A selection of "
            'your own must hold a file miniature.json with {"world": "its name"}, so that nobody takes its figures for '
            "the benchmark's."
        )
