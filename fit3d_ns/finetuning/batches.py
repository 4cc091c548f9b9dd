"""`Batch`: samples with their targets on the device, grouped by size, because images of several sizes do not stack."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.finetuning.targets import Target
from fit3d_ns.finetuning.training_views import Sample


@dataclass(frozen=True)
class Group:
    """Images of one size."""

    samples: list[Sample]
    """Where they come from, in order."""
    images: Float[Tensor, "batch 3 height width"]
    """What the backbone sees, in [0, 1]."""
    targets: Float[Tensor, "batch patches embed"]
    """What their tokens should be, float32."""
    weights: Float[Tensor, "batch patches"]
    """How much each token counts."""


@dataclass(frozen=True)
class Batch:
    """What goes through the backbone at once."""

    groups: list[Group]
    """One per image size, in order of first appearance."""

    @property
    def weight(self) -> float:
        """Sum of all weights."""
        return sum(float(group.weights.sum(dtype=torch.float64)) for group in self.groups)

    @property
    def num_tokens(self) -> int:
        """Patch tokens."""
        return sum(group.weights.numel() for group in self.groups)

    @property
    def num_images(self) -> int:
        """Images."""
        return sum(len(group.samples) for group in self.groups)

    @property
    def samples(self) -> Iterator[Sample]:
        """All samples, group by group."""
        return (sample for group in self.groups for sample in group.samples)


def create_batch(samples: Sequence[Sample], targets: Sequence[Target], device: torch.device) -> Batch:
    """Stacks samples of equal size."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_size.setdefault(tuple(sample.image.shape), []).append(index)
    groups = []
    for indices in by_size.values():
        images = torch.stack([samples[index].image for index in indices])
        groups.append(
            Group(
                samples=[samples[index] for index in indices],
                images=images.to(device, non_blocking=True),
                # (b, h, w, e) -> (b, h*w, e)
                targets=torch.stack([targets[index].features for index in indices]).flatten(1, 2).to(device),
                weights=torch.stack([targets[index].weights for index in indices]).flatten(1, 2).to(device),
            )
        )
    return Batch(groups)
