"""What the processes of one run tell each other, besides gradients: totals, wishes to stop, and what went wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from fit3d_ns.finetuning.optimization import Precision

TRACKER_FOLDER = "tensorboard"
"""Below the output folder."""
LONGEST_WAIT = timedelta(hours=24)
"""Processes wait for each other at most this long: the main one may validate many scenes meanwhile. One that died is
noticed sooner, by its closed connection or by the launcher."""
_BROKEN_CONNECTION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")


def create_accelerator(precision: Precision, device: str, trackers: tuple[str, ...], output_folder: Any) -> Accelerator:
    """The accelerator of this process.

    Args:
        precision: Of the backbone.
        device: `cuda` or `cpu`; accelerate picks the process's own card.
        trackers: Where curves go.
        output_folder: Where TensorBoard's files go.

    Raises:
        ValueError: CUDA is asked for and not there, half precision without it, or a tracker that is not installed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; use --device cpu.")
    if precision == "fp16" and device != "cuda":
        raise ValueError("--precision fp16 needs CUDA; use fp32 or bf16 on a CPU.")
    for tracker in trackers:
        # accelerate would leave it out in silence.
        if find_spec(tracker) is None:
            raise ValueError(f"--trackers {tracker}: it is not installed; install it with `pip install {tracker}`.")
    # accelerate keeps the precision of the first accelerator of a process for good; a second run may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(output_folder), logging_dir=str(Path(output_folder) / TRACKER_FOLDER)
        ),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        # Sums are normalised over a whole step here, so accelerate must not divide by anything.
        gradient_accumulation_steps=1,
    )


class Processes:
    """Small exchanges between the processes of an accelerator; each costs one round."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.number = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return self.accelerator.is_main_process

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all processes, in float64.

        Raises:
            ValueError: Another process died.
        """
        if self.number == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        with self.explain_deaths():
            dist.all_reduce(total)
        return [float(value) for value in total]

    def wait(self) -> None:
        """A barrier.

        Raises:
            ValueError: Another process died.
        """
        if self.number > 1:
            with self.explain_deaths():
                self.accelerator.wait_for_everyone()

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Lets the main process work while the others wait.

        Raises:
            ValueError: On every process, if the work raised one; or another process died.
        """
        problem, cause = "", None
        if self.is_main:
            try:
                work()
            except (ValueError, OSError) as error:
                problem, cause = str(error) or type(error).__name__, error
        try:
            self.agree(problem)
        except ValueError as error:
            raise error from cause

    @contextmanager
    def explain_deaths(self) -> Iterator[None]:
        """Says of a connection that broke inside the block that another process died.

        Raises:
            ValueError: It broke.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if self.number == 1 or not any(word in text for word in _BROKEN_CONNECTION):
                raise
            raise ValueError(
                f"Another process of this run died ({text.splitlines()[0]}); its own message says why. "
                "Run the same command again to go on from the last checkpoint."
            ) from error

    def close(self) -> None:
        """Takes leave of the others, once all are done."""
        self.wait()
        if self.number > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, problem: str) -> None:
        """Raises on every process if any has a problem, with the problem's sentence.

        Raises:
            ValueError: Some process named a problem, or died.
        """
        problems = [problem]
        if self.number > 1:
            problems = [""] * self.number
            with self.explain_deaths():
                dist.all_gather_object(problems, problem)
        for rank, text in enumerate(problems):
            if text:
                raise ValueError(text if self.number == 1 or rank == self.rank else f"Process {rank} failed: {text}")
