"""The ILSVRC reader and its miniature: one layout, and a sentence for the first missing or broken file."""

import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import BrokenFile
from course_lib.data.miniature import fingerprint
from course_lib.worlds import minis


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole miniature of the procedural world."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minis.PER_ITEM, "creatures", {"train": 2, "val": 2})
        return minis.mini_ilsvrc(folder, source="creatures")


@pytest.fixture
def tree(written, tmp_path):
    """A copy that a test may break."""
    import shutil

    return shutil.copytree(written, tmp_path / "ilsvrc")


def files(tree, part, split="val"):
    return sorted((tree / "ILSVRC" / part / "CLS-LOC" / split).rglob("*.*"))


def test_reads_what_was_written(written):
    for split in ("train", "val"):
        data = Ilsvrc(written, split)
        assert len(data) == 12 and len(data.classes) == 6
        assert sorted(p.label for p in data.photos) == [c for c in range(6) for _ in range(2)]
        for image, photo in data:
            assert image.dtype == torch.uint8 and (image.shape[2], image.shape[1]) == photo.size in minis.SCENE_SIZES
            mask = np.asarray(Image.open(photo.mask)) > 0
            rows, columns = np.nonzero(mask)
            assert photo.boxes == ((columns.min(), rows.min(), columns.max(), rows.max()),)
    for words in ("12 ", "of 6 classes", "exact"):
        assert words in str(data)


def test_same_arguments_same_bytes(written, tmp_path, monkeypatch):
    monkeypatch.setitem(minis.PER_ITEM, "creatures", {"train": 2, "val": 2})
    again = minis.mini_ilsvrc(tmp_path, source="creatures")

    def digest(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*")
            if f.is_file()
        }

    assert digest(again) == digest(written)
    assert fingerprint(again) == fingerprint(written) != "real data"


def test_written_once_and_again_when_stale(tmp_path, monkeypatch):
    monkeypatch.setitem(minis.PER_ITEM, "creatures", {"train": 1, "val": 1})
    folder = minis.mini_ilsvrc(tmp_path, source="creatures")
    stamp = (folder / "miniature.json").stat().st_mtime_ns
    assert (
        minis.mini_ilsvrc(tmp_path, source="creatures") == folder
        and (folder / "miniature.json").stat().st_mtime_ns == stamp
    )
    monkeypatch.setitem(minis.PER_ITEM, "creatures", {"train": 2, "val": 1})
    assert len(Ilsvrc(minis.mini_ilsvrc(tmp_path, source="creatures"), "train")) == 12


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(minis, "_write_scene", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        minis.mini_ilsvrc(tmp_path, source="creatures")
    assert not (tmp_path / "mini-ilsvrc-creatures").exists() and not list(tmp_path.glob(".writing*"))


def test_photographs_with_imagenet_ids(photos, tmp_path, monkeypatch):
    """Real photographs: labels are the network's outputs, since the synset file lists all 1000 classes."""
    monkeypatch.setitem(minis.PER_ITEM, "photographs", {"train": 1, "val": 1})
    monkeypatch.setattr(minis, "photographs", lambda root: photos)
    data = Ilsvrc(minis.mini_ilsvrc(tmp_path), "val")
    assert len(data.classes) == 1000 and len(data) == sum(p.wnid is not None for p in photos.cutouts)
    zebra = list(data.classes).index("n02391049")
    assert zebra == 340 and zebra in {p.label for p in data.photos}
    with pytest.raises(FileNotFoundError, match="train is missing"):
        Ilsvrc(data.root, "train")
    kinds = minis.mini_ilsvrc(tmp_path, labels="kind")
    train, val = Ilsvrc(kinds, "train"), Ilsvrc(kinds, "val")
    assert list(train.classes) == list(val.classes) and len(train.classes) == 40 and len(train) > len(val)


def test_batches_squash_images_boxes_and_masks_together(written):
    batch = next(iter(Ilsvrc(written).batches(size=96, batch_size=12)))
    assert (
        batch.images.shape == (12, 3, 96, 96)
        and batch.images.dtype == torch.uint8
        and batch.masks.shape == (12, 96, 96)
    )
    for boxes, mask in zip(batch.boxes, batch.masks, strict=True):
        rows, columns = mask.nonzero().T
        outline = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()])
        assert (boxes[0] - outline).abs().max() <= 1


