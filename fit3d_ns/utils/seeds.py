"""Random numbers that depend on a seed and on what they are for, never on who drew before."""

import hashlib
import random
from typing import Any

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


def create_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A torch generator of its own for one purpose; drawing from it leaves the global state alone."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def capture_random_states() -> dict[str, Any]:
    """The states of Python's, numpy's legacy and torch's generators, as tensors and plain values."""
    version, keys, gauss = random.getstate()
    state: Any = np.random.get_state()  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    _, numpy_keys, position, has_gauss, cached = state
    states: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [torch.from_numpy(numpy_keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Puts back what `capture_random_states` took; checkpoints of older versions of stage II hold torch's alone."""
    if "python" in states:
        version, keys, gauss = states["python"]
        random.setstate((version, tuple(keys), gauss))
        numpy_keys, position, has_gauss, cached = states["numpy"]
        state = ("MT19937", numpy_keys.numpy().astype(np.uint32), position, has_gauss, cached)
        np.random.set_state(state)  # noqa: NPY002 - nerfstudio draws from the legacy generator.
    torch.set_rng_state(states["torch"] if "torch" in states else states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        # A run may go on with fewer devices than it began with.
        for index, cuda_state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
