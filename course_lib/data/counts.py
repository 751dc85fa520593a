"""The published counts of a benchmark: an archive that lacks images gives figures that mean nothing, so it is refused."""

from pathlib import Path

from course_lib.data.images import BrokenFile


def check_counts(root: Path, benchmark: str, counts: dict[str, tuple[int, int]]) -> None:
    """Nothing if every count is the published one, or if `root` is a miniature (it holds miniature.json).

    Args:
        counts: what is counted -> (found, published).
    Raises:
        BrokenFile: a sentence with what was expected, what was found and what to do.
    """
    wrong = [
        f"{published:,} {what} were expected, {found:,} found"
        for what, (found, published) in counts.items()
        if found != published
    ]
    if wrong and not (root / "miniature.json").is_file():
        raise BrokenFile(
            f"{root} is not the whole of {benchmark}: {'; '.join(wrong)}. Unpack the archive again. A selection of your own "
            'must hold a file miniature.json with {"world": "its name"}, so that nobody takes its figures for the benchmark\'s.'
        )
