"""DeepLab: heads, sizes, what is trained and what is not, the loss, augmentation in the published order, resuming."""

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.data.voc import Voc, write_mask
from course_lib.worlds import minis
from course_lib.wsss import deeplab, views
from course_lib.wsss.deeplab import (
    DEEPLAB_HEADS,
    MaskedImages,
    MaskTraining,
    SegmenterArchitecture,
    build_segmenter,
    class_shares,
    load_segmenter,
    mask_loss,
    mask_recipe,
    save_segmenter,
    shifted_colours,
    train_segmenter,
)
from course_lib.wsss.learner import usual_optimizer

CLASSES = ("background", "cat", "dog")
TINY = SegmenterArchitecture(CLASSES, "small", "large-fov")


@pytest.fixture(scope="module")
def creatures():
    return minis.mini_voc(source="creatures")


@pytest.fixture(scope="module")
def few(creatures, tmp_path_factory):
    """The same data with twelve images to train on."""
    folder = tmp_path_factory.mktemp("few")
    for part in creatures.iterdir():
        if part.name != "ImageSets":
            (folder / part.name).symlink_to(part)
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part in (creatures / "ImageSets" / "Segmentation").iterdir():
        (lists / part.name).write_text("\n".join(part.read_text().split()[:12]) + "\n")
    return folder


@pytest.mark.parametrize("head", DEEPLAB_HEADS)
def test_logits_have_one_channel_for_each_class(head):
    net = build_segmenter(replace(TINY, head=head))
    with torch.no_grad():
        logits = net(net.prepare(torch.zeros(2, 3, 64, 48, dtype=torch.uint8)))
    assert logits.shape == (2, 3, 8, 6)


@pytest.mark.parametrize(
    ("head", "channels", "parameters"),
    [
        # Counted by hand from the published layers, for 2048 channels and 21 classes.
        ("large-fov", 2048, 2048 * 512 * 9 + 2 * 512 + 512 * 512 + 2 * 512 + 512 * 21 + 21),
        ("aspp", 2048, 4 * (2048 * 21 * 9 + 21)),
        (
            "aspp-concat",
            2048,
            4 * (2048 * 256 * 9 + 2 * 256) + 2048 * 256 + 2 * 256 + 1280 * 256 + 2 * 256 + 256 * 21 + 21,
        ),
    ],
)
def test_heads_have_the_published_layers(head, channels, parameters):
    kinds = {"large-fov": deeplab.LargeFov, "aspp": deeplab.Aspp, "aspp-concat": deeplab.AsppConcat}
    with torch.device("meta"):
        built = kinds[head](channels, 21)
    assert sum(weight.numel() for weight in built.parameters()) == parameters
    dilations = {
        layer.dilation[0] for layer in built.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] == 3
    }
    assert dilations == ({12} if head == "large-fov" else {6, 12, 18, 24})


def test_the_field_of_view_of_aspp_is_that_of_its_dilations():
    head = deeplab.Aspp(1, 1).double()
    features = torch.zeros(1, 1, 61, 61, dtype=torch.double, requires_grad=True)
    head(features)[0, 0, 30, 30].backward()
    rows = features.grad[0, 0].nonzero()[:, 0].unique().tolist()
    assert rows == [30 - 24, 30 - 18, 30 - 12, 30 - 6, 30, 30 + 6, 30 + 12, 30 + 18, 30 + 24]


def test_statistics_follow_the_batches_while_scale_and_shift_stay():
    net = build_segmenter(SegmenterArchitecture(CLASSES, "resnet38", "large-fov", width=2))
    net.train()
    moving = [part for part in net.trunk.modules() if isinstance(part, nn.BatchNorm2d) and part.training]
    assert moving and {part.momentum for part in moving} == {3e-4}
    assert not any(part.weight.requires_grad for part in moving)
    still = [part for unit in net.trunk.still for part in unit.modules() if isinstance(part, nn.BatchNorm2d)]
    assert still and not any(part.training for part in still)  # level 2 is frozen
    frozen = build_segmenter(SegmenterArchitecture(CLASSES, "resnet38", "large-fov", width=2, statistics="frozen"))
    frozen.train()
    assert not any(part.training for part in frozen.trunk.modules() if isinstance(part, nn.BatchNorm2d))


