"""Released checkpoints of nets on ResNet38: which tensors they hold tells which method they are of.

    method      heads, 1 x 1 convolutions without bias                          channel of the background
    cam         fc8 20                                    (PSA)                 none
    seam        fc8 21, f8_3 64, f8_4 128, f9 192         (SEAM)                0
    p2p-seam    ... and fc_proj 128                       (pixel-to-prototype contrast, on SEAM)     0
    eps         fc8 21                                    (EPS)                 20, here moved to 0
    p2p-eps     fc8 21, f8_3, f8_4, f9, proj_fc 128       (contrast, on EPS)    20, here moved to 0
    affinity    f8_3 64, f8_4 128, f8_5 256, f9 448       (AffinityNet of PSA and SEAM)              none

`read` takes such a file apart, `load` fills a trunk and its heads with it.
"""

from pathlib import Path

from torch import nn

from course_lib import checkpoints
from course_lib.checkpoints import State

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


def read(path: str | Path) -> tuple[str, State, State]:
    """A released checkpoint, or the state_dict of our own ResNet38, taken apart; names and shapes of heads are checked.

    Returns:
        (method, trunk, heads): a key of LAYOUTS, "trunk" where there is no head; the state_dict of a ResNet38; weights
        (rows columns 1 1) by published name, with the background in row 0 of fc8. The projector of both P2P variants is
        called fc_proj.
    Raises:
        FileNotFoundError, RuntimeError: as `checkpoints.read`, or heads of no published method.
    """
    trunk, _ = checkpoints.read(path)
    heads = {name.removesuffix(".weight"): trunk.pop(name) for name in [*trunk] if name.split(".")[0] in HEADS}
    shapes = {name: tuple(weight.shape) for name, weight in heads.items()}
    methods = [name for name, sizes in LAYOUTS.items() if shapes == {head: (*sizes[head], 1, 1) for head in sizes}]
    if not methods:
        raise RuntimeError(
            f"{path}: expected the heads of one of {', '.join(LAYOUTS)}, got {shapes!s:.400}; name another file."
        )
    (method,) = methods
    if method in BACKGROUND_LAST:
        heads["fc8"] = heads["fc8"].roll(1, 0)
    if "proj_fc" in heads:
        heads["fc_proj"] = heads.pop("proj_fc")
    return method, trunk, heads


def load(path: str | Path, trunk: nn.Module, heads: dict[str, nn.Module]) -> str:
    """Fills a trunk and heads, strictly, from a released checkpoint; returns its method.

    Args:
        trunk: a ResNet38 as published.
        heads: our modules by published name, such as {"fc8": net.classifier, "fc_proj": net.projector}. All heads of
            the file must be among them, and all of these must be in the file.
    Raises:
        FileNotFoundError, RuntimeError: as `read`, or it does not fit.
    """
    method, state, weights = read(path)
    if set(heads) != set(weights):
        raise RuntimeError(
            f"{Path(path).name} is a checkpoint of {method} with the heads {sorted(weights)}, but the network has "
            f"{sorted(heads)}. Build the network of that method."
        )
    checkpoints.fill(trunk, state, f"The trunk in {Path(path).name}")
    for name, head in heads.items():
        checkpoints.fill(head, {"weight": weights[name]}, f"{name} in {Path(path).name}")
    return method
