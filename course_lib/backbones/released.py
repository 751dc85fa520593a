"""Released checkpoints of nets on ResNet38: which tensors they hold tells which method they are of.

    method      heads, 1 x 1 convolutions without bias                                      channel of the background
    cam         fc8 20                                                  (PSA)               none
    seam        fc8 21, f8_3 64, f8_4 128, f9 192                       (SEAM)              0
    p2p-seam    ... and fc_proj 128                                     (pixel-to-prototype contrast, on SEAM)     0
    eps         fc8 21                                                  (EPS)               20, here moved to 0
    p2p-eps     fc8 21, f8_3, f8_4, f9, proj_fc 128                     (the same, on EPS)  20, here moved to 0
    affinity    f8_3 64, f8_4 128, f8_5 256, f9 448                     (AffinityNet of PSA and SEAM)              none

Only tensors are read (weights_only), so that a file from anywhere cannot run code.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import load_file
from torch import Tensor, nn

_SIMILAR = {"f8_3": (64, 512), "f8_4": (128, 1024), "f9": (192, 195)}  # what pixel correlation compares
LAYOUTS = {  # rows and columns of the heads
    "trunk": {},
    "cam": {"fc8": (20, 4096)},
    "eps": {"fc8": (21, 4096)},
    "seam": {"fc8": (21, 4096), **_SIMILAR},
    "p2p-seam": {"fc8": (21, 4096), **_SIMILAR, "fc_proj": (128, 4096)},
    "p2p-eps": {"fc8": (21, 4096), **_SIMILAR, "proj_fc": (128, 4096)},
    "affinity": {"f8_3": (64, 512), "f8_4": (128, 1024), "f8_5": (256, 4096), "f9": (448, 448)},
}
HEADS = {name for layout in LAYOUTS.values() for name in layout}
BACKGROUND_LAST = ("eps", "p2p-eps")


@dataclass(frozen=True)
class Released:
    """A checkpoint, taken apart."""

    method: str  # a key of LAYOUTS; "trunk" where there is no head
    trunk: dict[str, Shaped[Tensor, "..."]]  # state_dict of a ResNet38
    heads: dict[str, Float[Tensor, "rows columns 1 1"]]  # weights by published name, background in row 0 of fc8;
    #                                                     the projector of both P2P variants is called fc_proj


def read(path: str | Path) -> Released:
    """A released .pth (or .safetensors) file, or the state_dict of our own ResNet38, with names and shapes checked.

    Raises:
        FileNotFoundError: nothing is there.
        RuntimeError: not a file of tensors, or heads of no published method.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"A checkpoint was expected at {path}, but there is no such file.")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"{path} cannot be read as a file of tensors; anything else in it is not loaded: {error}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise RuntimeError(
            f"{path} holds something else than tensors by name. Save the state_dict of the network alone."
        )
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}  # of nn.DataParallel
    heads = {name.removesuffix(".weight"): state.pop(name) for name in [*state] if name.split(".")[0] in HEADS}
    shapes = {name: tuple(weight.shape) for name, weight in heads.items()}
    method = next(
        (
            method
            for method, layout in LAYOUTS.items()
            if shapes == {name: (*size, 1, 1) for name, size in layout.items()}
        ),
        None,
    )
    if method is None:
        raise RuntimeError(f"{path} holds the heads {shapes}, which no published network has: {_layouts()}.")
    if method in BACKGROUND_LAST:
        heads["fc8"] = heads["fc8"].roll(1, 0)
    return Released(method, state, {"fc_proj" if name == "proj_fc" else name: weight for name, weight in heads.items()})


def load(path: str | Path, trunk: nn.Module, heads: Mapping[str, nn.Module]) -> str:
    """Fills a trunk and heads, strictly, from a released checkpoint; returns its method.

    Args:
        trunk: a ResNet38 as published.
        heads: our modules by published name, such as {"fc8": net.classifier, "fc_proj": net.projector}. All heads of the file
            must be among them, and all of these must be in the file.
    Raises:
        FileNotFoundError, RuntimeError: as `read`, or it does not fit.
    """
    found = read(path)
    if set(heads) != set(found.heads):
        raise RuntimeError(
            f"{Path(path).name} is a checkpoint of {found.method} with the heads {sorted(found.heads)}, but the "
            f"network has {sorted(heads)}. Build the network of that method."
        )
    fill(trunk, found.trunk, f"The trunk in {Path(path).name}")
    for name, head in heads.items():
        fill(head, {"weight": found.heads[name]}, f"{name} in {Path(path).name}")
    return found.method


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict`, strict but for the step counters of batch normalisation, which old files lack.

    Args:
        source: what is loaded, for the error.
    Raises:
        RuntimeError: a tensor that is missing, left over, or of another shape.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith(".num_batches_tracked")]
    extra = [name for name in state if name not in wanted]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    for what, names in (("lacks", missing), ("holds besides", extra), ("has other shapes:", other)):
        if names:
            raise RuntimeError(
                f"{source} does not fit {type(module).__name__}: it {what} {', '.join(names[:4])}"
                + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                + "."
            )
    module.load_state_dict(dict(state), strict=False)


def _layouts() -> str:
    return "; ".join(f"{method}: {', '.join(layout) or 'none'}" for method, layout in LAYOUTS.items())