@pytest.mark.parametrize(("backbone", "momentum"), [("small", 0.1), ("resnet38", 3e-4)])
def test_statistics_of_the_head_are_there_after_a_training_of_its_length(backbone, momentum):
    """The released momentum is for 20,000 steps: after 200 it leaves them where they began, and predictions wrong."""
    config = mask_recipe(backbone, head="large-fov", width=2)
    heads = build_segmenter(config.architecture(CLASSES)).head.modules()
    assert {part.momentum for part in heads if isinstance(part, nn.BatchNorm2d)} == {momentum}


def test_released_groups_hold_no_batch_normalisation():
    net = build_segmenter(SegmenterArchitecture(CLASSES, "resnet38", "large-fov", width=2))
    optimizer = usual_optimizer(net.trunk, [net.head], MaskTraining(backbone="resnet38"))
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    assert not held & {id(weight) for norm in norms for weight in norm.parameters()}
    rates = [group["lr"] / 0.001 for group in optimizer.param_groups]
    assert rates == pytest.approx([1, 2, 10, 20])


@pytest.mark.figures
def test_the_loss_is_cross_entropy_at_the_size_of_the_mask():
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randint(3, (2, 33, 25), dtype=torch.uint8)
    mask[0, :9] = 255
    large = F.interpolate(logits, (33, 25), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(large, mask.long(), ignore_index=255)
    assert torch.allclose(mask_loss(logits, mask), expected)


def test_a_batch_of_void_gives_no_loss_and_a_gradient_of_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = mask_loss(logits, torch.full((1, 9, 9), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_the_loss_compiles_as_one_graph(monkeypatch):
    for module in (deeplab, views):  # without the shape checks of the tests, which do not compile
        for name, own in inspect.getmembers(module, inspect.isfunction):
            if str(own.__module__).startswith("course_lib"):
                monkeypatch.setattr(module, name, inspect.unwrap(own))
    plain = deeplab.mask_loss
    logits, mask = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 9, 9), dtype=torch.uint8)
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(logits, mask), plain(logits, mask))


@pytest.mark.figures
def test_a_mirrored_image_has_mirrored_shares():
    torch.manual_seed(0)
    net = build_segmenter(TINY)
    images = torch.randint(256, (1, 3, 40, 56), dtype=torch.uint8)
    shares, mirrored = (class_shares(net, these, (0.5, 1.0)) for these in (images, images.flip(-1)))
    assert shares.shape == (1, 3, 40, 56) and torch.allclose(shares.sum(1), torch.ones(1, 40, 56))
    assert torch.allclose(shares.flip(-1), mirrored, atol=1e-5)


def test_hue_turns_in_steps_of_180_and_the_rest_is_clipped():
    red = torch.zeros(3, 2, 2, dtype=torch.uint8)
    red[0] = 255
    assert torch.equal(shifted_colours(red, torch.tensor([0, 0, 0])), red)
    green = shifted_colours(red, torch.tensor([60, 10, 10]))  # a third of the circle
    assert green[1].min() > 250 and green[0].max() < 6 and not green[2].any()
    assert shifted_colours(red, torch.tensor([0, 0, -10]))[0].unique().tolist() == [245]


def test_outside_the_image_the_mask_is_void_and_a_flip_turns_both(creatures):
    data = Voc(creatures, "trainaug")
    config = MaskTraining(str(creatures), size=160, scales=(0.5, 0.5), jitter=0)
    torch.manual_seed(3)
    item = MaskedImages(data, None, config)[0]
    assert item["image"].shape == (3, 160, 160) and item["mask"].shape == (160, 160)
    assert (item["mask"][~item["inside"]] == 255).all() and not item["image"][:, ~item["inside"]].any()
    sides = [round(side * 0.5) for side in data[0][0].shape[1:]]
    assert item["inside"].sum() == sides[0] * sides[1]


def test_a_mask_of_another_size_is_named(creatures, tmp_path):
    data = Voc(creatures, "trainaug")
    for name in data.ids:
        write_mask(tmp_path / f"{name}.png", torch.zeros(3, 4, dtype=torch.uint8).numpy())
    with pytest.raises(ValueError, match=rf"{data.ids[0]}.png: expected a mask"):
        MaskedImages(data, tmp_path, mask_recipe("small", data=str(creatures)))[0]


