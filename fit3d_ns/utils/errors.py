"""Errors that a user can cause: what they say in one sentence, and that sentence instead of a traceback."""

import errno
import os
import sys
from types import TracebackType


def describe_error(error: BaseException) -> str:
    """An error as one sentence a user can act on."""
    if is_disk_full(error):
        return "the disk is full; free some space or choose another folder, then run the same command again."
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file or folder: {error.filename}."
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"no permission for {error.filename}; check its owner or choose another place."
    return " ".join(str(error).split()) or type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """True for the ways in which Python, torch and safetensors report a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return "No space left on device" in text or "PytorchStreamWriter failed writing file" in text


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a sentence about the file at fault; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def shows_tracebacks() -> bool:
    """Whether the environment asks for tracebacks: `FIT3D_DEBUG=1`."""
    return os.environ.get("FIT3D_DEBUG", "") not in ("", "0")


def install_error_sentences() -> None:
    """From here on a user's error that ends the process is printed as one sentence, with exit code 1.

    For processes whose entry point is not ours, as nerfstudio's: it replaces the hook that Python calls for an uncaught
    exception, so call it when one of our runs starts and never at import.
    """
    if not shows_tracebacks():
        sys.excepthook = _print_sentence


def _print_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, (ValueError, FileNotFoundError, PermissionError)):
        print(f"fit3d: error: {describe_error(error)}", file=sys.stderr)
        print("FIT3D_DEBUG=1 shows the traceback.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
