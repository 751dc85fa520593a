"""The pipeline: every refinement to its score, what is not made again, kills, broken inputs, own photographs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from course_lib import __main__
from course_lib.data.files import BrokenFile
from course_lib.data.voc import Voc
from course_lib.worlds import minis
from course_lib.wsss import affinity_learner, deeplab, learner
from course_lib.wsss import pipeline as pipelines
from course_lib.wsss.pipeline import (
    PipelineConfig,
    labels_after_crf,
    present_classes,
    run_pipeline,
    seeds_after_crf,
    shares_after_crf,
)

COUNT = 8  # images of each split


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The creatures with eight images of each split."""
    creatures, folder = minis.mini_voc(source="creatures"), tmp_path_factory.mktemp("few")
    for part in creatures.iterdir():
        if part.name != "ImageSets":
            (folder / part.name).symlink_to(part)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part in (creatures / "ImageSets" / "Segmentation").iterdir():
        (lists / part.name).write_text("\n".join(part.read_text().split()[:COUNT]) + "\n")
    return folder


@pytest.fixture(scope="module")
def config(few):
    return PipelineConfig(str(few), backbone="small", weights="random", epochs=1, batch_size=4, size=64)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder in which the tests of this module share stages."""
    return tmp_path_factory.mktemp("stages")


@pytest.mark.parametrize("refine", ["none", "crf", "psa", "truth"])
def test_every_refinement_is_scored_and_made_once(refine, config, shelf, monkeypatch):
    config = replace(config, refine=refine)
    result = run_pipeline(config, shelf, progress=False)
    rows = result["scores"]["train"]
    assert {"predict", *(["masks", "seeds"] if refine != "truth" else [])} <= rows.keys()
    assert all(0 <= row["miou"] <= 100 for row in rows.values())
    for name in ("train", "train_segmenter", "train_affinity", "score_maps", "dense_crf", "class_shares"):
        monkeypatch.setattr(pipelines, name, lambda *_, **__: pytest.fail("a stage was made again"))
    assert run_pipeline(config, shelf, progress=False) == result


def test_what_changed_is_made_and_nothing_else(config, shelf):
    first = run_pipeline(replace(config, refine="none", segment=False), shelf, progress=False)["stages"]
    second = run_pipeline(replace(config, refine="none", segment=False, threshold=0.4), shelf, progress=False)["stages"]
    assert first["classify"] == second["classify"] and first["seeds"] == second["seeds"]
    assert first["masks"] != second["masks"] and first["score"] != second["score"]
    other = run_pipeline(replace(config, refine="none", segment=False, seed=1), shelf, progress=False)["stages"]
    assert other["classify"] != first["classify"]


@pytest.mark.parametrize("stage", ["seeds", "crf", "masks", "predict"])
def test_a_killed_stage_goes_on_bit_for_bit(stage, config, shelf, tmp_path, monkeypatch):
    config = replace(config, refine="crf")
    whole = run_pipeline(config, shelf, progress=False)["stages"]
    for name in whole.values():
        shutil.copytree(shelf / name, tmp_path / name)
    folder = tmp_path / whole[stage]
    files = sorted(path for path in folder.iterdir() if path.name != "done.json")
    (folder / "done.json").unlink()
    for path in files[3:]:  # of the first batch a part is there
        path.unlink()
    (folder / f"{pipelines.paths.PART}half").write_bytes(b"half")
    again = run_pipeline(config, tmp_path, progress=False)["stages"]
    assert again == whole
    for path in (shelf / whole[stage]).iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert not (folder / f"{pipelines.paths.PART}half").exists()


@pytest.mark.parametrize(
    "learner",
    [learner.TagLearner, affinity_learner.AffinityLearner, deeplab.MaskLearner],
    ids=lambda kind: kind.__name__,
)
def test_a_killed_training_goes_on_bit_for_bit(learner, config, shelf, tmp_path, monkeypatch):
    config = replace(config, refine="psa", epochs=2)
    whole = run_pipeline(config, shelf, progress=False)["stages"]
    step, calls = learner.step, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 4:  # of two steps an epoch: in the second one
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(learner, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, tmp_path, progress=False)
    unfinished = [path for path in tmp_path.iterdir() if not (path / "done.json").is_file()]
    assert len(unfinished) == 1 and not (unfinished[0] / "model.safetensors").exists()
    monkeypatch.setattr(learner, "step", step)
    assert run_pipeline(config, tmp_path, progress=False)["stages"] == whole
    for name in whole.values():
        ours, theirs = (
            sorted(path for path in (root / name).rglob("*") if path.is_file()) for root in (shelf, tmp_path)
        )
        assert [path.relative_to(shelf) for path in ours] == [path.relative_to(tmp_path) for path in theirs]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs)), name


def test_masks_only_of_what_is_scored(config, shelf):
    wanted = replace(config, refine="crf", segment=False, masks_of=("val",))
    result = run_pipeline(wanted, shelf, progress=False)
    ids = {*Voc(wanted.data, "val").ids}
    for stage in ("crf", "masks"):
        assert {path.stem for path in (shelf / result["stages"][stage]).glob("*.png")} == ids
    assert "masks" in result["scores"]["val"] and "masks" not in result["scores"]["train"]
    with pytest.raises(ValueError, match="masks_of"):
        replace(wanted, segment=True)


def test_several_thresholds_share_a_lattice_and_change_nothing():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 12, 10), generator=generator, dtype=torch.uint8)
    scores = torch.rand(4, 12, 10, generator=generator) * torch.tensor([1, 0, 1, 0])[:, None, None]
    together = labels_after_crf(image, scores, [0.3, 0.6])
    for labels, threshold in zip(together, (0.3, 0.6)):
        assert torch.equal(labels, labels_after_crf(image, scores, [threshold])[0])
    assert {*together.unique().tolist()} <= {0, 1, 3}


def test_a_file_that_another_hand_changed_is_named(config, shelf, tmp_path):
    made = run_pipeline(replace(config, refine="none", segment=False), shelf, progress=False)["stages"]
    for name in made.values():
        shutil.copytree(shelf / name, tmp_path / name)
    seed = sorted((tmp_path / made["seeds"]).glob("*.npz"))[0]
    seed.write_bytes(seed.read_bytes()[:-20])
    with pytest.raises(BrokenFile, match=rf"{seed.name}: expected what the stage seeds wrote.*Remove"):
        run_pipeline(replace(config, refine="none", segment=False, threshold=0.5), tmp_path, progress=False)


def test_a_full_disk_leaves_no_half_file(config, shelf, tmp_path, monkeypatch, capsys):
    made = run_pipeline(replace(config, refine="none", segment=False), shelf, progress=False)["stages"]
    for name in ("classify", "seeds"):
        shutil.copytree(shelf / made[name], tmp_path / made[name])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipelines, "write_mask", full)
    with pytest.raises(OSError, match="No space"):
        run_pipeline(replace(config, refine="none", segment=False), tmp_path, progress=False)
    assert not list((tmp_path / made["masks"]).iterdir())


def test_a_class_without_a_score_is_never_a_label():
    torch.manual_seed(0)
    image = torch.randint(256, (3, 20, 24), dtype=torch.uint8)
    scores = torch.zeros(4, 20, 24)
    scores[2, 5:15, 5:15] = 0.9
    assert present_classes(scores)[1].tolist() == [0, 3]
    for method, how in {"seam": {"threshold": 0.26}, "irn": {"threshold": 0.3}, "eps": {"alpha": 8.0}}.items():
        assert set(seeds_after_crf(image, scores, method, **how).unique().tolist()) <= {0, 3}
    shares = shares_after_crf(image, scores, [4.0, 24.0])
    assert shares.shape == (2, 5, 20, 24) and not shares[:, [1, 2, 4]].any()
    assert torch.allclose(shares.sum(1), torch.ones(2, 20, 24), atol=1e-5)
    assert shares[0, 0].mean() > shares[1, 0].mean()  # a low alpha is a strong background


def test_without_a_score_everything_is_background():
    image, scores = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8)
    assert not seeds_after_crf(image, scores, "seam", threshold=0.2).any()
    assert torch.allclose(shares_after_crf(image, scores, [4.0])[0, 0], torch.ones(8, 8))


def test_the_command_takes_photographs_of_ones_own(few, tmp_path, capsys, monkeypatch):
    """No masks, some photographs without tags: seeds, masks, predictions and a picture, and a sentence on scores."""
    data, root = Voc(few, "trainaug"), tmp_path / "holiday"
    root.mkdir()
    lines = ["file,tags"]
    for index in range(8):
        shutil.copy(data.images[index], root / f"{index}.jpg")
        tags = [data.classes[1 + c] for c in data.tags[index].nonzero()[:, 0].tolist()] if index < 6 else []
        lines.append(f"{index}.jpg,{';'.join(tags)}")
    (root / "tags.csv").write_text("\n".join(lines) + "\n")
    words = ["run", "wsss", "--data", str(root), "--folder", str(tmp_path / "out"), "--method", "cam"]
    words += "--backbone small --weights random --refine crf --epochs 1 --batch-size 3 --size 64".split()
    assert __main__.main(words) == 0
    said = capsys.readouterr().out
    assert "without tags      2" in said and "nothing can be scored" in said and "Picture of 6 of them" in said
    (masks,) = (path for path in (tmp_path / "out").glob("masks-*") if path.is_dir())
    assert len(list(masks.glob("*.png"))) == 8  # those without tags have predicted ones
    (predicted,) = (tmp_path / "out").glob("predict-*")
    assert len(list(predicted.glob("*.png"))) == 8
    (picture,) = (tmp_path / "out").glob("masks-*.png")
    assert "Photographs under the masks" in picture.with_suffix(".txt").read_text()
    with Image.open(sorted(masks.glob("*.png"))[0]) as mask:
        assert mask.mode == "P" and np.array(mask).max() < len(data.classes)
    (score,) = (tmp_path / "out").glob("score-*.json")
    assert json.loads(score.read_text())["scores"] == {}


@pytest.mark.parametrize("changes", [{"method": "sam"}, {"refine": "magic"}, {"scales": (0.0,)}, {"threshold": 2.0}])
def test_settings_that_make_no_sense_are_refused(changes, few):
    with pytest.raises((ValueError, TypeError)):  # the tests check types, too
        PipelineConfig(str(few), **changes)
