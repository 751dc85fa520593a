"""Lists and annotations read with care: what is missing or broken is named in a sentence, never passed on."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from course_lib.data.images import BrokenFile


def existing(path: Path, otherwise: str) -> Path:
    """The path, if a file is there.

    Args:
        otherwise: the sentence of the FileNotFoundError, without the path that it begins with: "is missing: ...".
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} {otherwise}")
    return path


def read_lines(path: Path, otherwise: str = "is missing.") -> list[str]:
    """Lines of a text file, which is UTF-8; `otherwise` as in `existing`."""
    return existing(path, otherwise).read_text(encoding="utf-8").splitlines()


def read_xml(path: Path, otherwise: str) -> ElementTree.Element:
    """The outermost element of an annotation; `otherwise` as in `existing`."""
    try:
        return ElementTree.parse(existing(path, otherwise)).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise BrokenFile(f"{path} is not a complete annotation ({error}). Unpack it again.") from error
