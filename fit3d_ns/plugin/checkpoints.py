"""Checkpoints that survive: written whole or not at all, with all that a run needs to go on as if never stopped.

Besides nerfstudio's keys (`step pipeline optimizers schedulers scalers`) a checkpoint has `fit3d`: random states, the
order of the data, the strategy's statistics and the lift's by-products. Only tensors, ints, floats, strings and
containers of them, because `torch.load` refuses everything else.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import load_torch_file, save_torch_file

CHECKPOINT_PATTERN = re.compile(r"step-(\d{9})\.ckpt")


def save_checkpoint_file(state: dict[str, Any], path: Path, keep_older: bool = False) -> None:
    """Writes a checkpoint whole or not at all.

    nerfstudio reads a step number out of every name in the checkpoint folder, so nothing else may ever lie there:
    the temporary name is in the folder above. The other checkpoints are deleted once this one is safe, unless
    `keep_older`; ValueError where it cannot be written, and the previous one stays whole.
    """
    with write_atomically(path, beside=path.parent) as temporary:
        save_torch_file(state, temporary)
    if not keep_older:
        remove_other_checkpoints(path, newer=True)


def remove_other_checkpoints(path: Path, newer: bool = False) -> None:
    """Removes those of lower steps next to a checkpoint, which a kill may have left there, or also those of higher."""
    for other in path.parent.iterdir():
        if CHECKPOINT_PATTERN.fullmatch(other.name) and (other.name < path.name or newer and other.name != path.name):
            other.unlink()


def load_checkpoint_file(path: Path) -> dict[str, Any]:
    """Reads one checkpoint; ValueError where the file is missing, cut short, or not a checkpoint."""
    if not path.is_file():
        raise ValueError(f"No checkpoint {path}; check --load-dir, --load-step and --load-checkpoint.")
    try:
        # nerfstudio's own checkpoints hold numpy numbers, which are let through by name: that of the function that
        # pickles them, whose module moved in numpy 2, and files of either version are read.
        scalar: Any = np.float64(0.0).__reduce__()[0]
        names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
        with torch.serialization.safe_globals([scalar, *names, np.dtype, type(np.dtype("float64"))]):
            state = load_torch_file(path)
    except Exception as error:
        raise ValueError(f"Checkpoint {path} cannot be read ({first_line(error)}); it may be cut short.") from error
    missing = [key for key in ("step", "pipeline", "optimizers") if key not in state]
    if missing:
        raise ValueError(f"{path} is not a nerfstudio checkpoint: it has no {', '.join(missing)}.")
    return state


def load_latest_checkpoint(folder: Path, step: int | None = None) -> tuple[dict[str, Any], Path]:
    """Reads the checkpoint of `step`, or the newest one that is whole; damaged newer ones are named and passed over.

    `folder` is a checkpoint folder (`nerfstudio_models`) or the run folder above it; ValueError where there is no
    readable checkpoint.
    """
    if not folder.is_dir():
        raise ValueError(f"No checkpoint folder {folder}; check the path, or whether the run ever saved one.")
    if not any(folder.glob("*.ckpt")) and (folder / "nerfstudio_models").is_dir():
        folder = folder / "nerfstudio_models"
    if step is not None:
        path = folder / f"step-{step:09d}.ckpt"
        return load_checkpoint_file(path), path
    for path in sorted((path for path in folder.iterdir() if CHECKPOINT_PATTERN.fullmatch(path.name)), reverse=True):
        try:
            return load_checkpoint_file(path), path
        except ValueError as error:
            notice(f"{error} Trying the one before.")
    raise ValueError(f"No readable checkpoint in {folder}; train the run again.")


def make_plain(value: Any) -> Any:
    """Numpy scalars become Python's, everywhere inside dicts, lists and tuples; tensors stay."""
    if isinstance(value, dict):
        return {key: make_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(make_plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    return value
