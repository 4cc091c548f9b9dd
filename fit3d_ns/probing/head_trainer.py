"""`train_head`: trains a probe's head on any number of devices, and keeps the checkpoint that the selection rule takes.

The effective batch, its order and every loss are those of one process whatever the number of processes: losses come as
sums with counts, and both are summed over processes before they are divided.

Schedules have the formulas of mmcv, which the public code uses; t counts iterations from 0 to T - 1. Poly:
1 - t / T. Cosine: m + (1 - m) (1 + cos(pi t / T)) / 2. Linear warm-up over W iterations multiplies the schedule by
1 - (1 - t / W) (1 - r), from the ratio r on.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.samples import Batch, check_batch
from fit3d_ns.utils.progress import create_progress, notice


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate at each iteration."""

    kind: Literal["poly", "cosine"]
    num_iterations: int
    """T, at least 1."""
    num_warmup_iterations: int = 0
    """W; 0 for none."""
    warmup_ratio: float = 1e-6
    """r, the factor at the first iteration."""
    min_ratio: float = 0.0
    """m, the factor at the end of `cosine`."""

    def compute_factor(self, iteration: int) -> float:
        progress = iteration / self.num_iterations
        factor = 1.0 - progress
        if self.kind == "cosine":
            factor = self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
        if iteration < self.num_warmup_iterations:
            factor *= 1.0 - (1.0 - iteration / self.num_warmup_iterations) * (1.0 - self.warmup_ratio)
        return factor


@dataclass(frozen=True)
class OptimizationConfig:
    """How a head is trained; a batch is spread over all devices, and the schedule scales the peak learning rate."""

    schedule: Schedule
    batch_size: int
    learning_rate: float
    weight_decay: float
    max_gradient_norm: float | None = None
    """Gradients are scaled down to this norm."""
    has_one_cycle_momentum: bool = False
    """Adam's first beta follows mmcv's `OneCycle` instead of staying at 0.9."""
    images_per_group: int = 1
    """Images that share one loss value."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """SGD has momentum 0.9. A head's `list_rates`, if it has one, groups its parameters with factors of the rate."""


@dataclass(frozen=True)
class LossSum:
    """A loss before it is normalised over all processes: a sum with gradient, and how much was counted."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]


@dataclass
class TrainedHead:
    """A head in evaluation mode with the weights of a checkpoint, and what its training and measurement gave."""

    head: nn.Module
    iteration: int
    """Iterations after which the checkpoint was taken."""
    losses: list[float] = field(default_factory=list)
    """Loss at each iteration, over the whole batch."""
    scores: dict[int, float] = field(default_factory=dict)
    """Score by iteration, larger is better; empty for selection `last`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)
    """What else was chosen on the selection data, for the record."""

    def summarise_losses(self) -> tuple[float, float]:
        """Mean loss of the first and of the last tenth of the iterations."""
        tenth = max(len(self.losses) // 10, 1)
        return sum(self.losses[:tenth]) / tenth, sum(self.losses[-tenth:]) / tenth


def train_head(
    head: nn.Module,
    batches: Iterator[Batch],
    compute_loss: Callable[[Tensor, Tensor, int], LossSum],
    config: OptimizationConfig,
    *,
    accelerator: Any,
    compute_score: Callable[[nn.Module], float] | None = None,
    iterations_per_evaluation: int = 1,
    title: str = "Training",
) -> TrainedHead:
    """Trains a head of `FrozenFeatures` in place, and selects.

    `batches` are this process's share of every iteration's batch, `compute_loss` takes predictions, targets and
    iteration. `compute_score` measures the head on the selection data, larger is better, the same on every process; the
    last iteration is always scored, and without scores its weights are kept. ValueError if the batch does not split
    over the processes, or the loss is not finite.
    """
    num_processes = accelerator.num_processes
    check_batch(config.batch_size, num_processes, config.images_per_group)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    module, optimizer = accelerator.prepare(head, _create_optimizer(head, parameters, config))
    num_iterations = config.schedule.num_iterations
    result = TrainedHead(head, num_iterations)
    best: tuple[float, dict[str, Any]] | None = None
    with create_progress() as progress:
        task = progress.add_task(title, total=num_iterations, note="")
        for iteration in range(num_iterations):
            head.train()
            _set_rates(optimizer, config, iteration)
            features, targets = next(batches)
            predictions = module(features.to(accelerator.device))
            loss = compute_loss(predictions, targets.to(accelerator.device), iteration)
            total = sum_over_processes(torch.stack([loss.total.detach(), loss.count.detach()]), accelerator)
            if not torch.isfinite(total).all():
                problem = f"The loss is not finite at iteration {iteration + 1}"
                raise ValueError(f"{problem}; lower --learning-rate, or check the labels.")
            # Gradients are averaged over processes; the factor turns the mean of sums into the sum.
            accelerator.backward(loss.total * num_processes / total[1].clamp_min(1e-12))
            if config.max_gradient_norm is not None:
                accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            result.losses.append(float(total[0] / total[1].clamp_min(1e-12)))
            is_due = (iteration + 1) % iterations_per_evaluation == 0 or iteration + 1 == num_iterations
            if compute_score is not None and is_due:
                score = result.scores[iteration + 1] = compute_score(head.eval())
                if best is None or score > best[0]:
                    best = (score, copy.deepcopy(head.state_dict()))
                    result.iteration = iteration + 1
            progress.update(task, advance=1, note=f"loss {result.losses[-1]:.4f}")
    if progress.disable:
        notice(f"{title}: {num_iterations} iterations, loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}")
    if best is not None:
        head.load_state_dict(best[1])
    head.eval()
    return result


def sum_over_processes(values: Tensor, accelerator: Any) -> Tensor:
    """The sum, in every process, of what each of them has; on the device of `values`."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").to(values.device)


def compute_one_cycle_momentum(iteration: int, num_iterations: int) -> float:
    """Momentum (Adam's first beta) of mmcv's `OneCycle` policy: from 0.95 to 0.85 and back, by cosines."""
    turn, end = 0.3 * num_iterations - 1, num_iterations - 1
    phase = iteration / turn if iteration <= turn else 1.0 + (iteration - turn) / (end - turn)
    return 0.9 + 0.05 * math.cos(math.pi * phase)


def _create_optimizer(head: nn.Module, parameters: list[nn.Parameter], config: OptimizationConfig) -> Any:
    list_rates = getattr(head, "list_rates", None)
    rates = [(parameters, 1.0)] if list_rates is None else list_rates()
    # `factor` is ours; torch keeps unknown keys of a group.
    groups = [{"params": members, "factor": factor} for members, factor in rates]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def _set_rates(optimizer: Any, config: OptimizationConfig, iteration: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["factor"] * config.learning_rate * config.schedule.compute_factor(iteration)
        if config.has_one_cycle_momentum:
            momentum = compute_one_cycle_momentum(iteration, config.schedule.num_iterations)
            group["betas"] = (momentum, group["betas"][1])
