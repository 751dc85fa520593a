"""Training from tags: published settings, terms of each method, batches, interruption, processes, the command."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
import wsss_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import Subset, default_collate

from course_lib import __main__, engine
from course_lib.backbones.weights import LITE0
from course_lib.data.voc import VOC_COUNTS, Voc
from course_lib.experiments import wsss as experiment
from course_lib.worlds import minis, tagged
from course_lib.wsss import View, tag_loss
from course_lib.wsss.cam_net import build, load
from course_lib.wsss.contrast import ContrastConfig, contrast_loss
from course_lib.wsss.eps import saliency_loss
from course_lib.wsss.learner import (
    KeptImages,
    TaggedImages,
    TagLearner,
    fit,
    fit_once,
    gradient_reach,
    loss_terms,
    train,
    training_images,
    window,
)
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.recipes import TagTraining, recipe
from course_lib.wsss.seam import seam_loss
from course_lib.wsss.views import Transformation

pytestmark = pytest.mark.figures


@pytest.fixture(autouse=True)
def without_onednn():
    """On some processors oneDNN writes outside of its memory where very narrow, dilated convolutions are trained."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            tagged.RECIPES, "creatures", replace(tagged.RECIPES["creatures"], images={"trainaug": 14, "val": 4})
        )
        patch.setattr(minis, "SCORED", 8)
        return minis.mini_voc(tmp_path_factory.mktemp("data"), "creatures")


CONTRAST = ("cross-prototype", "cross-cam", "intra")


def tiny(tree, method="seam+p2p", **changes):
    """The small setting at a third of its size."""
    return recipe(
        method,
        "small",
        **{"data": str(tree), "size": 32, "small": 16, "epochs": 2, "batch_size": 4, "neck": 16} | changes,
    )


def published(tree, method="seam+p2p", **changes):
    """The published setting on a narrow ResNet38 and small images."""
    return recipe(
        method,
        "resnet38",
        **{
            "data": str(tree),
            "weights": "random",
            "width": 8,
            "size": 48,
            "small": 24,
            "long_side": (40, 64),
            "epochs": 1,
            "batch_size": 2,
        }
        | changes,
    )


# settings -------------------------------------------------------------------------------------------------------------


