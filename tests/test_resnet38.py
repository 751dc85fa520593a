"""ResNet38: published structure, names, counts; weights of MXNet and released checkpoints; any trunk of timm."""

import copy
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from course_lib.backbones import dense, mxnet, released, resnet38


@pytest.fixture(scope="module")
def full() -> resnet38.ResNet38:
    """The published size, without memory."""
    with torch.device("meta"):
        return resnet38.ResNet38()


def narrow(seed: int = 0) -> resnet38.ResNet38:
    """A ResNet38 of width 2 in which every tensor is random: with 0 and 1, a forgotten part would go unnoticed."""
    torch.manual_seed(seed)
    trunk = resnet38.ResNet38(2)
    for name, tensor in trunk.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif "bn" in name and tensor.is_floating_point():
            tensor.normal_(float(name.endswith("weight")), 0.3)
        elif tensor.is_floating_point():
            nn.init.kaiming_normal_(tensor)
    return trunk


def twin(state: dict, images: torch.Tensor) -> dict:
    """The network once more, from its table: block by block, without classes."""

    def ready(name, x):
        return F.batch_norm(
            x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        ).relu()

    x, taps = F.conv2d(images, state["conv1a.weight"], padding=1), {}
    blocks = ["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2", "b4", *(f"b4_{i}" for i in range(1, 6)), "b5", "b5_1", "b5_2"]
    for name in blocks:
        stride = 2 if name in ("b2", "b3", "b4") else 1
        first, second = {"b5": (1, 2), "b5_1": (2, 2), "b5_2": (2, 2)}.get(name, (1, 1))
        t = ready(f"{name}.bn_branch2a", x)
        if name == "b5":
            taps["conv4"] = t
        y = F.conv2d(t, state[f"{name}.conv_branch2a.weight"], stride=stride, padding=first, dilation=first)
        y = F.conv2d(
            ready(f"{name}.bn_branch2b1", y), state[f"{name}.conv_branch2b1.weight"], padding=second, dilation=second
        )
        shortcut = state.get(f"{name}.conv_branch1.weight")
        x = y + (x if shortcut is None else F.conv2d(t, shortcut, stride=stride))
    for name in ("b6", "b7"):
        t = ready(f"{name}.bn_branch2a", x)
        if name == "b6":
            taps["conv5"] = t
        y = F.conv2d(t, state[f"{name}.conv_branch2a.weight"])
        y = F.conv2d(ready(f"{name}.bn_branch2b1", y), state[f"{name}.conv_branch2b1.weight"], padding=4, dilation=4)
        y = F.conv2d(ready(f"{name}.bn_branch2b2", y), state[f"{name}.conv_branch2b2.weight"])
        x = y + F.conv2d(t, state[f"{name}.conv_branch1.weight"])
    return taps | {"conv6": ready("bn7", x)}


# structure -----------------------------------------------------------------------------------------------------------


def test_published_counts(full):
    """Facts of the released code: tensors, parameters, and what is left for the optimiser."""
    state = full.state_dict()
    assert (
        len(state) == 228
        and sum("conv" in name for name in state) == 43
        and sum("running_mean" in name for name in state) == 37
    )
    assert sum(p.numel() for p in full.parameters()) == 105_070_912
    with torch.device("meta"):
        heads = nn.ModuleList(
            nn.Conv2d(columns, rows, 1, bias=False) for rows, columns in released.LAYOUTS["p2p-seam"].values()
        )
    assert len(state) + len(heads.state_dict()) == 233
    everything = [*full.parameters(), *heads.parameters()]
    assert sum(p.numel() for p in everything) == 105_882_496
    assert sum(p.numel() for p in everything if p.requires_grad) == 105_013_824
    frozen = [name for name, p in full.named_parameters() if not p.requires_grad and "conv" in name]
    assert len(frozen) == 8 and all(name.split(".")[0] in ("conv1a", "b2", "b2_1", "b2_2") for name in frozen)
    groups = dense.parameter_groups(full, heads, lr=0.01, weight_decay=5e-4)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (43, 0.01, 5e-4),
        (0, 0.02, 0),
        (5, 0.1, 5e-4),
        (0, 0.2, 0),
    ]


