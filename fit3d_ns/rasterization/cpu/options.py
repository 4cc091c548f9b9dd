"""How the kernels of the CPU backend are compiled: one decorator for all of them."""

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a kernel: no bounds checks, no interpreter lock, division by zero gives infinity; kept on disk.

    Products and sums may be fused, but never reordered, so that results do not depend on how a loop was compiled.
    Type checkers that wrap every function at import are unwrapped: numba can only compile the function itself.
    """
    options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    kernel = njit(**options)(inspect.unwrap(function))
    # numba takes stored code for current as long as the kernel's own file has not changed. But kernels call functions
    # of other files, whose code is stored within theirs: any change here must make all of them stale.
    kernel._cache._cache_file._source_stamp = _hash_sources()
    return kernel


@functools.cache
def _hash_sources() -> str:
    """One name for the present text of all files in this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
