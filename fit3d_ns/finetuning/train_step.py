"""One optimizer step: batches of all processes in, one loss normalised over all of them, one update out.

Totals of the weights are known before the first forward pass, because targets do not depend on the backbone. So each
batch's loss is divided by the global total right away, and gradients add up to those of one large batch; DDP averages
over processes, hence the factor of their number.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.finetuning.draws import Sample
from fit3d_ns.finetuning.losses import SMALLEST_WEIGHT, StepTotals, compute_l1_sum, compute_l2_sp, compute_token_anchors
from fit3d_ns.finetuning.optimization import AnchorConfig, TrainedBackbone, compute_outputs
from fit3d_ns.finetuning.targets import Target
from fit3d_ns.training.processes import Processes
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import PhaseTimer
from fit3d_ns.utils.tensor_files import save_tensors

SMALLEST_SCALE = 2.0**-20
"""The loss scale of fp16 below which a gradient that still overflows is not finite by itself."""


@dataclass(frozen=True)
class Group:
    """Images of one size in [0, 1], what their tokens should be (float32), and how much each token counts; with a
    geometry head, what it should read."""

    samples: list[Sample]
    """None of photographs beside the scenes, which have empty targets and weights as well."""
    images: Float[Tensor, "batch 3 height width"]
    targets: Float[Tensor, "batch patches embed"]
    weights: Float[Tensor, "batch patches"]
    geometry: Float[Tensor, "batch patches 4"] | None = None


Batch = list[Group]
"""What goes through the backbone at once: one group per image size, in order of first appearance."""


def create_batch(samples: Sequence[Sample], targets: Sequence[Target], device: torch.device) -> Batch:
    """Stacks samples of equal size."""
    by_size: dict[tuple[int, ...], list[tuple[Sample, Target]]] = {}
    for sample, target in zip(samples, targets, strict=True):
        by_size.setdefault(tuple(sample.image.shape), []).append((sample, target))
    groups = []
    for pairs in by_size.values():
        images = torch.stack([sample.image for sample, _ in pairs]).to(device, non_blocking=True)
        # (b, h, w, e) -> (b, h*w, e)
        features = torch.stack([target.features for _, target in pairs]).flatten(1, 2).to(device)
        weights = torch.stack([target.weights for _, target in pairs]).flatten(1, 2).to(device)
        maps = [target.geometry for _, target in pairs if target.geometry is not None]
        geometry = torch.stack(maps).flatten(1, 2).to(device) if maps else None
        groups.append(Group([sample for sample, _ in pairs], images, features, weights, geometry))
    return groups


@dataclass
class TrainStep:
    """Does one step at a time, with gradients scaled down to `clip_norm`; evidence of a failure goes to `folder`."""

    backbone: TrainedBackbone
    anchors: AnchorConfig
    geometry_weight: float
    clip_norm: float
    processes: Processes
    timer: PhaseTimer
    folder: Path

    def run(self, batches: Sequence[Batch], totals: StepTotals, step: int) -> dict[str, float]:
        """Forward, backward and update for this process's batches; returns what was found, over all processes.

        `loss` is the masked L1 per channel, `anchor_loss` weighted anchors and geometry; `gradient_norm` is unclipped.

        ValueError on every process where the loss or gradient of any is not finite; no weight has moved then.
        """
        with self.timer.phase("forward_backward"):
            loss, anchor_loss = self._accumulate(batches, totals, step)
        with self.timer.phase("optimizer"):
            norm = self.processes.accelerator.clip_grad_norm_(self.backbone.parameters, self.clip_norm)
            scaler = self.processes.accelerator.scaler
            # A scaled fp16 gradient may overflow; then the scaler skips this step and lowers its scale.
            if scaler is None and not bool(torch.isfinite(norm)):
                self._stop("gradient", step, batches[-1])
            self.backbone.optimizer.step()
            if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
                self._stop("gradient", step, batches[-1])
            self.backbone.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, "anchor_loss": anchor_loss, "gradient_norm": float(norm)}

    def _accumulate(self, batches: Sequence[Batch], totals: StepTotals, step: int) -> tuple[float, float]:
        """Forward and backward of all batches; returns feature loss and anchors, over all processes."""
        losses = anchored = 0.0
        broken: tuple[Batch, list[Tensor]] | tuple[()] = ()
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.processes.accelerator.no_sync(self.backbone.module):
                loss, anchor, tokens = self._compute_losses(batch, totals)
                total = loss + anchor
                if is_last and self.backbone.original_weights:
                    # On every process alike, so averaging over them leaves it as it is.
                    pull = compute_l2_sp(self.backbone.bare, self.backbone.original_weights, self.anchors.l2_sp)
                    anchored += float(pull.detach()) / self.processes.number
                    total = total + pull / self.processes.number
                self.processes.accelerator.backward(total * self.processes.number)
            # One transfer, after all work is under way: on a GPU each of them waits for everything before it.
            values = torch.stack([loss.detach(), anchor.detach()]).tolist()
            if not math.isfinite(sum(values)):
                broken = broken or (batch, tokens)
            losses, anchored = losses + values[0], anchored + values[1]
        loss_sum, anchor_sum, num_broken = self.processes.sum([losses, anchored, float(bool(broken))])
        if num_broken > 0:
            self._stop("loss", step, *broken)
        return loss_sum, anchor_sum

    def _compute_losses(self, batch: Batch, totals: StepTotals) -> tuple[Tensor, Tensor, list[Tensor]]:
        original = self.backbone.original
        outputs = self.backbone.module([group.images for group in batch])
        sums, anchored, tokens = [], [], []
        for group, output in zip(batch, outputs, strict=True):
            tokens.append(output.patch_tokens.detach())
            if original is not None and (self.anchors.holds_tokens or not group.samples):
                with torch.no_grad(), self.processes.accelerator.autocast():
                    reference = compute_outputs(original, group.images)
                if not group.samples:
                    ones = torch.ones_like(reference.patch_tokens[..., 0])
                    kept = compute_l1_sum(output.patch_tokens, reference.patch_tokens, ones).sum()
                    anchored.append(kept / totals.num_tokens)
                    continue
                of_tokens = output, reference, group.targets, group.weights
                anchored.append(compute_token_anchors(*of_tokens, self.anchors, totals, original.model.norm))
            sums.append(compute_l1_sum(output.patch_tokens, group.targets, group.weights).sum())
            if output.geometry is not None and group.geometry is not None:
                lost = compute_l1_sum(output.geometry, group.geometry, group.weights).sum()
                anchored.append(self.geometry_weight * lost / totals.weight)
        loss = torch.stack(sums).sum() / totals.weight
        return loss, torch.stack(anchored).sum() if anchored else loss.new_zeros(()), tokens

    def _stop(self, what: str, step: int, batch: Batch | None = None, tokens: Sequence[Tensor] = ()) -> None:
        """Raises on every process, with the views of the process that has them; it also keeps what explains them."""
        self.backbone.optimizer.zero_grad(set_to_none=True)
        names = "" if batch is None else ", ".join(sample.name for sample in find_broken(batch, tokens))
        try:
            self.processes.agree(f"The {what} is not finite for {names}" if names else "")
        except ValueError as error:
            kept = ""
            if batch is not None:
                path = self.folder / f"not-finite-{self.processes.rank}.safetensors"
                rate = self.backbone.optimizer.param_groups[0]["lr"]
                save_evidence(path, batch, tokens, {"step": step, "learning_rate": rate, "error": str(error)})
                kept = f"; its images, targets and tokens are in {path}"
            raise ValueError(
                f"{error} at step {step}{kept}; look at that scene's features, lower --learning-rate, or use fp32."
            ) from error


def find_broken(batch: Batch, tokens: Sequence[Tensor]) -> list[Sample]:
    """The samples whose own loss is not finite; all of them where none stands out (gradients, anchors)."""
    broken = [
        sample
        for group, own in zip(batch, tokens, strict=False)
        if group.samples
        for sample, loss in zip(group.samples, compute_l1_sum(own, group.targets, group.weights), strict=True)
        if not bool(torch.isfinite(loss))
    ]
    return broken or [sample for group in batch for sample in group.samples]


def save_evidence(path: Path, batch: Batch, tokens: Sequence[Tensor], facts: dict[str, Any]) -> None:
    """Writes what explains a loss that is not finite: images, targets, weights and tokens, and the views' names."""
    tensors = {f"tokens.{index}": own for index, own in enumerate(tokens)}
    for index, group in enumerate(batch):
        tensors |= {f"{name}.{index}": getattr(group, name) for name in ("images", "targets", "weights")}
    save_tensors(path, tensors)
    broken = {sample.name for sample in find_broken(batch, tokens)}
    views = [
        {"scene": one.scene_id, "view": one.view.name, "flip": one.augmentation.flip, "broken": one.name in broken}
        for group in batch
        for one in group.samples
    ]
    write_json(path.with_suffix(".json"), {**facts, "views": views})


def sum_totals(batches: Sequence[Batch], processes: Processes, stop: bool, problem: str) -> tuple[StepTotals, bool]:
    """Totals over all processes, and whether any process wishes to stop after this step.

    What keeps this process from its batches (`problem`, "" if nothing does) raises ValueError on every process.
    """
    # Summed batch by batch: the order decides the last bit.
    sums = [sum(float(group.weights.sum(dtype=torch.float64)) for group in batch) for batch in batches]
    groups = [group for batch in batches for group in batch if group.samples]
    num_tokens, num_images = sum(group.weights.numel() for group in groups), sum(len(group.images) for group in groups)
    local = [float(value) for value in (sum(sums), num_tokens, num_images, stop, bool(problem))]
    *totals, wishes, problems = processes.sum(local)
    if problems > 0:
        processes.agree(problem)
    return StepTotals(max(totals[0], SMALLEST_WEIGHT), *totals[1:]), wishes > 0
