"""Networks of CAM, SEAM, EPS and contrast: published counts and wiring, gradients, what may be cached, checkpoints."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from course_lib.backbones import released
from course_lib.backbones.dense import parameter_groups
from course_lib.wsss import cam_net
from course_lib.wsss.cam_net import HEAD_NAMES, Architecture, build, load, save
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.seam import pixel_correlation, winning_maps

pytestmark = pytest.mark.figures

CLASSES = ("background", "bird", "fish", "train")
TRUNKS = {
    "small": Architecture("cam", CLASSES, "small", neck=16, projector=8),
    "resnet38": Architecture("cam", CLASSES, width=2, projector=8),
    "mobilenetv2_050": Architecture(
        "cam",
        CLASSES,
        "mobilenetv2_050",
        neck=16,
        projector=8,
        taps=("blocks.1", "blocks.3", "blocks.4"),
        frozen="blocks.3",
    ),
}
SMALL = TRUNKS["small"]


def net(trunk="small", method="seam+p2p", seed=0, **changes):
    torch.manual_seed(seed)
    return build(Architecture(**vars(TRUNKS[trunk]) | {"method": method} | changes))


def pictures(count=2, height=48, width=40, seed=0):
    return torch.randint(
        256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("method", TAG_METHODS)
def test_views_of_every_method_on_every_trunk(trunk, method):
    model = net(trunk, method)
    view = model(model.prepare(pictures()))
    grid = tuple(-(-side // model.trunk.stride) for side in (48, 40))
    assert view.cam.shape == view.refined.shape == (2, 4, *grid)
    assert (view.embeddings is None) == ("p2p" not in method)
    if "p2p" in method:
        assert view.embeddings.shape == (2, 8, *grid) and (view.embeddings >= 0).all() and (view.embeddings > 0).any()
    if method in ("cam", "eps"):
        assert view.refined is view.cam
    if method == "cam":
        assert not view.cam[:, 0].any() and len(model.classifier.weight) == 3, "nothing speaks for a background"
    expected = {"cam": {"fc8"}, "eps": {"fc8"}, "seam": {"fc8", "f8_3", "f8_4", "f9"}}.get(method, set(HEAD_NAMES))
    assert set(model.heads()) == expected


def test_published_counts():
    with torch.device("meta"):
        model = build(Architecture("seam+p2p"))
    assert sum(weight.numel() for weight in model.parameters()) == 105_882_496 and len(model.state_dict()) == 233
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 105_013_824
    groups = parameter_groups(model.trunk, model.new_layers(), 0.01, 5e-4)
    assert [len(group["params"]) for group in groups] == [43, 0, 5, 0]
    for name, method in TAG_METHODS.items():
        with torch.device("meta"):
            heads = build(Architecture(name)).heads()
        shapes = {released_name: tuple(head.weight.shape[:2]) for released_name, head in heads.items()}
        layout = released.LAYOUTS[method.released]
        assert shapes == {head.replace("proj_fc", "fc_proj"): size for head, size in layout.items()}


def test_wiring_of_seam_and_contrast():
    """The forward once more, from the table: no classes, published names."""
    model = net("resnet38")
    images = pictures()
    normal = model.trunk.normalise(images)
    taps, weights = model.trunk.taps(normal), {name: head.weight for name, head in model.heads().items()}
    cam = F.conv2d(taps["conv6"], weights["fc8"])
    colours = F.interpolate(normal, cam.shape[2:], mode="bilinear", align_corners=True)
    shallow, deeper = F.conv2d(taps["conv4"], weights["f8_3"]).relu(), F.conv2d(taps["conv5"], weights["f8_4"]).relu()
    both = torch.cat((colours, shallow, deeper), 1)
    view = model(model.prepare(images))
    torch.testing.assert_close(view.cam, cam)
    torch.testing.assert_close(view.embeddings, F.conv2d(taps["conv6"], weights["fc_proj"]).relu())
    torch.testing.assert_close(view.refined, pixel_correlation(winning_maps(cam), F.conv2d(both, weights["f9"])))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_gradients_go_where_they_are_published_to_go(trunk):
    model = net(trunk).train()

    def reached(choose):
        model.zero_grad()
        choose(model(model.prepare(pictures()))).square().sum().backward()
        return {
            name.split(".")[0]
            for name, weight in model.named_parameters()
            if weight.grad is not None and weight.grad.any()
        }

    below = {"trunk"} | ({"neck"} if model.neck is not None else set())
    assert reached(lambda view: view.cam) == below | {"classifier"}
    assert reached(lambda view: view.embeddings) == below | {"projector"}
    assert reached(lambda view: view.refined) == {"similar4", "similar5", "similar"}, "PCM teaches itself only"
    unreached = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and "similar" in name and weight.grad is None
    ]
    assert not unreached


def test_classifier_and_projector_see_the_same_channels_dropped():
    model = net(projector=4).train()
    with torch.no_grad():
        model.projector.weight.copy_(model.classifier.weight)
    view = model(model.prepare(pictures()))
    torch.testing.assert_close(view.embeddings, view.cam.relu())
    again = model(model.prepare(pictures()))
    assert not torch.allclose(view.cam, again.cam), "half of the channels are dropped in training"
    model.eval()
    torch.testing.assert_close(model(model.prepare(pictures())).cam, model(model.prepare(pictures())).cam)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_what_prepare_returns_can_be_kept(trunk):
    """Batches of kept single images give the same views: what is frozen depends on the image alone, in training too."""
    model, images = net(trunk).train(), pictures(3)
    kept = [model.prepare(image[None]) for image in images]
    joined = {name: torch.cat([maps[name] for maps in kept]) for name in kept[0]}
    assert all(not maps.requires_grad for maps in joined.values())
    for name, maps in model.prepare(images).items():
        assert (maps - joined[name]).abs().max() < 1e-5 * maps.abs().max(), name
    model.eval()
    torch.testing.assert_close(model(joined).refined, model(model.prepare(images)).refined, rtol=1e-3, atol=1e-4)


def test_smaller_views_and_padding():
    model, images = net("resnet38"), pictures()
    small = F.interpolate(model.trunk.normalise(images), (17, 17), mode="bilinear", align_corners=True)
    prepared = model.prepare(images, size=17)
    torch.testing.assert_close(prepared["trunk"], model.trunk.frozen(small)["trunk"])
    assert prepared["colours"].shape[2:] == (3, 3)
    inside = torch.ones(2, 48, 40, dtype=torch.bool)
    inside[:, :, 30:] = False
    padded = model.prepare(images, inside)
    images[:, :, :, 30:] = 77  # whatever lies there
    torch.testing.assert_close(padded["trunk"], model.prepare(images, inside)["trunk"])
    assert not model.prepare(images, torch.zeros_like(inside))["colours"].any(), "padding is the mean colour"


def test_published_initial_weights():
    model = net(neck=256, projector=128)
    fans = {name: sum(head.weight.shape[:2]) for name, head in model.heads().items()}
    for name, gain in (("fc8", 1), ("f9", 4), ("fc_proj", 1)):  # Xavier: uniform, of variance 2 gain^2 / (in + out)
        expected = gain * (2 / fans[name]) ** 0.5
        assert model.heads()[name].weight.std().item() == pytest.approx(expected, rel=0.06), name
    assert model.similar5.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.06)  # Kaiming, normal


@pytest.mark.parametrize("trunk", TRUNKS)
def test_save_and_load(trunk, tmp_path):
    model = net(trunk, "eps+p2p")
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.architecture == model.architecture and not again.training
    for ours, theirs in zip(model(model.prepare(pictures())), again(again.prepare(pictures()))):
        torch.testing.assert_close(ours, theirs)


def test_released_checkpoints(tmp_path, monkeypatch):
    """At width 2, to be quick: names of all heads, and EPS's background brought to channel 0."""
    monkeypatch.setattr(cam_net, "Architecture", partial(Architecture, width=2))
    sizes = {"fc8": 128, "f8_3": 16, "f8_4": 32, "fc_proj": 128, "proj_fc": 128, "f8_5": 128}
    monkeypatch.setattr(
        released,
        "LAYOUTS",
        {
            method: {
                name: (rows, 195 if name == "f9" and method != "affinity" else sizes.get(name, rows))
                for name, (rows, _) in layout.items()
            }
            for method, layout in released.LAYOUTS.items()
        },
    )
    for method, theirs in ((name, method.released) for name, method in TAG_METHODS.items()):
        torch.manual_seed(1)
        model = build(Architecture(method, width=2))
        state = model.trunk.state_dict() | {
            f"{name}.weight": head.weight.detach() for name, head in model.heads().items()
        }
        if theirs == "p2p-eps":
            state["proj_fc.weight"] = state.pop("fc_proj.weight")
        if "eps" in theirs:
            state["fc8.weight"] = state["fc8.weight"].roll(-1, 0)
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / f"{theirs}.pth")
        again = load(tmp_path / f"{theirs}.pth")
        assert again.architecture.method == method and again.architecture.dropout == (0.0 if "eps" in method else 0.5)
        torch.testing.assert_close(model(model.prepare(pictures())).refined, again(again.prepare(pictures())).refined)
    layout = {f"{name}.weight": torch.zeros(*size, 1, 1) for name, size in released.LAYOUTS["affinity"].items()}
    torch.save(layout, tmp_path / "aff.pth")
    with pytest.raises(RuntimeError, match="one of affinity, which makes no maps"):
        load(tmp_path / "aff.pth")


def test_what_is_refused_is_said(tmp_path):
    with pytest.raises(ValueError, match="no method 'grad-cam'; there are: cam, seam"):
        Architecture("grad-cam")
    with pytest.raises(ValueError, match='"random" weights for the trunk small'):
        build(SMALL, "pretrained")
    with pytest.raises(ValueError, match=r"the path of ilsvrc.* \(of ImageNet\)"):
        build(Architecture("cam", width=2), "pretrained")
    with pytest.raises(ValueError, match='"pretrained" or "random" weights for the trunk mobilenetv2_050'):
        build(TRUNKS["mobilenetv2_050"], "weights.pth")
    with pytest.raises(FileNotFoundError, match="Weights were expected"):
        load(tmp_path / "model.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"12")
    with pytest.raises(RuntimeError, match="a whole file of tensors"):
        load(tmp_path / "half.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(RuntimeError):
        load(tmp_path / "other.safetensors")
