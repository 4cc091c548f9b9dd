"""How weights move: AdamW, the learning rate as a function of the step, and the moving average of weights."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fit3d_ns.training.accelerator import Precision


@dataclass(frozen=True)
class OptimizationConfig:
    """How long and how fast to train."""

    learning_rate: float = 1e-5
    """Step size of AdamW, above 0 (public code: 1e-5)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay on all trained parameters, 0 and above (public code: 1e-4)."""
    clip_norm: float = 0.1
    """Gradients are scaled down to this norm, above 0 (public code: 0.1)."""
    batch_size: int = 2
    """Images per process and batch, 1 and above (public code: 2)."""
    accumulation_steps: int = 1
    """Batches per optimizer step, 1 and above."""
    epochs: float | None = None
    """Passes over all images, above 0 (public code: 1). None: one, or as many as make `min_steps`."""
    min_steps: int = 400
    """Without `epochs` and `max_steps`, few images are shown repeatedly for at least this many optimizer steps."""
    max_steps: int | None = None
    """Exact number of optimizer steps, 1 and above; wins over `epochs`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant (public code), or falling to 0 like half a cosine."""
    warmup_fraction: float = 0.0
    """Share of all steps in which the learning rate rises linearly from 0; 0 to below 1."""
    ema_decay: float = 0.0
    """Above 0, the result is the moving average of weights with this decay per step; below 1."""
    precision: Precision = "fp32"
    """Arithmetic of the backbone; targets, loss and weights are always float32. fp16 needs CUDA."""
    compile: bool = False
    """Compile the backbone with torch.compile."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not self.clip_norm > 0 or self.weight_decay < 0:
            raise ValueError("learning_rate and clip_norm must be above 0, weight_decay 0 or above.")
        if self.batch_size < 1 or self.accumulation_steps < 1 or self.min_steps < 1:
            raise ValueError("batch_size, accumulation_steps and min_steps must be at least 1.")
        if (self.max_steps is not None and self.max_steps < 1) or (self.epochs is not None and not self.epochs > 0):
            raise ValueError("max_steps must be at least 1 and epochs above 0.")
        if not 0.0 <= self.warmup_fraction < 1.0 or not 0.0 <= self.ema_decay < 1.0:
            raise ValueError("warmup_fraction and ema_decay must be in [0, 1).")

    def count_steps(self, num_images: int, num_processes: int) -> int:
        """Optimizer steps of a whole run; the last images that fill no step are left out (public code: drop_last).

        Raises:
            ValueError: One epoch is asked for and has fewer images than one step.
        """
        if self.max_steps is not None:
            return self.max_steps
        per_step = self.batch_size * self.accumulation_steps * num_processes
        if self.epochs is None:
            return max(num_images // per_step, self.min_steps)
        steps = int(self.epochs * num_images) // per_step
        if steps < 1:
            raise ValueError(
                f"{self.epochs:g} epochs of {num_images} images make no step of {per_step} images; raise --epochs, or "
                "lower --batch-size or --accumulation-steps."
            )
        return steps

    def compute_learning_rate(self, step: int, num_steps: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        warmup = math.ceil(self.warmup_fraction * num_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - warmup) / max(num_steps - warmup, 1)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def create_optimizer(parameters: Iterable[nn.Parameter], config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW over all given parameters alike (public code: norms, biases and embeddings decay too)."""
    return torch.optim.AdamW(list(parameters), lr=config.learning_rate, weight_decay=config.weight_decay)


class MovingAverage:
    """Exponential moving average of a module's trainable parameters, float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().float().clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's present weights in."""
        parameters = dict(module.named_parameters())
        for name, average in self.averages.items():
            average.lerp_(parameters[name].detach().float(), 1.0 - self.decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges weights and averages; a second call undoes it."""
        parameters = dict(module.named_parameters())
        for name, average in self.averages.items():
            weights = parameters[name].detach().clone()
            parameters[name].copy_(average)
            average.copy_(weights)
