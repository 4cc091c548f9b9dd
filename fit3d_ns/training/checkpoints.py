"""Checkpoints of a training: one folder per step, whole or not there.

    CHECKPOINTS / step-00000500 / state.pt          parameters, optimizer, scaler, averages, losses
                                  rng-0.pt ...      random generators, one file per process
                                  progress.json     step, processes, batch size, settings, format

A checkpoint is written to `step-N.tmp/`, every file is flushed to disk, and only then does the folder get its name.
Older ones are removed after that. So a full disk or a kill at any moment leaves the previous checkpoint whole.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.training.processes import Processes
from fit3d_ns.utils.errors import first_line, is_disk_full
from fit3d_ns.utils.files import flush_to_disk, read_json, remove, write_json
from fit3d_ns.utils.seeds import capture_random_states, restore_random_states

FORMAT_VERSION = 1
_PREFIX = "step-"
_TEMPORARY = ".tmp"


@dataclass(frozen=True)
class CheckpointProgress:
    """Where a run stood."""

    step: int
    num_processes: int
    batch_size: int
    """Images per process and batch."""
    accumulation_steps: int
    seconds: float
    """Time trained so far, over all runs."""
    settings: dict[str, Any]
    """Everything else that decides the weights; compared when resuming."""
    format_version: int = FORMAT_VERSION


class CheckpointFolder:
    """The checkpoints of one run; the `keep` newest stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def find_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*") if (path / "progress.json").is_file()]
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())

    def get_path(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.folder / f"{_PREFIX}{step:08d}"

    def save(self, progress: CheckpointProgress, state: dict[str, Any], processes: Processes) -> None:
        """Writes a checkpoint; called by all processes, of which the first writes the shared part.

        The state consists of tensors, numbers and strings in dictionaries and lists. Where the disk is full, all
        processes raise ValueError, and earlier checkpoints are untouched.
        """
        final, is_first = self.get_path(progress.step), processes.rank == 0
        if progress.step in self.find_steps():
            # A run that was stopped right after it resumed has nothing new to say.
            return
        temporary = final.with_name(final.name + _TEMPORARY)
        problem = ""
        if is_first:
            # What a kill left half-written, at whatever step.
            for stale in self.folder.glob(f"{_PREFIX}*{_TEMPORARY}"):
                remove(stale)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = _describe(error, temporary)
        processes.agree(problem)
        try:
            _save_tensors(capture_random_states(), temporary / f"rng-{processes.rank}.pt")
            if is_first:
                _save_tensors(state, temporary / "state.pt")
                write_json(temporary / "progress.json", asdict(progress))
        except (OSError, RuntimeError, ValueError) as error:
            problem = _describe(error, temporary)
        try:
            processes.agree(problem)
        except ValueError:
            if is_first:
                remove(temporary)
            raise
        if is_first:
            flush_to_disk(temporary)
            os.replace(temporary, final)
            flush_to_disk(self.folder)
            for step in self.find_steps()[: -self.keep]:
                remove(self.get_path(step))
        processes.wait()

    def load(self, step: int, rank: int = 0) -> tuple[CheckpointProgress, dict[str, Any]]:
        """Reads a checkpoint and sets this process's random generators; ValueError if it is damaged or too new."""
        path = self.get_path(step)
        content = read_json(path / "progress.json")
        if content.get("format_version", 0) > FORMAT_VERSION:
            raise ValueError(f"Checkpoint {path} is of a newer version; update fit3d-ns.")
        try:
            progress = CheckpointProgress(**content)
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            restore_random_states(torch.load(path / f"rng-{rank}.pt", map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(
                f"Checkpoint {path} cannot be read ({first_line(error)}); remove the folder to go on from the "
                "one before."
            ) from error
        return progress, state


def check_resumable(found: CheckpointProgress, wanted: CheckpointProgress, path: Path) -> None:
    """Refuses other processes or settings than those the checkpoint was made with; the ValueError names both values."""
    before, now = ({"num_processes": side.num_processes, **side.settings} for side in (found, wanted))
    if differences := _compare(before, now, ""):
        raise ValueError(
            f"Checkpoint {path} was made with other settings: {'; '.join(differences[:5])} (checkpoint against now); "
            "resume with the same, or start over with --resume never."
        )


def _compare(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [line for key in keys for line in _compare(found.get(key), wanted.get(key), f"{name}.{key}".strip("."))]
    return [] if found == wanted else [f"{name} {found} against {wanted}"]


def _describe(error: Exception, path: Path) -> str:
    if is_disk_full(error):
        return f"No space left for the checkpoint {path}; free some disk space and run the same command again."
    return f"The checkpoint {path} cannot be written ({first_line(error)})."


def _save_tensors(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)
    flush_to_disk(path)
