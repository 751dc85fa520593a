"""Checkpoints: the one place where weights are written to a file, read from one, and refused.

    checkpoints.write(folder / "model.safetensors", model, {"loss": "triplet"})
    state, about = checkpoints.read(folder / "model.safetensors")
    checkpoints.fill(model, state, "model.safetensors")

Only tensors and text are read, never code, so that a file from anywhere does no harm. What training scripts save is
read as it is: .safetensors, or a pickle of torch, also with the weights under a key such as "state_dict" beside an
epoch and an optimiser, and with all names behind "module." (nn.DataParallel) or "_orig_mod." (torch.compile).
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

State = dict[str, Shaped[Tensor, "..."]]  # tensors by name
WRAPPERS = ("state_dict", "model", "net", "model_state_dict")  # keys under which training scripts keep the weights


def write(path: Path, module: nn.Module, about: dict[str, Any] | None = None) -> None:
    """Write all tensors of a module as one .safetensors file, whole or not at all; a missing folder is made.

    The same tensors and words give the same bytes, so that several processes may write the same file.

    Args:
        about: what the file says about itself, anything that JSON holds.
    """
    state = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.writing")
    # All under one key: several would come in an order that changes from run to run.
    unfinished.write_bytes(save(state, {"about": json.dumps(about or {}, sort_keys=True)}))
    unfinished.replace(path)


def read(path: str | Path) -> tuple[State, dict[str, Any]]:
    """Tensors by name, on the CPU, and what the file says about itself: {} unless `write` made it say something.

    Args:
        path: a .safetensors file; a file of any other name is read as a pickle of torch, with weights_only.
    Raises:
        FileNotFoundError: nothing is there.
        RuntimeError: a folder, a broken file, one with code, or something else than tensors by name.
    """
    path, about = weights_at(path), {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(part.file_size for part in archive.infolist())
            if claimed > path.stat().st_size:  # torch compresses nothing
                raise ValueError(f"its parts claim {claimed:,} bytes")
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                about = dict(json.loads((file.metadata() or {}).get("about", "{}")))
        else:
            if b"bytearray" in path.read_bytes():  # weights_only makes one of any size
                raise ValueError("it asks for memory without numbers")
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in 2 * WRAPPERS:  # weights may be wrapped twice
            state = state[key] if isinstance(state.get(key), dict) else state
        if not all(
            isinstance(part, Tensor) and part.layout is torch.strided and part.is_cpu for part in state.values()
        ):
            raise TypeError(f"{', '.join(map(str, state))[:80]} are not all tensors with numbers")
        for prefix in ("module.", "_orig_mod.", "module."):  # both may be there, in either order
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    except Exception as error:  # broken bytes raise nearly anything
        # Only the first sentence of torch is shown: others advise to run the code in the file.
        reason = f"{type(error).__name__}: {str(error).split('. ')[0]:.200}"
        raise RuntimeError(
            f"{path} cannot be read: expected a whole file of tensors by name, got {path.stat().st_size:,} bytes of "
            f"something else ({reason}). Copy or download it again, or save the state_dict of the network alone; code "
            "in a file is never run."
        ) from None
    return state, about


def weights_at(path: str | Path) -> Path:
    """The path, if a file is there; otherwise the FileNotFoundError or RuntimeError of `read`."""
    if not os.path.isfile(path):
        kind, came = (RuntimeError, "a folder or pipe") if os.path.exists(path) else (FileNotFoundError, "nothing")
        raise kind(f"Weights were expected at {path}, got {came}; give the path of a .safetensors or .pth file.")
    return Path(path)


def fill(module: nn.Module, state: State, source: str) -> None:
    """`load_state_dict`, strict but for the step counters of batch normalisation, which old files lack.

    Args:
        source: what is loaded, for the error.
    Raises:
        RuntimeError: a tensor that is missing, left over, or of another shape. The module stays as it was.
    """
    wanted = module.state_dict()
    problems = {
        "lacks": [name for name in wanted if name not in state and not name.endswith(".num_batches_tracked")],
        "holds besides": [name for name in state if name not in wanted],
        "has other shapes:": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
            for name, tensor in state.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise RuntimeError(
                f"{source} does not fit {type(module).__name__}: it {what} {', '.join(names[:4]):.800}{more}. "
                "Build the network that it was saved from."
            )
    module.load_state_dict(state, strict=False)
