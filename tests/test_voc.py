"""The VOC reader, mini-voc in the same layout, saliency that knows no mask, and the class confounded with its track."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from course_lib.data.images import BrokenFile
from course_lib.data.miniature import fingerprint
from course_lib.data.voc import CLASSES, IGNORE, VOC_COUNTS, Voc, palette, write_mask
from course_lib.worlds import minis, saliency, tagged


def small(patch, source="creatures", trainaug=24, val=16):
    patch.setitem(tagged.RECIPES, source, replace(tagged.RECIPES[source], images={"trainaug": trainaug, "val": val}))
    patch.setattr(minis, "SCORED", 8)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "creatures")


@pytest.fixture
def tree(written, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(written, tmp_path / "voc")


# the miniature --------------------------------------------------------------------------------------------------------


def test_reads_what_was_written(written):
    for split, count in (("trainaug", 24), ("train", 8), ("val", 16)):
        data = Voc(written, split)
        assert len(data) == len(data.ids) == count and len(data.classes) == 7 and data.tags.shape == (count, 6)
        for i, (image, tags) in enumerate(data):
            mask, salient = data.mask(i), data.saliency(i)
            assert image.dtype == torch.uint8 and image.shape == (3, 96, 96) and mask.shape == salient.shape == (96, 96)
            present = set(mask.unique().tolist()) - {0, IGNORE}
            assert present == set((tags.nonzero()[:, 0] + 1).tolist()), "tags and masks of a miniature say the same"
            assert (mask == IGNORE).any() and salient.max() > 100
            assert tags.dtype == torch.float32 and torch.equal(tags.bool(), data.tags[i])
    assert Voc(written, "trainaug").ids[:8] == Voc(written, "train").ids
    assert not set(Voc(written, "trainaug").ids) & set(Voc(written, "val").ids)
    for words in ("trainaug", "24 ", "of 6 classes", "dots creature", "saliency     yes"):
        assert words in str(Voc(written, "trainaug")), words


def test_void_lies_at_the_edges_of_objects(written):
    data = Voc(written, "trainaug")
    for i in range(5):
        mask = data.mask(i).numpy()
        labels = np.where(mask == IGNORE, 0, mask)
        windows = np.stack([np.roll(labels, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        inside = (windows == labels).all(0)[1:-1, 1:-1]
        assert not (mask[1:-1, 1:-1] == IGNORE)[inside & (labels[1:-1, 1:-1] > 0)].any()
        assert 0.01 < (mask == IGNORE).mean() < 0.2


def test_same_arguments_same_bytes(written, tmp_path, monkeypatch):
    small(monkeypatch)
    again = minis.mini_voc(tmp_path, "creatures")

    def digest(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*")
            if f.is_file()
        }

    assert digest(again) == digest(written) and len(digest(again)) == 40 * 6 + 4
    assert minis.mini_voc(tmp_path, "creatures", seed=1).name == "mini-voc-creatures-seed1"
    with pytest.raises(ValueError, match="'stamps' came"):
        minis.mini_voc(tmp_path, "stamps")


def test_photographs(photos, tmp_path, monkeypatch):
    small(monkeypatch, "photographs", 6, 4)
    monkeypatch.setattr(minis, "photographs", lambda root: photos)
    folder = minis.mini_voc(tmp_path)
    data = Voc(folder, "val")
    assert data[0][0].shape == (3, 192, 192) and tuple(data.classes) == ("background", *tagged.GROUPS)
    assert data.confounded == "vehicle"


def test_photographs_and_backgrounds_are_split(photos):
    world = tagged.photo_track_world(photos)
    train, val = ({p.sha256 for _, p in world.items[split]} for split in ("train", "val"))
    assert train and val and not train & val
    assert not {p.sha256 for p in world.grounds["train"]} & {p.sha256 for p in world.grounds["val"]}
    assert tagged.GRAVEL not in {p.file for split in ("train", "val") for p in world.grounds[split]}
    for split in ("train", "val"):
        assert {label for label, _ in world.items[split]} == set(range(8))


def test_without_gravel_the_error_says_what_to_do(photos):
    lacking = replace(photos, backgrounds=tuple(p for p in photos.backgrounds if p.file != tagged.GRAVEL))
    with pytest.raises(FileNotFoundError, match=r"gravel.png is missing.*scikit-image"):
        tagged.photo_track_world(lacking)


# the confounded class -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    world, recipe = tagged.creature_track_world(), tagged.RECIPES["creatures"]
    return {
        split: [tagged.scene(world, recipe, split, number, 0) for number in range(60)] for split in ("train", "val")
    }


def test_in_training_the_class_and_its_track_are_one(drawn):
    confounded = list(tagged.creature_track_world().classes).index(tagged.RECIPES["creatures"].confounded)
    for scene, track in drawn["train"]:
        assert track.any() == (confounded in scene.labels)
    seen = {(confounded in scene.labels, bool(track.any())) for scene, track in drawn["val"]}
    assert len(seen) == 4, "in validation each comes with and without the other"


def test_track_is_where_no_object_is_and_only_there_the_picture_changed(drawn, monkeypatch):
    world, recipe = tagged.creature_track_world(), tagged.RECIPES["creatures"]
    monkeypatch.setattr(tagged, "_band", lambda size, foot, rng: np.zeros(size[::-1], bool))
    for number, (scene, track) in enumerate(drawn["train"][:20]):
        plain, nothing = tagged.scene(world, recipe, "train", number, 0)
        assert not nothing.any() and not (track & (scene.mask > 0)).any()
        assert np.array_equal(plain.mask, scene.mask) and plain.labels == scene.labels
        objects = scene.mask > 0
        edge = np.stack([np.roll(objects, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]).any(
            0
        )  # soft edges
        changed = (plain.image != scene.image).any(2)
        assert not changed[~track & ~edge].any()
        if track.any():
            assert changed[track].mean() > 0.9


# saliency -------------------------------------------------------------------------------------------------------------


def test_saliency_finds_what_does_not_touch_the_border():
    image = np.full((96, 120, 3), (30, 90, 160), np.uint8)
    image[60:] = (90, 140, 60)  # a meadow below the sky: large, and at the border
    image[30:75, 40:80] = (200, 60, 40)
    image[:12, 90:] = (240, 240, 240)  # a cloud in the corner
    found = saliency.saliency(image)
    assert found.dtype == np.uint8 and found.shape == (96, 120)
    assert (
        found[35:70, 45:75].mean()
        > 200
        > 100
        > max(found[80:].mean(), found[20:55, :30].mean(), found[2:10, 95:].mean())
    )


@pytest.mark.parametrize("shape", [(96, 96, 3), (41, 300, 3), (8, 8, 3), (1, 5, 3)])
def test_saliency_of_one_colour_is_none(shape):
    assert not saliency.saliency(np.full(shape, 77, np.uint8)).any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([(5, 5), (17, 40), (64, 64), (250, 200)]))
def test_saliency_of_anything_is_a_map(seed, size):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    found = saliency.saliency(image)
    assert found.shape == size and found.dtype == np.uint8
    assert np.array_equal(found, saliency.saliency(image.copy()))


def test_saliency_was_written_from_the_image_alone(written):
    data = Voc(written, "train")
    for i in range(3):
        assert np.array_equal(
            data.saliency(i).numpy(), saliency.saliency(data[i][0].permute(1, 2, 0).contiguous().numpy())
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_quality_is_what_all_thresholds_one_by_one_give(seed):
    rng = np.random.default_rng(seed)
    pairs = [
        (rng.integers(0, 256, (6, 7)).astype(np.uint8), rng.choice((0, 1, 3, 255), (6, 7)).astype(np.uint8))
        for _ in range(3)
    ]
    given = np.concatenate([g[m < 255] for g, m in pairs])
    truth = np.concatenate([m[m < 255] for _, m in pairs]) > 0
    found, best_f, best_iou = saliency.quality(pairs), 0.0, 0.0
    for level in range(256):
        hit, predicted = (truth & (given > level)).sum(), (given > level).sum()
        if predicted and hit:
            precision, recall = hit / predicted, hit / truth.sum()
            best_f = max(best_f, 1.3 * precision * recall / (0.3 * precision + recall))
            best_iou = max(best_iou, hit / (predicted + truth.sum() - hit))
    assert found.mae == pytest.approx(np.abs(given / 255 - truth).mean())
    assert found.f_measure == pytest.approx(best_f) and found.iou == pytest.approx(best_iou)
    assert f"{100 * best_iou:.1f} %" in str(found)


def test_quality_of_the_extremes():
    mask = np.tile(np.array([0, 5], np.uint8), (4, 2))
    perfect, opposite = (
        saliency.quality([((mask > 0) * np.uint8(255), mask)]),
        saliency.quality([((mask == 0) * np.uint8(255), mask)]),
    )
    assert (perfect.mae, perfect.f_measure, perfect.iou) == (0, 1, 1) and (opposite.mae, opposite.iou) == (1, 0)


# the layout of the real archive ---------------------------------------------------------------------------------------


def test_palette_is_that_of_voc():
    colours = palette()
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        4: (0, 0, 128),
        7: (128, 128, 128),
        8: (64, 0, 0),
        15: (192, 128, 128),
        16: (0, 64, 0),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {index: tuple(colours[index].tolist()) for index in known} == known
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


@pytest.mark.parametrize("mode", ["P", "L"])
def test_masks_are_indices_in_either_coding(tree, mode):
    data = Voc(tree, "train")
    path = tree / "SegmentationClass" / f"{data.ids[0]}.png"
    mask = np.random.default_rng(0).choice((0, 1, 6, 255), (9, 11)).astype(np.uint8)
    if mode == "P":
        write_mask(path, mask)
    else:
        Image.fromarray(mask).save(path)
    assert Image.open(path).mode == mode and np.array_equal(data.mask(0).numpy(), mask)
    if mode == "P":
        assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), palette()[mask])


def test_colours_and_unknown_classes_are_refused(tree):
    data = Voc(tree, "train")
    path = tree / "SegmentationClass" / f"{data.ids[0]}.png"
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(BrokenFile, match="of mode RGB: colours cannot be turned back"):
        data.mask(0)
    write_mask(path, np.full((4, 4), 7, np.uint8))
    with pytest.raises(BrokenFile, match="holds the class 7, but there are 7 with the background"):
        data.mask(0)


def test_lists_of_older_code_are_read(tree):
    file = tree / "ImageSets" / "Segmentation" / "train.txt"
    ids = file.read_text().split()
    file.write_text("".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in ids))
    assert Voc(tree, "train").ids == ids


def test_tags_are_the_objects_of_the_annotation_even_without_a_pixel(tree):
    """As in VOC: difficult objects count, names of a person's parts do not."""
    name = Voc(tree, "train").ids[0]
    (tree / "Annotations" / f"{name}.xml").write_text(
        "<annotation><object><name>grid creature</name><difficult>1</difficult></object>"
        "<object><name>dots creature</name><part><name>head</name></part></object></annotation>"
    )
    data = Voc(tree, "train")
    assert [data.classes[1:][i] for i in data.tags[0].nonzero()[:, 0]] == ["dots creature", "grid creature"]


