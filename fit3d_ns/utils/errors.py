"""`explain`: every exception that a user can mend, as one sentence that says what, where and what to do.

Libraries report a full disk or a missing permission in words of their own; the number of the error is in the exception,
in one that it came from, or in its text. All commands translate here, and nowhere else.
"""

import errno
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fit3d_ns.utils.package_files import read_table

_ERRORS = {getattr(errno, row["errno"]): row for row in read_table(Path(__file__).with_suffix(".csv"))}
"""Of each number, a sentence for the user, and a pattern for texts of libraries that lose the number (torch's writer
compares positions and does not say why they differ); the first pattern that is found counts."""
_RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENOMEM)
"""What counts also where it is only the context of another exception: the other one is a consequence."""


def explain(error: BaseException) -> str | None:
    """One sentence about an exception, with its full stop; None where only a traceback helps, because it is a bug."""
    if isinstance(error, RecursionError):
        return "the data is nested too deeply to be read; restore the file or make it again."
    if isinstance(error, UnicodeError):
        return f"a name or a text is not valid UTF-8 ({first_line(error)}); rename the file, or save it as UTF-8."
    number, path = find_errno(error)
    if isinstance(error, ValueError) and str(error):
        return _as_sentence(str(error))
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return (
            f"there is not enough memory ({first_line(error)}); close other programs, use smaller images or fewer "
            "Gaussians, or a machine with more."
        )
    if number in _ERRORS:
        sentence = _ERRORS[number]["sentence"]
        return f"{path}: {sentence}." if path else f"{sentence}."
    if isinstance(error, OSError):
        return _as_sentence(str(error) or type(error).__name__)
    text = str(error)
    if "can't start new thread" in text:
        return "the system refuses another thread; raise the limit (`ulimit -u`) or set OMP_NUM_THREADS=1."
    if type(error).__name__ == "SafetensorError":
        return f"a .safetensors file cannot be read or written ({first_line(error)}); restore it or make it again."
    return None


def find_errno(error: BaseException) -> tuple[int | None, str]:
    """The number of the system's error behind an exception, and the path that it names ("" if none)."""
    links = list(_walk(error))
    # What the system said comes before what a library made of it.
    for read in (_read_errno, _guess_errno):
        for link, is_context in links:
            number, path = read(link)
            if number is not None and (not is_context or number in _RESOURCES):
                return number, path
    return None, ""


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Around code that takes a file's content apart: what it does not find is a ValueError that names `source`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, UnicodeError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source} is damaged or not what was expected ({what}); copy or make it again.") from error


def check_writable(path: Path) -> None:
    """Tries to write where `path` will be, before the work that leads to it; nothing stays there.

    OSError where the folder, or the nearest one above it that exists, cannot be written to; `explain` has the sentence.
    """
    folder = Path(os.path.realpath(path.expanduser())).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    # A file without a name, where the file system has them: not even a kill leaves it.
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0")


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
        explain_thread_errors()
    allow_any_letter()


def allow_any_letter() -> None:
    """From here on letters that the terminal's encoding lacks are printed as escapes (`\\xe4`) instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def explain_thread_errors() -> None:
    """From here on a user's error in a thread is one line; TensorBoard's writer, for one, has a thread of its own."""
    threading.excepthook = _print_thread_error


def _print_thread_error(arguments: threading.ExceptHookArgs) -> None:
    sentence = None if arguments.exc_value is None else explain(arguments.exc_value)
    if sentence is None:
        threading.__excepthook__(arguments)
    else:
        print(f"fit3d: error in the background: {sentence}", file=sys.stderr)


def _print_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sentence = explain(error)
    if sentence is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"fit3d: error: {sentence}", file=sys.stderr)
        print("FIT3D_DEBUG=1 shows the traceback.", file=sys.stderr)


def _walk(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """An exception, what it was raised from, and what was being handled (True) at the time."""
    seen: set[int] = set()
    pending: list[tuple[BaseException | None, bool]] = [(error, False)]
    while pending:
        link, is_context = pending.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link, is_context
        pending += [(link.__cause__, is_context), (link.__context__, True)]


def _read_errno(error: BaseException) -> tuple[int | None, str]:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, str(error.filename or "")
    return None, ""


def _guess_errno(error: BaseException) -> tuple[int | None, str]:
    text = str(error)
    place = re.search(r'at path "([^"]+)"', text)
    path = place.group(1) if place else ""
    # Rust's standard library, for example in safetensors: "Disk quota exceeded (os error 122)".
    if match := re.search(r"\(os error (\d+)\)", text):
        return int(match.group(1)), path
    known = (number for number, row in _ERRORS.items() if row["texts"] and re.search(row["texts"], text))
    return next(known, None), path


def _as_sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?", "!")) else f"{text}."
