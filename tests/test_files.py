"""The one reader of lists, the readers of notes and annotations: any editor's file is read, the rest is a sentence."""

import os

import pytest

from course_lib.data import miniature
from course_lib.data.files import BrokenFile, existing, read_json, read_lines, read_xml, refuse_twice

LINES = {1: "1 a/b c", 2: "2 é"}
TEXT = "1 a/b c\n2 é\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.rstrip().encode(),
        TEXT.replace("\n", " \t\n").encode() + b" \n\n",
        TEXT.replace("/", "\\").encode(),
    ],
)
def test_a_list_of_any_editor_is_the_same_list(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_lines(tmp_path / "list.txt") == LINES


def test_blank_lines_are_counted_and_left_out(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\n\na\n \nb\x0bc\xc2\x85d\n")
    assert read_lines(tmp_path / "list.txt") == {3: "a", 5: "b\x0bc\x85d"}, "only the ends of lines end a line"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a\r\nb\n\xe9t\xe9\n", "line 3: expected text in UTF-8, got the byte 0xe9; save the list as UTF-8"),
        (b"a\nb\0\n", "line 2: expected text, got zero bytes; save it as UTF-8"),
        ("1 a".encode("utf-16-le"), "line 1: expected text, got zero bytes"),
        (b"a\n" + b"b" * 200_000, "line 2: expected text, got 200,000 characters in one line"),
        (b"\xff\xfea", "expected text in UTF-8"),
    ],
)
def test_what_is_no_list_is_named_with_its_line(tmp_path, content, sentence):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(BrokenFile, match=rf"list.txt, .*{sentence}"):
        read_lines(tmp_path / "list.txt")


def test_no_file_in_a_files_place(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "pipe"):
        with pytest.raises(BrokenFile, match=f"{name}: expected a file, got a folder, pipe or device"):
            existing(tmp_path / name)
    for name in ("loop", "nothing", "zero\0byte", 300 * "x"):
        with pytest.raises(FileNotFoundError, match="is missing: look elsewhere"):
            existing(tmp_path / name, "is missing: look elsewhere.")


def test_what_stands_twice_is_named(tmp_path):
    refuse_twice(tmp_path / "list.txt", ["a", "b"])
    with pytest.raises(BrokenFile, match=r"list.txt: expected each entry once, got 'b' 3 times"):
        refuse_twice(tmp_path / "list.txt", ["a", "b", "b", "b"])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "miniature.json").write_bytes(content)
    with pytest.raises(BrokenFile, match=r"miniature.json: expected JSON, got something else"):
        read_json(tmp_path / "miniature.json")
    with pytest.raises(BrokenFile, match=r"miniature.json: expected JSON"):
        miniature.check_counts(tmp_path, "VOC", {"images": 3}, {"images": 4})


def test_a_note_without_a_world_is_refused(tmp_path):
    assert miniature.about(tmp_path) == {} and miniature.fingerprint(tmp_path) == "real data"
    (tmp_path / "miniature.json").write_text('\ufeff{"world": "mine"}', encoding="utf-8")
    assert miniature.fingerprint(tmp_path) == "mine"
    refused = {'{"world": 7}': 'expected {"world": "its name", ...}, got', "[1]": "a JSON object, got list"}
    for text, sentence in refused.items():
        (tmp_path / "miniature.json").write_text(text)
        with pytest.raises(BrokenFile, match=rf"miniature.json: .*{sentence}"):
            miniature.about(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<annotation>", "no element found|unclosed"),
        (b"<html/>", "<html> in place of <annotation>"),
        (b'<annotation xmlns="urn:x"/>', "<{urn:x}annotation> in place of"),
        (b'<?xml version="1.0" encoding="none"?><annotation/>', "unknown encoding"),
        (b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation>&e;</annotation>', "undefined entity"),
        (b"<annotation>" + b"<a/>" * 300_000 + b"</annotation>", "1,200,025 bytes, where at most 1,048,576"),
    ],
)
def test_annotations_that_are_none(tmp_path, content, reason):
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(BrokenFile, match=rf"a.xml is not a complete annotation \(.*({reason})"):
        read_xml(tmp_path / "a.xml", "is missing.")
