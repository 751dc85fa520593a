"""Photographs are found, fetched and verified; nothing else of a package touches the disk."""

import errno
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from course_lib import paths
from course_lib.worlds import archives, downloads, packs, scenes
from course_lib.worlds import photographs as fetch

OBJECT, GROUND, OTHER = b"a bird" * 50, b"a meadow" * 40, b"not in the manifest"


def entry(file, content, source="stamps", **more):
    return {
        "file": file,
        "source": source,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **more,
    }


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A manifest of one object and one background, and a machine without apt-get or installed packages."""
    about = {"via": "deb", "licence": "CC0", "authors": "nobody", "origin": "nowhere"}
    known = {
        "sources": {"stamps": about},
        "kinds": {},
        "cutouts": [entry("usr/share/none-such/bird.png", OBJECT, kind="songbird", group="bird")],
        "backgrounds": [entry("usr/share/none-such/meadow.jpg", GROUND)],
        "examples": [],
    }
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "photographs.json").write_text(json.dumps(known))
    monkeypatch.setattr(paths, "shelf", lambda: tmp_path / "shelf")
    monkeypatch.setattr(fetch.shutil, "which", lambda name, which=shutil.which: name != "apt-get" and which(name))
    return tmp_path / "data"


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content or b""))
    return buffer.getvalue()


def package(path, files, name="data.tar.xz", compress=lzma.compress):
    """A .deb as dpkg writes it: an ar archive with the version, a control archive and the data archive."""
    data = compress(tarball(files))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as deb:
        deb.write(b"!<arch>\n")
        for member, content in (
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", lzma.compress(b"x" * 1025)[:-1] + b"!"),
            (name, data),
        ):
            deb.write(
                f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
                + content
                + b"\n" * (len(content) % 2)
            )
    return path


GOOD = [
    ("./usr/share/none-such/bird.png", OBJECT),
    ("./usr/bin/evil", OTHER),
    ("./usr/share/none-such/meadow.jpg", GROUND),
]


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_from_a_package_in_downloads(shelf):
    package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    found = fetch.photographs(shelf)
    assert len(found.cutouts) == len(found.backgrounds) == 1 and not found.missing
    assert files_below(shelf / "photographs") == [
        "stamps/usr/share/none-such/bird.png",
        "stamps/usr/share/none-such/meadow.jpg",
    ]
    assert found.path(found.cutouts[0]).read_bytes() == OBJECT


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="zstd packages are unpacked by dpkg-deb")
def test_zstd_package(shelf, tmp_path):
    tree = tmp_path / "tree"
    for name, content in GOOD:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: stamps\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@o>\nDescription: x\n"
    )
    (shelf / "downloads").mkdir(parents=True)
    subprocess.run(
        ["dpkg-deb", "-Zzstd", "--root-owner-group", "-b", tree, shelf / "downloads" / "stamps_1_all.deb"],
        check=True,
        capture_output=True,
    )
    assert len(fetch.photographs(shelf).cutouts) == 1


def test_second_call_needs_no_source(shelf):
    deb = package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    first = fetch.photographs(shelf)
    deb.unlink()
    assert fetch.photographs(shelf) == first


def test_damaged_file_is_fetched_again(shelf):
    package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    found = fetch.photographs(shelf)
    found.path(found.cutouts[0]).write_bytes(OBJECT[:-1] + b"?")
    assert fetch.photographs(shelf).path(found.cutouts[0]).read_bytes() == OBJECT


def test_different_photograph_is_left_out_listed_and_changes_the_fingerprint(shelf):
    known = json.loads((paths.shelf() / "photographs.json").read_text())
    known["cutouts"].append(entry("usr/share/none-such/cat.png", b"the manifest's cat", kind="cat", group="furry"))
    (paths.shelf() / "photographs.json").write_text(json.dumps(known))
    deb = package(
        shelf / "downloads" / "stamps_1_all.deb", [*GOOD, ("./usr/share/none-such/cat.png", b"some other cat ...")]
    )
    found = fetch.photographs(shelf)
    assert [p.file for p in found.missing] == ["usr/share/none-such/cat.png"] and "cat.png" in str(found)
    package(deb, [*GOOD, ("./usr/share/none-such/cat.png", b"the manifest's cat")])
    complete = fetch.photographs(shelf)
    assert not complete.missing and complete.fingerprint != found.fingerprint


@pytest.mark.parametrize("name", ["./usr/../../../escape.png", "/etc/cron.d/escape"])
def test_paths_that_leave_the_folder_are_refused(shelf, name):
    package(shelf / "downloads" / "stamps_1_all.deb", [(name, OTHER), *GOOD])
    with pytest.raises(ValueError, match="would leave the data folder"):
        fetch.photographs(shelf)


def test_links_are_never_followed(shelf):
    package(shelf / "downloads" / "stamps_1_all.deb", [("./usr/share/none-such/bird.png", None), GOOD[2]])
    with pytest.raises(FileNotFoundError, match="photographs are not in"):
        fetch.photographs(shelf)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"PK" + b[2:], lambda b: b[:8]])
def test_broken_package_is_named(shelf, damage):
    deb = package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    deb.write_bytes(damage(deb.read_bytes()))
    with pytest.raises(ValueError, match=r"stamps_1_all.deb .*[Dd]elete it"):
        fetch.photographs(shelf)


def test_nothing_found_says_what_to_do(shelf):
    with pytest.raises(FileNotFoundError) as error:
        fetch.photographs(shelf)
    for advice in ("apt-get install", str(shelf / "downloads"), 'source="creatures"'):
        assert advice in str(error.value)


def _fetch_in_child(folder, shelf, queue):
    paths.shelf = lambda: shelf
    fetch._take_apt = lambda *_: None
    queue.put(fetch.photographs(folder).fingerprint)


def test_two_processes_at_once(shelf):
    package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_fetch_in_child, args=(shelf, paths.shelf(), queue)) for _ in range(2)]
    [child.start() for child in children]
    prints = {queue.get(timeout=240) for _ in children}
    [child.join() for child in children]
    assert len(prints) == 1 and files_below(shelf / "photographs") == [
        "stamps/usr/share/none-such/bird.png",
        "stamps/usr/share/none-such/meadow.jpg",
    ]


def test_interrupted_write_leaves_no_half_file(shelf, monkeypatch):
    package(shelf / "downloads" / "stamps_1_all.deb", GOOD)
    real = fetch.os.replace
    monkeypatch.setattr(fetch.os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch.photographs(shelf)
    assert not [f for f in files_below(shelf / "photographs") if "part" not in f]
    monkeypatch.setattr(fetch.os, "replace", real)
    assert len(fetch.photographs(shelf).cutouts) == 1


def test_real_manifest_is_sound():
    known = fetch.manifest()
    every = [fetch.Photograph(**e) for part in ("cutouts", "backgrounds", "examples") for e in known[part]]
    assert len(known["cutouts"]) >= 240 and len({e["sha256"] for e in known["cutouts"]}) == len(known["cutouts"])
    for photograph in every:
        assert (
            photograph.source in known["sources"]
            and len(photograph.sha256) == 64
            and not photograph.file.startswith("/")
        )
        assert photograph.kind is None or known["kinds"][photograph.kind]["group"] == photograph.group
    assert all(about["licence"] and about["origin"] for about in known["sources"].values())
    assert not [p.file for p in every if any(word in p.file for word in ("cartoon", "mirror", "flip", "symbols"))]
    ids = [about["id"] for about in known["kinds"].values()]
    assert ids == sorted(set(ids))


def test_real_photographs(photos):
    """What this machine has: most of the manifest, each file verified, and the examples that the lessons name."""
    assert len(photos.cutouts) >= 200 and len(photos.backgrounds) >= 12


def test_examples_are_there_at_once(tmp_path):
    assert fetch.example("chelsea", tmp_path).is_file() and files_below(tmp_path) == [
        "photographs/scikit-image/skimage/data/chelsea.png"
    ]
    with pytest.raises(KeyError, match="there are: chelsea"):
        fetch.example("no such picture", tmp_path)


# The same photograph, packed differently


def png(pixels, mode="RGBA", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "PNG", **options)
    return stream.getvalue()


BIRD = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
BIRD[:20, ..., 3] = 0
FINCH = png(BIRD)


@pytest.fixture
def finch(shelf):
    """The shelf, whose object is a real PNG; its name is `finch.png` in some versions."""
    known = json.loads((paths.shelf() / "photographs.json").read_text())
    pixels = [fetch.pixel_hash(Image.open(io.BytesIO(FINCH)))]
    known["cutouts"] = [entry("usr/share/none-such/bird.png", FINCH, kind="songbird", pixels=pixels)]
    (paths.shelf() / "photographs.json").write_text(json.dumps(known))
    return shelf


def with_object(content, path="./usr/share/none-such/bird.png"):
    return [(path, content), GOOD[2]]


def invisible(colour):
    pixels = BIRD.copy()
    pixels[:20, :, :3] = colour
    return png(pixels)


@pytest.mark.parametrize(
    "content",
    [png(BIRD, compress_level=1), png(BIRD, optimize=True), png(BIRD, dpi=(72, 72)), invisible(0), invisible(99)],
    ids=["fast", "optimised", "with a field", "black where nothing is seen", "grey where nothing is seen"],
)
def test_another_packing_is_the_same_photograph(finch, content):
    package(finch / "downloads" / "stamps_1_all.deb", with_object(FINCH))
    usual = fetch.photographs(finch)
    shutil.rmtree(finch)
    package(finch / "downloads" / "stamps_2_all.deb", with_object(content))
    found = fetch.photographs(finch)
    assert content != FINCH and found.path(found.cutouts[0]).read_bytes() == content, "it is stored as it came"
    assert found.fingerprint == usual.fingerprint and not found.missing


def test_what_was_decoded_once_is_remembered(finch, monkeypatch):
    package(finch / "downloads" / "stamps_2_all.deb", with_object(png(BIRD, compress_level=1)))
    first = fetch.photographs(finch)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_decoded_hash", lambda content: pytest.fail("decoded again"))
        assert fetch.photographs(finch) == first
    (finch / "photographs" / fetch.NOTES).write_text("damaged")
    assert fetch.photographs(finch) == first


def changed():
    pixels = BIRD.copy()
    pixels[30, 10, 0] ^= 1
    return png(pixels)


@pytest.mark.parametrize("content", [changed(), png(BIRD.reshape(30, 40, 4)), FINCH[:-30], FINCH[:8]])
def test_other_pixels_are_another_photograph(finch, content):
    package(finch / "downloads" / "stamps_1_all.deb", with_object(content))
    with pytest.raises(FileNotFoundError, match="photographs are not in"):
        fetch.photographs(finch)


def test_a_huge_png_is_not_decoded(finch, monkeypatch):
    monkeypatch.setattr(fetch, "MOST_PIXELS", 100)
    assert fetch._decoded_hash(FINCH) == ""


def test_a_bomb_of_text_is_no_photograph():
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * (64 << 20), zip=True)
    assert fetch._decoded_hash(png(BIRD, pnginfo=about)) == ""


def test_a_photograph_is_found_wherever_a_package_keeps_it(finch):
    package(finch / "downloads" / "stamps_3_all.deb", with_object(FINCH, "./usr/share/elsewhere/birds/bird.png"))
    assert not fetch.photographs(finch).missing


def test_the_manifests_pixels_are_those_of_the_files(photos):
    """Every hash of pixels of the manifest fits the file that the sha256 stands for, whole or normalised."""
    for photograph in {*photos.cutouts, *photos.backgrounds, *photos.examples}:
        with Image.open(photos.path(photograph)) as image:
            mode = "RGBA" if image.has_transparency_data else "RGB"
            known = fetch.pixel_hash(image)
        assert {*photograph.pixels} == {known, fetch.pixel_hash(fetch.normalised(photos.path(photograph), mode))}


# Sources that are damaged, remembered, full


def ar(*members):
    return b"!<arch>\n" + b"".join(
        f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{size:<10}`\n".encode() + content for name, size, content in members
    )


def giant_header(kind):
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = kind, 3 << 30
    return ar(("data.tar", 4 << 30, header.tobuf(tarfile.GNU_FORMAT)))


def greedy_xz():
    """An .xz whose header asks for a dictionary of 1 GB."""
    content = bytearray(lzma.compress(b"x"))
    header = content[12 : 12 + 4 * (content[12] + 1)]
    header[4] = 36  # as LZMA2 codes the size
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    content[12 : 12 + len(header)] = header
    return bytes(content)


def negative_size():
    header = bytearray(tarfile.TarInfo("bird.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return ar(("data.tar", 512, bytes(header)))


DAMAGE = {
    "empty": b"",
    "no archive": b"%PDF-1.4" * 99,
    "negative size in ar": ar(("control.tar", -60, b"")),
    "no number in ar": ar(("control.tar", "many", b"")),
    "endless ar": ar(("control.tar", 9999999999, b"")),
    "negative size in tar": negative_size(),
    "giant pax header": giant_header(tarfile.XHDTYPE),
    "giant long name": giant_header(tarfile.GNUTYPE_LONGNAME),
    "no xz": ar(("data.tar.xz", 3, b"abc\n")),
    "no gzip": ar(("data.tar.gz", 3, b"abc\n")),
    "no bzip2": ar(("data.tar.bz2", 3, b"abc\n")),
    "no tar": ar(("data.tar", 1024, b"abc" * 400)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_package_is_named_and_passed_over(finch, damage, capsys):
    place = finch / "downloads" / "stamps_0_all.deb"
    place.parent.mkdir(parents=True)
    place.write_bytes(DAMAGE[damage])
    with pytest.raises(archives.BrokenArchive, match=r"stamps_0_all.deb.*[Dd]elete it"):
        fetch.photographs(finch)
    with pytest.raises(archives.BrokenArchive, match=r"stamps_0_all.deb.*[Dd]elete it"):
        fetch.photographs(finch)  # what is remembered is said again
    package(finch / "downloads" / "stamps_1_all.deb", with_object(FINCH))
    assert not fetch.photographs(finch).missing
    assert "stamps_0_all.deb" in capsys.readouterr().out


def test_a_greedy_decompressor_is_stopped(finch):
    place = finch / "downloads" / "stamps_0_all.deb"
    place.parent.mkdir(parents=True)
    content = greedy_xz()
    place.write_bytes(ar(("data.tar.xz", len(content), content)))
    with pytest.raises(archives.BrokenArchive, match="stamps_0_all.deb.*[Mm]emory"):
        fetch.photographs(finch)


def test_a_pipe_does_not_hang(finch):
    (finch / "downloads").mkdir(parents=True)
    os.mkfifo(finch / "downloads" / "stamps_0_all.deb")
    (finch / "downloads" / "stamps_1_all.deb").mkdir()
    (finch / "downloads" / "stamps_2_all.deb").symlink_to("nowhere")
    package(finch / "downloads" / "stamps_3_all.deb", with_object(FINCH))
    assert not fetch.photographs(finch).missing


APT = """#!/bin/sh
echo "$@" >> {log}
for last; do :; done
case "$*" in
  *--print-uris*) test -f {offers}/$last.deb && echo "'x' $(cat {offers}/version).deb 9 $(cat {offers}/version)" ;;
  *download*) cp {offers}/$last.deb $(cat {offers}/version).deb ;;
  *) exit 100 ;;
