"""Which folders a scene file may take photographs from: its own, the one that is named, and those confirmed once.

A scene file names the folder of its photographs itself, and photographs end up in pictures that people publish; so a
file from somebody else must not choose the folder. Lifting or exporting a scene names the capture, which confirms its
root for this user on this machine. For any other root the user is asked, or the message names the flag that allows it.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from fit3d_ns.utils.files import read_json, write_json
from fit3d_ns.utils.progress import notice

MAX_ROOTS = 1000
"""Confirmed roots that are remembered; the oldest are forgotten."""
MAX_NOTICES = 3
"""Roots that one process names before it stops naming them."""
_said: list[Path] = []


def confirm_root(root: Path) -> None:
    """Remembers that this user reads photographs below `root`; where nothing can be remembered, nothing happens."""
    root = root.resolve()
    roots = [known for known in _read_roots() if known != root]
    with suppress(OSError, ValueError):
        write_json(_get_path(), {"roots": [str(known) for known in [*roots[-MAX_ROOTS + 1 :], root]]})


def check_root(root: Path, scene_file: Path) -> None:
    """Lets photographs below `root` be read for a scene file, and says so.

    ValueError where the root is neither below the file's folder nor confirmed, and nobody can be asked.
    """
    resolved = root.resolve()
    own = scene_file.resolve().parent
    if not (_is_below(resolved, own) or any(_is_below(resolved, known) for known in _read_roots())):
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


def _is_below(path: Path, folder: Path) -> bool:
    # A file at the top of the file system would otherwise allow all of it.
    return path.is_relative_to(folder) and folder != Path(folder.anchor)


def _read_roots() -> list[Path]:
    with suppress(ValueError, TypeError, KeyError, OSError):
        return [Path(root) for root in read_json(_get_path())["roots"]]
    return []


def _get_path() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fit3d_ns" / "photograph_roots.json"