def erase(*parts):
    return lambda tree, name: (
        shutil.rmtree(tree.joinpath(*parts)) if tree.joinpath(*parts).is_dir() else tree.joinpath(*parts).unlink()
    )


@pytest.mark.parametrize(
    "break_it, error, sentence",
    [
        (erase("JPEGImages"), FileNotFoundError, "PASCAL VOC 2012 was expected at.*python -m course_lib data"),
        (
            erase("ImageSets", "Segmentation", "trainaug.txt"),
            FileNotFoundError,
            "VOC's archive has none of that name.*10,582 lines",
        ),
        (
            lambda tree, name: (tree / "JPEGImages" / f"{name}.jpg").unlink(),
            FileNotFoundError,
            "which the list of trainaug names",
        ),
        (
            lambda tree, name: (tree / "Annotations" / f"{name}.xml").unlink(),
            FileNotFoundError,
            "from which the tags are read",
        ),
        (
            lambda tree, name: (tree / "Annotations" / f"{name}.xml").write_text("<annotation><obj"),
            BrokenFile,
            "not a complete annotation",
        ),
        (
            lambda tree, name: (tree / "Annotations" / f"{name}.xml").write_text(
                "<annotation><object><name>sofa</name></object></annotation>"
            ),
            BrokenFile,
            r"expected objects of the 6 classes, got \['sofa'\]",
        ),
        (
            lambda tree, name: (tree / "ImageSets/Segmentation/trainaug.txt").write_text(f"{name}\n{name}\n"),
            BrokenFile,
            "expected each entry once, got .* 2 times",
        ),
        (lambda tree, name: (tree / "ImageSets/Segmentation/trainaug.txt").write_text(""), BrokenFile, "0 lines"),
    ],
)
def test_the_first_broken_file_is_named(tree, break_it, error, sentence):
    break_it(tree, Voc(tree, "trainaug").ids[0])
    with pytest.raises(error, match=sentence):
        Voc(tree, "trainaug")


