"""`FinetuneTrainer`: the training loop of stage II (paper, section 3.2, Algorithm 1).

Each step draws images, renders what their tokens should be, and moves the backbone towards that. What a step does is a
function of the weights, the optimizer's state and the step's number: there is no sampler, loader or augmentation state,
so a run that was killed goes on to the same weights.
"""

import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.features import TokenModel
from fit3d_ns.finetuning.config import FinetuneConfig
from fit3d_ns.finetuning.draws import Draw, DrawSequence, Sample
from fit3d_ns.finetuning.optimization import TrainedBackbone, copy_original
from fit3d_ns.finetuning.photographs import Photographs
from fit3d_ns.finetuning.targets import TargetRenderer
from fit3d_ns.finetuning.train_step import Batch, Group, TrainStep, create_batch, sum_totals
from fit3d_ns.training.checkpoints import CheckpointFolder, CheckpointProgress, check_resumable
from fit3d_ns.training.processes import Processes
from fit3d_ns.utils.device import choose_num_workers, fast_matmul
from fit3d_ns.utils.progress import PhaseTimer, create_progress, notice
from fit3d_ns.utils.selection import list_positions, load_ahead
from fit3d_ns.utils.stopping import StopRequest

Validate = Callable[[TokenModel, int], dict[str, float]]
"""Takes the backbone and the step; returns curves that are logged."""
NUM_NOTICES = 10
"""Lines about the loss in a run without a terminal."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run at a step boundary, after a checkpoint."""


