"""Random numbers that depend on a seed and on what they are for, never on who drew before."""

import hashlib
import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy's legacy generator and torch; libraries below us draw from these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    torch.manual_seed(seed)


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, for example `derive_seed(42, "flip", epoch, frame)`."""
    text = "/".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def create_generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of its own for one purpose; drawing from it leaves the global state alone."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))
