"""Image retrieval as a system: what is compared, what is trained, what is written, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pytorch_metric_learning.losses import ProxyAnchorLoss
from safetensors.torch import load_file

from course_lib import __main__, backbones, checkpoints
from course_lib.data.cub import Cub
from course_lib.evaluate.ranking import retrieval as score
from course_lib.experiments import retrieval
from course_lib.experiments.retrieval import (
    RetrievalEvaluation,
    RetrievalTraining,
    evaluate,
    load,
    metric_loss,
    table,
    train,
)
from course_lib.metric_learning.features import extract
from course_lib.metric_learning.learner import Learner, embedding
from course_lib.metric_learning.losses import batch_hard_triplet, batch_prototype_softmax

pytestmark = pytest.mark.figures

CLASSES, IMAGES = 8, 4


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """The layout of CUB-200-2011, eight classes of four images, the last of one: a class is a colour, on noise."""
    root, rng = tmp_path_factory.mktemp("cub"), np.random.default_rng(0)
    lists = {name: [] for name in ("classes", "images", "image_class_labels", "bounding_boxes", "train_test_split")}
    for number in range(1, CLASSES + 1):
        name = f"{number:03}.Bird_{number}"
        (root / "images" / name).mkdir(parents=True)
        lists["classes"].append(name)
        colour = rng.integers(40, 216, 3)
        for shot in range(IMAGES if number < CLASSES else 1):
            image = np.clip(colour + rng.normal(0, 40, (40, 50, 3)), 0, 255).astype(np.uint8)
            lists["images"].append(f"{name}/{shot}.jpg")
            Image.fromarray(image).save(root / "images" / lists["images"][-1])
            lists["image_class_labels"].append(number)
            lists["bounding_boxes"].append("5.0 5.0 20.0 20.0")
            lists["train_test_split"].append(1)
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("".join(f"{number} {line}\n" for number, line in enumerate(lines, 1)))
    (root / "miniature.json").write_text('{"world": "birds of noise"}')
    return root


def tiny(birds, **changes):
    """Sixteen images of four classes, in two steps an epoch."""
    return RetrievalTraining(
        **dict(
            data=str(birds),
            backbone="test_efficientnet",
            weights="random",
            dimensions=6,
            epochs=2,
            classes=4,
            images=2,
            size=64,
        )
        | changes
    )


def quick(birds, **changes):
    return RetrievalEvaluation(
        **dict(data=str(birds), backbone="test_efficientnet", weights="random", size=64) | changes
    )


@pytest.fixture(scope="module")
def trained(birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder / "model.safetensors", train(tiny(birds), folder, progress=False)


def figures(row):
    return {
        **{f"recall@{k}": 100 * share for k, share in row.recall.items()},
        "r_precision": 100 * row.r_precision,
        "map@r": 100 * row.map_at_r,
    }


# evaluation -----------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_features_made_all_at_once(birds, trained, tmp_path):
    path, _ = trained
    result = evaluate(quick(birds, checkpoint=str(path), batch_size=3), tmp_path, progress=False)
    model, loss = load("test_efficientnet", str(path))
    assert loss == "triplet"
    data = Cub(birds, "test")
    images = torch.stack(
        [
            F.interpolate(image[None].float(), (64, 64), mode="bilinear", antialias=True)[0].round().byte()
            for image, _ in data
        ]
    )
    model.to(memory_format=torch.channels_last)
    # Close to features made all at once; and as in the evaluation to the last bit, since ranks jump.
    pooled = extract(
        lambda part: model.features(model.normalise(part)).mean((2, 3)), data, (64, 64), batch_size=3, progress=False
    )
    with torch.no_grad():
        at_once = model.features(model.normalise(images)).mean((2, 3))
        torch.testing.assert_close(pooled, at_once, rtol=0, atol=1e-2 * float(at_once.std()))
        embedded = model.classifier(pooled)
    expected = {
        "embedding": F.normalize(embedded),
        "pooled features, cosine": F.normalize(pooled),
        "pooled features, Euclidean": pooled,
    }
    assert list(result["rows"]) == list(expected)
    for name, features in expected.items():
        assert result["rows"][name] == pytest.approx(figures(score(features, data.labels)), abs=1e-3)
    assert (result["queries"], result["without_match"], result["classes"]) == (12, 1, 4)
    assert json.loads((tmp_path / "retrieval.json").read_text()) == result
    assert (tmp_path / "retrieval.md").read_text() == table(result)


def test_an_untrained_network_has_pooled_features_only(birds, tmp_path):
    result = evaluate(quick(birds), tmp_path, progress=False)
    assert list(result["rows"]) == ["pooled features, cosine", "pooled features, Euclidean"]
    assert result["settings"]["loss"] is None and result["settings"]["fingerprint"] == "birds of noise"


def test_the_classifier_of_another_system_is_no_embedding(tmp_path):
    model = backbones.create("test_efficientnet", False, 3)
    checkpoints.write(tmp_path / "m.safetensors", model, {"loss": "softmax", "classifier": "trained"})
    assert load("test_efficientnet", str(tmp_path / "m.safetensors"))[1] is None


def test_published_figures_stand_beside_ours_with_their_caveats(birds, tmp_path):
    text = table(evaluate(quick(birds), tmp_path, progress=False))
    assert (
        "| *published, CUB-200-2011:* Proxy-Anchor loss (Kim et al., CVPR 2020) | 69.9 | 79.6 | 86.6 | 91.4 |  |  |"
        in text
    )
    assert "pools by mean plus maximum" in text and "do not compare" in text
    assert "1 image is the only one of its class" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


# training -------------------------------------------------------------------------------------------------------------


def test_training_moves_network_and_embedding(birds, trained):
    path, history = trained
    assert len(history) == 2 and all(np.isfinite(row["loss"]) for row in history)
    torch.manual_seed(0)
    start, state = backbones.create("test_efficientnet", False, 6).state_dict(), load_file(path)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in start.items()
    }
    for name in (
        "network.conv_stem.weight",
        "classifier.weight",
        "network.bn1.running_mean",
    ):  # random weights: statistics move
        assert not torch.equal(state[name], start[name]), name


def test_the_same_seed_gives_the_same_model_and_an_end_is_an_end(birds, trained, tmp_path):
    path, history = trained
    again = train(tiny(birds), tmp_path, progress=False)
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    states = load_file(path), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert train(tiny(birds), tmp_path, progress=False) == again  # nothing is left to do


def test_the_last_block_leaves_the_trunk_as_it_is(birds, tmp_path):
    train(tiny(birds, last_block=True), tmp_path, progress=False)
    torch.manual_seed(0)
    start, state = (
        backbones.create("test_efficientnet", False, 6).state_dict(),
        load_file(tmp_path / "model.safetensors"),
    )
    last = max(int(name.split(".")[2]) for name in start if name.startswith("network.blocks."))
    free = (f"network.blocks.{last}.", "network.conv_head.", "network.bn2.", "classifier.")
    moved = {name for name in start if not torch.equal(start[name], state[name])}
    assert all(name.startswith(free) for name in moved)
    assert {"classifier.weight", "network.conv_head.weight"} <= moved


def test_a_loss_with_proxies_trains_them_at_a_rate_of_their_own(birds, tmp_path, monkeypatch):
    seen = {}

    def fit(learner, step, loader, optimizer, plan, *, scheduler, **options):
        start = learner.loss.proxies.detach().clone()
        learner.train()
        for batch in loader:
            optimizer.zero_grad()
            sum(step(learner, batch).values()).backward()
            optimizer.step()
            scheduler.step()
        seen.update(
            moved=(learner.loss.proxies - start).abs().max().item(),
            rates=[group["lr"] for group in optimizer.param_groups],
        )
        return []

    monkeypatch.setattr(retrieval.engine, "train", fit)
    train(tiny(birds, loss="ProxyAnchorLoss", last_block=True), tmp_path, progress=False)
    assert seen["moved"] > 0 and seen["rates"] == [1e-3, 1e-2]
    assert not any("proxies" in name for name in load_file(tmp_path / "model.safetensors"))


def test_pretrained_statistics_stay():
    learner = Learner(backbones.create("test_efficientnet", False, 6), retrieval._terms, 4)
    learner.loss = metric_loss("triplet", 4, 6)
    mean = learner.backbone.network.bn1.running_mean.clone()
    learner.train().step(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(learner.backbone.network.bn1.running_mean, mean)


def test_losses_are_those_of_their_names():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = F.normalize(torch.randn(12, 6, generator=generator)), torch.arange(12) % 4
    torch.testing.assert_close(
        metric_loss("triplet", 4, 6)(embeddings, labels), batch_hard_triplet(embeddings, labels, 0.1)
    )
    torch.testing.assert_close(
        metric_loss("prototype-cosine", 4, 6)(embeddings, labels),
        batch_prototype_softmax(embeddings, labels, "cosine", 30.0),
    )
    torch.manual_seed(0)
    expected = ProxyAnchorLoss(num_classes=4, embedding_size=6)(embeddings, labels)
    torch.manual_seed(0)
    torch.testing.assert_close(metric_loss("ProxyAnchorLoss", 4, 6)(embeddings, labels), expected)
    assert metric_loss("MultiSimilarityLoss", 4, 6)(embeddings, labels).isfinite()


@pytest.mark.parametrize("name", ["Triplet", "BaseDistance", "torch"])
def test_an_unknown_loss_is_named(name):
    with pytest.raises(
        ValueError, match=f"There is no loss '{name}'; there are triplet, prototype-cosine, and those of"
    ):
        metric_loss(name, 4, 6)


def test_a_missing_package_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ValueError, match="pip install pytorch-metric-learning"):
        metric_loss("ProxyAnchorLoss", 4, 6)
    assert metric_loss("triplet", 4, 6)


def test_embeddings_have_length_1_whatever_the_precision():
    model = backbones.create("test_efficientnet", False, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding(model, torch.rand(3, model.classifier.in_features))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))


def test_crops_follow_the_generator_and_keep_labels(birds, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(retrieval.engine, "train", lambda *given, **_: seen.append(given[2].dataset) or [])
    train(tiny(birds, size=32), tmp_path, progress=False)
    data, known = seen[0], Cub(birds, "train")
    torch.manual_seed(1)
    first, label = data[5]
    other, _ = data[5]
    torch.manual_seed(1)
    assert torch.equal(first, data[5][0]) and not torch.equal(first, other)
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert label == known[5][1] and len(data) == len(known)


# commands -------------------------------------------------------------------------------------------------------------


def test_commands_train_and_evaluate(birds, tmp_path, capsys):
    options = ["retrieval", "--data", str(birds), *"--backbone test_efficientnet --size 64 --device cpu".split()]
    training = "--weights random --epochs 1 --classes 4 --images 2 --dimensions 5 --last-block".split()
    loss = ["--loss", "prototype-cosine", "--folder", str(tmp_path / "run")]
    assert __main__.main(["train", *options, *training, *loss]) == 0
    assert "epoch   1  loss" in capsys.readouterr().out
    evaluation = ["--checkpoint", str(tmp_path / "run" / "model.safetensors"), "--folder", str(tmp_path / "out")]
    assert __main__.main(["evaluate", *options, *evaluation]) == 0
    said = capsys.readouterr().out
    assert "# test_efficientnet (prototype-cosine), 12 queries of" in said and "| embedding |" in said
    assert (tmp_path / "out" / "retrieval.json").is_file()


@pytest.mark.parametrize(
    "command, sentence",
    [
        (["evaluate", "retrieval", "--data", "nowhere"], "as --data, got nowhere"),
        (["train", "retrieval", "--data", "nowhere", "--folder", "unused"], "as --data, got nowhere"),
        (
            ["evaluate", "retrieval", "--checkpoint", "nothing.safetensors"],
            "nothing.safetensors",
        ),
        (
            [
                "train",
                "retrieval",
                "--weights",
                "random",
                "--backbone",
                "test_resnet",
                "--last-block",
                "--folder",
                "unused",
            ],
            "last block alone",
        ),
        (
            [
                "train",
                "retrieval",
                "--weights",
                "random",
                "--backbone",
                "test_resnet",
                "--classes",
                "50",
                "--folder",
                "unused",
            ],
            "Batches of 50 classes were asked for, but the data has 4",
        ),
    ],
)
def test_what_cannot_be_done_is_a_sentence(birds, command, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [] if "--data" in command else ["--data", str(birds)]
    assert __main__.main([*command, *given]) == 1
    assert sentence in capsys.readouterr().err
