"""`choose_device`: the one way from a `--device` flag to the device that is used."""

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
