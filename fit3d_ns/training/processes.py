"""The processes of a training: the device and arithmetic that each has, where curves go, and what they tell each other.

Besides gradients these are totals, requests to stop, and what went wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, gather_object

from fit3d_ns.utils.device import DeviceChoice, choose_device
from fit3d_ns.utils.errors import explain

Value = TypeVar("Value")

_BROKEN_CONNECTION = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Socket")


class Processes:
    """Exchanges between the processes of an accelerator, one round each; ValueError where another process died."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank = accelerator.process_index
        self.number = accelerator.num_processes
        self.is_main = accelerator.is_main_process

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
        with self.explain_deaths():
            return gather_object([value])

    def wait(self) -> None:
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


Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of what is trained; losses and weights are always float32."""
LONGEST_WAIT = timedelta(hours=24)
"""Processes wait for each other at most this long: the main one may validate many scenes meanwhile. One that died is
noticed sooner, by its closed connection or by the launcher."""


def create_accelerator(
    device: DeviceChoice, precision: Precision = "fp32", trackers: Sequence[str] = (), output_folder: Path | None = None
) -> Accelerator:
    """The accelerator of this process; under `accelerate launch` or torchrun it joins the other processes.

    With `cuda`, accelerate picks the process's own card. TensorBoard's files go below the output folder. ValueError
    where CUDA is asked for and not there, for fp16 without it, and for a tracker that is not installed.
    """
    chosen = choose_device(device).type
    if precision == "fp16" and chosen != "cuda":
        raise ValueError("--precision fp16 needs CUDA; use fp32 or bf16 on a CPU.")
    for tracker in trackers:
        # accelerate would leave it out in silence.
        if find_spec(tracker) is None:
            raise ValueError(f"--trackers {tracker}: it is not installed; install it with `pip install {tracker}`.")
    # accelerate keeps the precision of a process's first accelerator for good; a second run may want another.
    AcceleratorState._reset_state()
    project = output_folder and ProjectConfiguration(str(output_folder), str(output_folder / "tensorboard"))
    return Accelerator(
        cpu=chosen == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=list(trackers) or None,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        # Sums are normalised over a whole step by us, so accelerate must not divide by anything.
        gradient_accumulation_steps=1,
    )


@contextmanager
def track_run(
    processes: Processes, trackers: Sequence[str], output_folder: Path, settings: str, first_step: int
) -> Iterator[None]:
    """Starts the accelerator's trackers, and closes them however the block ends: only then are all curves written.

    Curves of an interrupted run are dropped from `first_step` on. ValueError where wandb does not start.
    """
    if not trackers:
        yield
        return
    # wandb writes elsewhere, without a word, where it is given a folder that does not exist.
    output_folder.mkdir(parents=True, exist_ok=True)
    choices = {
        "tensorboard": {"purge_step": first_step},
        "wandb": {"dir": str(output_folder), "name": output_folder.absolute().name},
    }
    options = {name: choice for name, choice in choices.items() if name in trackers}
    problem, cause = "", None
    try:
        processes.accelerator.init_trackers("fit3d-finetune", config={"settings": settings}, init_kwargs=options)
    except Exception as error:
        # wandb's own errors, of many classes; they come in the main process alone.
        if "wandb" not in trackers:
            raise
        sentence = " ".join(str(error).split()).rstrip(".")
        problem = (
            f"--trackers wandb does not start ({sentence}); log in with `wandb login`, set WANDB_MODE=offline to keep "
            "the curves on this machine, or leave it out."
        )
        cause = error
    processes.agree(problem, cause)
    try:
        yield
    finally:
        for tracker in processes.accelerator.trackers:
            tracker.finish()
