"""Market-1501: fields of file names, junk and distractors, a sentence for what is broken; and its miniature."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.data import market1501
from course_lib.data.images import BrokenFile
from course_lib.data.market1501 import MARKET_ARCHIVE, Market1501
from course_lib.worlds import dolls, minis

SMALL = {"TRAIN": 6, "TEST": 4, "DISTRACTORS": 3, "JUNK": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(dolls, name, value)
        return minis.mini_market(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tree(written, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(written, tmp_path / "market")


def test_splits_of_the_miniature(written):
    train, query, gallery = (Market1501(written, split) for split in ("train", "query", "gallery"))
    assert len(train) == 30 and len(train.classes) == 6 and train.labels.unique().tolist() == list(range(6))
    assert set(query.identities.tolist()) == set(gallery.identities.tolist()) - {0}
    assert not set(train.identities.tolist()) & set(gallery.identities.tolist())
    assert train.identities.min() > 0 and query.identities.min() > 0 and (gallery.identities == 0).sum() == 3
    assert train.junk == query.junk == 0 and gallery.junk == 2 and gallery.identities.min() == 0
    pairs = list(zip(query.identities.tolist(), query.cameras.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "one query for each identity and camera"
    for identity, camera in pairs:
        others = gallery.cameras[gallery.identities == identity]
        assert (others != camera).sum() >= 3, "a match in another camera"
    for data in (train, query, gallery):
        assert set(data.cameras.tolist()) <= set(range(1, 7))
        assert [int(data.classes[label]) for label in data.labels] == data.identities.tolist()
        for i, (image, label) in enumerate(data):
            assert image.shape == (3, 128, 64) and image.dtype == torch.uint8 and label == data.labels[i]
            assert data.parts(i).shape == (128, 64) and data.parts(i).max() <= 4


def test_fields_of_a_file_name(written):
    for data in (Market1501(written, split) for split in ("train", "gallery")):
        for i, file in enumerate(data.images):
            identity, where, *_ = file.stem.split("_")
            assert (data.identities[i], data.cameras[i]) == (int(identity), int(where[1]))


def test_table(written):
    text = str(Market1501(written, "gallery"))
    for words in ("gallery", "of 4 identities", "distractors       3", "junk              2", "exact"):
        assert words in text, text


def test_masks_belong_to_their_pictures(written):
    """Where a mask ends the picture has an edge, several times more often than elsewhere."""
    data = Market1501(written, "train")
    at_border, elsewhere = [], []
    for i in range(len(data)):
        person = data.parts(i) > 0
        edges = data[i][0].float().diff(dim=2).abs().sum(0) > 60  # 128 63
        border = person.float().diff(dim=1).abs() > 0
        at_border.append(edges[border].float().mean())
        elsewhere.append(edges[~border].float().mean())
    assert np.mean(at_border) > 3 * np.mean(elsewhere), "the outline of a mask is no outline in the picture"


def test_same_arguments_same_bytes(written, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(dolls, name, value)

    def digest(folder):
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*")
            if f.is_file()
        }

    assert digest(minis.mini_market(tmp_path)) == digest(written)
    other = minis.mini_market(tmp_path, identity="head")
    assert other.name == "mini-market-head" and digest(other).keys() != digest(written).keys()
    assert minis.mini_market(tmp_path, seed=1).name == "mini-market-clothes-seed1"


def test_wrong_world_is_explained(tmp_path):
    with pytest.raises(ValueError, match="identity is one of clothes, head, both, but 'shoes' came"):
        minis.mini_market(tmp_path, identity="shoes")


def test_folder_above_the_archive(tree, tmp_path):
    tree.rename(tmp_path / MARKET_ARCHIVE)
    assert len(Market1501(tmp_path, "query")) > 0


def test_real_archive_is_counted(tree, monkeypatch):
    (tree / "miniature.json").unlink()
    with pytest.raises(
        BrokenFile, match=r"12,936 images were expected, 30 found; 751 identities were expected, 6 found. Unpack"
    ):
        Market1501(tree, "train")
    shutil.rmtree(tree / "parts")
    monkeypatch.setitem(market1501.MARKET_COUNTS, "train", {"images": 30, "identities": 6})
    data = Market1501(tree, "train")
    assert "none" in str(data)
    with pytest.raises(FileNotFoundError, match="Only the miniature has part masks"):
        data.parts(0)


def test_published_counts_are_those_of_the_paper():
    assert market1501.MARKET_COUNTS["gallery"]["images"] + market1501.MARKET_COUNTS["gallery"]["junk images"] == 19_732


@pytest.mark.parametrize(
    "name", ["person.jpg", "0002_c7s1_000451_03.jpg", "2_c1s1_000451_03.jpg", "-2_c1s1_000451_03.jpg"]
)
def test_name_that_does_not_parse_is_named(tree, name):
    Image.new("RGB", (64, 128)).save(tree / "query" / name)
    with pytest.raises(BrokenFile, match=f"{name} is not named as in Market-1501"):
        Market1501(tree, "query")


def test_other_files_are_overlooked(tree):
    (tree / "bounding_box_test" / "Thumbs.db").write_bytes(b"thumbs")  # the archive holds one
    assert len(Market1501(tree, "gallery")) == len(list((tree / "bounding_box_test").glob("*.jpg"))) - 2


def test_missing_parts_of_the_layout_are_explained(tree):
    with pytest.raises(ValueError, match="split is one of train, query, gallery, but 'test' came"):
        Market1501(tree, "test")
    shutil.rmtree(tree / "query")
    with pytest.raises(FileNotFoundError, match=r"query is missing.*holds bounding_box_train"):
        Market1501(tree, "query")
    (tree / "query").mkdir()
    Image.new("RGB", (64, 128)).save(tree / "query" / "-1_c1s1_000451_03.jpg")
    with pytest.raises(FileNotFoundError, match="no image of a person"):
        Market1501(tree, "query")


def test_truncated_image_is_named_when_it_is_read(tree):
    data = Market1501(tree, "query")
    data.images[0].write_bytes(data.images[0].read_bytes()[:700])
    with pytest.raises(BrokenFile, match="cannot be decoded"):
        data[0]
