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

from course_lib import __main__, backbones, maps
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.evaluate.localization import MaxBoxAcc
from course_lib.experiments import localise
from course_lib.experiments.localise import METHODS, PAPER, Evaluation, evaluate, linear_probe, network, table
from course_lib.metric_learning import learner as train
from course_lib.metric_learning.learner import LOSSES, BalancedBatches, Learner, Photos, Training
from course_lib.prototypes import class_prototypes
from course_lib.worlds import minis


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(minis.PER_ITEM, "creatures", {"train": 3, "val": 2})
        return minis.mini_ilsvrc(tmp_path_factory.mktemp("data"), source="creatures")


def small(tree, **changes):
    """A tiny network on 18 training and 12 validation images."""
    return Evaluation(
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


# evaluation --------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_equations_all_at_once(tree, result):
    """Everything in memory, no stream, no groups of images; `class_prototypes`, and one MaxBoxAcc for each figure."""
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
    rules = {
        "classifier": (pooled @ weight.T + bias).argmax(1),
        "l1": (pooled[:, None] - prototypes).abs().sum(2).argmin(1),
        "cosine": torch.cosine_similarity(pooled[:, None], prototypes, dim=2).argmax(1),
    }
    every = torch.arange(12)
    raw = {
        "cam": maps.cam(features, weight)[every, val.labels],
        "dist-cam": maps.dist_cam(features, prototypes)[every, val.labels],
        "uniform": features.mean(1),
    }
    for name, map in raw.items():
        for rule, predicted in rules.items():
            score = MaxBoxAcc()
            score.accumulate(maps.heatmap(map, 96), val.boxes, predicted == val.labels)
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


def test_random_weights_are_fresh_and_wrong_classes_fixed(tree):
    query, labels = torch.rand(6, 8), torch.arange(6)
    rows = {"classifier": torch.eye(6, 8), "prototypes": torch.rand(6, 8)}
    first, again, second = (localise._weights(query, labels, rows, small(tree), number) for number in (0, 0, 1))
    assert torch.equal(first["random"], again["random"]) and not torch.equal(first["random"], second["random"])
    assert torch.equal(first["cam, wrong class"], second["cam, wrong class"])
    assert not (first["cam, wrong class"] * first["cam"]).any()


def test_every_method_and_the_table(tree, tmp_path):
    result = evaluate(small(tree, methods=tuple(METHODS), limit=4, samples=1), tmp_path, progress=False)
    assert result["settings"]["images"] == 4 and all(row["split_half"] is None for row in result["rows"].values())
    text = (tmp_path / "localise.md").read_text()
    assert text == table(result) and json.loads((tmp_path / "localise.json").read_text()) == result
    for name in METHODS:
        assert f"\n| {name} |" in text and f"\n| {name}, wrong class |" in text
    # A linear probe is centred as it stands, so centring changes nothing.
    assert result["rows"]["cam-centred"]["curve"] == pytest.approx(result["rows"]["cam"]["curve"])


def test_the_papers_figures_stand_beside(tree, tmp_path):
    result = evaluate(small(tree, backbone="resnet18", size=64, limit=2, samples=1), tmp_path, progress=False)
    assert result["paper"] == {"cam": 59.5, "dist-cam": 56.7}
    assert any(line.startswith("| dist-cam |") and line.endswith("| 56.7 |") for line in table(result).splitlines())


def test_six_backbones_of_the_paper():
    assert all(name in timm.list_pretrained() for name, _, _ in PAPER.values())
    assert [name.split(".")[0] for name, _, _ in PAPER.values()] == list(PAPER) and len(PAPER) == 6
    assert all(cam > dist_cam for _, cam, dist_cam in PAPER.values())


@pytest.mark.parametrize("save", [1, 3, 4, 6])
def test_interrupted_evaluation_goes_on_to_the_same_numbers(tree, result, tmp_path, monkeypatch, save):
    """18 training images in 5 batches, 12 validation images in 3; stopped right after each of some of the saves."""
    saves, real = [], localise._save

    def stop(state, file):
        real(state, file)
        saves.append(file.name)
        if len(saves) == save:
            raise KeyboardInterrupt

    monkeypatch.setattr(localise, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(small(tree), tmp_path, progress=False)
    assert evaluate(small(tree), tmp_path, progress=False) == result
    assert saves == ["prototypes.pt"] * 5 + ["scores.pt"] * 3


def test_killed_evaluation_goes_on_to_the_same_numbers(tree, result, tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from course_lib.metric_learning import localise as l\n"
        "real, left = l.squash, [int(sys.argv[3])]\n"
        "def squash(*args, **kwargs):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args, **kwargs)\n"
        "l.squash = squash\n"
        "l.evaluate(l.Evaluation(sys.argv[1], 'test_resnet', 'random', ('cam', 'dist-cam'), size=96, batch_size=4,\n"
        "                        save_every=1), Path(sys.argv[2]), progress=False)"
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
    streams, real = [], localise._stream
    monkeypatch.setattr(
        localise,
        "_stream",
        lambda data, chosen, done, *more: streams.append((data.split, done)) or real(data, chosen, done, *more),
    )
    assert evaluate(small(tree), tmp_path, progress=False) == result
    assert streams == [("train", 5), ("val", 0)]


def test_state_of_another_evaluation_is_refused(tree, tmp_path):
    evaluate(small(tree), tmp_path, progress=False)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
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


# training ----------------------------------------------------------------------------------------------------------------


def quick(tree, **changes):
    return Training(
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
    history = train.train(config, tmp_path, progress=False)
    assert len(history) == 2 and all(row["loss"] > 0 for row in history)
    after = load_file(tmp_path / "model.safetensors")
    moved = {
        name for name in before if not name.startswith("classifier") and not torch.equal(before[name], after[name])
    }
    last = max(int(name.split(".")[2]) for name in before if ".blocks." in name)
    assert moved and all(
        name.startswith((f"network.blocks.{last}.", "network.conv_head", "network.bn2")) for name in moved
    )
    found = small(tree, backbone=config.backbone, weights=str(tmp_path / "model.safetensors"), limit=4)
    result = evaluate(found, tmp_path / "out", progress=False)
    assert result["classifier"] == ("own" if loss in train.CLASSIFYING else "linear probe")


def test_whole_network_trains_on_photographs(tree, tmp_path):
    config = quick(tree, loss="center", backbone="test_resnet", epochs=12, learning_rate=0.03)
    history = train.train(config, tmp_path, progress=False)
    assert {"softmax", "center", "loss"} <= set(history[0]) and history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert train.train(config, tmp_path, progress=False) == history  # finished: nothing is done twice


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


def test_trunk_and_tail_are_the_network(tree):
    model = backbones.create("test_efficientnet", False)
    images = Ilsvrc(tree)[0][0][None]
    with torch.no_grad():
        whole = model.features(model.normalise(images))
        torch.testing.assert_close(train.tail(model, train.trunk(model, images)), whole)
        found, labels = train.trunk_features(model, Ilsvrc(tree), 64, progress=False).tensors
        images = next(iter(Ilsvrc(tree).batches(64, 12))).images
        torch.testing.assert_close(
            train.tail(model, found), model.features(model.normalise(images)), rtol=1e-3, atol=1e-4
        )
    assert sorted(labels.tolist()) == [c for c in range(6) for _ in range(2)]
    with pytest.raises(ValueError, match="EfficientNets of timm, which have conv_stem"):
        Learner(backbones.create("test_resnet", False), LOSSES["triplet"], 6, last_block=True)


def test_centers_learn_at_their_own_rate(tree):
    """One batch of all 12 images, 2 of each class: each center goes 2/12 of the way from 0 to the mean of its class."""
    model, _ = network("test_efficientnet", "random", ["a"])
    model.classifier = nn.Linear(256, 6)
    learner = Learner(model, LOSSES["center"], 6, last_block=True)
    dataset = train.trunk_features(model, Ilsvrc(tree), 56, progress=False)
    with torch.no_grad():
        pooled = train.tail(model, dataset.tensors[0]).mean((2, 3))
    train.fit(learner, dataset, dataset.tensors[1], quick(tree, loss="center", classes=6, epochs=1), progress=False)
    means = class_prototypes(pooled, dataset.tensors[1], 6)
    torch.testing.assert_close(learner.centers.detach(), means / 6, rtol=1e-3, atol=1e-4)


def test_a_loss_of_pytorch_metric_learning_fits_in(tree):
    model, _ = network("test_efficientnet", "random", ["a"])
    other = TripletMarginLoss()
    learner = Learner(model, lambda learner, query, labels: {"theirs": other(query, labels)}, 6, last_block=True)
    dataset = train.trunk_features(model, Ilsvrc(tree, "train"), 56, progress=False)
    history = train.fit(learner, dataset, dataset.tensors[1], quick(tree), progress=False)
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
    photos = Photos(Ilsvrc(tree, "train"), 56)
    torch.manual_seed(0)
    some = [photos[0][0] for _ in range(6)]
    torch.manual_seed(0)
    assert (
        torch.equal(photos[0][0], some[0]) and photos[0][0].shape == (3, 56, 56) and photos[0][0].dtype == torch.uint8
    )
    assert any(not torch.equal(some[0], other) for other in some[1:])


def test_unknown_loss_is_explained(tree):
    with pytest.raises(ValueError, match="no loss 'triple'; there are: softmax, "):
        quick(tree, loss="triple")


# commands ----------------------------------------------------------------------------------------------------------------


def test_commands_train_and_evaluate(tree, tmp_path, capsys):
    common = ["localise", "--data", str(tree), "--backbone", "test_efficientnet"]
    assert (
        __main__.main(
            [
                "train",
                *common,
                "--random",
                "--loss",
                "softmax",
                "--last-block",
                "--epochs",
                "1",
                "--classes",
                "3",
                "--images",
                "2",
                "--folder",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "epoch   1  softmax" in capsys.readouterr().out
    assert (
        __main__.main(
            [
                "evaluate",
                *common,
                "--checkpoint",
                str(tmp_path / "model.safetensors"),
                "--method",
                "cam,dist-cam",
                "--limit",
                "4",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    assert "the network's own" in capsys.readouterr().out and (tmp_path / "out/localise.json").is_file()
    assert __main__.main(["evaluate", *common, "--method", "camm"]) == 1
    assert "no method 'camm'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train localise", "evaluate localise"])
def test_commands_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main([*name.split(), "--help"])
    assert stop.value.code == 0 and name in capsys.readouterr().out
    assert __main__.main([name.split()[0]]) == 2 and name in capsys.readouterr().err
