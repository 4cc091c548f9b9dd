"""What the processes of one run tell each other, besides gradients: totals, requests to stop, and what went wrong."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from fit3d_ns.utils.errors import explain

Value = TypeVar("Value")

_BROKEN_CONNECTION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")


class Processes:
    """Exchanges between the processes of an accelerator, one round each; ValueError where another process died."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.number = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """True in the process that writes files."""
        return self.accelerator.is_main_process

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if self.number == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        with self.explain_deaths():
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        values = [value] * self.number
        if self.number > 1:
            with self.explain_deaths():
                dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """A barrier."""
        if self.number > 1:
            with self.explain_deaths():
                self.accelerator.wait_for_everyone()

    def run_on_main(self, work: Callable[[], None]) -> None:
        """Lets the main process work while the others wait; what goes wrong raises ValueError on every process."""
        problem, cause = "", None
        if self.is_main:
            try:
                work()
            except (ValueError, OSError) as error:
                problem, cause = explain(error) or type(error).__name__, error
        self.agree(problem, cause)

    def agree(self, problem: str, cause: BaseException | None = None) -> None:
        """Called by every process with its problem, "" for none; all raise ValueError with any that there is."""
        for rank, text in enumerate(self.gather(problem)):
            if text:
                sentence = text if self.number == 1 or rank == self.rank else f"Process {rank} failed: {text}"
                raise ValueError(sentence) from cause

    @contextmanager
    def explain_deaths(self) -> Iterator[None]:
        """Turns a connection that breaks inside the block into a ValueError that says that another process died."""
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
        """Waits for all processes, then destroys the process group."""
        self.wait()
        if self.number > 1 and dist.is_initialized():
            dist.destroy_process_group()
