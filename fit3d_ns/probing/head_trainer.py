"""`train_head`: trains a probe's head on any number of devices, and keeps the checkpoint that the selection rule takes.

The effective batch, its order and every loss are those of one process whatever the number of processes: losses come as
sums with counts, and both are summed over processes before they are divided.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fit3d_ns.probing.assembly import FrozenFeatures
from fit3d_ns.probing.batch_order import BatchOrder, Draw, check_batch
from fit3d_ns.probing.depth.losses import LossSum
from fit3d_ns.probing.schedules import Schedule, compute_one_cycle_momentum
from fit3d_ns.utils.progress import create_progress, notice

Selection = Literal["validation", "last", "test"]
"""Which checkpoint counts: the best on a validation part of the training data, the last, or the best on the test data
(what the public depth code does)."""


@dataclass(frozen=True)
class OptimizationConfig:
    """How a head is trained."""

    schedule: Schedule
    """Learning rate over the iterations."""
    batch_size: int
    """Images per iteration over all devices."""
    learning_rate: float
    """Peak learning rate, positive."""
    weight_decay: float
    """On all parameters."""
    max_gradient_norm: float | None = None
    """Gradients are scaled down to this norm."""
    has_one_cycle_momentum: bool = False
    """Adam's first beta follows mmcv's `OneCycle` instead of staying at 0.9."""
    images_per_group: int = 1
    """Images that share one loss value."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """SGD has momentum 0.9. Heads with a method `list_rates` say a factor of the learning rate for their parameters."""


@dataclass
class TrainedHead:
    """A head with the selected checkpoint's weights."""

    head: nn.Module
    """In evaluation mode."""
    iteration: int
    """Iterations after which the checkpoint was taken."""
    losses: list[float] = field(default_factory=list)
    """Loss at each iteration, over the whole batch."""
    scores: dict[int, float] = field(default_factory=dict)
    """Score by iteration, larger is better; empty for selection `last`."""


LoadBatch = Callable[[list[Draw], list[Draw]], tuple[FrozenFeatures, Tensor]]
"""Features and targets of some draws, on the training device; the second list is what will be asked for next."""
ComputeLoss = Callable[[Tensor, Tensor, int], LossSum]
"""Loss of (predictions, targets, iteration) on this process's share."""
ComputeScore = Callable[[nn.Module], float]
"""Score of a head on the selection data, larger is better; the same on every process."""


def train_head(
    head: nn.Module,
    num_samples: int,
    load_batch: LoadBatch,
    compute_loss: ComputeLoss,
    config: OptimizationConfig,
    *,
    accelerator: Any,
    seed: int,
    compute_score: ComputeScore | None = None,
    iterations_per_evaluation: int | None = None,
    title: str = "Training",
) -> TrainedHead:
    """Trains and selects.

    Args:
        head: Takes `FrozenFeatures`; changed in place.
        num_samples: Samples that `load_batch` can draw from.
        load_batch: As `LoadBatch`.
        compute_loss: As `ComputeLoss`.
        config: As above.
        accelerator: accelerate's; its processes share each batch.
        seed: Of the order of samples.
        compute_score: None keeps the last iteration's weights.
        iterations_per_evaluation: Iterations between scores; the last iteration is always scored.
        title: What the progress bar says.

    Raises:
        ValueError: The batch does not split over the processes, or the loss is not finite.
    """
    num_processes, process = accelerator.num_processes, accelerator.process_index
    check_batch(config.batch_size, num_processes, config.images_per_group)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    module, optimizer = accelerator.prepare(head, _create_optimizer(head, parameters, config))
    order = BatchOrder(num_samples, config.batch_size, seed)
    num_iterations = config.schedule.num_iterations
    result = TrainedHead(head, num_iterations)
    best: tuple[float, dict[str, Any]] | None = None
    with create_progress() as progress:
        task = progress.add_task(title, total=num_iterations, note="")
        for iteration in range(num_iterations):
            head.train()
            _set_rates(optimizer, config, iteration)
            upcoming = order.list_draws(iteration + 1, process, num_processes) if iteration + 1 < num_iterations else []
            features, targets = load_batch(order.list_draws(iteration, process, num_processes), upcoming)
            loss = compute_loss(module(features), targets, iteration)
            total = _sum_over_processes(torch.stack([loss.total.detach(), loss.count.detach()]), accelerator)
            _check_finite(total, iteration)
            # Gradients are averaged over processes; the factor turns the mean of sums into the sum.
            accelerator.backward(loss.total * num_processes / total[1].clamp_min(1e-12))
            if config.max_gradient_norm is not None:
                accelerator.clip_grad_norm_(parameters, config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            result.losses.append(float(total[0] / total[1].clamp_min(1e-12)))
            is_due = iterations_per_evaluation is not None and (iteration + 1) % iterations_per_evaluation == 0
            if compute_score is not None and (is_due or iteration + 1 == num_iterations):
                score = compute_score(head.eval())
                result.scores[iteration + 1] = score
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


def create_accelerator(device: str, precision: Literal["fp32", "bf16", "fp16"] = "fp32") -> Any:
    """accelerate's `Accelerator` on `auto`, `cpu` or `cuda`; under `accelerate launch` it joins the other processes.

    Raises:
        ValueError: `cuda` is asked for and there is none.
    """
    from accelerate import Accelerator

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA is asked for, but torch finds no CUDA device; use --device cpu or auto.")
    mixed_precision = "no" if precision == "fp32" else precision
    return Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(), mixed_precision=mixed_precision)


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


def _sum_over_processes(values: Tensor, accelerator: Any) -> Tensor:
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, reduction="sum")


def _check_finite(total: Tensor, iteration: int) -> None:
    if not torch.isfinite(total).all():
        raise ValueError(
            f"The loss is not finite at iteration {iteration + 1}; lower --learning-rate, or check the labels."
        )
