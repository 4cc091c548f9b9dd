"""Which folders a scene file may take photographs from: its own, the one that is named, and those confirmed once.

A scene file names the folder of its photographs itself, and photographs end up in pictures that people publish; so a
file from somebody else must not choose the folder. Lifting or exporting a scene names the capture, which confirms its
root for this user on this machine. For any other root the user is asked, or the message names the flag that allows it.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from fit3d_ns.utils.files import hash_bytes, read_json
from fit3d_ns.utils.progress import notice

MAX_NOTICES = 3
"""Roots that one process names before it stops naming them."""
_said: list[Path] = []


def confirm_root(root: Path) -> None:
    """Remembers that this user reads photographs below `root`; where nothing can be remembered, nothing happens."""
    record = _locate_record(root.resolve())
    with suppress(OSError, ValueError):
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{root.resolve()}\n", encoding="utf-8")


def check_root(root: Path, scene_file: Path) -> None:
    """Lets photographs below `root` be read for a scene file, and says so.

    ValueError where the root is neither below the file's folder nor confirmed, and nobody can be asked.
    """
    resolved = root.resolve()
    # Without the top of the file system, which would allow all of it.
    above = (resolved, *resolved.parents)[:-1]
    if not (scene_file.resolve().parent in above or _is_confirmed(above)):
        _ask(root, scene_file)
    if resolved not in _said:
        _said.append(resolved)
        if len(_said) <= MAX_NOTICES:
            notice(f"Photographs of {scene_file.name} are read below {root}.")


def _ask(root: Path, scene_file: Path) -> None:
    question = f"{scene_file} takes photographs from {root}, which is outside its own folder"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        print(f"{question}. Read them, now and in future? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            confirm_root(root)
            return
    raise ValueError(f"{question} and was not confirmed on this machine; if that is right, add --data-root {root}.")


def _is_confirmed(folders: tuple[Path, ...]) -> bool:
    # A file for each root, so that tasks which lift side by side all leave theirs; one JSON file held all before.
    with suppress(OSError):
        if any(_locate_record(folder).is_file() for folder in folders):
            return True
    with suppress(ValueError, TypeError, KeyError, OSError):
        return any(Path(known) in folders for known in read_json(_get_folder().with_suffix(".json"))["roots"])
    return False


def _locate_record(root: Path) -> Path:
    return _get_folder() / hash_bytes(str(root))


def _get_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fit3d_ns" / "photograph_roots"
