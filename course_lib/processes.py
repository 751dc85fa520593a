"""What processes that share a batch tell each other under torch.distributed. In one process this does nothing."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def processes() -> int:
    """Number of processes that share a batch; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def gathered(share: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "all *rest"]:
    """Rows of all processes, in their order, without gradient; each process gives as many. Alone: the rows."""
    if processes() == 1:
        return share
    parts = [torch.empty_like(share) for _ in range(processes())]
    dist.all_gather(parts, share.detach().contiguous())
    return torch.cat(parts)


def sum_over_processes(share: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sum of the shares of all processes, on the CPU: all must call. Alone: the share."""
    if processes() == 1:
        return share
    whole = share.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)  # NCCL knows no CPU tensors
    dist.all_reduce(whole)
    return whole.cpu()