def test_images_in_class_folders_with_flat_annotations(tree):
    """The common rearrangement of val into class folders."""
    before = [(p.image.name, p.label) for p in Ilsvrc(tree).photos]
    data = Ilsvrc(tree)
    for photo in data.photos:
        folder = photo.image.parent / list(data.classes)[photo.label]
        folder.mkdir(exist_ok=True)
        photo.image.rename(folder / photo.image.name)
    for mask in files(tree, "Masks"):
        mask.unlink()
    (tree / "ILSVRC/Masks/CLS-LOC/val").rmdir()
    after = Ilsvrc(tree)
    assert sorted((p.image.name, p.label) for p in after.photos) == sorted(before)
    assert next(iter(after.batches())).masks is None


def test_train_images_without_boxes_are_fine(tree):
    files(tree, "Annotations", "train")[-1].unlink()
    data = Ilsvrc(tree, "train")
    assert len(data) == 12 and "1 images without" in str(data)


def xml(path, change):
    path.write_text(change(path.read_text()))


BREAKS = {
    "no tree at all": (lambda t: t.rename(t.parent / "elsewhere"), FileNotFoundError, "CLS-LOC/val is missing"),
    "no synset file": (
        lambda t: (t / "LOC_synset_mapping.txt").unlink(),
        FileNotFoundError,
        "LOC_synset_mapping.txt is missing",
    ),
    "nameless class": (lambda t: (t / "LOC_synset_mapping.txt").write_text("n95000001\n"), BrokenFile, "line 1"),
    "unsorted classes": (lambda t: (t / "LOC_synset_mapping.txt").write_text("n2 b\nn1 a\n"), BrokenFile, "not sorted"),
    "unknown class": (lambda t: (t / "LOC_synset_mapping.txt").write_text("n1 a\n"), BrokenFile, "does not list"),
    "no images": (lambda t: [f.unlink() for f in files(t, "Data")], FileNotFoundError, "no .JPEG file"),
    "no box file": (lambda t: files(t, "Annotations")[3].unlink(), FileNotFoundError, "val_00000004.xml is missing"),
    "empty xml": (
        lambda t: files(t, "Annotations")[0].write_text(""),
        BrokenFile,
        "val_00000001.xml is not a complete",
    ),
    "xml without size": (
        lambda t: xml(files(t, "Annotations")[0], lambda s: re.sub("<width>.*</width>", "", s)),
        BrokenFile,
        "complete",
    ),
    "xml without object": (
        lambda t: xml(files(t, "Annotations")[0], lambda s: s.replace("object", "thing")),
        BrokenFile,
        "no object",
    ),
    "box outside": (
        lambda t: xml(files(t, "Annotations")[0], lambda s: re.sub("<xmax>.*</xmax>", "<xmax>999</xmax>", s)),
        BrokenFile,
        "does not lie in the image",
    ),
    "box turned round": (
        lambda t: xml(
            files(t, "Annotations")[0],
            lambda s: re.sub("<xmin>.*</xmin>", "<xmin>239</xmin>", s).replace("<xmax>", "<xmax>-"),
        ),
        BrokenFile,
        "does not lie in the image",
    ),
    "mask lost": (lambda t: files(t, "Masks")[5].unlink(), FileNotFoundError, "val_00000006.png is missing"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_layout_is_refused_with_the_first_broken_file(tree, name):
    damage, kind, words = BREAKS[name]
    damage(tree)
    with pytest.raises(kind, match=words):
        Ilsvrc(tree)


def test_truncated_jpeg_is_named_when_it_is_read(tree):
    image = files(tree, "Data")[0]
    image.write_bytes(image.read_bytes()[:900])
    with pytest.raises(BrokenFile, match=r"val_00000001.JPEG cannot be decoded"):
        Ilsvrc(tree)[0]


def test_box_of_another_image_is_noticed(tree):
    """The annotation is consistent in itself, but the image is smaller."""
    image = files(tree, "Data")[0]
    Image.open(image).resize((40, 30)).save(image, "JPEG")
    with pytest.raises(BrokenFile, match="annotation of another image"):
        Ilsvrc(tree)[0]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_photographs(tree, mode):
    image = files(tree, "Data")[0]
    Image.open(image).convert(mode).save(image, "JPEG")
    assert Ilsvrc(tree)[0][0].shape[0] == 3


def test_wrong_arguments_are_explained(tmp_path):
    with pytest.raises(ValueError, match='source is "photographs" or "creatures"'):
        minis.mini_ilsvrc(tmp_path, source="creature")


# boxes of train, which nobody checked, and numbers of images ---------------------------------------------------------


def with_box(tree, split, number, corners, size=None):
    """The annotation of one image, changed; the image's own width and height."""
    file = files(tree, "Annotations", split)[number]
    text = file.read_text()
    for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners):
        text = re.sub(f"<{name}>.*</{name}>", f"<{name}>{value}</{name}>", text)
    for name, value in zip(("width", "height"), size or ()):
        text = re.sub(f"<{name}>.*</{name}>", f"<{name}>{value}</{name}>", text)
    file.write_text(text)
    with Image.open(files(tree, "Data", split)[number]) as image:
        return image.size


@pytest.mark.parametrize("size", [None, (0, 0), (9, 9), "swapped"])
def test_boxes_of_train_are_repaired_and_counted(tree, size):
    width, height = with_box(tree, "train", 0, (0, 0, 1, 1))
    size = (height, width) if size == "swapped" else size
    with_box(tree, "train", 0, (-7, 5, width + 30, 20), size)  # over the border
    with_box(tree, "train", 1, (40, 30, 8.4, 5.6), size)  # corners swapped, and fractions
    with pytest.warns(UserWarning, match=r"CLS-LOC/train: [23] boxes reached over the border.*All images stay"):
        data = Ilsvrc(tree, "train")
    assert len(data) == 12 and data[0][1].boxes == ((0, 5, width, 20),) and data[1][1].boxes == ((8, 6, 40, 30),)
    assert "boxes" in str(data) and next(iter(data.batches(batch_size=12))).boxes[1].shape == (1, 4)


@pytest.mark.parametrize("corners", [(10, 10, 10, 40), (10, 40, 30, 40), (900, 5, 950, 20), (-9, -9, -2, -2)])
def test_a_box_of_train_without_area_is_dropped_and_counted(tree, corners):
    with_box(tree, "train", 2, corners)
    with pytest.warns(UserWarning, match="1 boxes .* or dropped where nothing was left"):
        data = Ilsvrc(tree, "train")
    assert data[2][1].boxes == data.photos[2].boxes == () and len(data) == 12 and "1 images without" in str(data)
    assert next(iter(data.batches(batch_size=12))).boxes[2].shape == (0, 4)


def test_a_train_annotation_right_in_itself_but_of_a_larger_image_is_clamped_when_it_is_read(tree, recwarn):
    width, height = with_box(tree, "train", 0, (2, 2, 900, 900), (1000, 1000))
    data = Ilsvrc(tree, "train")
    assert not recwarn and data[0][1].boxes == ((2, 2, width, height),)


def test_without_any_annotation_train_is_whole(tree, recwarn):
    for file in files(tree, "Annotations", "train"):
        file.unlink()
    data = Ilsvrc(tree, "train")
    assert len(data) == 12 and not recwarn and all(not photo.boxes for _, photo in data)
    assert next(iter(data.batches())).boxes[0].shape == (0, 4)


@pytest.mark.parametrize("corners", [(40, 5, 8, 20), (-1, 5, 20, 20), (5, 5, 900, 20), ("inf", 5, 8, 20)])
def test_val_stays_strict(tree, corners):
    with_box(tree, "val", 0, corners)
    with pytest.raises(BrokenFile, match=r"val_00000001.xml"):
        Ilsvrc(tree)


def test_fractions_are_read_in_val(tree):
    with_box(tree, "val", 0, ("4.0", "5.2", "20.7", "30"))
    assert Ilsvrc(tree).photos[0].boxes == ((4, 5, 21, 30),)


def test_a_part_of_the_benchmark_is_refused_unless_it_says_so(tree):
    ids = [f"n{number:08}" for number in range(994)] + [f"n9500000{number}" for number in range(1, 7)]
    synsets = tree / "LOC_synset_mapping.txt"
    own = [line.split()[0] for line in synsets.read_text().splitlines()]
    synsets.write_text("".join(f"{wnid} name\n" for wnid in sorted({*ids[:994], *own})))
    assert len(Ilsvrc(tree).classes) == 1000, "a miniature says what it is"
    (tree / "miniature.json").unlink()
    for split, count in (("val", "50,000"), ("train", "1,281,167")):
        with pytest.raises(BrokenFile, match=rf"ILSVRC 2012 \({split}\): {count} images were expected, 12 found"):
            Ilsvrc(tree, split)
    synsets.write_text("".join(f"{wnid} name\n" for wnid in own))
    assert len(Ilsvrc(tree)) == 12, "other classes in this layout are a data set of one's own"


def test_a_class_twice_in_the_synset_file_is_refused(tree):
    synsets = tree / "LOC_synset_mapping.txt"
    first = synsets.read_text().splitlines()[0]
    synsets.write_text(f"{first}\n{synsets.read_text()}")
    with pytest.raises(BrokenFile, match=r"LOC_synset_mapping.txt: expected each entry once, got 'n\d+' 2 times"):
        Ilsvrc(tree)
