"""Prototypes: what a class looks like on average, as pooled features.

    P_c = 1/N_c sum_{i in c} s_i          Shen et al., "Distance-Based Class Activation Map for Metric Learning", Eq. 7

The paper averages feature maps and pools when it compares. Pooling and averaging commute, so k numbers for each class are
enough: 1000 classes of 2048 channels are 8 MB.
"""

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor


def class_prototypes(
    features: Float[Tensor, "n k"], labels: Int[Tensor, " n"], num_classes: int
) -> Float32[Tensor, "c k"]:
    """Mean feature of each class  (Shen et al., Eq. 7), summed in float64; gradients pass.

    Args:
        features: pooled features, one row per sample; scaled to length 1 before, if the model compares directions.
        labels: class of each row, 0..num_classes - 1.
    Raises:
        ValueError: a label out of range or a class without samples (looked at on the CPU only: on a GPU the look would
            stall a training step, and the prototype of such a class is NaN).
    """
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, num_classes)
        _check_counts(labels.bincount(minlength=num_classes))
    wide, labels = features.double(), labels.long()
    sums = wide.new_zeros(num_classes, features.shape[1]).index_add(0, labels, wide)
    counts = wide.new_zeros(num_classes).index_add(0, labels, torch.ones_like(labels, dtype=wide.dtype))
    return (sums / counts[:, None]).float()


class ClassPrototypes:
    """Class prototypes of a stream, such as a whole training set  (Shen et al., Eq. 7): `accumulate` batches, then `compute`.

    `sums` and `counts` are all there is to save for a resume. Sums are float64, on the CPU: the order of the batches leaves
    no trace that float32 could show. Under torch.distributed each process accumulates its own share of the samples; a sampler
    that repeats samples to fill up the last batch would count them twice.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        self.sums = torch.zeros(num_classes, channels, dtype=torch.float64)
        self.counts = torch.zeros(num_classes, dtype=torch.long)

    def accumulate(self, features: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> None:
        """Adds a batch of pooled features. A batch that is refused leaves everything as it was.

        Raises:
            ValueError: another number of channels, a label out of range, or a feature that is NaN or infinite.
        """
        if features.shape[1] != self.sums.shape[1]:
            raise ValueError(f"Pooled features of {self.sums.shape[1]} channels were expected, but {features.shape[1]} came.")
        features, labels = features.detach().cpu().double(), labels.cpu().long()
        check_labels(labels, len(self.counts))
        if not (finite := features.isfinite().all(1)).all():
            raise ValueError(f"Sample {int((~finite).nonzero()[0])} of the batch, of class {int(labels[~finite][0])}, holds "
                             "NaN or infinite features, which would spoil the prototype of its class. Look at it first.")
        self.sums.index_add_(0, labels, features)
        self.counts += labels.bincount(minlength=len(self.counts))

    def compute(self) -> Float32[Tensor, "c k"]:
        """Prototypes of everything accumulated so far. With torch.distributed running, that of all processes: all must call.

        Raises:
            ValueError: a class without samples.
        """
        sums, counts = self.sums, self.counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums, counts = _sum_over_processes(sums), _sum_over_processes(counts)
        _check_counts(counts)
        return (sums / counts[:, None]).float()


def _sum_over_processes(share: Tensor) -> Tensor:
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"      # NCCL knows no CPU tensors
    whole = share.to(device, copy=True)
    torch.distributed.all_reduce(whole)
    return whole.cpu()


def check_labels(labels: Int[Tensor, " n"], num_classes: int) -> None:
    """Raises a ValueError if a label lies outside 0..num_classes - 1."""
    if ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(f"Labels from 0 to {num_classes - 1} were expected, but {int(labels.min())} to {int(labels.max())} "
                         "came. Number the classes from 0, or raise num_classes.")


def _check_counts(counts: Int[Tensor, " c"]) -> None:
    if empty := (counts == 0).nonzero().flatten().tolist():
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(f"{len(empty)} of {len(counts)} classes have no sample, and so no prototype: {some}. Add samples, or "
                         "number only the classes that are there.")
