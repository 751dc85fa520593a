"""Table 1 as a command, and the training of its models: twins, interruptions, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms.v2 import functional as transforms

from course_lib import __main__, backbones, maps
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.evaluate.localization import MaxBoxAcc
from course_lib.experiments import localise
from course_lib.experiments.localise import (
    CLASS_RULES,
    LocaliseEvaluation,
    LocaliseTraining,
    crop,
    evaluate,
    fit_learner,
    table,
    train,
)
from course_lib.experiments.shared import network, timm_name
from course_lib.metric_learning.features import tail, trunk_features
from course_lib.metric_learning.learner import (
    CLASSIFYING,
    LOSSES,
    RATES,
    BalancedBatches,
    Learner,
    common_row,
    linear_probe,
)
from course_lib.prototypes import class_prototypes
from course_lib.published import DIST_CAM_TABLE_1
from course_lib.worlds import minis

pytestmark = pytest.mark.figures


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minis.PER_ITEM, "creatures", {"train": 3, "val": 2})
        return minis.mini_ilsvrc(tmp_path_factory.mktemp("data"), source="creatures")


def small(tree, **changes):
    """A tiny network on 18 training and 12 validation images."""
    return LocaliseEvaluation(
        **dict(
            data=str(tree),
            backbone="test_resnet",
            weights="random",
            methods=("cam", "dist-cam"),
            size=96,
            batch_size=4,
            save_every=1,
        )
        | changes
    )


@pytest.fixture(scope="module")
def result(tree, tmp_path_factory):
    return evaluate(small(tree), tmp_path_factory.mktemp("evaluated"), progress=False)


# evaluation -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_equations_all_at_once(tree, result, tmp_path, monkeypatch):
    """Everything in memory, no stream, no groups of images; `class_prototypes`, and one MaxBoxAcc for each figure.

    Boxes jump where a rounding error crosses a threshold. So heatmaps are compared first: those of the evaluation with
    those all at once. The boxes are then those of the evaluation's heatmaps, to the last bit.
    """
    seen, heatmap = [], maps.heatmap
    with monkeypatch.context() as patch:
        patch.setattr(maps, "heatmap", lambda raw, size: seen.append(heatmap(raw, size)) or seen[-1])
        assert evaluate(small(tree), tmp_path, progress=False) == result
    names = list(result["rows"])  # each with a heatmap of every batch
    heat = {name: torch.cat(seen[place :: len(names)]) for place, name in enumerate(names)}
    model, own = network("test_resnet", "random", list(Ilsvrc(tree).classes))
    assert not own
    with torch.no_grad():
        batch = next(iter(Ilsvrc(tree, "train").batches(96, 18)))
        query = model.features(model.normalise(batch.images)).mean((2, 3))
        prototypes = class_prototypes(query, batch.labels, 6)
        weight, bias = linear_probe(query, batch.labels, 6)
        val = next(iter(Ilsvrc(tree).batches(96, 12)))
        features = model.features(model.normalise(val.images))
        pooled = features.mean((2, 3))
    scores = {  # of classes, the largest wins
        "classifier": pooled @ weight.T + bias,
        "l1": -(pooled[:, None] - prototypes).abs().sum(2),
        "cosine": torch.cosine_similarity(pooled[:, None], prototypes, dim=2),
    }
    for score in scores.values():
        first, second = score.topk(2).values.T
        assert (first - second > 1e-5 * score.std()).all(), "rounding alone decides a prediction"
    every = torch.arange(12)
    raw = {
        "cam": maps.cam(features, weight)[every, val.labels],
        "dist-cam": maps.dist_cam(features, prototypes)[every, val.labels],
        "uniform": features.mean(1),
    }
    for name, map in raw.items():
        torch.testing.assert_close(heat[name], maps.heatmap(map, 96), rtol=0, atol=1e-3)
        for rule, of_classes in scores.items():
            score = MaxBoxAcc()
            score.accumulate(heat[name], val.boxes, of_classes.argmax(1) == val.labels)
            expected, row = score.compute(), result["rows"][name]
            assert row["top1_error_best"][rule] == pytest.approx(100 * (1 - expected.top1_best))
            assert row["top1_error"][rule] == pytest.approx(100 * (1 - expected.top1))
            assert row["gt_known_error_best"] == pytest.approx(100 * (1 - expected.max_box_acc))
            assert row["max_box_acc_v2"] == pytest.approx(100 * expected.max_box_acc_v2)
            assert row["curve"] == pytest.approx((100 * expected.single[1, ::10]).tolist())
            assert result["accuracy"][rule] == pytest.approx(100 * expected.accuracy)
    assert result["baselines"]["whole image"] == pytest.approx(100 * (1 - expected.whole_image))
    assert result["settings"]["images"] == 12 and result["classifier"] == "linear probe"


def test_controls_are_there(result):
    assert set(result["rows"]) == {"cam", "cam, wrong class", "dist-cam", "dist-cam, wrong class", "uniform", "random"}
    assert result["rows"]["dist-cam, wrong class"]["top1_error_best"] is None
    assert result["rows"]["cam"]["split_half"] is None
    assert -1 <= result["rows"]["dist-cam"]["split_half"] < 1 and -1 <= result["rows"]["dist-cam"]["wrong_class"] < 1
    assert result["rows"]["cam, wrong class"]["curve"] != result["rows"]["cam"]["curve"]


def test_random_weights_are_fresh_and_wrong_classes_fixed():
    labels = torch.arange(6)
    first, again, second = (localise._controls(labels, 6, 8, 0, number) for number in (0, 0, 1))
    for (wrong, weights), same in ((again, True), (second, False)):
        assert torch.equal(first[0], wrong) and torch.equal(first[1], weights) == same
    assert (first[0] != labels).all() and sorted(first[0].tolist()) == labels.tolist()
    assert first[1].shape == (6, 1, 8)


def test_every_method_and_the_table(tree, tmp_path):
    result = evaluate(small(tree, methods=tuple(CLASS_RULES), limit=4, samples=1), tmp_path, progress=False)
    assert result["settings"]["images"] == 4 and all(row["split_half"] is None for row in result["rows"].values())
    text = (tmp_path / "localise.md").read_text()
    assert text == table(result) and json.loads((tmp_path / "localise.json").read_text()) == result
    for name in CLASS_RULES:
        assert f"\n| {name} |" in text and f"\n| {name}, wrong class |" in text
    # A linear probe is centred as it stands, and centring changes nothing: rounding moves few boxes of 100 thresholds.
    differ = [
        one != pytest.approx(other)
        for one, other in zip(result["rows"]["cam-centred"]["curve"], result["rows"]["cam"]["curve"], strict=True)
    ]
    assert sum(differ) <= 3


def test_the_papers_figures_stand_beside(tree, tmp_path):
    result = evaluate(small(tree, backbone="resnet18", size=64, limit=2, samples=1), tmp_path, progress=False)
    assert result["paper"] == {"cam": 59.5, "dist-cam": 56.7}
    assert any(line.startswith("| dist-cam |") and line.endswith("| 56.7 |") for line in table(result).splitlines())


def test_six_backbones_of_the_paper():
    assert all(timm_name(name) in timm.list_pretrained() for name in DIST_CAM_TABLE_1)
    assert [timm_name(name).split(".")[0] for name in DIST_CAM_TABLE_1] == list(DIST_CAM_TABLE_1)
    assert len(DIST_CAM_TABLE_1) == 6 and timm_name("resnet26") == "resnet26"
    assert all(cam > dist_cam for cam, dist_cam in DIST_CAM_TABLE_1.values())


@pytest.mark.parametrize("save", [1, 3, 4, 6])
def test_interrupted_evaluation_goes_on_to_the_same_numbers(tree, result, tmp_path, monkeypatch, save):
    """18 training images in 5 batches, 12 validation images in 3; stopped right after each of some of the saves."""
    saves, real = [], os.replace

    def stop(unfinished, file):
        real(unfinished, file)
        if Path(file).suffix == ".pt":
            saves.append(file.name)
            if len(saves) == save:
                raise KeyboardInterrupt

    monkeypatch.setattr(localise.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small(tree), tmp_path, progress=False)
    assert evaluate(small(tree), tmp_path, progress=False) == result
    assert saves == ["prototypes.pt"] * 5 + ["scores.pt"] * 3


def test_killed_evaluation_goes_on_to_the_same_numbers(tree, result, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from course_lib.experiments import localise as l\n"
        "real, left = l.squash, [int(sys.argv[3])]\n"
        "def squash(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        "l.squash = squash\n"
        "l.evaluate(l.LocaliseEvaluation(sys.argv[1], 'test_resnet', 'random', methods=('cam', 'dist-cam'), size=96,\n"
        "                                batch_size=4, save_every=1), Path(sys.argv[2]), progress=False)"
    )
    root = Path(localise.__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", script, str(tree), str(tmp_path), "7"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (tmp_path / "scores.pt").is_file() and not (tmp_path / "localise.json").exists()
    assert evaluate(small(tree), tmp_path, progress=False) == result


def test_prototypes_serve_further_methods(tree, result, tmp_path, monkeypatch):
    evaluate(small(tree, methods=("cam",)), tmp_path, progress=False)
    squashed, real = [], localise.squash
    monkeypatch.setattr(localise, "squash", lambda items, size: squashed.append(len(items)) or real(items, size))
    assert evaluate(small(tree), tmp_path, progress=False) == result
    assert squashed == [4, 4, 4], "validation images, and none to train on"


def test_state_of_another_evaluation_is_refused(tree, tmp_path):
    evaluate(small(tree), tmp_path, progress=False)
    with pytest.raises(ValueError, match="other settings: seed was 0 and is 1"):
        evaluate(small(tree, seed=1), tmp_path, progress=False)


def test_what_cannot_be_evaluated_is_explained(tree, tmp_path):
    alone = shutil.copytree(tree, tmp_path / "mini-ilsvrc")
    shutil.rmtree(alone / "ILSVRC/Data/CLS-LOC/train")
    with pytest.raises(FileNotFoundError, match="no training images, and prototypes are means"):
        evaluate(small(alone), tmp_path / "out", progress=False)
    with pytest.raises(FileNotFoundError, match="ILSVRC 2012 tree"):
        evaluate(small(tmp_path / "nothing"), tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="no method 'camm'"):
        small(tree, methods=("camm",))
    assert not (tmp_path / "out").exists()


def test_classifier_is_the_networks_own_for_imagenet_only():
    synsets = [wnid for wnid, _ in backbones.imagenet_classes()]
    assert network("test_resnet", "random", synsets)[1] and not network("test_resnet", "random", synsets[:-1])[1]
    (a, _), (b, _), (c, _) = (network("test_resnet", "random", synsets, seed) for seed in (0, 0, 1))
    assert torch.equal(a.classifier.weight, b.classifier.weight) and not torch.equal(
        a.classifier.weight, c.classifier.weight
    )


def test_linear_probe_is_the_one_solution():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    features = torch.randn(60, 5, generator=generator) + 2 + torch.nn.functional.one_hot(labels, 5)
    weight, bias = linear_probe(features, labels, 4, decay=0.01)
    other = LogisticRegression(C=1 / (60 * 0.01), tol=1e-10, max_iter=10_000).fit(
        features.double().numpy(), labels.numpy()
    )
    torch.testing.assert_close(weight, torch.from_numpy(other.coef_).float(), rtol=1e-3, atol=1e-4)
    expected = torch.from_numpy(other.intercept_ - other.intercept_.mean()).float()
    torch.testing.assert_close(bias - bias.mean(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight.sum(0), torch.zeros(5), rtol=0, atol=1e-5)


# training -------------------------------------------------------------------------------------------------------------


def quick(tree, **changes):
    return LocaliseTraining(
        **dict(
            data=str(tree),
            backbone="test_efficientnet",
            weights="random",
            epochs=2,
            classes=3,
            images=2,
            size=56,
            learning_rate=1e-3,
        )
        | changes
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_the_last_block_and_is_evaluated(tree, tmp_path, loss):
    config = quick(tree, loss=loss, last_block=True)
    before = network(config.backbone, "random", list(Ilsvrc(tree).classes))[0].state_dict()
    history = train(config, tmp_path, progress=False)
    assert len(history) == 2 and all(row["loss"] > 0 for row in history)
    after = load_file(tmp_path / "model.safetensors")
    moved = {
        name for name in before if not name.startswith("classifier") and not torch.equal(before[name], after[name])
    }
    last = max(int(name.split(".")[2]) for name in before if ".blocks." in name)
    assert moved and all(
        name.startswith((f"network.blocks.{last}.", "network.conv_head", "network.bn2")) for name in moved
    )
    found = small(tree, backbone=config.backbone, checkpoint=str(tmp_path / "model.safetensors"), limit=4)
    result = evaluate(found, tmp_path / "out", progress=False)
    assert result["classifier"] == ("own" if loss in CLASSIFYING else "linear probe")


def test_whole_network_trains_on_photographs(tree, tmp_path):
    config = quick(tree, loss="center", backbone="test_resnet", epochs=12, learning_rate=0.03)
    history = train(config, tmp_path, progress=False)
    assert {"softmax", "center", "loss"} <= set(history[0]) and history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert train(config, tmp_path, progress=False) == history  # finished: nothing is done twice


def test_statistics_are_frozen_unless_weights_are_random():
    model, _ = network("test_resnet", "random", ["a"])
    learner = Learner(model, LOSSES["triplet"], 1).train()
    norms = [part for part in learner.modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and not any(part.training for part in norms) and learner.training
    assert all(
        part.training
        for part in Learner(model, LOSSES["triplet"], 1, frozen_statistics=False).train().modules()
        if isinstance(part, nn.BatchNorm2d)
    )
    assert not model.classifier.weight.requires_grad and next(model.network.parameters()).requires_grad


def trunk_dataset(model, data):
    labels = torch.tensor([photo.label for photo in data.photos])
    return TensorDataset(trunk_features(model, data, 56, progress=False), labels)


def test_centers_learn_at_their_own_rate(tree):
    """One batch of all 12 images, 2 of each class: each center goes 2/12 of the way from 0 to the mean of its class."""
    model, _ = network("test_efficientnet", "random", ["a"])
    model.classifier = nn.Linear(256, 6)
    learner = Learner(model, LOSSES["center"], 6, last_block=True)
    dataset = trunk_dataset(model, Ilsvrc(tree))
    with torch.no_grad():
        pooled = tail(model, dataset.tensors[0]).mean((2, 3))
    fit_learner(learner, dataset, dataset.tensors[1], quick(tree, loss="center", classes=6, epochs=1), progress=False)
    means = class_prototypes(pooled, dataset.tensors[1], 6)
    torch.testing.assert_close(learner.centers.detach(), means / 6, rtol=1e-3, atol=1e-4)


def test_a_loss_of_pytorch_metric_learning_fits_in(tree):
    model, _ = network("test_efficientnet", "random", ["a"])
    other = TripletMarginLoss()
    learner = Learner(model, lambda learner, query, labels: {"theirs": other(query, labels)}, 6, last_block=True)
    dataset = trunk_dataset(model, Ilsvrc(tree, "train"))
    history = fit_learner(learner, dataset, dataset.tensors[1], quick(tree), progress=False)
    assert history[-1]["theirs"] > 0


def test_batches_are_balanced():
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] + [4] * 7)
    batches = BalancedBatches(labels, classes=3, images=4, generator=torch.Generator().manual_seed(0))
    seen = list(batches)
    assert len(seen) == len(batches) == 22 // 12
    for batch in list(batches) + list(batches) + list(batches):
        own = labels[batch].view(3, 4)
        assert (own == own[:, :1]).all() and len(set(own[:, 0].tolist())) == 3
        for row, label in zip(torch.tensor(batch).view(3, 4), own[:, 0].tolist()):
            assert len(set(row.tolist())) == (1 if label == 2 else 4)
    again = BalancedBatches(labels, 3, 4, torch.Generator().manual_seed(0))
    assert list(again) == seen
    with pytest.raises(ValueError, match="5 classes were asked for, but the data has 4"):
        BalancedBatches(labels, 5, 1, torch.Generator())


def test_photos_are_cropped_and_flipped_by_torchs_generator(tree):
    image, photo = Ilsvrc(tree, "train")[0]
    torch.manual_seed(0)
    some = [crop(56, image, photo) for _ in range(6)]
    torch.manual_seed(0)
    again, label = crop(56, image, photo)
    assert torch.equal(again, some[0][0]) and again.shape == (3, 56, 56) and again.dtype == torch.uint8
    assert label == photo.label and any(not torch.equal(again, other) for other, _ in some[1:])
    torch.manual_seed(3)
    top, left, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
    expected = transforms.resize(image, [64, 64])[:, top : top + 56, left : left + 56]
    torch.manual_seed(3)
    assert torch.equal(crop(56, image, photo)[0], expected.flip(-1) if flip else expected)


def test_unknown_loss_is_explained(tree):
    with pytest.raises(ValueError, match="no loss 'triple'; there are: softmax, "):
        quick(tree, loss="triple")
    assert set(RATES) == set(LOSSES)


# commands -------------------------------------------------------------------------------------------------------------


def test_commands_train_and_evaluate(tree, tmp_path, capsys):
    common = ["localise", "--data", str(tree), "--backbone", "test_efficientnet", "--device", "cpu"]
    training = "--weights random --loss softmax --last-block --epochs 1 --classes 3 --images 2".split()
    assert __main__.main(["train", *common, *training, "--folder", str(tmp_path)]) == 0
    assert "epoch   1  softmax" in capsys.readouterr().out
    evaluation = ["--checkpoint", str(tmp_path / "model.safetensors"), "--folder", str(tmp_path / "out")]
    assert __main__.main(["evaluate", *common, *evaluation, *"--methods cam dist-cam --limit 4".split()]) == 0
    assert "the network's own" in capsys.readouterr().out and (tmp_path / "out/localise.json").is_file()
    assert __main__.main(["evaluate", *common, "--checkpoint", "nothing.safetensors"]) == 1
    assert "nothing.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        __main__.main(["evaluate", *common, "--methods", "camm"])
    assert "no method 'camm'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train localise", "evaluate localise"])
def test_commands_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([*name.split(), "--help"])
    assert stop.value.code == 0 and name in capsys.readouterr().out
    assert __main__.main([name.split()[0]]) == 2 and name in capsys.readouterr().err


def test_sgd_keeps_the_mean_row_of_a_classifier_and_adam_does_not():
    features = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4
    plain, momentum, adam = (
        common_row(make, features, labels, 4)
        for make in (
            lambda weights: torch.optim.SGD(weights, 0.1),
            lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=0.1),
            lambda weights: torch.optim.Adam(weights, 1e-3),
        )
    )
    assert plain < 1e-5 and momentum < 1e-5 and adam > 0.05