esac
"""


@pytest.fixture
def apt(finch, tmp_path, monkeypatch):
    """An apt-get that offers what lies in a folder, writes down how it was called, and reaches no network."""
    monkeypatch.undo()
    monkeypatch.setattr(paths, "shelf", lambda: tmp_path / "shelf")
    log, offers, tools = tmp_path / "apt.log", tmp_path / "offers", tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(APT.format(log=log, offers=offers))
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(fetch, "UNREACHABLE", set())

    def offer(version, files):
        downloads.offer.cache_clear()
        package(offers / "stamps.deb", files)
        (offers / "version").write_text(version)

    offer.calls = lambda: [line for line in log.read_text().splitlines() if "--print-uris" not in line]
    return offer


def test_what_a_source_lacks_is_not_downloaded_twice(finch, apt):
    known = json.loads((paths.shelf() / "photographs.json").read_text())
    known["cutouts"].append(entry("usr/share/none-such/cat.png", b"a cat", kind="cat"))
    (paths.shelf() / "photographs.json").write_text(json.dumps(known))
    apt("1", with_object(FINCH))
    assert [len(fetch.photographs(finch).missing) for _ in range(3)] == [1, 1, 1]
    assert apt.calls() == ["-q download stamps"]
    apt("2", [*with_object(FINCH), ("./usr/share/none-such/cat.png", b"a cat")])
    assert not fetch.photographs(finch).missing and apt.calls() == ["-q download stamps"] * 2
    assert not [path for path in finch.rglob("*") if path.suffix == ".deb" or ".writing-" in path.name]


def test_without_a_network_apt_is_asked_once_in_a_process(finch, apt, tmp_path, capsys):
    (tmp_path / "offers").mkdir()
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="check the network"):
            fetch.photographs(finch)
    assert len([call for call in apt.calls() if "update" in call]) == 1


@pytest.mark.parametrize("where", ["before", "while"])
def test_a_full_disk_gets_a_sentence_and_leaves_nothing(finch, apt, where, monkeypatch):
    apt("1", with_object(FINCH))
    if where == "before":
        usage = shutil.disk_usage(finch.parent)
        monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=5000))
    else:
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(paths.os, "replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(
        OSError, match=f"{finch}: expected room for .* got a full disk; free some space, or set COURSE_DATA"
    ):
        fetch.photographs(finch)
    assert files_below(finch) == [".photographs.writing"]


# Folders


@pytest.fixture
def read_only(monkeypatch):
    """A function that makes a folder read-only, for root too."""

    def make(folder):
        opened, made = os.open, os.mkdir

        def refuse(path, flags, *rest, **named):
            if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return opened(path, flags, *rest, **named)

        def refuse_folder(path, *rest, **named):
            if str(path).startswith(str(folder)) and not os.path.isdir(path):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return made(path, *rest, **named)

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "mkdir", refuse_folder)

    return make


def test_a_complete_folder_is_only_read(finch, read_only):
    package(finch / "downloads" / "stamps_1_all.deb", with_object(png(BIRD, compress_level=1)))
    first = fetch.photographs(finch)
    before = files_below(finch)
    read_only(finch)
    assert fetch.photographs(finch) == first and files_below(finch) == before


def test_an_empty_read_only_folder_says_what_to_do(finch, read_only):
    package(finch / "downloads" / "stamps_1_all.deb", GOOD)
    read_only(finch)
    with pytest.raises(FileNotFoundError, match="Read-only file system.*set COURSE_DATA"):
        fetch.photographs(finch)


def test_an_example_needs_no_folder_to_write_to(tmp_path, read_only):
    read_only(tmp_path)
    assert fetch.example("chelsea", tmp_path).is_file() and files_below(tmp_path) == []


def test_files_are_for_all_users(finch):
    package(finch / "downloads" / "stamps_1_all.deb", with_object(FINCH))
    found = fetch.photographs(finch)
    assert stat.S_IMODE(found.path(found.cutouts[0]).stat().st_mode) == 0o644
    assert stat.S_IMODE((finch / ".photographs.writing").stat().st_mode) == 0o666


# Packs


@pytest.fixture(scope="module")
def pack(photos, tmp_path_factory):
    """A pack of a few photographs of every sort: small, too long, palettes, JPEG, grey."""
    few = fetch.Photographs(
        photos.folder,
        tuple(p for p in photos.cutouts if Path(p.file).stem in ("spade", "flower1", "mug", "blackbird")),
        tuple(p for p in photos.backgrounds if Path(p.file).stem in ("Aqua", "gravel", "china")),
        photos.examples[:1],
        (),
        "few",
    )
    file = tmp_path_factory.mktemp("packs") / "few.zip"
    said = packs.write(few, file)
    assert "8 photographs" in said and str(file) in said
    return few, file


def test_scenes_see_the_same_pixels_from_a_pack(pack, tmp_path):
    few, file = pack
    store = fetch._Store(tmp_path / "photographs")
    everything = [*few.cutouts, *few.backgrounds, *few.examples]
    store.take(file, everything)
    assert not store.lacking(everything)
    for photograph in everything:
        mode = "RGBA" if photograph in few.cutouts else "RGB"
        seen = [scenes._read(place, mode) for place in (few.path(photograph), store.path(photograph))]
        assert seen[0].size == seen[1].size and seen[0].tobytes() == seen[1].tobytes()
        assert max(seen[1].size) <= 1000


def test_a_pack_is_small_the_same_again_and_tells_licences(pack, tmp_path):
    few, file = pack
    packs.write(few, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        text = archive.read("LICENCES.md").decode()
    assert len(names) == len(set(names)) and "photographs.json" in names
    assert {
        f"licences/{name}.txt" for name, about in fetch.manifest()["sources"].items() if about["via"] == "deb"
    } < set(names)
    assert all(about["licence"] in text and about["origin"] in text for about in fetch.manifest()["sources"].values())


def test_a_pack_overwrites_nothing(pack, tmp_path):
    (tmp_path / "mine.zip").write_text("mine")
    with pytest.raises(FileExistsError, match="mine.zip exists; move it away"):
        packs.write(pack[0], tmp_path / "mine.zip")
    with pytest.raises(ValueError, match="notes.txt: expected a name that ends in .zip"):
        packs.write(pack[0], tmp_path / "notes.txt")


def zipped(path, members, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            member = zipfile.ZipInfo(name)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            archive.writestr(member, content)
    return path


@pytest.mark.parametrize("how", ["downloads", "COURSE_PACK"])
def test_photographs_from_a_pack(finch, how, monkeypatch, tmp_path):
    """A pack is preferred to a package, and only what has the manifest's pixels is taken."""
    known = json.loads((paths.shelf() / "photographs.json").read_text())
    ground = png(BIRD[20:, ..., :3], "RGB")
    known["backgrounds"][0]["pixels"] = [fetch.pixel_hash(Image.open(io.BytesIO(ground)))]
    (paths.shelf() / "photographs.json").write_text(json.dumps(known))
    place = finch / "downloads" / "pack.zip" if how == "downloads" else tmp_path / "pack.zip"
    zipped(
        place,
        [("photographs/stamps/bird.png", FINCH), ("photographs/stamps/meadow.png", ground), ("x/evil.png", OTHER)],
    )
    package(finch / "downloads" / "stamps_1_all.deb", GOOD)
    if how == "COURSE_PACK":
        monkeypatch.setenv("COURSE_PACK", str(place))
    found = fetch.photographs(finch)
    assert found.path(found.backgrounds[0]).read_bytes() == ground and not found.missing
    assert sorted(path.name for path in (finch / "photographs").rglob("*.*g")) == ["bird.png", "meadow.jpg"]


