"""What the processes of one run tell each other, besides gradients: totals, wishes to stop, and what went wrong."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fit3d_ns.finetuning.optimization import Precision


def create_accelerator(precision: Precision, device: str, trackers: tuple[str, ...], output_folder: Any) -> Accelerator:
    """The accelerator of this process.

    Args:
        precision: Of the backbone.
        device: `cuda` or `cpu`; accelerate picks the process's own card.
        trackers: Where curves go.
        output_folder: Where TensorBoard's files go.

    Raises:
        ValueError: CUDA is asked for and not there, or half precision without it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; use --device cpu.")
    if precision == "fp16" and device != "cuda":
        raise ValueError("--precision fp16 needs CUDA; use fp32 or bf16 on a CPU.")
    # accelerate keeps the precision of the first accelerator of a process for good; a second run may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(trackers) or None,
        project_dir=str(output_folder),
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
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise ValueError(
                f"Another process of this run died ({str(error).splitlines()[0]}); its own message says why. "
                "Run the same command again to go on from the last checkpoint."
            ) from error
        return [float(value) for value in total]

    def wait(self) -> None:
        """A barrier."""
        if self.number > 1:
            self.accelerator.wait_for_everyone()

    def agree(self, problem: str) -> None:
        """Raises on every process if any has a problem, with the problem's sentence.

        Raises:
            ValueError: Some process named a problem.
        """
        problems = [problem]
        if self.number > 1:
            problems = [""] * self.number
            dist.all_gather_object(problems, problem)
        for rank, text in enumerate(problems):
            if text:
                raise ValueError(text if self.number == 1 or rank == self.rank else f"Process {rank} failed: {text}")
