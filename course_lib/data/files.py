"""Lists, notes and annotations read with care: what is missing or broken is named in a sentence, never passed on."""

import codecs
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

LINE = 1000  # characters; real lists stay below 200
ANNOTATION = 2**20  # bytes; real annotations stay below 50,000


class BrokenFile(ValueError):
    """A file of a data set is not what its layout promises; the message names the file and what to do."""


def existing(path: str | Path, otherwise: str = "is missing; unpack or write it again.") -> Path:
    """The path, if a file is there.

    Args:
        otherwise: the sentence of the FileNotFoundError, without the path that it begins with: "is missing: ...".
    Raises:
        FileNotFoundError: nothing is there.
        BrokenFile: a folder, a pipe or a device, which would never end.
    """
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise BrokenFile(f"{path}: expected a file, got a folder, pipe or device; put the file in its place.")
        raise FileNotFoundError(f"{path} {otherwise}")
    return Path(path)


def read_lines(path: Path, otherwise: str = "is missing; unpack it again.") -> dict[int, str]:
    """The lines of a list that are not blank, by number from 1, without spaces at their ends; \\ is read as /.

    Lists come from many editors: UTF-8 with or without a byte-order mark, or UTF-16 with one; lines of any system.

    Args:
        otherwise: as in `existing`.
    Raises:
        BrokenFile: another encoding, zero bytes or a line of over 1,000 characters. And the errors of `existing`.
    """
    content = existing(path, otherwise).read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + len(re.findall(rb"\r\n|\r|\n", content[: error.start]))
        raise BrokenFile(
            f"{path}, line {line}: expected text in UTF-8, got the byte {content[error.start]:#04x}; save the list as "
            "UTF-8, or unpack it again."
        ) from None
    lines = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if "\0" in line or len(line) > LINE:
            came = "zero bytes" if "\0" in line else f"{len(line):,} characters in one line"
            raise BrokenFile(f"{path}, line {number}: expected text, got {came}; save it as UTF-8, or unpack it again.")
        if line.strip():
            lines[number] = line.strip().replace("\\", "/")
    return lines


def refuse_twice(path: Path, names: Iterable[object]) -> None:
    """Nothing if all names are different; otherwise the BrokenFile that names the first one that stands twice."""
    for name, count in Counter(names).items():
        if count > 1:
            raise BrokenFile(f"{path}: expected each entry once, got {name!r} {count} times; unpack the list again.")


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        BrokenFile: no JSON, or JSON that is not one object. And the errors of `existing`.
    """
    try:
        found = json.loads(existing(path).read_bytes())
    except BrokenFile:
        raise
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: expected JSON, got something else ({error}); write or unpack it again.") from None
    if not isinstance(found, dict):
        raise BrokenFile(f"{path}: expected a JSON object, got {type(found).__name__}; write or unpack it again.")
    return found


def read_xml(path: Path, otherwise: str) -> ElementTree.Element:
    """The element <annotation> of an annotation; `otherwise` as in `existing`."""
    content = existing(path, otherwise).read_bytes()
    try:
        if len(content) > ANNOTATION:
            raise ValueError(f"{len(content):,} bytes, where at most {ANNOTATION:,} were expected")
        root = ElementTree.fromstring(content)
        if root.tag != "annotation":
            raise ValueError(f"<{root.tag:.40}> in place of <annotation>")
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise BrokenFile(f"{path} is not a complete annotation ({error}). Unpack it again.") from None
    return root
