"""Files that are never half-written, folders that one process works in, and hashes of contents."""

import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import psutil

from fit3d_ns.utils.errors import explain, find_errno, first_line

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Process numbers mean something on their own machine only."""

_NUMBERS = itertools.count()
_OWN: set[str] = set()
"""Temporary names that this process is writing to; several threads may write at once."""
_LFS_MARK = b"version https://git-lfs"

_MAX_NAME = 200
"""File systems allow 255 bytes for a name."""


@contextmanager
def write_atomically(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path next to `path`; what was written there takes the name `path` when the block ends well.

    The data is on disk before the name changes, so after a crash `path` holds either the old content or the new. A
    symbolic link stays one: what it points to is replaced. What dead processes left beside it is removed. The block may
    make a folder instead of a file; missing folders above are made. With `beside`, a path on the same disk, temporary
    names go into the folder of that instead.

    Raises:
        ValueError: It cannot be written; the sentence names `path`, and nothing remains of the attempt.
    """
    path = Path(os.path.realpath(path))
    temporary = (beside or path).with_name(_name_temporary(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(temporary.parent)
        _OWN.add(temporary.name)
        yield temporary
        for inner in sorted(temporary.rglob("*"), reverse=True):
            flush_to_disk(inner)
        flush_to_disk(temporary)
        if temporary.is_file():
            # Some libraries make files that only their owner may read; these become like any other file.
            with suppress(PermissionError):
                # Not every file system (FAT, some network shares) has permissions to give.
                os.chmod(temporary, 0o666 & ~_get_umask())
        _replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException as error:
        remove(temporary)
        number, named = find_errno(error)
        is_ours = isinstance(error, Exception) and number is not None and not isinstance(error, ValueError)
        # What the block reads has troubles of its own, which are not about `path`.
        if is_ours and (not named or named.startswith(str(path.parent))):
            raise ValueError(f"{path} cannot be written: {explain(error)}") from error
        raise
    finally:
        _OWN.discard(temporary.name)


def sweep_temporaries(folder: Path) -> None:
    """Removes temporary files and folders in `folder` whose writers are no longer alive on this machine."""
    for stale in folder.glob(f"*.{_HOST}.*-*.tmp"):
        process = stale.name.split(".")[-2].split("-")[0]
        # This process's own number came round again, unless the name is one that it writes to itself.
        is_over = process.isdigit() and (int(process) == os.getpid() or not psutil.pid_exists(int(process)))
        if is_over and stale.name not in _OWN:
            remove(stale)


@contextmanager
def make_temporary_folder(folder: Path, name: str) -> Iterator[Path]:
    """A folder that only this user may enter, gone when the block ends; after a kill, a later call sweeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(folder)
    made = Path(tempfile.mkdtemp(prefix=f"{name}.{_HOST}.{os.getpid()}-", suffix=".tmp", dir=folder))
    _OWN.add(made.name)
    try:
        yield made
    finally:
        remove(made)
        _OWN.discard(made.name)


def remove(path: Path) -> None:
    """Removes a file or a whole folder; nothing happens where there is none, or where it cannot be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of an output folder while the block runs, ValueError if one is at work there already.

    The system frees the folder when a process dies.
    """
    with lock_file(folder / ".lock", f"in {folder}; wait for it, or choose another folder"):
        yield


@contextmanager
def lock_file(path: Path, where: str) -> Iterator[TextIO]:
    """A file to append to that one process has at a time; ValueError says where another is at work already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"Another process works {where}.") from error
        except OSError:
            # Some network file systems have no locks; what is written there is whole all the same.
            pass
        yield file


@contextmanager
def wait_for_folder(folder: Path) -> Iterator[None]:
    """Around a block that reads a file of a folder and writes it again: other processes wait for its end."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically as indented JSON; NaN and infinities become null, which every reader accepts."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def refuse_lfs_pointer(path: Path) -> None:
    """Raises ValueError for the note that Git leaves where a large file was not fetched."""
    with open(path, "rb") as file:
        if file.read(len(_LFS_MARK)) == _LFS_MARK:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")


def read_json(path: Path) -> Any:
    """Reads a JSON file; a ValueError names one that is missing or is not JSON."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No such file: {path}.")
    refuse_lfs_pointer(path)
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, source: str) -> Any:
    """Parses JSON that errors call `source`; ValueError where it is none."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise ValueError(f"{source} is not valid JSON ({reason}); restore the file or make it again.") from error


def hash_bytes(*chunks: bytes | str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the chunks, text in UTF-8, each preceded by its length."""
    digest = hashlib.sha256()
    for chunk in chunks:
        # Names of files may hold bytes that are no text.
        chunk = chunk.encode("utf-8", "surrogatepass") if isinstance(chunk, str) else chunk
        digest.update(len(chunk).to_bytes(8, "little"))
        digest.update(chunk)
    return digest.hexdigest()[:16]


def hash_file(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _replace(temporary: Path, path: Path) -> None:
    """Gives a file or folder its name; a folder that has the name leaves when the new one is there."""
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    old = path.with_name(_name_temporary(path.name))
    _OWN.add(old.name)
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    finally:
        _OWN.discard(old.name)
    remove(old)


def _name_temporary(name: str) -> str:
    """`.NAME.HOST.PID-N.tmp`: a later writer of the same file sees whether this one is still alive."""
    return f".{name[:_MAX_NAME]}.{_HOST}.{os.getpid()}-{next(_NUMBERS)}.tmp"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@lru_cache(maxsize=1)
def _get_umask() -> int:
    # There is no way to ask for it without setting it; once is enough.
    mask = os.umask(0)
    os.umask(mask)
    return mask
