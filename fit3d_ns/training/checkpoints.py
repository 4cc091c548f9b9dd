"""Checkpoints of a training: one folder per step, complete or absent.

    CHECKPOINTS / step-00000500 / state.pt          parameters, optimizer, scaler, averages, losses
                                  rng-0.pt ...      random generators, one file per process
                                  progress.json     step, processes, batch size, settings, format

Older checkpoints are removed once a newer one is safe. So a full disk or a kill at any moment leaves a complete one,
and if another program damaged the newest, the run continues from the one before.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.training.processes import Processes
from fit3d_ns.utils.errors import first_line
from fit3d_ns.utils.files import read_json, remove, write_atomically, write_json
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.results import flatten
from fit3d_ns.utils.selection import capture_random_states, restore_random_states
from fit3d_ns.utils.tensor_files import load_torch_file, save_torch_file

FORMAT_VERSION = 1
_PREFIX = "step-"


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


class DamagedCheckpointError(ValueError):
    """A checkpoint that cannot be read; one before it may be whole."""


class CheckpointFolder:
    """The checkpoints of one run; the `keep` newest stay."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._damaged: set[int] = set()

    def find_steps(self) -> list[int]:
        """Steps of the checkpoints that are not known to be damaged, ascending."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*") if (path / "progress.json").is_file()]
        steps = {int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit()}
        return sorted(steps - self._damaged)

    def get_path(self, step: int) -> Path:
        return self.folder / f"{_PREFIX}{step:08d}"

    def save(self, progress: CheckpointProgress, state: dict[str, Any], processes: Processes) -> None:
        """Writes a checkpoint; called by all processes, of which the first writes.

        The state consists of tensors, numbers and strings in dictionaries and lists. Where it cannot be written, all
        processes raise ValueError, and earlier checkpoints are untouched.
        """
        # A run that was stopped right after it resumed has nothing new to say.
        if progress.step in self.find_steps():
            return
        random_states = processes.gather(capture_random_states())

        def write() -> None:
            with write_atomically(self.get_path(progress.step)) as temporary:
                temporary.mkdir()
                for rank, random_state in enumerate(random_states):
                    save_torch_file(random_state, temporary / f"rng-{rank}.pt")
                save_torch_file(state, temporary / "state.pt")
                write_json(temporary / "progress.json", asdict(progress))
            self._damaged.discard(progress.step)
            self._remove_older()

        processes.run_on_main(write)

    def load_newest(self, processes: Processes) -> tuple[CheckpointProgress, dict[str, Any]] | None:
        """Reads the newest checkpoint that all processes can read; None where there is none at all.

        ValueError where all are damaged, or the newest is of a newer version.
        """
        problem = ""
        for step in reversed(self.find_steps()):
            found, problem = None, ""
            try:
                found = self.load(step, processes.rank)
            except DamagedCheckpointError as error:
                problem = str(error)
            problem = next(filter(None, processes.gather(problem)), "")
            if not problem:
                if processes.is_main:
                    self._remove_older()
                return found
            self._damaged.add(step)
            if processes.is_main:
                notice(f"{problem} Trying the one before.")
        if problem:
            raise ValueError(f"{problem} There is none before it; start over with --resume never.")
        return None

    def _remove_older(self) -> None:
        for step in self.find_steps()[: -self.keep]:
            remove(self.get_path(step))

    def load(self, step: int, rank: int = 0) -> tuple[CheckpointProgress, dict[str, Any]]:
        """Reads a checkpoint and sets this process's random generators.

        DamagedCheckpointError where it cannot be read, ValueError where it is of a newer version.
        """
        path = self.get_path(step)
        try:
            content = read_json(path / "progress.json")
            if not (is_newer := content.get("format_version", 0) > FORMAT_VERSION):
                progress = CheckpointProgress(**content)
                state = load_torch_file(path / "state.pt")
                restore_random_states(load_torch_file(path / f"rng-{rank}.pt"))
        except Exception as error:
            raise DamagedCheckpointError(f"Checkpoint {path} cannot be read ({first_line(error)}).") from error
        if is_newer:
            raise ValueError(f"Checkpoint {path} is of a newer version; update fit3d-ns.")
        return progress, state


def check_resumable(found: CheckpointProgress, wanted: CheckpointProgress, path: Path) -> None:
    """Refuses other processes or settings than those the checkpoint was made with; the ValueError names both values."""
    before, now = (flatten({"num_processes": side.num_processes, **side.settings}) for side in (found, wanted))
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if differences := [f"{name} {before.get(name)} against {now.get(name)}" for name in differing]:
        raise ValueError(
            f"Checkpoint {path} was made with other settings: {'; '.join(differences[:5])} (checkpoint against now); "
            "resume with the same, or start over with --resume never."
        )
