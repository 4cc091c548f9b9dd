"""Files that are never half-written, and names made from what they hold."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from fit3d_ns.utils.errors import is_disk_full


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`; what was written there takes the name `path` when the block ends well.

    The data is on disk before the name changes, so after a crash `path` holds either the old content or the new.

    Args:
        path: The final file. Its folder is made if it is missing.

    Raises:
        ValueError: The disk is full; nothing remains of the attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # Some libraries make files that only their owner may read; these become like any other file.
        with suppress(PermissionError):
            # Not every file system (FAT, some network shares) has permissions to give.
            os.chmod(temporary, 0o666 & ~_get_umask())
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise ValueError(f"No space left for {path}; free some disk space or choose another folder.") from error
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` atomically as indented JSON; NaN and infinities become null, which every reader accepts."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: The file is missing or is not JSON; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"No such file: {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore the file or make it again.") from error


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_bytes(*chunks: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the chunks, each preceded by its length."""
    digest = hashlib.sha256()
    for chunk in chunks:
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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


@lru_cache(maxsize=1)
def _get_umask() -> int:
    # There is no way to ask for it without setting it; once is enough.
    mask = os.umask(0)
    os.umask(mask)
    return mask
