"""Commands in children whose every file operation can be made to fail: the harness of the fault campaigns.

Children are forked from a server that has imported everything and computed nothing, so an attempt costs what the
command itself costs. SQLite tests its journal this way: count the operations, then stop at the N-th, for every N.
"""

import errno
import importlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

OPERATIONS = ("mkdir", "fsync", "replace", "rename", "unlink", "remove", "rmdir")
"""Functions of `os` that change what a folder holds or what a disk has; all writers end in one of them."""

PRELOADED = [
    *(f"fit3d_ns.cli.{name}" for name in ("export", "finetune", "lift", "probe", "report", "synthesize")),
    "tests.faults.warm",
    "nerfstudio.scripts.train",
    "tests.faults.world",
]


@dataclass(frozen=True)
class Fault:
    """What happens at one operation below the work folder."""

    at: int
    """The operation, counted from 1; 0 counts only."""
    error: int = 0
    """Number of the `OSError` that is raised there and from there on; 0 sends `signal` instead."""
    signal: int = signal.SIGKILL
    """What the process gets there."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    kind: str
    """`done`, `sentence`, `interrupted`, `killed`, `traceback` or `hang`."""
    text: str
    """Everything that was printed."""
    num_operations: int = 0
    """Operations below the work folder."""
    had_error: bool = False
    """Whether the error of the fault was raised."""


FAILURES = ("traceback", "hang", "silent", "code", "other")
"""How an attempt fails: a traceback; no end; other results without a word; strangers' code that ran; anything else."""


@dataclass(frozen=True)
class Verdict:
    """What one attempt showed."""

    row: str
    """Of the table that the suite prints."""
    case: str
    """Which attempt of them it was."""
    failure: str = ""
    """One of `FAILURES`; empty where the attempt was survived."""
    text: str = ""
    """What was seen instead."""

    def fail(self, failure: str, text: str) -> "Verdict":
        """The same attempt, failed; what is not among `FAILURES` is `other`."""
        return replace(self, failure=failure if failure in FAILURES else "other", text=f"{failure}: {text[-2500:]}")


def attempt(
    function: Callable[..., None],
    arguments: Sequence[Any],
    folder: Path,
    *,
    fault: Fault | None = None,
    seconds: float = 60.0,
    memory_gb: float = 6.0,
    file_mb: float | None = None,
) -> Outcome:
    """Runs a module-level function in a child and says how it ended.

    Args:
        function: Imported anew in the child.
        arguments: What it is called with; picklable.
        folder: Where the child works; only operations below it count.
        fault: What happens there.
        seconds: After which a child counts as hanging.
        memory_gb: Address space that the child may take beyond what the server has.
        file_mb: Largest file that the child may write, in 1e6 bytes.
    """
    log, counter, ended = (folder / f".attempt.{name}" for name in ("log", "count", "code"))
    for stale in (log, counter, ended):
        stale.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=_run_child, args=(function, list(arguments), folder, fault, memory_gb, file_mb))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return Outcome("hang", _read(log))
    text, counted = _read(log), _read(counter).split()
    count, had_error = int(counted[0] if counted else 0), "error" in counted
    # Two threads that start children disturb what `multiprocessing` knows of exit codes: the child writes its own.
    code = int(_read(ended) or (child.exitcode if child.exitcode and child.exitcode < 0 else -signal.SIGKILL))
    if "Traceback (most recent call last)" in text:
        return Outcome("traceback", text, count, had_error)
    kinds = {0: "done", 1: "sentence", 130: "interrupted", -signal.SIGKILL: "killed"}
    return Outcome(kinds.get(code, f"exit {code}"), text, count, had_error)


def run_all(items: Sequence[Item], function: Callable[[Item], Any]) -> list[Any]:
    """Maps over two attempts at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def find_litter(folder: Path) -> list[str]:
    """Temporary files that an earlier process left."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".tmp"))


def copy_folder(source: Path, target: Path) -> Path:
    """A fresh copy for one attempt."""
    shutil.copytree(source, target, symlinks=True)
    return target


def call_main(module: str, arguments: list[str]) -> None:
    """The `main` of a command, as its entry point calls it."""
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def call_ns_train(arguments: list[str]) -> None:
    """nerfstudio's entry point, which reads `sys.argv`."""
    sys.argv = ["ns-train", *arguments]
    importlib.import_module("nerfstudio.scripts.train").entrypoint()


def _run_child(
    function: Callable[..., None],
    arguments: list[Any],
    folder: Path,
    fault: Fault | None,
    memory_gb: float,
    file_mb: float | None,
) -> None:
    with open(folder / ".attempt.log", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(folder)
    # torch renews its thread pool at the first use after a fork, which two threads must not do at once.
    torch.set_num_threads(1)
    # The server runs with signals as the test runner has them; commands expect Python's own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_AS, (_used_address_space() + int(memory_gb * 1e9),) * 2)
    if file_mb is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_mb * 1e6),) * 2)
    install(fault or Fault(0), folder)
    code = 0
    try:
        function(*arguments)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        code = 1
        # A command may have installed a hook of its own for what ends the process.
        with suppress(OSError):
            sys.excepthook(type(error), error, error.__traceback__)
    # The log may be at the limit that is being tried.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    (folder / ".attempt.code").write_text(str(code))
    os._exit(code)


def install(fault: Fault, folder: Path) -> None:
    """Replaces the operations by ones that count and fail; the count is written to `.attempt.count`."""
    counter = os.open(folder / ".attempt.count", os.O_CREAT | os.O_WRONLY)
    root = str(folder.resolve())
    number = [0]

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def operation(target: Any, *rest: Any, **named: Any) -> Any:
            if _locate(target).startswith(root):
                number[0] += 1
                os.pwrite(counter, f"{number[0]:8d}".encode(), 0)
                if fault.at and number[0] == fault.at and not fault.error:
                    os.kill(os.getpid(), fault.signal)
                if fault.at and number[0] >= fault.at and fault.error and name not in ("unlink", "remove", "rmdir"):
                    os.pwrite(counter, b" error", 8)
                    raise OSError(fault.error, os.strerror(fault.error), str(target))
            return original(target, *rest, **named)

        setattr(os, name, operation)

    for name in OPERATIONS:
        wrap(name)


def describe(error: int) -> str:
    """`ENOSPC` of 28."""
    return errno.errorcode[error]


def _locate(target: Any) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return os.path.abspath(os.fspath(target))


def _used_address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