class FinetuneTrainer:
    """Trains one backbone on the scenes of one bank."""

    def __init__(
        self,
        token_model: TokenModel,
        targets: TargetRenderer,
        config: FinetuneConfig,
        processes: Processes,
        output_folder: Path,
        inputs: dict[str, Any],
        validate: Validate | None = None,
        timer: PhaseTimer | None = None,
    ):
        """Freezes what is not trained, wraps the backbone, and goes on from a checkpoint where there is one.

        Args:
            token_model: The original backbone; it is trained in place.
            inputs: Backbone, scenes and photographs by their hashes, as plain JSON values; a checkpoint of others is
                refused with a ValueError.
            validate: Called by the main process every `steps_per_validation` steps.
            timer: Gets the seconds of `load`, `target`, `forward_backward` and `optimizer`.
        """
        self.targets, self.config, self.processes = targets, config, processes
        self.bank, self.views, self.accelerator = targets.bank, targets.views, processes.accelerator
        self.output_folder, self.validate, self._inputs = output_folder, validate, inputs
        # Feature loss of each step so far, those before a resume included, and the time without validation.
        self.losses: list[float] = []
        self.seconds = 0.0
        self.timer = timer or PhaseTimer()
        self.step = 0
        optimization, anchors = config.optimization, config.anchors
        self.sequence = DrawSequence(self.views.views_per_scene, config.sampling)
        self.num_steps = optimization.count_steps(self.sequence.num_images, processes.number)
        # Of one optimizer step, over all processes.
        self.images_per_step = optimization.batch_size * optimization.accumulation_steps * processes.number
        self.steps_per_epoch = max(self.sequence.num_images // self.images_per_step, 1)
        device = self.accelerator.device
        first = next(view for views in self.views.views for view in views)
        self.photographs = Photographs(anchors, (first.width, first.height), config.sampling.seed)
        if anchors.photographs:
            self._inputs = {**inputs, "photographs": self.photographs.hash}
        original = (targets.original or copy_original(token_model)).to(device) if anchors.needs_original else None
        geometry_weight = config.targets.geometry_weight
        token_model, has_geometry = token_model.to(device), geometry_weight > 0
        self.backbone = TrainedBackbone(token_model, original, config.trainable, anchors, optimization, has_geometry)
        self.bare = self.backbone.bare
        self.checkpoints = CheckpointFolder(output_folder / "checkpoints", config.run.keep_checkpoints)
        scaler_state = self._resume()
        # After a state was loaded, because DDP copies what it is given.
        self.backbone.module, self.backbone.optimizer = self.accelerator.prepare(self.bare, self.backbone.optimizer)
        if scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler_state)
        self.train_step = TrainStep(
            self.backbone, anchors, geometry_weight, optimization.clip_norm, processes, self.timer, output_folder
        )

    def summarise_losses(self) -> tuple[float | None, float | None]:
        """Mean loss of the first and of the last quarter of the steps (1 to 100 steps); single steps are noisy."""
        if not self.losses:
            return None, None
        number = min(max(len(self.losses) // 4, 1), 100)
        return sum(self.losses[:number]) / number, sum(self.losses[-number:]) / number

    def run(self) -> None:
        """Trains to the last step, or to a checkpoint and `Interrupted` where a signal came.

        ValueError where an image cannot be read, a loss is not finite, or the disk is full.
        """
        self.bare.train()
        steps_per_notice = max(self.num_steps // NUM_NOTICES, 1)
        with StopRequest() as stop, create_progress() as progress:
            task = progress.add_task("Fine-tuning", total=self.num_steps, completed=self.step, note="")
            if not self.processes.is_main:
                progress.stop()
            for result, wishes in self._iterate(stop):
                speed = self.step * self.images_per_step / max(self.seconds, 1e-9)
                note = f"loss {result['loss']:.4f}  {speed:.1f} images/s"
                progress.update(task, completed=self.step, note=note)
                is_last = self.step == self.num_steps
                if progress.disable and self.processes.is_main and (self.step % steps_per_notice == 0 or is_last):
                    notice(f"Fine-tuning: step {self.step} of {self.num_steps}, {note}")
                self._log(result)
                if wishes or is_last or self.step % self.config.run.steps_per_checkpoint == 0:
                    self._save_or_go_on(is_last and not wishes)
                if wishes:
                    raise Interrupted(f"stopped at step {self.step} of {self.num_steps}; the same command goes on")
                every = self.config.run.steps_per_validation
                if self.validate is not None and every and self.step % every == 0 and not is_last:
                    self._validate(self.validate)
        self.bare.eval()

    def _save_or_go_on(self, is_last: bool) -> None:
        """A disk that is too full for the last checkpoint may have room for the weights, which are a third of it."""
        try:
            self.save_checkpoint()
        except OSError as error:
            if not (is_last and self.processes.number == 1 and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise
            notice(f"The disk is too full for the last checkpoint ({error.filename}); the weights come next.")

    def save_checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        state = {
            **self.backbone.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        self.checkpoints.save(self.describe_progress(), state, self.processes)

    def _iterate(self, stop: StopRequest) -> Iterator[tuple[dict[str, float], bool]]:
        """Does the steps; yields each one's result, and whether any process wishes to stop."""
        optimization, run = self.config.optimization, self.config.run
        depth = max(2 * optimization.batch_size * optimization.accumulation_steps, 8)
        num_workers = choose_num_workers(self.accelerator.device) if run.num_workers is None else run.num_workers
        samples = load_ahead(self._draw(), self._load, num_workers, max(depth, 2 * num_workers))
        try:
            while self.step < self.num_steps:
                start = time.perf_counter()
                batches, problem = self._collect(samples)
                totals, wishes = sum_totals(batches, self.processes, stop.is_requested, problem)
                rate = optimization.compute_learning_rate(self.step, self.num_steps, self.steps_per_epoch)
                self.backbone.set_learning_rate(rate)
                with self.processes.explain_deaths(), fast_matmul(self.accelerator.device, optimization.tf32):
                    result = self.train_step.run(batches, totals, self.step)
                self.backbone.update_averages()
                self.step += 1
                self.losses.append(result["loss"])
                self.seconds += time.perf_counter() - start
                # Several processes learn of each other's wishes where the next step begins; one alone need not wait.
                yield result, wishes or (self.processes.number == 1 and stop.is_requested)
        finally:
            samples.close()  # type: ignore[attr-defined]

    def _collect(self, samples: Iterator[tuple[Sample, Tensor]]) -> tuple[list[Batch], str]:
        """This process's batches of the next step, or the problem that kept it from them."""
        optimization = self.config.optimization
        batches = []
        try:
            for _ in range(optimization.accumulation_steps):
                with self.timer.phase("load"):
                    loaded = list(islice(samples, optimization.batch_size))
                with self.timer.phase("target"):
                    rendered = [self.targets.render(sample) for sample, _ in loaded]
                    batches.append(create_batch([sample for sample, _ in loaded], rendered, self.accelerator.device))
                    if any(len(photographs) for _, photographs in loaded):
                        images = torch.cat([photographs for _, photographs in loaded]).to(self.accelerator.device)
                        batches[-1].append(Group([], images, images[:, 0, :0, :0], images[:, 0, 0, :0]))
        except (ValueError, OSError) as error:
            return [], str(error) or type(error).__name__
        return batches, ""

    def _load(self, place: tuple[int, Draw]) -> tuple[Sample, Tensor]:
        """A draw, and the photographs that join it."""
        config, patch_size, (position, draw) = self.config, self.bare.token_model.description.patch_size, place
        rule = self.targets.rules[draw.scene]
        sample = self.views.load_sample(draw, config.augmentation, patch_size, config.sampling.seed, rule)
        return sample, self.photographs.load(position)

    def _draw(self) -> Iterator[tuple[int, Draw]]:
        """This process's positions and draws from the present step on; scenes are announced before they are read."""
        optimization, announced = self.config.optimization, -1
        size, share = optimization.batch_size, (self.processes.rank, self.processes.number)
        for step in range(self.step, self.num_steps):
            for position in list_positions(step, size, *share, optimization.accumulation_steps):
                draw = self.sequence[position]
                if draw.scene != announced:
                    self.bank.announce(draw.scene)
                    announced = draw.scene
                yield position, draw

    def _resume(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint if the configuration wants it; returns the scaler's state."""
        kind = self.config.run.resume
        self.processes.wait()
        if kind == "never":
            if self.processes.is_main:
                shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
            self.processes.wait()
            return None
        found = self.checkpoints.load_newest(self.processes)
        if found is None and kind == "require":
            raise ValueError(f"There is no checkpoint in {self.checkpoints.folder} to resume; use --resume auto.")
        if found is None:
            return None
        progress, state = found
        path = self.checkpoints.get_path(progress.step)
        for name, now in self._inputs.items():  # Earlier versions lack the hashes after a dash.
            if re.sub(r"-\w+", "", repr(now)) == repr(progress.settings.get(name)):
                progress.settings[name] = now
        check_resumable(progress, self.describe_progress(), path)
        if progress.step > self.num_steps:
            problem = f"Checkpoint {path} has {progress.step} steps, this run ends at {self.num_steps}"
            raise ValueError(f"{problem}; raise --max-steps or start over with --resume never.")
        self.backbone.load_state_dict(state)
        self.step = progress.step
        self.losses, self.seconds = state["losses"].tolist(), progress.seconds
        if self.processes.is_main:
            notice(f"Resuming from step {self.step} of {self.num_steps} ({path}).")
        return state["scaler"]

    def describe_progress(self) -> CheckpointProgress:
        """The progress that a checkpoint records now; all but `step` and `seconds` decides the weights."""
        optimization = self.config.optimization
        return CheckpointProgress(
            step=self.step,
            num_processes=self.processes.number,
            batch_size=optimization.batch_size,
            accumulation_steps=optimization.accumulation_steps,
            seconds=self.seconds,
            settings={**self.config.decisive, **self._inputs},
        )

    def _validate(self, validate: Validate) -> None:
        self.backbone.swap_averages()
        self.bare.eval()
        model, step = self.bare.token_model, self.step
        self.processes.run_on_main(lambda: self.accelerator.log(validate(model, step), step=step))
        self.bare.train()
        self.backbone.swap_averages()

    def _log(self, result: dict[str, float]) -> None:
        values = {**result, "learning_rate": self.backbone.optimizer.param_groups[0]["lr"]}
        anchors = self.config.anchors
        if not (anchors.needs_original or anchors.l2_sp or self.config.targets.geometry_weight):
            del values["anchor_loss"]
        self.accelerator.log(values, step=self.step)