def test_missing_pseudo_masks_are_said_before_any_work(creatures, tmp_path):
    with pytest.raises(FileNotFoundError, match="pseudo masks"):
        train_segmenter(mask_recipe("small", data=str(creatures), masks=str(tmp_path / "none")))


def test_what_is_kept_is_trained_as_what_is_read(creatures):
    """Features that are kept are those of the images: the first losses agree where no flip differs."""
    config = mask_recipe("small", data=str(creatures), epochs=1, statistics="frozen")
    net = build_segmenter(config.architecture(Voc(creatures, "trainaug").classes))
    masked = MaskedImages(Voc(creatures, "trainaug"), None, config)
    masked.data.ids, masked.data.images = masked.data.ids[:3], masked.data.images[:3]
    kept = deeplab.KeptMasks(net, masked, progress=False)
    for index in range(3):
        torch.manual_seed(index)
        item = kept[index]
        torch.manual_seed(index)
        read = masked[index]
        straight = torch.equal(read["mask"], item["mask"])
        turned = (lambda x: x) if straight else (lambda x: x.flip(-1))
        assert torch.equal(turned(read["mask"]), item["mask"])
        assert torch.equal(net.prepare(turned(read["image"])[None])["trunk"][0], item["maps"]["trunk"])


def test_a_training_resumes_bit_for_bit_and_its_network_is_kept(few, tmp_path, monkeypatch):
    config = mask_recipe("small", data=str(few), epochs=2, size=32, batch_size=4)
    whole, history = train_segmenter(config, tmp_path / "whole", progress=False)
    step, calls = deeplab.MaskLearner.step, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(deeplab.MaskLearner, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_segmenter(config, tmp_path / "killed", progress=False)
    monkeypatch.setattr(deeplab.MaskLearner, "step", step)
    again, second = train_segmenter(config, tmp_path / "killed", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    loaded = load_segmenter(tmp_path / "whole" / "model.safetensors")
    assert loaded.architecture == whole.architecture
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "killed" / "model.safetensors"
    ).read_bytes()
    assert history[-1]["masks"] == second[-1]["masks"]


def test_other_weights_are_refused(tmp_path):
    save_segmenter(build_segmenter(TINY), tmp_path / "model.safetensors")
    assert isinstance(load_segmenter(tmp_path / "model.safetensors").head, deeplab.LargeFov)
    from course_lib import checkpoints

    checkpoints.write(tmp_path / "other.safetensors", nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="segmentation network"):
        load_segmenter(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"scales": (2.0, 1.0)}, "scales"), ({"kept": True}, "kept"), ({"head": "fcn"}, "head"), ({"size": 2}, "size")],
)
def test_settings_that_make_no_sense_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        MaskTraining(**changes)


@pytest.mark.slow
def test_one_step_at_the_published_size_on_a_cpu(capsys):
    """ASPP on ResNet-101 at stride 8, 321 pixels."""
    from course_lib.lesson import peak_memory

    torch.manual_seed(0)
    net = build_segmenter(SegmenterArchitecture(backbone="resnet101", head="aspp"))
    net.train()
    optimizer = usual_optimizer(net.trunk, [net.head], MaskTraining())
    batch = {
        "image": torch.randint(256, (2, 3, 321, 321), dtype=torch.uint8),
        "inside": torch.ones(2, 321, 321, dtype=torch.bool),
        "mask": torch.randint(21, (2, 321, 321), dtype=torch.uint8),
    }
    before = [weight.clone() for weight in net.head.parameters()]
    loss = deeplab.MaskLearner(net).step(batch)["masks"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(not torch.equal(a, b) for a, b in zip(before, net.head.parameters()))
    with capsys.disabled():
        print(f"\nDeepLab-ASPP, ResNet-101, two images of 321 px: {peak_memory():.0f} MB at most")


def test_a_path_is_needed_for_resnet38():
    with pytest.raises(ValueError, match="resnet38"):
        build_segmenter(SegmenterArchitecture(CLASSES, "resnet38"), "pretrained")
