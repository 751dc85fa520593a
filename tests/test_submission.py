"""The archive for VOC's test server: its places, its pictures, and what would be refused."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from course_lib.data.files import BrokenFile
from course_lib.data.voc import palette, write_mask
from course_lib.wsss.submission import check_submission, write_submission

NAMES = ("2008_000006", "2008_000011")
PLACE = "results/VOC2012/Segmentation/comp6_test_cls"


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (7, 5)).save(root / "JPEGImages" / f"{name}.jpg")
        write_mask(root / "predicted" / f"{name}.png", np.full((5, 7), 20, np.uint8))
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(NAMES) + "\n")
    return root


def test_the_server_finds_what_it_wants(voc, tmp_path):
    archive = tmp_path / "results.tgz"
    assert write_submission(voc / "predicted", voc, archive) == 2
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [f"{PLACE}/{name}.png" for name in NAMES]
        with Image.open(tar.extractfile(tar.getnames()[0])) as picture:
            assert picture.mode == "P" and picture.size == (7, 5) and np.array(picture).max() == 20
            assert picture.getpalette()[:63] == palette()[:21].flatten().tolist()
    first = archive.read_bytes()
    write_submission(voc / "predicted", voc, archive)
    assert archive.read_bytes() == first


def grey(path):
    Image.new("L", (7, 5)).save(path)


def larger(path):
    write_mask(path, np.zeros((6, 7), np.uint8))


def unknown(path):
    write_mask(path, np.full((5, 7), 21, np.uint8))


def colours(path):
    picture = Image.fromarray(np.zeros((5, 7), np.uint8))
    picture.putpalette([7] * 768)
    picture.save(path)


def text(path):
    path.write_text("no picture")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(grey, "palette of indices"), (larger, "7 x 5"), (unknown, "0 to 20"), (colours, "VOC's palette"), (text, "PNG")],
)
def test_a_picture_that_would_be_refused_is_named(voc, tmp_path, spoil, said):
    spoil(voc / "predicted" / f"{NAMES[1]}.png")
    with pytest.raises(BrokenFile, match=f"{NAMES[1]}.png: .*{said}"):
        write_submission(voc / "predicted", voc, tmp_path / "results.tgz")
    assert not (tmp_path / "results.tgz").exists()


def test_a_missing_prediction_is_named(voc, tmp_path):
    (voc / "predicted" / f"{NAMES[0]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=NAMES[0]):
        write_submission(voc / "predicted", voc, tmp_path / "results.tgz")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"{PLACE}/{NAMES[0]}.png"], "1 of 2 images are missing"),
        ([f"{NAME}.png" for NAME in NAMES], "lies elsewhere"),
        ([f"{PLACE}/{name}.png" for name in (*NAMES, "2009_1")], "belongs to no image"),
    ],
)
def test_an_archive_of_somebody_else_is_looked_at(voc, tmp_path, names, said):
    content = (voc / "predicted" / f"{NAMES[0]}.png").read_bytes()
    with tarfile.open(tmp_path / "other.tgz", "w:gz") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(BrokenFile, match=said):
        check_submission(tmp_path / "other.tgz", voc)


def test_what_is_no_archive_is_said(voc, tmp_path):
    (tmp_path / "results.tgz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(BrokenFile, match="expected a .tgz archive"):
        check_submission(tmp_path / "results.tgz", voc)