@pytest.mark.parametrize(
    "side, grid", [((128, 128), (16, 16)), ((134, 134), (17, 17)), ((375, 500), (47, 63)), ((448, 448), (56, 56))]
)
def test_published_sizes(full, side, grid):
    taps = full.taps(torch.empty(1, 3, *side, device="meta"))
    assert {tap: tuple(maps.shape) for tap, maps in taps.items()} == {
        "conv4": (1, 512, *grid),
        "conv5": (1, 1024, *grid),
        "conv6": (1, 4096, *grid),
    }
    assert full.channels == {tap: maps.shape[1] for tap, maps in taps.items()} and full.stride == 8


def test_forward_is_the_table():
    trunk, images = narrow().double(), torch.randn(2, 3, 37, 50, dtype=torch.float64)
    expected = twin(trunk.state_dict(), images)
    found = trunk.train(False).taps(images)
    assert list(found) == list(dense.TAPS) and min(maps.std() for maps in found.values()) > 0.1
    for tap in dense.TAPS:
        torch.testing.assert_close(found[tap], expected[tap])


def test_frozen_parts_stay_as_they_are():
    trunk, images = narrow(), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(trunk.state_dict())
    assert trunk.train() is trunk and trunk.training and trunk.b6.training
    assert not any(layer.training for layer in trunk.modules() if isinstance(layer, nn.BatchNorm2d))
    optimiser = torch.optim.SGD(dense.parameter_groups(trunk, [], 0.1, 0.5), lr=0.1)
    frozen = trunk.frozen(images)
    assert not frozen["trunk"].requires_grad
    sum(maps.square().mean() for maps in trunk.trained(frozen).values()).backward()
    optimiser.step()
    changed = {name for name, tensor in trunk.state_dict().items() if not torch.equal(tensor, before[name])}
    convolutions = {name for name in before if "conv" in name}
    assert changed == {name for name in convolutions if name.split(".")[0] not in ("conv1a", "b2", "b2_1", "b2_2")}
    assert trunk.eval() is trunk and not trunk.training
    twin_of = copy.deepcopy(trunk).train()
    assert not trunk.training and not any(m.training for m in trunk.modules()) and twin_of.still[0] is twin_of.conv1a


def test_channels_are_dropped_in_training_only():
    trunk, images = narrow(), torch.randn(1, 3, 32, 32)
    same = [trunk.eval().taps(images)["conv6"] for _ in range(2)]
    torch.testing.assert_close(*same, rtol=0, atol=0)
    one, other = (trunk.train().taps(images) for _ in range(2))
    assert not torch.equal(one["conv6"], other["conv6"])
    torch.testing.assert_close(one["conv5"], other["conv5"], rtol=0, atol=0)