def test_published_settings():
    images = VOC_COUNTS["trainaug"][0]
    configs = {method: recipe(method, "resnet38", data="voc") for method in TAG_METHODS}
    steps = {method: config.epochs * (images // config.batch_size) for method, config in configs.items()}
    assert steps == {"cam": 9915, "seam": 10576, "eps": 19830, "seam+p2p": 10576, "eps+p2p": 19830}
    assert {config.optimizer for config in configs.values()} == {"sgd"} and not any(
        config.kept for config in configs.values()
    )
    assert {config.momentum for config in configs.values()} == {5e-4}, "as released, where papers say 0.9"
    assert [configs[method].small for method in ("seam", "seam+p2p", "eps+p2p")] == [134, 128, 128]
    assert [configs[method].learning_rate for method in TAG_METHODS] == [0.1, 0.01, 0.01, 0.01, 0.01]
    assert [configs[method].dropout for method in TAG_METHODS] == [0.5, 0.5, 0.0, 0.5, 0.0]
    assert configs["eps+p2p"].contrast == ContrastConfig.code(saliency=True)
    assert configs["seam+p2p"].contrast == ContrastConfig.code()
    assert recipe("cam", "resnet50", data="voc").long_side == (256, 512), (
        "other networks of timm are trained as published"
    )


def test_optimizer_and_schedule(tree, monkeypatch):
    seen = {}

    def spy(model, step, loader, optimizer, plan, *, scheduler, folder, progress):
        seen.update(optimizer=optimizer, scheduler=scheduler, steps=plan.epochs * len(loader))
        return []

    monkeypatch.setattr(engine, "train", spy)
    config = published(tree, epochs=3)
    learner = TagLearner(build(config.architecture(Voc(tree, "trainaug").classes)), config)
    fit(learner, TaggedImages(Voc(tree, "trainaug"), config))
    groups = seen["optimizer"].param_groups
    assert [len(group["params"]) for group in groups] == [43, 0, 5, 0] and seen["steps"] == 21
    assert [group["momentum"] for group in groups] == [5e-4] * 4
    assert [group["weight_decay"] for group in groups] == [5e-4, 0, 5e-4, 0]
    for step in range(21):
        share = (1 - step / 21) ** 0.9
        assert [group["lr"] for group in groups] == pytest.approx(
            [0.01 * share, 0.02 * share, 0.1 * share, 0.2 * share]
        )
        seen["optimizer"].step()
        seen["scheduler"].step()

    config = tiny(tree)
    learner = TagLearner(build(config.architecture(Voc(tree, "trainaug").classes)), config)
    fit(learner, TaggedImages(Voc(tree, "trainaug"), config))
    held = [weight for group in seen["optimizer"].param_groups for weight in group["params"]]
    assert len(held) == len(list(learner.parameters())), (
        "from random weights everything learns, scales of normalisation too"
    )
    assert learner.start == int(0.4 * 6)


# terms ----------------------------------------------------------------------------------------------------------------


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(side):
        return View(
            *(torch.randn(2, 4, side, side, generator=generator) for _ in range(2)),
            torch.rand(2, 8, side, side, generator=generator),
        )

    tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    return (
        [draw(6), draw(3)],
        tags,
        torch.rand(2, 1, 48, 48, generator=generator),
        torch.rand(2, 2, 3, 3, generator=generator),
    )


def test_terms_are_the_sums_that_the_table_names():
    (one, two), tags, saliency, noise = views()
    found = {
        method: loss_terms(
            recipe(method, "resnet38", size=48, small=24, contrast=ContrastConfig()),
            [one, two][: TAG_METHODS[method].views],
            tags,
            saliency,
            noise,
        )
        for method in TAG_METHODS
    }
    mean = tag_loss(one.cam.mean((2, 3))[:, 1:], tags)
    contrast = contrast_loss(one, two, tags, ContrastConfig(), noise)
    smaller = F.interpolate(saliency, (24, 24), mode="bilinear", align_corners=True)
    salient = sum(
        saliency_loss(maps, part, tags) / 2
        for maps, part in ((one.cam, saliency), (one.refined, saliency), (two.cam, smaller), (two.refined, smaller))
    )
    expected = {
        "cam": {"tags": mean},
        "eps": {"tags": mean, "saliency": saliency_loss(one.cam, saliency, tags)},
        "seam": seam_loss(one, two, tags, 48, 24),
        "seam+p2p": seam_loss(one, two, tags, 48, 24) | contrast,
        "eps+p2p": seam_loss(one, two, tags, 6, 3) | {"saliency": salient} | contrast,
    }
    for method, terms in expected.items():
        assert found[method].keys() == terms.keys(), method
        for name, term in terms.items():
            torch.testing.assert_close(found[method][name], term, msg=f"{method}: {name}")


def test_the_reach_of_a_loss_is_the_length_of_its_gradient():
    pair = torch.nn.ModuleList((torch.nn.Linear(1, 1), torch.nn.Linear(2, 1)))
    first, second = pair
    terms = {"both": 3 * first.weight.sum() + 4 * first.bias.sum() + 12 * second.bias.sum(), "one": second.bias.sum()}
    found = gradient_reach(terms, {"first": first, "second": second, "pair": pair})
    assert found == pytest.approx(
        {
            ("both", "first"): 5,
            ("both", "second"): 12,
            ("both", "pair"): 13,
            ("one", "first"): 0,
            ("one", "second"): 1,
            ("one", "pair"): 1,
        }
    )


def test_statistics_for_evaluation_are_those_of_the_first_view(tree):
    """Those of the second view differ: with a mixture of both, SEAM lost a point and a half on creatures."""
    config, data = tiny(tree, dropout=0.0), Voc(tree, "trainaug")
    learner = TagLearner(build(config.architecture(data.classes)), config).train()
    batch = default_collate([TaggedImages(data, config)[i] for i in range(4)])
    learner.step(batch)
    norm = learner.net.trunk.blocks[0][1]
    first = learner.net.trunk.blocks[0][0](learner.net.prepare(batch["image"])["trunk"])
    torch.testing.assert_close(norm.running_mean, 0.1 * first.mean((0, 2, 3)))


def test_contrast_counts_from_its_step_on(tree):
    config = tiny(tree)
    data = Voc(tree, "trainaug")
    learner = TagLearner(build(config.architecture(data.classes)), config).train()
    learner.start = 1
    batch = default_collate([TaggedImages(data, config)[i] for i in range(4)])
    before, after = learner.step(batch), learner.step(batch)
    assert all(not before[name] for name in CONTRAST) and all(after[name] > 0 for name in CONTRAST)
    assert before.keys() == after.keys() and learner.steps == 2 and "steps" in learner.state_dict()


# data -----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_window_is_a_piece_of_the_image(height, width, size, seed):
    torch.manual_seed(seed)
    image = torch.arange(1, height * width + 1, dtype=torch.uint8).view(1, height, width)
    found = window(image, size)[0]
    rows, columns = found.any(1).nonzero()[:, 0], found.any(0).nonzero()[:, 0]
    assert len(rows) == min(height, size) and len(columns) == min(width, size)
    piece = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = divmod(int(piece[0, 0]) - 1, width)
    assert torch.equal(piece, image[0, top : top + len(rows), left : left + len(columns)]), "one piece, without gaps"


def test_windows_go_everywhere():
    torch.manual_seed(0)
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 5, 5)
    assert len({int(window(image, 3)[0, 0, 0]) for _ in range(200)}) == 9
    assert len({tuple(window(image, 7)[0].nonzero()[0].tolist()) for _ in range(200)}) == 9


class Gradient(Voc):
    """Images whose red is also their saliency, so that both must be moved alike."""

    def __init__(self, height, width):
        ramp = 20 + torch.arange(width).expand(height, width) + torch.arange(height)[:, None] * 2
        self.image = ramp.byte().expand(3, height, width)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.image, torch.tensor([1.0])

    def saliency(self, index):
        return self.image[0]


def test_image_and_saliency_are_cut_and_turned_alike():
    config = recipe("eps", "resnet38", data="", size=40, long_side=(30, 60), jitter=False)
    turned, sizes = set(), set()
    for seed in range(30):
        torch.manual_seed(seed)
        item = TaggedImages(Gradient(40, 50), config)[0]
        assert item["image"].shape == (3, 40, 40) and torch.equal(item["image"][:1], item["saliency"])
        assert torch.equal(item["inside"], item["image"][0] > 0), "outside there is nothing"
        rows = item["inside"].any(1).sum()
        sizes.add(int(rows))
        inside = item["image"][0][item["inside"]].view(rows, -1).int()
        turned.add(bool((inside[:, -1] < inside[:, 0]).all()))
    assert turned == {True, False} and len(sizes) > 5
    jittered = TaggedImages(Gradient(40, 50), replace(config, jitter=True))[0]
    assert not torch.equal(jittered["image"][:1], jittered["saliency"]), "colours of the image only"


def test_batches_of_methods_without_saliency_do_not_read_it(tree):
    for method in TAG_METHODS:
        item = TaggedImages(Voc(tree, "trainaug"), tiny(tree, method))[0]
        assert ("saliency" in item) == ("eps" in method)
        assert item["image"].shape == (3, 32, 32) and item["inside"].all()


def test_kept_features_are_those_of_the_images(tree):
    config = tiny(tree, "eps+p2p", kept=True)
    data = Voc(tree, "trainaug")
    net = build(config.architecture(data.classes)).eval()
    kept, photos = KeptImages(net, data, config, progress=False), TaggedImages(data, config)
    flips = set()
    for seed in range(8):
        torch.manual_seed(seed)
        item = kept[seed]
        drawn = (photos[seed] for _ in range(20))
        straight = min(drawn, key=lambda photo: (photo["saliency"].int() - item["saliency"]).abs().sum())
        assert torch.equal(straight["saliency"], item["saliency"]) and torch.equal(straight["tags"], item["tags"])
        for size, view in zip((None, 16), item["views"]):
            for name, maps in net.prepare(straight["image"][None], size=size).items():
                torch.testing.assert_close(view[name], maps[0])
        torch.manual_seed(seed)
        flips.add(int(torch.randint(2, ())))
    assert flips == {0, 1} and len(kept) == 14


# training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TAG_METHODS)
def test_every_method_learns_and_can_be_loaded(tree, tmp_path, method):
    config = tiny(tree, method, epochs=4)
    _, history = train(config, tmp_path, progress=False)
    assert history[-1]["tags"] < history[0]["tags"]
    again = load(tmp_path / "model.safetensors")
    assert again.architecture.method == method and again.architecture.classes == tuple(Voc(tree, "train").classes)


def test_the_setting_for_photographs(tree, tmp_path):
    """EfficientNet-Lite0 with its ImageNet weights, frozen but for one block, on kept features."""
    config = recipe("seam+p2p", data=str(tree), size=64, small=48, epochs=2, batch_size=7)
    torch.manual_seed(0)
    net = build(config.architecture(Voc(tree, "trainaug").classes), config.weights)
    train(config, tmp_path, progress=False)
    before, after = net.state_dict(), load_file(tmp_path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trunk = {name.rsplit(".", 1)[0] for name in moved if name.startswith("trunk")}
    last = [part for part in net.trunk.parts if any(weight.requires_grad for weight in part.parameters())]
    assert (
        len(last) == 1
        and last[0] is net.trunk.parts[-1]
        and all(f"parts.{len(net.trunk.parts) - 1}." in name for name in trunk)
    )
    assert {"neck.weight", "classifier.weight", "similar.weight", "projector.weight"} <= moved and trunk


def test_an_interrupted_training_ends_as_if_it_had_not_been(tree, tmp_path, monkeypatch):
    config = tiny(tree, epochs=3, contrast_from=0.5)
    train(config, tmp_path / "whole", progress=False)
    step, calls = TagLearner.step, iter(range(100))

    def fails(self, batch):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(TagLearner, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", progress=False)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train(config, tmp_path / "parts", progress=False)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_same_batches_with_and_without_contrast(tree, tmp_path):
    """A method is compared with its own batches and weights: contrast of weight 0 changes nothing."""
    off = ContrastConfig(cross_prototype=0.0, cross_cam=0.0, intra=1e-30)
    histories = [
        train(tiny(tree, epochs=1, contrast=off, contrast_from=start), progress=False)[1] for start in (0.0, 1.0)
    ]
    # Not to the last bit: gradients of two losses are summed in another order.
    assert histories[0][0]["tags"] == pytest.approx(histories[1][0]["tags"], rel=1e-5)


class Louder(TagLearner):
    """As a lesson varies a learner."""

    def __init__(self, net, config, factor=2.0):
        super().__init__(net, config)
        self.factor = factor

    def step(self, batch):
        return {name: self.factor * term for name, term in super().step(batch).items()}


def silent(layer, inputs, output):
    """A hook."""
    return 0 * output


def test_a_training_is_done_once(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    config = tiny(tree, "cam", kept=True)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def watched(net, step):
        mode = net.training
        found = net.eval()(net.prepare(picture)).cam.detach()
        net.train(mode)
        return {"map": found, "step": step} if step % 3 == 0 else None

    def ran(kind=TagLearner, seed=0, hook=None, part=14, **options):
        torch.manual_seed(seed)
        learner = kind(build(config.architecture(Voc(tree, "trainaug").classes), config.weights), config, **options)
        if hook:
            learner.net.classifier.register_forward_hook(hook)
        images = training_images(config, progress=False)
        found = fit_once(learner, Subset(images, range(part)), watched, progress=False)
        kept = "read from" in capsys.readouterr().err
        assert kept == ("views" not in vars(images)), "nothing frozen runs for what is kept"
        return kept, learner, *found

    torch.manual_seed(0)
    plain = TagLearner(build(config.architecture(Voc(tree, "trainaug").classes), config.weights), config)
    history = fit(plain, training_images(config, progress=False), progress=False)
    (kept, once, first, pages), (again, copy, second, same) = ran(), ran()
    assert not kept and again and [*pages] == [*same] == [0, 3, 6]
    losses = [[row["loss"] for row in rows] for rows in (history, first, second)]
    assert losses[1] == losses[2] and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert all(torch.equal(pages[step]["map"], same[step]["map"]) for step in pages) and not copy.net.training
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, once.state_dict()[name]), name
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(copy.net(copy.net.prepare(picture)).cam, same[6]["map"])
    # Another learner, a number of it, a hook, other weights to start from, fewer images: all train anew.
    others = [{"kind": Louder}, {"kind": Louder, "factor": 3.0}, {"hook": silent}, {"seed": 1}, {"part": 12}]
    assert [ran(**other)[0] for other in others] == [False] * 5
    assert ran(kind=Louder)[0] and ran()[0]


def test_two_processes_train_as_one(tree, tmp_path):
    """Shares of a batch on two processes: prototypes, counts and gradients are those of the whole batch."""
    wsss_worker.run(str(tree), tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        wsss_worker.__file__,
    ]
    subprocess.run(
        [*command, str(tree), str(tmp_path / "two")],
        check=True,
        timeout=600,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.manual_seed(0)
    start = build(published(tree).architecture(Voc(tree, "trainaug").classes)).state_dict()
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    for row, other in zip(*histories):
        assert {name: row[name] for name in row if name != "seconds"} == pytest.approx(
            {name: other[name] for name in other if name != "seconds"}, rel=1e-4
        )
    moved = [name for name, weight in start.items() if not torch.equal(one[name], weight)]
    assert {"classifier.weight", "projector.weight", "similar.weight", "trunk.b3.conv_branch1.weight"} <= set(moved)


def test_twenty_steps_of_the_published_command(tree, tmp_path, capsys):
    """SGD, crops, jitter and padding on a narrow ResNet38: three epochs of seven batches."""
    options = [
        "train",
        "wsss",
        "--backbone",
        "resnet38",
        "--weights",
        "random",
        "--width",
        "8",
        "--data",
        str(tree),
        "--size",
        "48",
        "--small",
        "24",
        "--epochs",
        "3",
        "--batch-size",
        "2",
        "--folder",
        str(tmp_path),
    ]
    assert __main__.main(options) == 0
    assert "epoch   3  tags" in capsys.readouterr().out
    assert (
        __main__.main(
            [
                "evaluate",
                "seeds",
                "--checkpoint",
                str(tmp_path / "model.safetensors"),
                "--data",
                str(tree),
                "--splits",
                "val",
                "--limit",
                "1",
                "--folder",
                str(tmp_path / "seeds"),
            ]
        )
        == 0
    )
    assert "Scales: 0.5, 1, 1.5, 2" in capsys.readouterr().out


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the command would train, from words; the data are an empty folder, nothing is trained."""

    def settings(*words):
        seen = []
        monkeypatch.setattr(experiment, "train", lambda config, folder: (seen.append(config), []))
        folder = str(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
        assert __main__.main(["train", "wsss", "--data", "d", "--folder", folder, *words]) == 0
        return seen[0]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    return settings


def test_options_mean_settings(asked):
    assert asked() == recipe(data="d") and recipe(data="d").kept and recipe(data="d").backbone == LITE0
    words = "--preset paper --cross-prototype 0.2 --cross-cam 0.2 --intra 0.3 --top-k 8 --momentum 0.9"
    paper = asked(*words.split())
    assert paper.contrast == replace(ContrastConfig.paper(), cross_prototype=0.2, cross_cam=0.2, intra=0.3, top_k=8)
    assert paper.momentum == 0.9
    code = asked("--preset", "code", "--method", "eps+p2p")
    assert code.contrast == ContrastConfig.code(saliency=True) and code.contrast.top_k == 16
    turned = asked("--backbone", "small", "--method=seam", "--flip", "--rotation", "20")
    assert turned == recipe("seam", "small", data="d", transformation=Transformation(flip=True, rotation=20.0))


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(["train", "wsss", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--preset" in shown
    for kind in (TagTraining, ContrastConfig, Transformation):
        for name in {field.name for field in fields(kind)} - {"contrast", "transformation"}:
            assert f"-{name.replace('_', '-')} " in shown or f"-{name.replace('_', '-')}\n" in shown, name


def test_what_is_refused_is_said(tree, tmp_path, capsys):
    def error(*options):
        assert __main__.main(["train", "wsss", "--data", str(tree), "--folder", str(tmp_path), *options]) == 1
        return capsys.readouterr().err

    assert "no method 'irn'" in error("--method", "irn")
    assert "no options of contrast with the method seam, got cross_cam" in error("--method", "seam", "--cross-cam", "1")
    assert "no options of contrast with the method eps" in error("--method", "eps", "--preset", "paper")
    assert "(of ImageNet)" in error("--backbone", "resnet38")
    assert "got 14 images; take smaller" in error("--backbone", "small", "--batch-size", "15", "--epochs", "1")
    with pytest.raises(ValueError, match="features of whole images"):
        TagTraining("d", kept=True)
    with pytest.raises(ValueError, match="learning_rate must be from 1e-12"):
        TagTraining("d", learning_rate=0.0)


@pytest.mark.slow
def test_one_published_step_at_full_size(tree):
    """SEAM+P2P on the whole ResNet38, 448 px, batch 1; states the peak memory."""
    config = recipe("seam+p2p", "resnet38", data=str(tree), weights="random", batch_size=1, epochs=1)
    data = Voc(tree, "trainaug")
    learner = TagLearner(build(config.architecture(data.classes)), config)
    before = learner.net.similar.weight.detach().clone()
    history = fit(learner, Subset(TaggedImages(data, config), [0]), progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nloss {history[0]['loss']:.3f}, peak memory {peak:.1f} GB")
    assert not torch.equal(before, learner.net.similar.weight) and peak < 16


def test_images_are_kept_without_saliency_where_no_method_asks_for_it(tmp_path):
    """Photographs of one's own have none."""
    for part in minis.mini_voc(source="creatures").iterdir():
        if part.name != "SALImages":
            (tmp_path / part.name).symlink_to(part)
    config = recipe("cam", "small", data=str(tmp_path), size=32, small=32, kept=True)
    data = Voc(tmp_path, "val")
    net = build(config.architecture(data.classes), config.weights)
    item = KeptImages(net, data, config, progress=False)[0]
    assert "saliency" not in item and item["tags"].any()
    with pytest.raises(FileNotFoundError, match="no saliency map"):
        KeptImages(net, data, replace(config, method="eps"), progress=False)
