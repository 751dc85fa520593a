"""Where things are: the checkout, the data, the measured results, the shelf. Nothing here creates a folder."""

import os
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PART = ".part-"  # what the names of half-written files begin with


def checkout() -> Path | None:
    """The course's folder if course_lib lies in a checkout, None if it was installed as a package (as on Colab)."""
    root = HERE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def data_root(given: str | Path = "") -> Path:
    """The data folder: the one given, else COURSE_DATA of the environment, else data/ of the checkout, else ./data."""
    chosen = given or os.environ.get("COURSE_DATA") or (checkout() or Path.cwd()) / "data"
    return Path(chosen).expanduser().absolute()


def results() -> Path:
    """The folder of measured figures: COURSE_RESULTS of the environment, else build/results of the checkout or here."""
    chosen = os.environ.get("COURSE_RESULTS") or (checkout() or Path.cwd()) / "build" / "results"
    return Path(chosen).expanduser().absolute()


def work() -> Path:
    """The folder of a student's own copies and results: COURSE_WORK of the environment, else work/ of the checkout."""
    chosen = os.environ.get("COURSE_WORK") or (checkout() or Path.cwd()) / "work"
    return Path(chosen).expanduser().absolute()


def shelf() -> Path:
    """The folder with photographs.json and evidence/: data/ of the checkout, else the copy in the installed library."""
    root = checkout()
    return root / "data" if root else HERE / "shelf"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: neither an interrupt nor two writers at once leave half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PART)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp makes files that only the owner reads
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
