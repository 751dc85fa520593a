"""With 180 of the 251 cut-outs every count follows from the data that is there: writers, readers and lessons."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from course_lib.data.cub import Cub
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.data.voc import Voc
from course_lib.evaluate import episodes
from course_lib.worlds import minis, scenes, tagged

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def part(photos):
    """The 180 cut-outs with the smallest hashes, but all dogs, parrots and waders save one, and no jug."""
    kept = sorted(photos.cutouts, key=lambda p: p.sha256)
    alone = [next(p for p in kept if p.kind == kind) for kind in ("dog", "parrot", "wader")]
    others = [p for p in kept if p.kind not in ("dog", "parrot", "wader", "jug")][: 180 - len(alone)]
    cutouts = tuple(p for p in photos.cutouts if p in (*alone, *others))
    return replace(photos, cutouts=cutouts, fingerprint="180 of 251")


@pytest.fixture
def writers(part, monkeypatch):
    monkeypatch.setattr(minis, "photographs", lambda root: part)
    monkeypatch.setattr(minis, "PER_ITEM", {"photographs": {"train": 1, "val": 1}})
    monkeypatch.setattr(minis, "PER_CLASS", {"imagenet": 2, "cub": 1})
    recipe = replace(tagged.RECIPES["photographs"], images={"trainaug": 4, "val": 2})
    monkeypatch.setattr(tagged, "RECIPES", {"photographs": recipe})
    monkeypatch.setattr(minis, "SCORED", 2)


def test_a_class_has_photographs_to_train_and_to_validate(part):
    world = scenes.photo_world(part, "kind")
    assert len(part.cutouts) == 180 and len(world.classes) < 40
    for split in ("train", "val"):
        assert {label for label, _ in world.items[split]} == set(range(len(world.classes)))
    assert not {"dog", "parrot", "wader", "jug"} & {*world.classes.values()}


def test_every_miniature_is_written_and_read(part, writers, tmp_path):
    kinds = scenes.photo_world(part, "kind").classes
    data = {split: Ilsvrc(minis.mini_ilsvrc(tmp_path, labels="kind"), split) for split in ("train", "val")}
    for split in data.values():
        assert split.classes == kinds and {photo.label for photo in split.photos} == {*range(len(kinds))}
    assert len(Ilsvrc(minis.mini_ilsvrc(tmp_path), "val")) == sum(p.wnid is not None for p in part.cutouts)
    few = {split: MiniImageNet(minis.mini_imagenet(tmp_path), split) for split in ("train", "val", "test")}
    assert sorted(kind for split in few.values() for kind in split.classes) == sorted(kinds.values())
    for split in few.values():
        found = episodes.sample(split.labels, 5, 1, 1, 3, torch.Generator().manual_seed(0))
        assert found.support.shape == (3, 5, 1)
    assert sum(len(Cub(minis.mini_cub(tmp_path), split).classes) for split in ("train", "test")) == len(
        minis._species(part)
    )
    assert len(Voc(minis.mini_voc(tmp_path), "trainaug")) == 4


def test_too_few_kinds_get_a_sentence(part, monkeypatch, tmp_path):
    counts = Counter(p.kind for p in part.cutouts)
    some = [kind for kind, _ in counts.most_common() if kind][:12]
    few = replace(part, cutouts=tuple(p for p in part.cutouts if p.kind in some))
    monkeypatch.setattr(minis, "photographs", lambda root: few)
    with pytest.raises(ValueError, match="Expected 15 kinds of two photographs or more for 5-way episodes, got 12"):
        minis.mini_imagenet(tmp_path)


@pytest.mark.slow
def test_lessons_run_on_a_part_of_the_photographs(part, tmp_path):
    for photograph in {*part.cutouts, *part.backgrounds, *part.examples}:
        place = tmp_path / "data" / "photographs" / photograph.source / photograph.file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(part.path(photograph), place)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\nexit 100\n")  # what is missing is to be had nowhere
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    environment = {"COURSE_DATA": str(tmp_path / "data"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    lessons = ["00", "01", "04", "05", "07", "08"]
    command = [
        sys.executable,
        "-m",
        "course_lib",
        "run",
        *lessons,
        "--profile",
        "smoke",
        "--into",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
