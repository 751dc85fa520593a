"""Few-shot learning as commands: two stages of training, evaluation on episodes, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, nn

from course_lib import __main__
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.evaluate.episodes import CLASSIFIERS, interval, recalls, sample
from course_lib.experiments import fewshot
from course_lib.experiments.fewshot import (
    EpisodeBatches,
    FewShotEvaluation,
    FewShotTraining,
    episode_terms,
    evaluate,
    few_shot_network,
    table,
    train,
)
from course_lib.metric_learning.features import extract

pytestmark = pytest.mark.figures


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Classes are colours; 5 to train, 4 to test, 8 images each, in the layout of Ravi and Larochelle."""
    root = tmp_path_factory.mktemp("data") / "colours"
    (root / "images").mkdir(parents=True)
    (root / "split").mkdir()
    (root / "miniature.json").write_text('{"world": "colours"}')
    generator = Generator().manual_seed(0)
    number = 0
    for split, classes in (("train", 5), ("test", 4)):
        lines = ["filename,label"]
        for label in range(classes):
            colour = torch.randint(80, 176, (3, 1, 1), generator=generator)
            for _ in range(8):
                number += 1
                shade = torch.randint(-50, 51, (3, 1, 1), generator=generator)
                image = (colour + shade + torch.randint(-30, 31, (3, 40, 40), generator=generator)).to(torch.uint8)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / f"{number:08}.png")
                lines.append(f"{number:08}.png,n{split}{label}")
        (root / "split" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def small(root, **changes):
    """Two epochs of four batches of a tiny network, and one of two batches of two episodes."""
    return FewShotTraining(
        **dict(
            data=str(root),
            backbone="test_resnet",
            size=32,
            epochs=2,
            batch_size=10,
            learning_rate=0.01,
            meta_epochs=1,
            batches=2,
            episodes=2,
            ways=3,
            shots=2,
            queries=3,
        )
        | changes
    )


def quick(root, **changes):
    return FewShotEvaluation(
        **dict(
            data=str(root),
            backbone="test_resnet",
            weights="random",
            ways=3,
            shots=(1, 2),
            queries=4,
            episodes=50,
            size=32,
        )
        | changes
    )


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(small(root), folder, progress=False)


# training -------------------------------------------------------------------------------------------------------------


def test_both_stages_train_and_leave_a_checkpoint_each(root, trained):
    folder, history = trained
    assert [list(row) for row in history["classes"]] == [["softmax", "loss", "seconds"]] * 2
    assert [list(row) for row in history["episodes"]] == [["episodes", "loss", "seconds"]]
    start = few_shot_network("test_resnet", "random", 5).state_dict()
    first, second = (load_file(folder / f"{name}.safetensors") for name in ("pretrained", "model"))
    weights = [name for name in start if name.endswith("weight")]
    assert all(not torch.equal(start[name], first[name]) for name in weights)
    assert all(not torch.equal(first[name], second[name]) for name in weights if "classifier" not in name)
    assert torch.equal(first["classifier.weight"], second["classifier.weight"]), "episodes have no classifier"


def test_a_training_goes_on_from_its_first_stage_to_the_same_weights(root, trained, tmp_path):
    folder, history = trained
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "episodes")
    (tmp_path / "again" / "model.safetensors").unlink()
    again = train(small(root), tmp_path / "again", progress=False)
    assert again["classes"] == history["classes"]
    expected, found = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_rate_drops_in_the_last_tenth_of_the_first_stage(root, tmp_path, monkeypatch):
    seen = []

    def engine_train(learner, step, loader, optimizer, plan, scheduler=None, **_):
        for _ in range(plan.epochs):
            for _ in loader.batch_sampler:
                seen.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if scheduler:
                    scheduler.step()
        return []

    monkeypatch.setattr(fewshot.engine, "train", engine_train)
    train(small(root, epochs=10), tmp_path, progress=False)
    assert seen == pytest.approx([0.01] * 36 + [0.001] * 4 + [0.001] * 2)


