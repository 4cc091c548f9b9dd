"""Running compiled kernels on several threads: a small pool of our own instead of numba's threading layers.

numba's layers cannot be used here: one kills a child that was forked after a kernel ran, the other aborts when two
threads run kernels at once. Our kernels release the interpreter lock and share nothing, so plain Python threads do; the
pool is dropped in a forked child and made again on first use.

Work is cut into tasks by its size alone, never by the number of threads, and each task writes where no other task does;
so results are the same to the bit whichever thread runs which task.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


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

    helpers = _submit(work, num_threads - 1)
    try:
        work()
    finally:
        for helper in helpers:
            # One that has not begun is not needed any more: another render keeps the pool busy.
            if not helper.cancel():
                helper.result()


def _submit(work: Callable[[], None], count: int) -> list:
    """Starts `work` on `count` threads of the pool, which grows when more are asked for."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            # Threads of a smaller pool finish what they were given and then end.
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="rasterization"), count
        return [_pool.submit(work) for _ in range(count)]


def _forget_pool() -> None:
    global _lock, _pool, _pool_size
    _lock, _pool, _pool_size = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_forget_pool)
