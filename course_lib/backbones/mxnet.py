"""The ImageNet weights of ResNet38, read from MXNet's own format without MXNet, which is no longer maintained.

A .params file is a list of arrays and their names, little endian, without padding:

    file      uint64 0x112, uint64 0;  uint64 n, n arrays;  uint64 n, n names (uint64 length, bytes)
    array     V2, V3    uint32 0xF993FAC9 or ...CA, int32 storage (0 = dense), uint32 ndim, int64 shape[ndim]
              V1        uint32 0xF993FAC8, uint32 ndim, int64 shape[ndim]
              legacy    uint32 ndim, uint32 shape[ndim]                       (before MXNet 1.0; the released file is of 2016)
              all       and, unless ndim is 0: int32 device, int32 its number, int32 type, data

Sizes are compared with what is left of the file before anything is read: a broken file costs no memory.
"""

import hashlib
import math
import re
import struct
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

MAGIC, V1, V2, V3 = 0x112, 0xF993FAC8, 0xF993FAC9, 0xF993FACA
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
MAX_DIMENSIONS = 8
IMAGENET_MD5 = "ff21f45d6bf03284100dcbec571edfad"  # of ilsvrc-cls_rna-a1_cls1000_ep-0001.params
PARTS = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def read_params(path: str | Path) -> dict[str, Shaped[Tensor, "..."]]:
    """All arrays of a .params file by name, such as "arg:conv1a_weight".

    Raises:
        FileNotFoundError: nothing is there.
        RuntimeError: not such a file, truncated, or with arrays that are sparse or of an unknown type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Weights of MXNet were expected at {path}, but there is no such file.")
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        magic, reserved = reader.numbers("<QQ", "the header")
        if (magic, reserved) != (MAGIC, 0):
            raise reader.error(
                f"it begins with {magic:#x}, {reserved:#x} instead of {MAGIC:#x}, 0x0; is it a .params file?"
            )
        arrays = [reader.array(number) for number in range(reader.count("arrays", 4))]
        names = [reader.name(number) for number in range(reader.count("names", 8))]
        if len(names) != len(arrays) or len(set(names)) != len(names):
            raise reader.error(f"{len(arrays)} arrays have {len(set(names))} different names")
        if reader.left():
            raise reader.error(f"{reader.left():,} bytes follow after its end")
    return dict(zip(names, arrays))


def resnet38_state(path: str | Path) -> dict[str, Shaped[Tensor, "..."]]:
    """The state_dict of a ResNet38 trunk from the released ImageNet weights; the classifier of 1000 classes is left out.

    A file that is not the published one, byte for byte, is used with a warning.

    Raises:
        RuntimeError: a name that no tensor of ResNet38 has in that file, and the errors of `read_params`.
    """
    arrays = read_params(path)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != IMAGENET_MD5:
            warnings.warn(
                f"{path} is not the published file ilsvrc-cls_rna-a1_cls1000_ep-0001.params (md5 {IMAGENET_MD5}): "
                "figures made with it do not compare.",
                stacklevel=2,
            )
    return {_renamed(name): array for name, array in arrays.items() if not name.startswith("arg:linear1000_")}


def _renamed(name: str) -> str:
    """arg:res4b3_branch2b1_weight -> b4_3.conv_branch2b1.weight, aux:bn5a_branch2a_moving_var -> b5.bn_branch2a.running_var"""
    found = re.fullmatch(
        r"(?:arg|aux):(?:(conv1a|bn7)|(res|bn)([2-7])(?:a|b([1-5]))_(branch(?:1|2a|2b1|2b2)))"
        r"_(weight|gamma|beta|moving_mean|moving_var)",
        name,
    )
    if not found:
        raise RuntimeError(f"ResNet38 has no tensor called {name!r} in MXNet. Is the file that of ilsvrc-cls_rna-a1?")
    alone, kind, level, unit, branch, part = found.groups()
    if alone:
        return f"{alone}.{PARTS[part]}"
    return f"b{level}{f'_{unit}' if unit else ''}.{'conv' if kind == 'res' else 'bn'}_{branch}.{PARTS[part]}"


class _Reader:
    """A file that knows how much of it is left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def error(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self.path} cannot be read as weights of MXNet: {what}. Fetch it again, or check its name."
        )

    def left(self) -> int:
        return self.size - self.file.tell()

    def check(self, size: int, what: str) -> None:
        if size > self.left():
            raise self.error(f"{what} would take {size:,} bytes, where {self.left():,} are left")

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        self.check(struct.calcsize(form), what)
        return struct.unpack(form, self.file.read(struct.calcsize(form)))

    def count(self, what: str, least: int) -> int:
        (count,) = self.numbers("<Q", f"the number of {what}")
        self.check(count * least, f"{count:,} {what}")
        return count

    def name(self, number: int) -> str:
        (length,) = self.numbers("<Q", f"name {number}")
        self.check(length, f"name {number}")
        try:
            return self.file.read(length).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"name {number} is not text") from error

    def array(self, number: int) -> Tensor:
        what = f"array {number}"
        (kind,) = self.numbers("<I", what)
        if kind in (V2, V3):
            (storage,) = self.numbers("<i", what)
            if storage:
                raise self.error(f"{what} is sparse (storage type {storage})")
        (dimensions,) = self.numbers("<I", what) if kind in (V1, V2, V3) else (kind,)
        if dimensions > MAX_DIMENSIONS:
            raise self.error(f"{what} claims {dimensions:,} dimensions")
        shape = self.numbers(f"<{dimensions}{'q' if kind in (V1, V2, V3) else 'I'}", what)
        if not shape:
            return torch.empty(0)
        _, _, flag = self.numbers("<iii", what)
        if not 0 <= flag < len(TYPES):
            raise self.error(f"{what} is of type {flag}; 0 to {len(TYPES) - 1} are known")
        if min(shape) < 0:
            raise self.error(f"{what} claims the shape {shape}")
        dtype, count = np.dtype(TYPES[flag]), math.prod(shape)
        self.check(count * dtype.itemsize, f"{what} of shape {shape}")
        return torch.from_numpy(
            np.fromfile(self.file, dtype, count).astype(dtype.newbyteorder("="), copy=False)
        ).reshape(shape)
