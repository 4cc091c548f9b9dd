"""Errors of `ns-*` commands in one sentence, as the `fit3d-*` commands show them."""

import os
import sys
from types import TracebackType


def install_error_sentences() -> None:
    """From here on a `ValueError` that ends the process is printed as one sentence, with exit code 1.

    nerfstudio's entry points know nothing of this; so the hook that Python calls for an uncaught exception is replaced
    when one of our runs starts, never at import. `FIT3D_DEBUG=1` leaves tracebacks as they are.
    """
    if os.environ.get("FIT3D_DEBUG", "") not in ("", "0") or sys.excepthook is _print_sentence:
        return
    sys.excepthook = _print_sentence


def _print_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, (ValueError, FileNotFoundError, PermissionError)):
        print(f"fit3d: error: {' '.join(str(error).split())}", file=sys.stderr)
        print("FIT3D_DEBUG=1 shows the traceback.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
