"""miniImageNet in both layouts, a sentence for what is broken, and its miniature in the layout of Ravi & Larochelle."""

import hashlib

import pytest
import torch
from PIL import Image

from course_lib.data import miniimagenet
from course_lib.data.images import BrokenFile
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.worlds import minis

ROWS = [("n02110341", 0), ("n01930112", 1), ("n02110341", 2), ("n01930112", 3), ("n99999999", 4)]


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (90, 84), (shade, 0, 0)).save(path)


@pytest.fixture
def flat(tmp_path):
    """Ravi & Larochelle: renamed files in one folder."""
    lines = ["filename,label"]
    for wnid, i in ROWS:
        picture(tmp_path / "images" / f"{wnid}{i:08}.jpg", 40 * i)
        lines.append(f"{wnid}{i:08}.jpg,{wnid}")
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "test.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "miniature.json").write_text('{"world": "test"}')
    return tmp_path


@pytest.fixture(params=miniimagenet.TREES)
def tree(request, tmp_path):
    """easyfsl: a list of files in a train tree of ILSVRC."""
    lines = ["class_name,image_name"]
    for wnid, i in ROWS:
        picture(tmp_path / request.param / wnid / f"{wnid}_{i}.JPEG", 40 * i)
        lines.append(f"{wnid},{wnid}_{i}.JPEG")
    (tmp_path / "test.csv").write_text("\r\n".join(lines) + "\r\n")
    (tmp_path / "miniature.json").write_text('{"world": "test"}')
    return tmp_path


def check(data):
    assert data.ids == ["n02110341", "n01930112", "n99999999"], "order of first appearance"
    assert data.classes == ["dalmatian", "nematode", "n99999999"], "names where they are known"
    assert data.labels.tolist() == [0, 1, 0, 1, 2] and len(data) == len(data.images) == 5
    for i, (image, label) in enumerate(data):
        assert image.shape == (3, 84, 90) and image.dtype == torch.uint8 and label == data.labels[i]
        assert abs(int(image[0].float().mean()) - 40 * i) <= 3, "another image"
    assert "5   of 3 classes, 1-2 each" in str(data)


def test_flat_layout(flat):
    check(MiniImageNet(flat, "test"))
    (flat / "split" / "test.csv").rename(flat / "test.csv")
    check(MiniImageNet(flat, "test"))


def test_tree_layout(tree):
    check(MiniImageNet(tree, "test"))


def test_real_archive_is_counted(flat, monkeypatch):
    (flat / "miniature.json").unlink()
    with pytest.raises(
        BrokenFile,
        match=r"miniImageNet \(test\): 20 classes were expected, 3 found; 12,000 images were expected, 5 found",
    ):
        MiniImageNet(flat, "test")
    assert {split: 600 * classes for split, classes in miniimagenet.CLASS_COUNTS.items()} == {
        "train": 38_400,
        "val": 9_600,
        "test": 12_000,
    }


def listing(flat, text):
    (flat / "split" / "test.csv").write_text(text)


BREAKS = {
    "no list": (lambda t: (t / "split" / "test.csv").unlink(), FileNotFoundError, "test.csv is missing, and so is"),
    "other header": (lambda t: listing(t, "image,class\na.jpg,n1\n"), BrokenFile, "begins with 'image,class'"),
    "empty list": (lambda t: listing(t, ""), BrokenFile, "begins with ''"),
    "header alone": (lambda t: listing(t, "filename,label\n"), BrokenFile, "lists no image"),
    "one field": (lambda t: listing(t, "filename,label\na.jpg,n1\nb.jpg\n"), BrokenFile, "line 3: expected two fields"),
    "empty field": (lambda t: listing(t, "filename,label\n,n1\n"), BrokenFile, "line 2: expected two fields"),
    "images elsewhere": (
        lambda t: (t / "images").rename(t / "pictures"),
        FileNotFoundError,
        "5 of the 5 images .* into one of the folders images, ILSVRC",
    ),
    "image lost": (
        lambda t: (t / "images" / "n0211034100000002.jpg").unlink(),
        FileNotFoundError,
        "1 of the 5 images .* the first is .*n0211034100000002.jpg",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_layout_is_refused(flat, name):
    damage, kind, words = BREAKS[name]
    damage(flat)
    with pytest.raises(kind, match=words):
        MiniImageNet(flat, "test")


def test_wrong_split_is_explained(flat):
    with pytest.raises(ValueError, match="split is one of train, val, test, but 'novel' came"):
        MiniImageNet(flat, "novel")


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minis.PER_CLASS, "imagenet", 2)
        patch.setattr(minis, "photographs", lambda root: photos)
        return minis.mini_imagenet(tmp_path_factory.mktemp("data"))


def test_miniature(written, photos):
    splits = {split: MiniImageNet(written, split) for split in ("train", "val", "test")}
    assert {split: len(data.classes) for split, data in splits.items()} == {"train": 24, "val": 6, "test": 10}
    ids = [wnid for data in splits.values() for wnid in data.ids]
    assert len(ids) == len(set(ids)) == 40, "a class is in two splits"
    shown = {kind: sum(p.kind == kind for p in photos.cutouts) for data in splits.values() for kind in data.classes}
    assert min(shown[kind] for split in ("val", "test") for kind in splits[split].classes) >= 4
    for data in splits.values():
        assert data.labels.bincount().unique().tolist() == [2]
        assert all(image.shape == (3, 84, 84) for image, _ in data)


def test_five_way_episodes_with_fifteen_queries_are_possible():
    assert minis.PER_CLASS["imagenet"] >= 5 + 15 and minis.VALIDATION >= 5


def test_same_arguments_same_bytes(written, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(minis.PER_CLASS, "imagenet", 2)
    monkeypatch.setattr(minis, "photographs", lambda root: photos)
    again = minis.mini_imagenet(tmp_path)

    def digest(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*")
            if f.is_file()
        }

    assert digest(again) == digest(written)
    other = minis.mini_imagenet(tmp_path, seed=1)
    assert (
        other.name == "mini-imagenet-seed1"
        and MiniImageNet(other, "test").classes != MiniImageNet(again, "test").classes
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n\r\n") + "\n",
        lambda text: text.replace(",", ", ").replace("\n", " \n"),
        lambda text: "".join(",".join(f'"{word}"' for word in row.split(",")) + "\n" for row in text.splitlines()),
    ],
)
def test_lists_of_spreadsheets_are_read(flat, change):
    path = flat / "split" / "test.csv"
    path.write_text(change(path.read_text()), newline="")
    check(MiniImageNet(flat, "test"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("filename,label\na.jpg,n1\nb.jpg,n2\na.jpg,n2\n", "expected each entry once, got 'a.jpg' 2 times"),
        ("filename,label\n" + "a" * 200_000 + ",n1\n", "line 2: expected text, got 200,003 characters"),
        ('filename,label\n\n"a.jpg,n1\nb.jpg,n2\n', "line 3: expected two fields"),
        ("filename;label\na.jpg;n1\n", "begins with 'filename;label'; expected (.|\n)* with commas"),
        ("filename,label\na.jpg,n1\nb\0.jpg,n2\n", "line 3: expected text, got zero bytes"),
    ],
    ids=["twice", "long", "quote", "semicolons", "zero bytes"],
)
def test_what_a_csv_file_must_not_hold_is_named(flat, text, sentence):
    listing(flat, text)
    with pytest.raises(BrokenFile, match=rf"test.csv.*{sentence}"):
        MiniImageNet(flat, "test")
