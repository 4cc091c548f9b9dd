"""`track_run`: where the curves of a run go while it lasts: TensorBoard's files, a run of wandb's, or both."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from fit3d_ns.finetuning.processes import Processes

PROJECT_NAME = "fit3d-finetune"
"""What trackers call the run's project."""


@contextmanager
def track_run(
    accelerator: Accelerator,
    processes: Processes,
    trackers: Sequence[str],
    output_folder: Path,
    settings: str,
    first_step: int,
) -> Iterator[None]:
    """Starts the trackers, and closes them at the end however it comes: only then are all curves written.

    Args:
        accelerator: Made for these trackers.
        trackers: `tensorboard`, `wandb`, or none at all.
        output_folder: Both write below it.
        settings: Of the run, as one text.
        first_step: Number of the first step that will be logged; later ones of an interrupted run are dropped.

    Raises:
        ValueError: wandb does not start, for example because nobody is logged in.
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
    problem, cause = "", None
    try:
        accelerator.init_trackers(
            PROJECT_NAME,
            config={"settings": settings},
            init_kwargs={name: options for name, options in choices.items() if name in trackers},
        )
    except Exception as error:
        # wandb's own errors, of many classes; they come in the main process alone.
        if "wandb" not in trackers:
            raise
        sentence = " ".join(str(error).split()).rstrip(".")
        problem, cause = (
            f"--trackers wandb does not start ({sentence}); log in with `wandb login`, set WANDB_MODE=offline to keep "
            "the curves on this machine, or leave it out.",
            error,
        )
    try:
        processes.agree(problem)
    except ValueError as error:
        raise error from cause
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
