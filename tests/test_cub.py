"""CUB-200-2011: the retrieval split, boxes, numbers from 1; a sentence for what is broken; and its miniature."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.data import cub
from course_lib.data.cub import CUB_ARCHIVE, Cub
from course_lib.data.images import BrokenFile
from course_lib.worlds import minis, scenes


@pytest.fixture(scope="module")
def written(photos, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minis.PER_CLASS, "cub", 1)
        patch.setattr(minis, "ANIMALS", ("bird", "fish"))
        patch.setattr(minis, "photographs", lambda root: photos)
        return minis.mini_cub(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tree(tmp_path):
    """Four classes with two images each, made by hand."""
    tables = {
        "classes": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n3 003.Sooty_Albatross\n"
        "4 004.Groove_billed_Ani\n",
        "images": "".join(f"{i + 1} {i // 2 + 1:03}.x/bird_{i}.jpg\n" for i in range(8)),
        "image_class_labels": "".join(f"{i + 1} {i // 2 + 1}\n" for i in range(8)),
        "bounding_boxes": "".join(f"{i + 1} {i}.0 2.0 20.0 30.0\n" for i in range(8)),
    }
    for name, text in tables.items():
        (tmp_path / f"{name}.txt").write_text(text)
    for i in range(8):
        file = tmp_path / "images" / f"{i // 2 + 1:03}.x" / f"bird_{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if i % 2 else "RGB", (50, 40), 30 * i if i % 2 else (30 * i, 0, 0)).save(file)
    (tmp_path / "miniature.json").write_text('{"world": "test"}')
    return tmp_path


def test_first_half_trains_and_second_half_tests(tree):
    train, test = Cub(tree, "train"), Cub(tree, "test")
    assert train.classes == ["Black footed Albatross", "Laysan Albatross"] and test.classes == [
        "Sooty Albatross",
        "Groove billed Ani",
    ]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 1]
    assert [file.name for file in test.images] == [f"bird_{i}.jpg" for i in range(4, 8)]
    assert test.boxes == [(i, 2, i + 20, 32) for i in range(4, 8)]
    assert "4   of 2 classes, 2-2 each" in str(test)


def test_greyscale_comes_as_rgb(tree):
    image, label = Cub(tree, "test")[1]
    assert image.shape == (3, 40, 50) and image.dtype == torch.uint8 and label == 0 and (image[0] == image[2]).all()


def test_folder_above_the_archive(tree):
    (tree / "up").mkdir()
    for thing in [*tree.glob("*.txt"), tree / "images", tree / "miniature.json"]:
        target = tree / "up" / CUB_ARCHIVE / thing.name
        target.parent.mkdir(exist_ok=True)
        thing.rename(target)
    assert len(Cub(tree / "up", "test")) == 4


def test_real_archive_is_counted(tree, monkeypatch):
    (tree / "miniature.json").unlink()
    with pytest.raises(
        BrokenFile, match=r"\(test\): 5,924 images were expected, 4 found; 100 classes were expected, 2 found"
    ):
        Cub(tree, "test")
    monkeypatch.setitem(cub.CUB_COUNTS, "test", {"images": 4, "classes": 2})
    assert len(Cub(tree, "test")) == 4
    assert cub.CUB_COUNTS["train"]["images"] + 5_924 == 11_788


def rewrite(tree, name, old, new):
    path = tree / f"{name}.txt"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


BREAKS = {
    "no lists": (lambda t: (t / "images.txt").unlink(), FileNotFoundError, "images.txt is missing"),
    "no boxes": (lambda t: (t / "bounding_boxes.txt").unlink(), FileNotFoundError, "bounding_boxes.txt is missing"),
    "short line": (
        lambda t: rewrite(t, "bounding_boxes", "1 0.0 2.0 20.0 30.0", "1 0.0 2.0"),
        BrokenFile,
        "line 1: expected a number and 4",
    ),
    "line of spaces and a word": (
        lambda t: rewrite(t, "images", "2 001", " x\n2 001"),
        BrokenFile,
        "images.txt, line 2",
    ),
    "words for numbers": (
        lambda t: rewrite(t, "bounding_boxes", "5 4.0", "5 four"),
        BrokenFile,
        "bounding_boxes.txt, line 5: expected numbers, got '5 four",
    ),
    "unknown class": (
        lambda t: rewrite(t, "image_class_labels", "7 4", "7 9"),
        BrokenFile,
        "image 7 into class 9, which classes.txt does not",
    ),
    "image without class": (
        lambda t: rewrite(t, "image_class_labels", "8 4\n", ""),
        BrokenFile,
        "image_class_labels.txt has no line for image 8",
    ),
    "image without box": (
        lambda t: rewrite(t, "bounding_boxes", "8 7.0 2.0 20.0 30.0\n", ""),
        BrokenFile,
        "bounding_boxes.txt has no line for",
    ),
    "image lost": (
        lambda t: (t / "images/003.x/bird_5.jpg").unlink(),
        FileNotFoundError,
        "bird_5.jpg is listed in images.txt, but missing",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_layout_is_refused(tree, name):
    damage, kind, words = BREAKS[name]
    damage(tree)
    with pytest.raises(kind, match=words):
        Cub(tree, "test")


@pytest.mark.parametrize("box", ["40.0 2.0 20.0 30.0", "-3.0 2.0 20.0 30.0", "4.0 2.0 0.0 30.0"])
def test_box_outside_is_noticed_when_the_image_is_read(tree, box):
    rewrite(tree, "bounding_boxes", "5 4.0 2.0 20.0 30.0", f"5 {box}")
    data = Cub(tree, "test")
    with pytest.raises(BrokenFile, match=r"does not lie in .*bird_4.jpg, which has 50 x 40 pixels"):
        data[0]


def test_wrong_split_is_explained(tree):
    with pytest.raises(ValueError, match="second half"):
        Cub(tree, "val")


def test_miniature(written, photos):
    train, test = Cub(written, "train"), Cub(written, "test")
    assert len(train.classes) in (len(test.classes), len(test.classes) - 1) and len(train.classes) >= 18
    assert not set(train.classes) & set(test.classes)
    assert len(train) == len(train.classes) and train.labels.tolist() == list(range(len(train)))
    assert {Image.open(file).mode for file in [*train.images, *test.images]} == {"L", "RGB"}
    for data in (train, test):
        for (image, _), (x0, y0, x1, y1) in zip(data, data.boxes, strict=True):
            assert 0 <= x0 < x1 < image.shape[2] and 0 <= y0 < y1 < image.shape[1]


def test_miniature_has_no_photograph_twice(photos):
    species = minis._species(photos)
    files = [photograph.sha256 for own in species.values() for photograph in own]
    assert len(files) == len(set(files)) == sum(p.group in minis.ANIMALS for p in photos.cutouts)
    assert [p.file.split("/")[-1] for p in species["gnu"]] == [
        "gnu-baby-stand.png",
        "gnu-baby.png",
        "gnu-sitting.png",
        "gnu-stand.png",
    ]


def test_same_arguments_same_bytes(written, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(minis.PER_CLASS, "cub", 1)
    monkeypatch.setattr(minis, "ANIMALS", ("bird", "fish"))
    monkeypatch.setattr(minis, "photographs", lambda root: photos)
    again = minis.mini_cub(tmp_path)

    def digest(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*")
            if f.is_file()
        }

    assert digest(again) == digest(written)
    assert Cub(minis.mini_cub(tmp_path, seed=1), "train").classes != Cub(again, "train").classes


def test_boxes_are_those_of_the_objects(written, photos, monkeypatch):
    """A scene composed again from its seed has the box that the list says."""
    monkeypatch.setattr(minis, "ANIMALS", ("bird", "fish"))
    world, data, species = scenes.photo_world(photos, "kind", 0), Cub(written, "test"), minis._species(photos)
    names = list(species)
    order = np.random.default_rng(0).permutation(len(names))
    first = len(names) // 2
    for i in range(5):
        rng = np.random.default_rng((0, first + i, 0))
        size = minis.SCENE_SIZES[rng.integers(len(minis.SCENE_SIZES))]
        scene = scenes.compose(
            world, "val", [(0, species[names[order[first + i]]][0])], (size[0] * 2 // 3, size[1] * 2 // 3), rng
        )
        assert data.boxes[i] == tuple(scene.boxes[0].tolist())


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("images", "2 001.x/bird_1.jpg", "1 001.x/bird_1.jpg", "images.txt: expected each entry once, got 1 2 times"),
        (
            "images",
            "2 001.x/bird_1.jpg",
            "2 001.x/bird_0.jpg",
            "images.txt: expected each entry once, got '001",
        ),
        ("classes", "2 002.Laysan", "1 002.Laysan", "classes.txt: expected each entry once"),
        ("bounding_boxes", "5 4.0 2.0", "5 nan 2.0", "bounding_boxes.txt, line 5: expected numbers, got '5 nan"),
        ("bounding_boxes", "5 4.0 2.0", "5 4.0 -1e300", "bounding_boxes.txt, line 5: expected numbers"),
        ("bounding_boxes", "5 4.0 2.0", "5 inf 2.0", "bounding_boxes.txt, line 5: expected numbers"),
    ],
)
def test_what_stands_twice_or_is_no_number_is_refused(tree, name, old, new, sentence):
    rewrite(tree, name, old, new)
    with pytest.raises(BrokenFile, match=sentence):
        Cub(tree, "test")


@pytest.mark.parametrize("name", ["classes", "images", "image_class_labels", "bounding_boxes"])
def test_lists_of_windows_are_read_and_empty_ones_refused(tree, name):
    expected = [Cub(tree, split).images for split in ("train", "test")]
    path = tree / f"{name}.txt"
    text = path.read_text()
    path.write_text(text.replace("/", "\\").replace("\n", " \r\n\r\n"), encoding="utf-8-sig", newline="")
    assert [Cub(tree, split).images for split in ("train", "test")] == expected
    path.write_text("\n \n")
    with pytest.raises(BrokenFile, match=rf"{name}.txt: expected a line for each entry, got an empty list"):
        Cub(tree, "test")


def test_half_of_the_classes_without_an_image_is_refused(tree):
    path = tree / "images.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(BrokenFile, match="expected images of the test half, got none"):
        Cub(tree, "test")


def test_a_class_without_a_number_keeps_its_name(tree):
    rewrite(tree, "classes", "001.Black_footed_Albatross", "Black_footed_Albatross")
    assert Cub(tree, "train").classes[0] == "Black footed Albatross"
