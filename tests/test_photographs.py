"""Photographs are found, fetched and verified; nothing else of a package touches the disk."""

import hashlib
import io
import json
import lzma
import multiprocessing
import shutil
import subprocess
import tarfile

import pytest

from course_lib import paths
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
