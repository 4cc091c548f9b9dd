"""How the kernels of the CPU backend are compiled: one decorator for all of them."""

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a kernel: no bounds checks, no interpreter lock, division by zero gives infinity; kept on disk.

    Products and sums may be fused, but never reordered, so that results do not depend on how a loop was compiled.
    Type checkers that wrap every function at import are unwrapped: numba can only compile the function itself.
    """
    options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    return njit(**options)(inspect.unwrap(function))
