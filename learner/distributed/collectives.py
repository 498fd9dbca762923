"""Collectives of the learner's ranks: rank numbers, sums, maxima, flags and barriers over all ranks.

Needs torch.distributed and no DeepSpeed. The process group must exist: `deepspeed_engine.init_distributed` creates it.
Every rank must call every function here in the same order, `rank_and_world_size` excepted, or the others wait until the
process group's timeout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank, and the number of ranks."""
    return dist.get_rank(), dist.get_world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum `values` over all ranks, in place. Returns `values`."""
    dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Take the maximum of `values` over all ranks, in place. Returns `values`."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is True on any rank; every rank gets the same answer.

    Also a barrier when there are several.
    """
    if dist.get_world_size() == 1:
        return flag
    return bool(all_reduce_max(torch.tensor([int(flag)], device=device))[0])


def barrier() -> None:
    """Wait until every rank has called this function.

    Waits for: every rank. Unblocked by: the slowest one. Gives up after: the process group's timeout.
    """
    dist.barrier()