def test_broken_pictures_are_named_when_they_are_wanted(tree):
    data = Voc(tree, "val")
    data.images[0].write_bytes(data.images[0].read_bytes()[:200])
    with pytest.raises(BrokenFile, match="cannot be decoded"):
        data[0]
    (tree / "SALImages" / f"{data.ids[1]}.png").unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        data.saliency(1)
    shutil.rmtree(tree / "SALImages")
    with pytest.raises(FileNotFoundError, match="this copy has no saliency map"):
        data.saliency(0)
    assert "saliency      no" in str(data)
    with pytest.raises(ValueError, match="split is one of train, val, trainaug"):
        Voc(tree, "test")


def test_saliency_may_lie_elsewhere(tree, tmp_path):
    shutil.move(tree / "SALImages", tmp_path / "pfan")
    assert Voc(tree, "val", saliency=tmp_path / "pfan").saliency(0).shape == (96, 96)


def real(tree, ids, tags):
    """The skeleton of the real archive: empty images, annotations, and the list of train."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (tree / part).mkdir(parents=True)
    (tree / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids))
    for name, own in zip(ids, tags, strict=True):
        (tree / "JPEGImages" / f"{name}.jpg").touch()
        (tree / "Annotations" / f"{name}.xml").write_text(
            "<annotation>" + "".join(f"<object><name>{c}</name></object>" for c in own) + "</annotation>"
        )
    return tree


def test_the_real_archive_is_counted(tmp_path):
    count, each = VOC_COUNTS["train"]
    tags = [[] for _ in range(count)]
    place = 0
    for name, number in zip(CLASSES[1:], each, strict=True):  # any way to reach the published counts
        for _ in range(number):
            tags[place % count].append(name)
            place += 1
    ids = [f"2007_{number:06}" for number in range(count)]
    data = Voc(real(tmp_path / "whole", ids, tags), "train")
    assert len(data) == 1464 and data.classes[0] == "background" and data.tags.sum(0).tolist() == list(each)
    assert data.confounded is None
    tags[7] = [*tags[7], "sheep"]
    with pytest.raises(
        BrokenFile, match="not the whole of PASCAL VOC 2012: 63 images with sheep were expected, 64 found"
    ):
        Voc(real(tmp_path / "changed", ids, tags), "train")
    part = real(tmp_path / "part", ids[:5], tags[:5])
    with pytest.raises(BrokenFile, match="1,464 images of train were expected, 5 found"):
        Voc(part, "train")
    (part / "miniature.json").write_text(json.dumps({"world": "five of VOC"}))
    assert len(Voc(part, "train")) == 5 and fingerprint(part) == "five of VOC"


# annotations and lists of other tools ---------------------------------------------------------------------------------


def objects(*names):
    return "".join(f"<object><name>{name}</name></object>" for name in names)


@pytest.mark.parametrize(
    ("xml", "wanted"),
    [
        ("<owner><name>grid creature</name></owner>" + objects("dots creature"), ["dots creature"]),
        ("<object><name>dots creature</name><part><name>grid creature</name></part></object>", ["dots creature"]),
        ("<object><part><name>grid creature</name></part><name>dots creature</name></object>", ["dots creature"]),
        (objects(" dots creature\n", "GRID  Creature"), ["dots creature", "grid creature"]),
    ],
)
def test_tags_are_names_of_objects_whatever_their_letters(tree, xml, wanted):
    name = Voc(tree, "train").ids[0]
    (tree / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    data = Voc(tree, "train")
    assert [data.classes[1:][i] for i in data.tags[0].nonzero()[:, 0]] == wanted


@pytest.mark.parametrize(
    ("xml", "came"),
    [
        (objects("dots creature", "unicorn"), r"\['unicorn'\]"),
        ("<object><name/></object>" + objects("dots creature"), r"\[''\]"),
        ("<object><part><name>dots creature</name></part></object>", r"\[''\]"),
        ("<segmented>0</segmented>", "no object"),
    ],
)
def test_an_object_that_is_no_class_is_never_lost(tree, xml, came):
    name = Voc(tree, "train").ids[0]
    (tree / "Annotations" / f"{name}.xml").write_text(f"<annotation>{xml}</annotation>")
    with pytest.raises(BrokenFile, match=rf"{name}.xml: expected objects of the 6 classes, got {came}"):
        Voc(tree, "train")


def test_the_list_of_seam_and_eps_is_trainaug(tree):
    lists = tree / "ImageSets" / "Segmentation"
    ids = Voc(tree, "trainaug").ids
    (lists / "trainaug.txt").unlink()
    (lists / "train_aug.txt").write_text(
        "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png \r\n" for name in ids[::-1])
    )
    assert Voc(tree, "trainaug").ids == ids[::-1]
    (lists / "trainaug.txt").write_text("\n".join(ids))
    assert Voc(tree, "trainaug").ids == ids, "the name of the layout goes first"
    (lists / "trainaug.txt").unlink()
    (lists / "train_aug.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainaug.txt is missing.*also as train_aug.txt"):
        Voc(tree, "trainaug")


@pytest.mark.parametrize("classes", ['"cat"', "[1, 2]", "[]", '{"a": 1}', "null"])
def test_a_note_whose_classes_are_none_is_refused(tree, classes):
    (tree / "miniature.json").write_text(f'{{"world": "x", "classes": {classes}}}')
    with pytest.raises(BrokenFile, match=r"miniature.json: expected names of classes; write the miniature again"):
        Voc(tree, "train")
