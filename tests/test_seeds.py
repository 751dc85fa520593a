"""Seeds: scores pass by pass as published, thresholds, files, and the command that scores a network."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import __main__
from course_lib.data.voc import Voc, palette
from course_lib.evaluate.segmentation import IGNORE, segmentation
from course_lib.experiments import wsss as experiment
from course_lib.experiments.wsss import SeedEvaluation, evaluate, read_scores, same_size, write_scores
from course_lib.worlds import minis, tagged
from course_lib.wsss import seeds
from course_lib.wsss.cam_net import Architecture, build, load, save
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.seeds import hard_seeds, scaled_scores, score_maps

pytestmark = pytest.mark.figures

CLASSES = ("background", "bird", "fish", "train")


def net(method="seam+p2p", classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return build(Architecture(method, classes, "small", neck=16, projector=8))


def pictures(count=3, height=40, width=48, seed=0):
    """Coarse noise: fine noise would be all edges."""
    noise = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1) * 255).byte()


def slow(model, image, tag, scales, name):
    """Scores of one image, pass by pass and class by class, as the released scripts make them."""
    source, activation = model.method.readings[name]
    height, width = image.shape[1:]
    total = np.zeros((len(tag), height, width))
    for scale in scales:
        for flip in (False, True):
            size = (round(height * scale), round(width * scale))
            scaled = transforms.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
            with torch.no_grad():
                maps = getattr(model(model.prepare((scaled.flip(-1) if flip else scaled)[None])), source)
            if activation == "softmax":
                maps = maps.exp() / maps.exp().sum(1, keepdim=True)
            if activation == "relu":
                maps = maps.clamp_min(0)
            if not activation:
                maps = F.interpolate(maps, size, mode="bilinear", align_corners=True)
            maps = F.interpolate(maps[:, 1:], (height, width), mode="bilinear", align_corners=False)[0].numpy()
            total += maps[:, :, ::-1] if flip else maps
    for number in range(len(tag)):
        if not tag[number]:
            total[number] = 0
            continue
        one = np.maximum(total[number], 0)
        if activation:
            total[number] = one / (one.max() + 1e-5)
        else:
            low, high = one.min(), one.max()
            one[one < low + 1e-5] = 0
            total[number] = np.maximum((one - low - 1e-5) / (high - low + 1e-5), 0)
    return torch.from_numpy(total).float()


@pytest.mark.parametrize("method", TAG_METHODS)
def test_scores_equal_those_made_pass_by_pass(method):
    model, images, scales = net(method), pictures(), (0.5, 1.0, 1.5)
    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    found = score_maps(model, images, tags, scales)
    assert list(found) == list(TAG_METHODS[method].readings)
    for name, scores in found.items():
        assert 0 <= scores.min() and 0.9 < scores.max() <= 1
        for image, tag, score in zip(images, tags, scores):
            torch.testing.assert_close(score, slow(model, image, tag, scales, name), rtol=1e-3, atol=1e-4)


def test_a_network_looks_at_the_size_it_was_trained_for(tmp_path):
    """`scored_at` is the longer side of the scale 1, is kept in checkpoints, and scores are as large as the images."""
    plain, told, tags = net(), net(), torch.ones(3, 3)
    told.architecture = replace(told.architecture, scored_at=96)  # twice the longer side
    save(told, tmp_path / "told.safetensors")
    for scores, expected in zip(
        *(
            score_maps(model, pictures(), tags, scales).values()
            for model, scales in ((load(tmp_path / "told.safetensors"), (0.5, 1.0)), (plain, (1.0, 2.0)))
        )
    ):
        assert scores.shape[2:] == (40, 48) and torch.equal(scores, expected)
    ones = next(iter(score_maps(plain, pictures(), tags).values()))
    assert not torch.equal(ones, next(iter(score_maps(told, pictures(), tags).values())))


def test_mirror_images_have_mirrored_scores():
    model, images, tags = net(), pictures(), torch.ones(3, 3)
    for name, scores in score_maps(model, images, tags).items():
        torch.testing.assert_close(
            score_maps(model, images.flip(-1), tags)[name].flip(-1), scores, rtol=1e-3, atol=1e-4
        )


def test_scores_of_maps_without_a_peak():
    maps = torch.stack([torch.zeros(2, 3), torch.full((2, 3), 0.3), torch.full((2, 3), -1.0)])[None]
    assert not scaled_scores(maps, True).any(), "a constant has nothing above its minimum"
    scores = scaled_scores(maps, False)
    assert not scores[0, [0, 2]].any() and scores[0, 1].min() > 0.99
    maps[0, 0, 1, 1] = 5.0
    assert scaled_scores(maps, True)[0, 0].max() == pytest.approx(1, abs=1e-4)


def test_a_seed_needs_a_score_above_the_threshold():
    scores = torch.tensor([[0.2, 0.3, 0.1, 0.0], [0.2, 0.25, 0.4, 0.0]])[None, :, None]
    assert hard_seeds(scores, 0.2).tolist() == [[[0, 1, 2, 0]]], "0.2 itself is background"
    assert hard_seeds(scores, 0.19).tolist() == [[[1, 1, 2, 0]]], "of equals the first"
    assert not hard_seeds(torch.zeros(1, 2, 1, 4), 0.0).any()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(0, 1000))
def test_kept_scores_come_back_rounded(tmp_path_factory, present, seed):
    tags = torch.tensor(present, dtype=torch.float32)
    scores = torch.rand(len(present), 5, 4, generator=torch.Generator().manual_seed(seed)) * tags[:, None, None]
    path = tmp_path_factory.mktemp("runs") / "maps" / "one.npz"
    write_scores(path.parent, "one", scores, tags)
    again = read_scores(path)
    assert again.shape == scores.shape and (again - scores).abs().max() <= 0.5 / 255 + 1e-6
    with np.load(path, allow_pickle=False) as file:
        assert file["levels"].dtype == np.uint8 and len(file["levels"]) == sum(present), "only tagged classes take room"


# a whole set ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tagged.RECIPES, "creatures", replace(tagged.RECIPES["creatures"], images={"trainaug": 14, "val": 12})
        )
        patch.setattr(minis, "SCORED", 8)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "creatures")


@pytest.fixture(scope="module")
def checkpoint(tree, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "model.safetensors"
    save(net(classes=tuple(Voc(tree, "train").classes)), path)
    return path


def miou(labels, truth, classes):
    """Of label images and masks, all pixels pooled, in percent."""
    labels, truth = (torch.cat([image.flatten().long() for image in images]) for images in (labels, truth))
    known, count = truth != IGNORE, len(classes)
    pairs = (truth[known] * count + labels[known]).bincount(minlength=count**2)
    return 100 * segmentation(pairs.view(count, count), classes).miou


def test_evaluation_equals_one_pass_for_each_threshold(tree, checkpoint, tmp_path):
    evaluation = SeedEvaluation(str(checkpoint), str(tree), save=True)
    result = evaluate(evaluation, load(checkpoint), tmp_path, progress=False)
    assert json.loads((tmp_path / "seeds.json").read_text()) == json.loads(json.dumps(result))
    model, data = net(classes=tuple(Voc(tree, "train").classes)), Voc(tree, "val")
    found = seeds.score(model.to(memory_format=torch.channels_last), data)
    assert found == result["splits"]["val"], "lessons score as the command does"
    masks = [data.mask(i) for i in range(len(data))]
    for name, row in result["splits"]["val"].items():
        scores = [score_maps(model, data[i][0][None], data[i][1][None])[name] for i in range(len(data))]
        curve = [miou([hard_seeds(score, step / 100) for score in scores], masks, data.classes) for step in range(60)]
        # Image by image in place of batches, rounding moves a handful of 110,592 pixels over a threshold.
        assert row["curve"] == pytest.approx(curve, abs=0.05) and row["miou"] == pytest.approx(max(curve), abs=0.05)
        hit = total = 0
        for i, score in enumerate(scores):
            label = data.classes.index(data.confounded)
            if data.tags[i, label - 1]:
                hit += int((hard_seeds(score, row["threshold"])[0][data.track(i)] == label).sum())
                total += int(data.track(i).sum())
        assert row["track"] == pytest.approx(100 * hit / total, abs=0.5)

    row = result["splits"]["val"]["with PCM"]
    saved = []
    for i, name in enumerate(data.ids):
        with Image.open(tmp_path / "seeds" / "val" / f"{name}.png") as picture:
            assert picture.mode == "P" and picture.getpalette()[:21] == palette()[:7].ravel().tolist()
            seed = torch.from_numpy(np.array(picture))
        assert seed.shape == data.mask(i).shape
        assert set(seed.unique().tolist()) <= {0, *(data.tags[i].nonzero()[:, 0] + 1).tolist()}
        kept = read_scores(tmp_path / "maps" / "val" / f"{name}.npz")
        assert torch.equal(hard_seeds(kept[None], row["threshold"])[0], seed.long())
        saved.append(seed)
    assert miou(saved, masks, data.classes) == pytest.approx(row["miou"], abs=0.5), "rounding to bytes moves few pixels"
    for words in ("| val | with PCM |", "61.54", "58.41", "dots creature", "track"):
        assert words in (tmp_path / "seeds.md").read_text(), words


def test_batches_hold_images_of_one_size(tree):
    data = Voc(tree, "train")
    assert same_size(data, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]] and same_size(data, 3, limit=4) == [[0, 1, 2], [3]]
    sizes = {path: (96, 96) for path in data.images} | {data.images[1]: (96, 80)}

    class Header:
        def __init__(self, path, formats):
            self.size = sizes[path]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.Image, "open", Header)
        assert same_size(data, 4) == [[0, 2, 3, 4], [5, 6, 7], [1]]


def test_command(tree, checkpoint, tmp_path, capsys):
    options = ["evaluate", "seeds", "--checkpoint", str(checkpoint), "--data", str(tree), "--folder", str(tmp_path)]
    assert __main__.main([*options, "--splits", "val", "--scales", "1", "1.5", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "# Seeds of seam+p2p" in out and "Scales: 1, 1.5" in out and "| train |" not in out
    assert not (tmp_path / "maps").exists(), "maps are written only when asked for"
    assert __main__.main([*options[:-2], "--checkpoint", str(tmp_path / "no.safetensors")]) == 1
    assert "A checkpoint was expected" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_broken_images_are_named_and_no_figure_is_made_of_the_others(
    tree, checkpoint, tmp_path, capsys, monkeypatch, workers
):
    data = shutil.copytree(tree, tmp_path / "data")
    images = Voc(data, "val").images
    options = ["--checkpoint", checkpoint, "--data", data, "--folder", tmp_path / "out", "--splits", "val"]
    options = ["evaluate", "seeds", *map(str, options), "--workers", workers]
    whole = images[2].read_bytes()
    images[2].write_bytes(whole[: len(whole) // 2])
    assert __main__.main(options) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{images[2]} cannot be decoded") and "Traceback" not in said
    for path in images[1:3]:
        path.write_bytes(b"no image")
    assert __main__.main(options) == 1
    said = capsys.readouterr().err
    assert f"2 of 12 images of val cannot be read, so there are no figures of it: {images[1]}, {images[2]}." in said
    assert not list((tmp_path / "out").glob("seeds*"))


def test_a_network_for_other_classes_is_refused(tree, tmp_path):
    save(net(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="classes of the network, bird, fish, train, got dots creature"):
        evaluate(SeedEvaluation(str(tmp_path / "other.safetensors"), str(tree)), net(), tmp_path, progress=False)
