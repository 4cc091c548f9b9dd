"""Sums over processes: each holds a share of the views, all hold the same Gaussians."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def sum_over_processes(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replaces each tensor by its sum over the processes of `group`, in place; does nothing where `group` is None."""
    if group is None:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)


def is_any(flag: bool, device: torch.device, group: dist.ProcessGroup | None) -> bool:
    """True on every process of `group` if `flag` is on one of them, so that all take the same branch."""
    if group is None:
        return flag
    count = torch.tensor(float(flag), device=device)
    sum_over_processes([count], group)
    return bool(count > 0)


def select_share(items: Sequence[Item], group: dist.ProcessGroup | None) -> list[Item]:
    """This process's share of `items`: every world-size-th one, so that neighbours in a path are spread evenly."""
    if group is None:
        return list(items)
    return list(items)[dist.get_rank(group) :: dist.get_world_size(group)]