HOSTILE = {
    "a path upwards": ([("../../bird.png", FINCH)], {}, "would leave the data folder"),
    "an absolute path": ([("/tmp/bird.png", FINCH)], {}, "would leave the data folder"),
    "a link": ([("bird.png", b"/etc/passwd")], {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "is a link"),
    "a bomb": ([("bird.png", bytes(33 << 20))], {"compress_type": zipfile.ZIP_DEFLATED}, "at most 33,554,432 bytes"),
    "bombs": ([(str(i), bytes(30 << 20)) for i in range(9)], {"compress_type": zipfile.ZIP_DEFLATED}, "unpack to more"),
    "lzma": ([("bird.png", FINCH)], {"compress_type": zipfile.ZIP_LZMA}, "oddly packed"),
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_pack_is_refused(finch, how):
    members, attributes, sentence = HOSTILE[how]
    zipped(finch / "downloads" / "pack.zip", members, **attributes)
    with pytest.raises(archives.BrokenArchive, match=f"pack.zip.*{sentence}"):
        fetch.photographs(finch)
    package(finch / "downloads" / "stamps_1_all.deb", with_object(FINCH))
    assert not fetch.photographs(finch).missing


def test_a_size_that_is_a_lie_unpacks_no_more_than_it_says(finch):
    place = zipped(
        finch / "downloads" / "pack.zip", [("bird.png", bytes(64 << 20))], compress_type=zipfile.ZIP_DEFLATED
    )
    place.write_bytes(place.read_bytes().replace((64 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(archives.BrokenArchive, match="pack.zip.*damaged"):
        fetch.photographs(finch)


def test_an_address_is_fetched_by_pooch(finch, monkeypatch, tmp_path):
    address, asked = "https://none.invalid/pack.zip#sha256=" + "0" * 64, []
    package(finch / "downloads" / "stamps_1_all.deb", with_object(FINCH))
    monkeypatch.setenv("COURSE_PACK", address)
    monkeypatch.setattr(fetch, "UNREACHABLE", set())
    monkeypatch.setattr(
        downloads, "pack", lambda *pack: asked.append(pack[0]) or (_ for _ in ()).throw(OSError("no network"))
    )
    assert not fetch.photographs(finch).missing and asked == [address], "the package serves"


def test_the_address_of_pyproject_is_asked(finch, monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.course]\nphotographs = "https://none.invalid/p.zip#sha256=12"\n')
    monkeypatch.setattr(paths, "checkout", lambda: tmp_path)
    assert fetch._published_pack() == "https://none.invalid/p.zip#sha256=12"
    monkeypatch.setattr(paths, "checkout", lambda: None)
    assert fetch._published_pack() == ""