def test_resnet12_trains_on_whole_episodes(root, tmp_path, monkeypatch):
    monkeypatch.setattr(fewshot.resnet12, "CHANNELS", (8, 8, 8, 16))  # the same, but for the size of its files
    config = small(root, backbone="resnet12", epochs=1, batch_size=20, batches=1, episodes=1, drop=0.5)
    history = train(config, tmp_path, progress=False)
    assert history["episodes"][0]["episodes"] > 0
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["classifier.weight"].shape == (5, 16)
    assert int(saved["network.blocks.3.drop.passes"]) == 2 + 1, "DropBlock counts the passes of both stages"
    result = evaluate(
        quick(root, backbone="resnet12", checkpoint=str(tmp_path / "model.safetensors")), tmp_path, progress=False
    )
    assert result["settings"]["weights"] == "model"


def test_a_network_with_weights_keeps_its_statistics(root, trained, tmp_path):
    folder, _ = trained
    train(small(root, weights=str(folder / "model.safetensors"), epochs=1), tmp_path, progress=False)
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path))
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["network.conv1.0.weight"], after["network.conv1.0.weight"])


def test_batches_are_whole_episodes(root):
    data, config = MiniImageNet(root, "train"), small(root, batches=3)
    batches = list(EpisodeBatches(data.labels, config, Generator().manual_seed(0)))
    assert len(batches) == len(EpisodeBatches(data.labels, config, Generator())) == 3
    for batch in batches:
        for part in torch.tensor(batch).view(2, 15):
            support, query = data.labels[part[:6]].view(3, 2), data.labels[part[6:]].view(3, 3)
            assert (
                (support == support[:, :1]).all() and (query == support[:, :1]).all() and len(set(part.tolist())) == 15
            )
            assert len(set(support[:, 0].tolist())) == 3


