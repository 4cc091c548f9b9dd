"""`choose_device`: the one way from a `--device` flag to the device that is used; and what a device is given."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

DeviceChoice = Literal["auto", "cuda", "cpu"]
"""Values of every `--device` flag; `auto` is CUDA where there is one."""


def choose_device(choice: DeviceChoice) -> torch.device:
    """The device that a flag names; ValueError where `cuda` is asked for and torch finds no CUDA device."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine offers no CUDA device (see fit3d-info); take --device cpu.")
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(choice)


def choose_budget_gb(device: torch.device, on_cpu: float) -> float:
    """Memory for what is kept on a device, in 1e9 bytes: half of what a CUDA device has free now, else `on_cpu`."""
    if device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds without using it is free too.
    return 0.5e-9 * (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def choose_num_workers(device: torch.device) -> int:
    """Threads that load photographs ahead: two beside work on a CPU, more to keep up with a CUDA device."""
    return min(os.cpu_count() or 2, 8) if device.type == "cuda" else 2


@contextmanager
def fast_matmul(device: torch.device, is_on: bool = True) -> Iterator[None]:
    """Float32 matrix products of the block in TF32 on a CUDA device: the 10 bits of mantissa that stored tokens have.

    Only for a backbone: solves and decoders need all 23 bits.
    """
    before = torch.get_float32_matmul_precision()
    if is_on and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
