"""How the kernels of the CPU backend are compiled, run on several threads, and given scratch memory.

Threads come from a small pool of our own because numba's threading layers cannot be used here: one kills a child that
was forked after a kernel ran, the other aborts when two threads run kernels at once. Our kernels release the
interpreter lock and share nothing, so plain Python threads suffice; a forked child drops the pool and makes a new one.

Work is cut into tasks by its size alone, never by the number of threads, and each task writes where no other task does;
so results are the same to the bit whichever thread runs which task.
"""

import errno
import functools
import hashlib
import inspect
import itertools
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import config, njit

from fit3d_ns.utils.errors import explain
from fit3d_ns.utils.progress import notice, notice_once

CHUNK = 1024
"""Gaussians per task of the kernels that go through all Gaussians."""
LARGEST_KEPT_BYTES = 256_000_000
"""Larger scratch arrays are allocated each time; a thread keeps at most this much under each name."""

_pool: ThreadPoolExecutor
_kept = threading.local()


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a kernel: no bounds checks, no interpreter lock, division by zero gives infinity; kept where possible.

    Products and sums may be fused, but never reordered, so that results do not depend on how a loop was compiled.
    Type checkers that wrap every function at import are unwrapped: numba can only compile the function itself.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
    function = inspect.unwrap(function)
    try:
        kernel = njit(cache=True, **options)(function)
    except RuntimeError:
        # Neither beside the code nor below the home folder may anything be written.
        folder = _choose_temporary_cache()
        if folder is None:
            return njit(**options)(function)
        # numba asks for this where a kernel is defined, and has no other way to say it.
        vars(config)["CACHE_DIR"] = str(folder)
        kernel = njit(cache=True, **options)(function)
    kernel._cache.save_overload = _save_if_possible(kernel._cache.save_overload)
    # numba takes stored code for current as long as the kernel's own file has not changed. But kernels call functions
    # of other files, whose code is stored within theirs: any change here must make all of them stale.
    kernel._cache._cache_file._source_stamp = _hash_sources()
    return kernel


def run_tasks(kernel: Callable[..., Any], num_tasks: int, *arguments: Any) -> None:
    """Calls `kernel(task, *arguments)` for each task number, on as many threads as PyTorch uses."""
    num_threads = min(torch.get_num_threads(), num_tasks)
    if num_threads <= 1:
        for task in range(num_tasks):
            kernel(task, *arguments)
        return
    counter = itertools.count()

    def work() -> None:
        # `next` on a counter is atomic under the interpreter lock.
        for task in iter(counter.__next__, None):
            if task >= num_tasks:
                return
            kernel(task, *arguments)

    helpers = [_pool.submit(work) for _ in range(num_threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            # One that has not begun is not needed any more: another render keeps the pool busy.
            if not helper.cancel():
                helper.result()


def count_chunks(num_gaussians: int) -> int:
    """Tasks of a kernel that handles `CHUNK` Gaussians at a time."""
    return -(-num_gaussians // CHUNK)


def take_zeros(name: str, size: int) -> np.ndarray:
    """Zeros, float32 [size], valid until this thread asks for the same name again.

    The memory is kept from one call to the next. The C library gives blocks of over 32 MB back to the system when they
    are freed; in a lift onto 140,000 Gaussians, half of the time went into getting them again, page by page.
    """
    if 4 * size > LARGEST_KEPT_BYTES:
        return np.zeros(size, np.float32)
    known: np.ndarray | None = getattr(_kept, name, None)
    if known is None or known.size < size:
        # A little more than was asked for: views of one scene differ in size.
        known = np.empty(min(size + size // 4, LARGEST_KEPT_BYTES // 4), np.float32)
        setattr(_kept, name, known)
    array = known[:size]
    array.fill(0.0)
    return array


@functools.cache
def _hash_sources() -> str:
    """One name for the present text of all files in this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _choose_temporary_cache() -> Path | None:
    """A folder for compiled kernels that only this user can write to, since they are run; None where there is none."""
    folder = Path(tempfile.gettempdir()) / f"fit3d_ns-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        tempfile.TemporaryFile(dir=folder).close()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        notice(f"Compiled kernels are not kept ({explain(error)}); every start compiles them. See NUMBA_CACHE_DIR.")
        return None
    notice(f"Code and home are read-only: compiled kernels are kept in {folder}. See NUMBA_CACHE_DIR.")
    return folder


def _save_if_possible(save: Callable[..., None]) -> Callable[..., None]:
    def save_or_say(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            notice_once("kernels", f"Compiled kernels are not kept: {explain(error)} See NUMBA_CACHE_DIR.")

    return save_or_say


def _create_pool() -> None:
    global _pool
    # Its threads start when they are first needed.
    _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="rasterization")


_create_pool()
os.register_at_fork(after_in_child=_create_pool)