def test_the_loss_of_episodes_is_the_equation_one_query_after_another():
    features = torch.randn(2 * 15, 7, generator=Generator().manual_seed(0)).requires_grad_()
    learner = nn.Module()
    learner.temperature = nn.Parameter(torch.tensor(10.0))
    losses = []
    for part in features.view(2, 15, 7):
        directions = part / part.norm(dim=1, keepdim=True)
        prototypes = directions[:6].view(3, 2, 7).mean(1)
        for number, query in enumerate(directions[6:]):
            logits = 10 * torch.stack([F.cosine_similarity(query, prototype, 0) for prototype in prototypes])
            losses.append(-logits.log_softmax(0)[number // 3])
    found = episode_terms(3, 2, 3)(learner, features, torch.zeros(30).long())["episodes"]
    torch.testing.assert_close(found, torch.stack(losses).mean())
    found.backward()
    assert learner.temperature.grad != 0 and features.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(episode_terms(3, 2, 3)(learner, features, torch.zeros(30).long())["episodes"], found)


def test_half_an_episode_is_refused():
    with pytest.raises(ValueError, match="Episodes of 15 images were expected, but 20 came"):
        episode_terms(3, 2, 3)(nn.Module(), torch.randn(20, 4), torch.zeros(20).long())


# evaluation -----------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_episodes(root, trained, tmp_path):
    folder, _ = trained
    config = quick(root, checkpoint=str(folder / "model.safetensors"))
    result = evaluate(config, tmp_path, progress=False)
    assert json.loads((tmp_path / "fewshot.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    data, model = MiniImageNet(root, "test"), few_shot_network("test_resnet", config.checkpoint)
    model.to(memory_format=torch.channels_last)  # as in the evaluation, to the last bit: answers jump
    features = extract(
        lambda images: model.features(model.normalise(images)).mean((-2, -1)),
        data,
        (32, 32),
        batch_size=config.batch_size,
        progress=False,
    )
    row = next(row for row in result["rows"] if (row["shots"], row["method"]) == (2, "l2"))
    drawn = sample(data.labels, 3, 2, 4, 50, Generator().manual_seed(0))
    share, cosine = (100 * recalls(features, drawn, method).mean(1) for method in ("l2", "cosine"))
    assert row["accuracy"] == pytest.approx(interval(share), rel=1e-4)
    assert row["balanced"] == pytest.approx(interval(share), rel=1e-4)
    assert row["gain"] == pytest.approx(interval(share - cosine), rel=1e-4, abs=1e-4)
    assert [(row["shots"], row["method"]) for row in result["rows"]] == [
        (k, method) for k in (1, 2) for method in CLASSIFIERS
    ]
    assert {row["method"] for row in result["rows"] if row["transductive"]} == {"shift", "rectified"}


def test_the_papers_figures_stand_beside_with_what_is_unclear(root, tmp_path):
    result = evaluate(quick(root, ways=4, shots=(1,)), tmp_path, progress=False)
    assert "77.14" not in table(result), "they are 5-way"
    result["settings"]["ways"] = 5
    text = table(result)
    assert "77.14 ± 0.42" in text and "70.31" in text and "not a target" in text
    assert "| ResNet-12 (Shen et al., section 4.1) [1] | not said | 77.14 ± 0.42 |  |" in text
    assert "ImageNet, which holds" not in text
    result["settings"]["weights"] = "pretrained"
    assert "ImageNet, which holds the test classes" in table(result)


def test_unbalanced_queries_have_two_accuracies_and_no_papers(root, tmp_path):
    config = quick(root, queries=(6, 1, 1), shots=(1,), methods=("cosine", "rectified"))
    result = evaluate(config, tmp_path, progress=False)
    text = table(result)
    assert "mean of classes" in text and "6, 1, 1 queries of the classes" in text and "CSPN" not in text
    plain = next(row for row in result["rows"] if row["method"] == "cosine")
    assert plain["accuracy"] != plain["balanced"] and plain["gain"] is None
    alone = evaluate(replace(config, methods=("l1",)), tmp_path / "alone", progress=False)
    assert alone["rows"][0]["gain"] is None, "there is nothing to compare with"


def test_the_seed_decides(root, tmp_path):
    def accuracy(seed, folder):
        config = quick(root, shots=(1,), methods=("cosine",), seed=seed, weights="random")
        return evaluate(config, tmp_path / folder, progress=False)["rows"][0]["accuracy"]

    first, again, other = accuracy(0, "first"), accuracy(0, "again"), accuracy(1, "other")
    assert first == again != other


def test_what_cannot_be_evaluated_is_explained(root, tmp_path):
    with pytest.raises(ValueError, match="There is no method 'l3'"):
        quick(root, methods=("l3",))
    with pytest.raises(ValueError, match=r"up to 16 images of a class \(1 support, 15 queries\), but class 0 has 8"):
        evaluate(quick(root, queries=15), tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        evaluate(quick(root, checkpoint="nowhere.safetensors"), tmp_path, progress=False)
    with pytest.raises(ValueError, match="There is no ResNet-12 with ImageNet weights"):
        evaluate(quick(root, backbone="resnet12", weights="pretrained"), tmp_path, progress=False)
    (tmp_path / "text.safetensors").write_text("text")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, sentence in (("text", "cannot be read"), ("other", "does not fit Backbone: it lacks classifier.weight")):
        for backbone in ("test_resnet", "resnet12"):
            config = quick(root, backbone=backbone, checkpoint=str(tmp_path / f"{name}.safetensors"))
            with pytest.raises(RuntimeError, match=sentence):
                evaluate(config, tmp_path, progress=False)


# commands -------------------------------------------------------------------------------------------------------------


def test_commands_train_and_evaluate(root, tmp_path, capsys):
    options = ["fewshot", "--data", str(root), *"--backbone test_resnet --size 32 --ways 3 --device cpu".split()]
    training = "--epochs 1 --batch-size 20 --meta-epochs 1 --batches 1 --episodes 1 --queries 3".split()
    assert __main__.main(["train", *options, *training, "--folder", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "epoch   1  softmax" in said and "epoch   2  episodes" in said and "model.safetensors" in said
    evaluation = ["--checkpoint", str(tmp_path / "run" / "model.safetensors"), "--folder", str(tmp_path)]
    episodes = "--shots 1 --queries 5 2 2 --episodes 20 --methods cosine rectified --epsilon 1".split()
    assert __main__.main(["evaluate", *options, *evaluation, *episodes]) == 0
    said = capsys.readouterr().out
    assert "| rectified | yes |" in said and "5, 2, 2 queries" in said and "epsilon = 1" in said
    assert (tmp_path / "fewshot.md").read_text() in said


def test_commands_explain_themselves(tmp_path, capsys):
    assert __main__.main(["evaluate", "fewshot", "--data", str(tmp_path)]) == 1
    assert __main__.main(["train", "fewshot", "--data", str(tmp_path), "--folder", str(tmp_path)]) == 1
    assert "miniImageNet was expected at" in capsys.readouterr().err
