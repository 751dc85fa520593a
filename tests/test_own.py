"""Photographs of one's own: what is found, what is refused, and VOC's layout that is made of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib.data.files import BrokenFile
from course_lib.data.own import as_voc, own_photographs
from course_lib.data.voc import Voc, write_mask


@pytest.fixture
def holiday(tmp_path):
    """Four photographs, one turned by EXIF, one without tags, one that no line names."""
    root = tmp_path / "holiday"
    (root / "beach").mkdir(parents=True)
    generator = np.random.default_rng(0)
    picture = lambda height, width: Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone that was held upright
    picture(20, 30).save(root / "beach" / "IMG 1.jpg", exif=turned)
    picture(24, 16).save(root / "b.png")
    picture(24, 16).save(root / "c.JPG", "JPEG")
    picture(24, 16).save(root / "other.jpg")
    (root / "tags.csv").write_text("file,tags\nbeach/IMG 1.jpg,Dog; ball \nb.png,dog\nc.JPG,\n", encoding="utf-8-sig")
    return root


def test_the_table_says_what_was_found(holiday):
    found = own_photographs(holiday)
    assert found.files == {"beach/IMG 1.jpg": ("ball", "dog"), "b.png": ("dog",), "c.JPG": ()}
    assert found.classes == ["background", "ball", "dog"] and (found.unlisted, found.masks) == (1, 0)
    assert "so nothing can be scored" in str(found) and "dog 2" in str(found)


def test_it_becomes_vocs_layout(holiday, tmp_path):
    root = as_voc(own_photographs(holiday), tmp_path / "out")
    data = Voc(root, "trainaug")
    assert data.classes == ["background", "ball", "dog"] and len(data) == 2
    tags = {name.split("-")[1]: row.tolist() for name, row in zip(data.ids, data.tags)}
    assert tags == {"b": [False, True], "IMG": [True, True]}
    by_name = {name: data[i][0].shape for i, name in enumerate(data.ids)}
    assert sorted(by_name.values()) == [(3, 24, 16), (3, 30, 20)]  # the turned one stands upright
    assert (root / "ImageSets" / "Segmentation" / "test.txt").read_text().split() == ["00002-c"]
    assert as_voc(own_photographs(holiday), tmp_path / "out") == root  # what is there is left alone
    assert {path.name for path in holiday.iterdir()} == {"beach", "b.png", "c.JPG", "other.jpg", "tags.csv"}


def test_masks_come_along_and_must_fit(holiday, tmp_path):
    write_mask(holiday / "masks" / "b.png", torch.ones(24, 16, dtype=torch.uint8).numpy())
    data = Voc(as_voc(own_photographs(holiday), tmp_path / "out"), "train")
    assert data.mask(data.ids.index("00000-b")).unique().tolist() == [1]
    write_mask(holiday / "masks" / "b.png", torch.ones(5, 5, dtype=torch.uint8).numpy())
    with pytest.raises(BrokenFile, match="16 x 24 pixels"):
        as_voc(own_photographs(holiday), tmp_path / "out")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("gone.jpg,dog", "gone.jpg, where nothing is"),
        ("../b.png,dog", "outside"),
        ("/etc/passwd,dog", "outside"),
        ("b.png,dog\nb.png,cat", "second time"),
        ("b.png,dog,cat", "3 columns"),
        ("b.png,", "no photograph has a tag"),
        ("b.png,background", "background"),
        ("", "no photograph has a tag"),
    ],
)
def test_faults_are_named_by_line(holiday, lines, said):
    (holiday / "tags.csv").write_text(lines + "\n")
    with pytest.raises(BrokenFile, match=said):
        own_photographs(holiday)


def test_a_folder_without_tags_says_what_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="IMG_0012.jpg,dog;ball"):
        own_photographs(tmp_path)


def test_a_photograph_that_is_none_is_named(holiday, tmp_path):
    (holiday / "b.png").write_bytes(b"nothing")
    with pytest.raises(BrokenFile, match="b.png"):
        as_voc(own_photographs(holiday), tmp_path / "out")