def test_half_precision_and_channels_last():
    trunk, images = narrow().train(), torch.randn(1, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert trunk.taps(images.to(memory_format=torch.channels_last))["conv6"].isfinite().all()


def test_normalise_is_that_of_imagenet(full):
    trunk = narrow()
    image = (torch.tensor([0.485, 0.456, 0.406]) * 255).round().to(torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    assert trunk.normalise(image).abs().max() < 0.01
    with pytest.raises(ValueError, match=r"expected in 0..1"):
        trunk.normalise(torch.full((3, 2, 2), 7.0))


@pytest.mark.slow
def test_one_step_at_published_size():
    """448 px, one image, 105 million parameters: half a minute and 3 GB."""
    trunk = resnet38.create().train()
    head = nn.Conv2d(4096, 21, 1, bias=False)
    optimiser = torch.optim.SGD(dense.parameter_groups(trunk, [head], 0.01, 5e-4), lr=0.01, momentum=5e-4)
    loss = head(trunk.taps(torch.randn(1, 3, 448, 448))["conv6"]).square().mean()
    loss.backward()
    optimiser.step()
    assert loss.isfinite() and head.weight.grad.abs().max() > 0 and trunk.b3.conv_branch2a.weight.grad.abs().max() > 0


# .params files of MXNet ----------------------------------------------------------------------------------------------


def record(array: np.ndarray, kind: str, flag: int | None = None) -> bytes:
    """One array, byte by byte."""
    flags = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6}
    head = {
        "legacy": b"",
        "V1": struct.pack("<I", 0xF993FAC8),
        "V2": struct.pack("<Ii", 0xF993FAC9, 0),
        "V3": struct.pack("<Ii", 0xF993FACA, 0),
    }[kind]
    shape = struct.pack(f"<I{array.ndim}{'I' if kind == 'legacy' else 'q'}", array.ndim, *array.shape)
    if not array.ndim:
        return head + shape
    return head + shape + struct.pack("<iii", 1, 0, flags[str(array.dtype)] if flag is None else flag) + array.tobytes()


def params(arrays: dict[str, bytes], names: list[str] | None = None) -> bytes:
    names = list(arrays) if names is None else names
    return b"".join(
        [
            struct.pack("<QQQ", 0x112, 0, len(arrays)),
            *arrays.values(),
            struct.pack("<Q", len(names)),
            *(struct.pack("<Q", len(name.encode())) + name.encode() for name in names),
        ]
    )


@pytest.mark.parametrize("kind", ["legacy", "V1", "V2", "V3"])
def test_all_records_and_types_are_read(tmp_path, kind):
    rng = np.random.default_rng(0)
    arrays = {
        f"arg:{dtype}": rng.integers(0, 100, (2, 3, 1)).astype(dtype)
        for dtype in ("float32", "float64", "float16", "uint8", "int32", "int8", "int64")
    }
    arrays |= {"aux:one": np.arange(5, dtype=np.float32), "arg:empty": np.zeros((0, 4), np.float32)}
    path = tmp_path / "weights.params"
    path.write_bytes(
        params(
            {name: record(array, kind) for name, array in arrays.items()} | {"arg:none": record(np.array(1.0), kind)}
        )
    )
    found = mxnet.read_params(path)
    assert list(found) == [*arrays, "arg:none"] and found["arg:none"].numel() == 0
    for name, array in arrays.items():
        assert found[name].dtype == torch.from_numpy(array).dtype
        torch.testing.assert_close(found[name], torch.from_numpy(array))


GOOD = record(np.ones((2, 3), np.float32), "V2")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "the header would take 16 bytes, where 0 are left"),
        (b"\x80\x02PK" + bytes(20), "is it a .params file"),
        (params({"a": GOOD})[:-20], "would take"),
        (struct.pack("<QQQ", 0x112, 0, 2**40), "1,099,511,627,776 arrays would take"),
        (params({"a": record(np.ones(3, np.float32), "legacy", flag=9)}), "is of type 9"),
        (params({"a": struct.pack("<Ii", 0xF993FAC9, 1) + GOOD[8:]}), "sparse"),
        (params({"a": struct.pack("<I", 77) + bytes(400)}), "77 dimensions"),
        (
            params({"a": struct.pack("<IIqq", 0xF993FAC8, 2, 2**40, 2**40) + struct.pack("<iii", 1, 0, 0)}),
            "would take 4,835,703,278,458",
        ),
        (
            params({"a": struct.pack("<IIqq", 0xF993FAC8, 2, -1, -8) + struct.pack("<iii", 1, 0, 0)}),
            r"claims the shape \(-1, -8\)",
        ),
        (params({"a": GOOD}, names=[]), "1 arrays have 0 different names"),
        (params({"a": GOOD, "b": GOOD}, names=["a", "a"]), "2 arrays have 1 different names"),
        (params({"a": GOOD}) + b"x", "1 bytes follow"),
        (params({"a": GOOD})[:-1] + b"\xff", "can't decode"),
    ],
)
def test_broken_files_are_named(tmp_path, content, sentence):
    path = tmp_path / "weights.params"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"weights.params cannot be read.*{sentence}"):
        mxnet.read_params(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_broken_file_goes_further_than_a_sentence(tmp_path_factory, data):
    """Whatever bytes are changed or cut off: arrays come back, or the sentence does; none is larger than the file."""
    whole = bytearray(
        params({name: record(np.ones((2, 2), np.float32), kind) for name, kind in (("a", "legacy"), ("b", "V2"))})
    )
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.params"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert sum(array.numel() for array in mxnet.read_params(path).values()) <= len(whole)
    except RuntimeError as error:
        assert "cannot be read" in str(error)


def mxnet_name(name: str) -> str:
    """The name of one of our tensors in MXNet, the other way round than the library."""
    module, _, part = name.rpartition(".")
    part = {
        "weight": "gamma" if "bn" in module else "weight",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_var",
    }[part]
    kind = "aux" if part.startswith("moving") else "arg"
    if "." in module:
        block, layer = module.split(".")
        level, _, unit = block[1:].partition("_")
        layer, branch = layer.split("_")
        module = f"{'res' if layer == 'conv' else 'bn'}{level}{f'b{unit}' if unit else 'a'}_{branch}"
    return f"{kind}:{module}_{part}"


def imagenet_file(path, trunk, leave_out=(), add=()):
    arrays = {mxnet_name(name): tensor.numpy() for name, tensor in trunk.state_dict().items() if "batches" not in name}
    arrays |= {"arg:linear1000_weight": np.ones((4, 2), np.float32), "arg:linear1000_bias": np.ones(4, np.float32)}
    arrays |= {name: np.ones(1, np.float32) for name in add}
    path.write_bytes(params({name: record(array, "legacy") for name, array in arrays.items() if name not in leave_out}))
    return len(arrays)


def test_imagenet_weights_come_home(tmp_path, monkeypatch):
    source, path = narrow(), tmp_path / "a1.params"
    assert imagenet_file(path, source) == 193
    with pytest.warns(UserWarning, match="not the published file"):
        trunk = resnet38.create(path, width=2)
    assert not trunk.training
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(trunk.state_dict()[name], tensor, rtol=0, atol=0)
    assert mxnet_name("b4_3.conv_branch2b1.weight") == "arg:res4b3_branch2b1_weight"
    assert (
        mxnet_name("b5.bn_branch2a.running_var") == "aux:bn5a_branch2a_moving_var"
        and mxnet_name("bn7.bias") == "arg:bn7_beta"
    )


@pytest.mark.filterwarnings("ignore:.*not the published file")
def test_imagenet_weights_are_read_strictly(tmp_path):
    path, source = tmp_path / "a1.params", narrow()
    imagenet_file(path, source, leave_out=["arg:res6a_branch1_weight", "aux:bn7_moving_var"])
    with pytest.raises(
        RuntimeError, match=r"a1.params does not fit ResNet38: it lacks b6.conv_branch1.weight, bn7.running_var\."
    ):
        resnet38.create(path, width=2)
    imagenet_file(path, source, add=["arg:res8a_branch1_weight"])
    with pytest.raises(RuntimeError, match="no tensor called 'arg:res8a_branch1_weight'"):
        resnet38.create(path, width=2)
    imagenet_file(path, source)
    with pytest.raises(
        RuntimeError, match=r"has other shapes: conv1a.weight \(2, 3, 3, 3\) instead of \(3, 3, 3, 3\).* and .* more"
    ):
        resnet38.create(path, width=3)
    with pytest.raises(FileNotFoundError, match=r"nowhere.params"):
        resnet38.create(tmp_path / "nowhere.params")


# released checkpoints ------------------------------------------------------------------------------------------------


def checkpoint(path, method, full, prefix="", counters=True, change=lambda state: None):
    """A file with published names and shapes. One number stands for each tensor: all parameters are 60 kilobytes."""
    state = {
        f"{prefix}{name}": torch.tensor(float(number)).expand(tensor.shape)
        for number, (name, tensor) in enumerate(full.state_dict().items())
        if counters or "batches" not in name
    }
    for name, size in released.LAYOUTS[method].items():
        rows = torch.arange(float(size[0])).view(-1, 1, 1, 1)
        state[f"{prefix}{name}.weight"] = rows.expand(*size, 1, 1)
    change(state)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("method", list(released.LAYOUTS))
@pytest.mark.parametrize("prefix, counters", [("", True), ("module.", False)])
def test_released_checkpoints_are_known_by_their_names(tmp_path, full, method, prefix, counters):
    path = checkpoint(tmp_path / "released.pth", method, full, prefix, counters)
    assert path.stat().st_size < 200_000
    found, trunk, heads = released.read(path)
    assert found == method
    assert {name: tuple(w.shape[:2]) for name, w in heads.items()} == {
        name.replace("proj_fc", "fc_proj"): size for name, size in released.LAYOUTS[method].items()
    }
    wanted = full.state_dict()
    assert set(trunk) == {name for name in wanted if counters or "batches" not in name}
    assert all(trunk[name].shape == wanted[name].shape for name in trunk)


@pytest.mark.parametrize(
    "method, first", [("eps", 20.0), ("p2p-eps", 20.0), ("seam", 0.0), ("p2p-seam", 0.0), ("cam", 0.0)]
)
def test_background_comes_first(tmp_path, full, method, first):
    _, _, heads = released.read(checkpoint(tmp_path / "released.pth", method, full))
    rows = heads["fc8"][:, 0, 0, 0].tolist()
    assert rows[0] == first and sorted(rows) == [*range(len(rows))]
    assert rows[1:] == sorted(rows[1:]), "the classes keep their order"


def test_load_fills_trunk_and_heads_and_nothing_halfway(tmp_path, full):
    """The real thing in small: a narrow trunk, since its shapes are checked against the module that is filled."""
    source, small = narrow(), resnet38.ResNet38(2)
    path = checkpoint(tmp_path / "eps.pth", "eps", source)
    head = nn.Conv2d(4096, 21, 1, bias=False)
    assert released.load(path, small, {"fc8": head}) == "eps"
    assert head.weight[:, 5, 0, 0].tolist() == [20.0, *range(20)]
    order = list(source.state_dict())
    assert small.b7.conv_branch1.weight.unique().tolist() == [float(order.index("b7.conv_branch1.weight"))]
    with pytest.raises(
        RuntimeError, match=r"checkpoint of eps with the heads \['fc8'\], but the network has \['f9', 'fc8'\]"
    ):
        released.load(path, small, {"fc8": head, "f9": head})
    with pytest.raises(RuntimeError, match=r"fc8 in eps.pth does not fit Conv2d: it has other shapes"):
        released.load(path, small, {"fc8": nn.Conv2d(4096, 20, 1, bias=False)})
    with pytest.raises(RuntimeError, match=r"The trunk in eps.pth does not fit ResNet38: it has other shapes"):
        released.load(path, resnet38.ResNet38(3), {"fc8": head})


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: s.pop("b5_1.bn_branch2a.running_var"), "lacks b5_1.bn_branch2a.running_var"),
        (lambda s: s.update({"b8.weight": torch.zeros(1)}), "holds besides b8.weight"),
        (lambda s: s.update({"fc8.bias": torch.zeros(21)}), "expected the heads of one of"),
        (lambda s: s.pop("f9.weight"), "expected the heads of one of"),
        (lambda s: s.update({"f9.weight": torch.zeros(192, 194, 1, 1)}), "expected the heads of one of"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(tmp_path, change, sentence):
    path = checkpoint(tmp_path / "seam.pth", "seam", narrow(), change=change)
    heads = {
        name: nn.Conv2d(columns, rows, 1, bias=False) for name, (rows, columns) in released.LAYOUTS["seam"].items()
    }
    with pytest.raises(RuntimeError, match=sentence):
        released.load(path, resnet38.ResNet38(2), heads)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [{"fc8.weight": Evil()}, [torch.zeros(1)], {"epoch": 3}])
