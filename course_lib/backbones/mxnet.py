"""The ImageNet weights of ResNet38, read from MXNet's own format without MXNet, which is no longer maintained.

A .params file is a list of arrays and their names, little endian, without padding:

    file      uint64 0x112, uint64 0;  uint64 n, n arrays;  uint64 n, n names (uint64 length, bytes)
    array     V2, V3    uint32 0xF993FAC9 or ...CA, int32 storage (0 = dense), uint32 ndim, int64 shape[ndim]
              V1        uint32 0xF993FAC8, uint32 ndim, int64 shape[ndim]
              legacy    uint32 ndim, uint32 shape[ndim]                       (before MXNet 1.0; the released file is of
                        2016)
              all       and, unless ndim is 0: int32 device, int32 its number, int32 type, data

Sizes are compared with what is left of the file before an array is made: a broken file costs no memory but its own.
"""

import hashlib
import math
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from course_lib import checkpoints
from course_lib.checkpoints import State

MAGIC, V1, V2, V3 = 0x112, 0xF993FAC8, 0xF993FAC9, 0xF993FACA
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
MAX_DIMENSIONS, MAX_ARRAYS = 8, 10_000  # ResNet38 has 4 and 190; empty arrays take 100 times their bytes in memory
IMAGENET_MD5 = "ff21f45d6bf03284100dcbec571edfad"  # of ilsvrc-cls_rna-a1_cls1000_ep-0001.params
TENSORS = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


def read_params(path: str | Path) -> State:
    """All arrays of a .params file by name, such as "arg:conv1a_weight".

    Raises:
        FileNotFoundError: nothing is there.
        RuntimeError: not such a file, truncated, or with arrays that are sparse or of an unknown type.
    """
    reader = _Reader(memoryview(checkpoints.weights_at(path).read_bytes()))
    try:
        header = reader.numbers("<QQ", "the header")
        if header != (MAGIC, 0):
            raise ValueError(
                f"it begins with {header[0]:#x}, {header[1]:#x} instead of {MAGIC:#x}, 0x0; is it a .params file?"
            )
        arrays = [reader.array(f"array {number}") for number in range(reader.count("arrays"))]
        names = [reader.name(f"name {number}") for number in range(reader.count("names"))]
        if not len(arrays) == len(names) == len(set(names)):
            raise ValueError(f"{len(arrays)} arrays have {len(set(names))} different names")
        if reader.left:
            raise ValueError(f"{len(reader.left):,} bytes follow after its end")
    except ValueError as error:
        raise RuntimeError(
            f"{path} cannot be read as weights of MXNet: {error}. Fetch it again, or check its name."
        ) from error
    return dict(zip(names, arrays))


def resnet38_state(path: str | Path) -> State:
    """The state_dict of a ResNet38 trunk from the released ImageNet weights, without the classifier of 1000 classes.

    A file that is not the published one, byte for byte, is used with a warning.

    Raises:
        RuntimeError: a name that no tensor of ResNet38 has in that file, and the errors of `read_params`.
    """
    arrays = read_params(path)
    if hashlib.md5(Path(path).read_bytes()).hexdigest() != IMAGENET_MD5:
        warnings.warn(
            f"{path} is not the published file ilsvrc-cls_rna-a1_cls1000_ep-0001.params (md5 {IMAGENET_MD5}): "
            "figures made with it do not compare.",
            stacklevel=2,
        )
    return {_renamed(name, path): array for name, array in arrays.items() if not name.startswith("arg:linear1000_")}


def _renamed(name, path):
    """Our name: arg:res4b3_branch2b1_weight is b4_3.conv_branch2b1.weight, aux:bn7_moving_var is bn7.running_var."""
    found = re.fullmatch(
        r"(?:arg|aux):(?:(conv1a|bn7)|(res|bn)([2-7])(?:a|b([1-5]))_(branch(?:1|2a|2b1|2b2)))"
        r"_(weight|gamma|beta|moving_mean|moving_var)",
        name,
    )
    if not found:
        raise RuntimeError(
            f"{path}: ResNet38 has no tensor called {name!r:.80} in MXNet. Is it that of ilsvrc-cls_rna-a1?"
        )
    alone, kind, level, unit, branch, part = found.groups()
    if alone:
        return f"{alone}.{TENSORS[part]}"
    return f"b{level}{f'_{unit}' if unit else ''}.{'conv' if kind == 'res' else 'bn'}_{branch}.{TENSORS[part]}"


@dataclass
class _Reader:
    """What is left of a file."""

    left: memoryview

    def check(self, size, what):
        if size > len(self.left):
            raise ValueError(f"{what} would take {size:,} bytes, where {len(self.left):,} are left")

    def take(self, size, what):
        self.check(size, what)
        taken, self.left = self.left[:size], self.left[size:]
        return taken

    def numbers(self, form, what):
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def count(self, what):
        (count,) = self.numbers("<Q", f"the number of {what}")
        self.check(4 * count, f"{count:,} {what}")  # each takes 4 bytes or more
        if count > MAX_ARRAYS:
            raise ValueError(f"it claims {count:,} {what}, where at most {MAX_ARRAYS:,} are read")
        return count

    def name(self, what):
        (length,) = self.numbers("<Q", what)
        return str(self.take(length, what), "utf-8")

    def array(self, what):
        (kind,) = self.numbers("<I", what)
        legacy = kind not in (V1, V2, V3)
        if kind in (V2, V3) and self.numbers("<i", what) != (0,):
            raise ValueError(f"{what} is sparse")
        (dimensions,) = (kind,) if legacy else self.numbers("<I", what)
        if dimensions > MAX_DIMENSIONS:
            raise ValueError(f"{what} claims {dimensions:,} dimensions")
        shape = self.numbers(f"<{dimensions}{'I' if legacy else 'q'}", what)
        if not shape:
            return torch.empty(0)
        flag = self.numbers("<iii", what)[2]
        if not 0 <= flag < len(TYPES):
            raise ValueError(f"{what} is of type {flag}; 0 to {len(TYPES) - 1} are known")
        if min(shape) < 0:
            raise ValueError(f"{what} claims the shape {shape}")
        dtype = np.dtype(TYPES[flag])
        data = self.take(math.prod(shape) * dtype.itemsize, f"{what} of shape {shape}")
        return torch.from_numpy(np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))).reshape(shape)