def test_nothing_but_tensors_is_loaded(tmp_path, capsys, content):
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(RuntimeError, match=r"evil.pth"):
        released.read(tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "half.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:90])
    with pytest.raises(RuntimeError, match=r"half.pth cannot be read"):
        released.read(tmp_path / "half.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        released.read(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_our_own_trunk_comes_back(tmp_path, suffix):
    source, path = narrow(), tmp_path / f"trunk.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(source.state_dict(), path)
    again = resnet38.create(path, width=2)
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(again.taps(images), source.eval().taps(images))


# trunks of timm ------------------------------------------------------------------------------------------------------


def test_a_network_of_timm_through_the_same_interface():
    """The setting of the course: Lite0 with its ImageNet weights, one block trained on what is frozen before it."""
    trunk = dense.Timm("tf_efficientnet_lite0", taps=("blocks.2", "blocks.4", "blocks.5.0"), frozen="blocks.4")
    assert trunk.channels == {"conv4": 40, "conv5": 112, "conv6": 192} and trunk.stride == 16
    images = trunk.normalise(torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8))
    frozen = trunk.train().frozen(images)
    assert {name: tuple(maps.shape[2:]) for name, maps in frozen.items()} == {
        name: (6, 6) for name in ("conv4", "conv5", "trunk")
    }
    trunk.trained(frozen)["conv6"].mean().backward()
    learning = {name for name, p in trunk.named_parameters() if p.grad is not None}
    last = len(trunk.parts) - 1
    assert learning and all(name.startswith(f"parts.{last}.") and "bn" not in name for name in learning)
    assert not any(layer.training for layer in trunk.modules() if isinstance(layer, nn.BatchNorm2d))
    groups = dense.parameter_groups(trunk, [nn.Conv2d(3, 2, 1)], 0.01, 5e-4)
    assert [len(g["params"]) for g in groups][1:] == [0, 1, 1]


@pytest.mark.parametrize(
    "name, stride, options",
    [
        ("resnet18", 16, {}),
        ("resnet18", 8, {"output_stride": 8}),
        ("regnety_004", 16, {}),
        ("densenet121", 32, {"output_stride": 32}),
        ("convnext_atto", 16, {}),
    ],
)
def test_taps_are_the_networks_own_maps(name, stride, options):
    torch.manual_seed(0)
    trunk = dense.Timm(name, pretrained=False, **options).eval()
    assert trunk.stride == stride
    images = torch.randn(1, 3, 64, 64)
    taps = trunk.taps(images)
    torch.manual_seed(0)
    network = dense.load_network(name, False, **({} if stride == 32 else {"output_stride": stride}))
    expected = network.eval().forward_features(images)
    torch.testing.assert_close(taps["conv6"], expected, rtol=1e-4, atol=1e-4)
    assert {maps.shape[2:] for maps in taps.values()} == {expected.shape[2:]}


def test_networks_that_are_no_chain_are_refused_with_the_reason():
    for name, options, reason in [
        ("vit_tiny_patch16_224", {"output_stride": 32}, "one size only"),
        ("mobilenetv3_small_050", {}, "cannot dilate mobilenetv3_small_050 to an output stride of 16"),
        ("resnet18", {"frozen": "layer9"}, "no part 'layer9'; its parts are: conv1, bn1"),
        ("resnet18", {"taps": ("layer3", "layer2", "layer4")}, "from shallow to deep"),
    ]:
        with pytest.raises(ValueError, match=reason):
            dense.Timm(name, pretrained=False, **options)


def test_a_hidden_step_is_noticed(monkeypatch):
    """Parts that are called one after another, but are not the network."""
    network = dense.load_network("resnet18", False)
    forward = network.forward_features
    network.forward_features = lambda images: forward(images).square()
    monkeypatch.setattr(dense, "load_network", lambda *_, **__: network)
    with pytest.raises(ValueError, match="The parts of resnet18 cannot be called one after another"):
        dense.Timm("resnet18", pretrained=False)


def test_arrays_of_nothing_take_no_memory(tmp_path):
    """Four bytes in the file are an object of several hundred in memory."""
    (tmp_path / "weights.params").write_bytes(struct.pack("<QQQ", 0x112, 0, 2_500_000) + bytes(10_000_000))
    with pytest.raises(RuntimeError, match=r"weights.params cannot be read.*claims 2,500,000 arrays, where at most"):
        mxnet.read_params(tmp_path / "weights.params")


def test_names_of_another_network_are_named_with_their_file(tmp_path):
    (tmp_path / "weights.params").write_bytes(params({"arg:res9_weight": GOOD}))
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"weights.params: ResNet38 has no tensor called"):
        mxnet.resnet38_state(tmp_path / "weights.params")
