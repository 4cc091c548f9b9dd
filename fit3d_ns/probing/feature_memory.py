"""`FeatureMemory`: frozen features of pictures that are seen again and again, kept in half precision up to a budget.

A frozen backbone says the same about the same picture every time; so where augmentation has only a few variants (a
window, its mirror image), each is passed through the backbone once, and every epoch, seed and evaluation reads it here.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.probing.assembly import FrozenFeatures
from fit3d_ns.probing.frozen_backbones import FrozenBackbones

BYTES_PER_GB = 1e9
_FLOAT16_MAX = 6e4


@dataclass(frozen=True)
class Picture:
    """What is passed through the backbones, and what the head is to say about it."""

    image: Float[Tensor, "3 height width"]
    """In [0, 1]."""
    target: Shaped[Tensor, "*size"]
    """Labels or depth, as the loss or the metric wants them."""


@dataclass(frozen=True)
class RememberedFeatures:
    """Features of one picture with its target."""

    features: FrozenFeatures
    """A batch of one."""
    target: Shaped[Tensor, "*size"]
    """As in `Picture`."""


@dataclass
class FeatureMemory:
    """Keeps what fits; the rest is computed again whenever it is asked for."""

    backbones: FrozenBackbones
    """Compute what is not there."""
    budget_gb: float
    """Largest memory of kept features and targets, in 1e9 bytes."""
    _kept: dict[Hashable, RememberedFeatures] = field(default_factory=dict, repr=False)
    _num_bytes: int = field(default=0, repr=False)

    def fetch(self, keys: Sequence[Hashable], load_picture: Callable[[Hashable], Picture]) -> list[RememberedFeatures]:
        """Features of some pictures in the order of their keys.

        Args:
            keys: Names of the pictures; equal keys stand for equal pictures.
            load_picture: Called once for each key that is not there.
        """
        found = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        pictures = {key: load_picture(key) for key in missing}
        by_size: dict[torch.Size, list[Hashable]] = {}
        for key, picture in pictures.items():
            by_size.setdefault(picture.image.shape, []).append(key)
        for group in by_size.values():
            features = self.backbones(torch.stack([pictures[key].image for key in group]))
            for row, key in enumerate(group):
                found[key] = self._keep(key, _select_row(features, row), pictures[key].target)
        return [found[key] for key in keys]

    def _keep(self, key: Hashable, features: FrozenFeatures, target: Tensor) -> RememberedFeatures:
        is_large = features.maps.abs().max() > _FLOAT16_MAX
        small = RememberedFeatures(features.to("cpu", torch.float32 if is_large else torch.float16), target.cpu())
        size = count_bytes(small)
        if self._num_bytes + size <= self.budget_gb * BYTES_PER_GB:
            self._kept[key] = small
            self._num_bytes += size
        # What did not fit is returned as if it had been kept, so that figures do not depend on the budget.
        return small


def count_bytes(remembered: RememberedFeatures) -> int:
    """Memory of one entry."""
    tensors = (remembered.features.maps, remembered.features.class_tokens, remembered.target)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def stack_features(entries: Sequence[RememberedFeatures], fill: int | float = 0) -> tuple[FrozenFeatures, Tensor]:
    """A batch out of entries, whose pictures may have several sizes: smaller maps are continued right and below.

    Tokens at the edge are repeated, which is what bilinear upsampling reads beyond the edge anyway, so that a linear
    head says the same about each picture as if it were alone.

    Args:
        entries: What is stacked.
        fill: The target that does not count, for the places that are added.
    """
    sizes = [entry.features.maps.shape[3:5] for entry in entries]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    maps, targets = [], []
    for entry, size in zip(entries, sizes, strict=True):
        missing = height - size[0], width - size[1]
        maps.append(_repeat_edges(entry.features.maps, *missing) if any(missing) else entry.features.maps)
        target = entry.target
        if any(missing):
            # As many targets per token and axis as the others have.
            rows, columns = (target.shape[axis] // size[axis] * missing[axis] for axis in (0, 1))
            target = F.pad(target, (0, columns, 0, rows), value=fill)
        targets.append(target)
    class_tokens = torch.cat([entry.features.class_tokens for entry in entries])
    return FrozenFeatures(torch.cat(maps), class_tokens), torch.stack(targets)


def _repeat_edges(maps: Tensor, rows: int, columns: int) -> Tensor:
    # (b, parts, layers, h, w, e): the last row, then the last column.
    below = maps[:, :, :, -1:].expand(-1, -1, -1, rows, -1, -1)
    taller = torch.cat([maps, below], dim=3)
    return torch.cat([taller, taller[:, :, :, :, -1:].expand(-1, -1, -1, -1, columns, -1)], dim=4)


def _select_row(features: FrozenFeatures, row: int) -> FrozenFeatures:
    # Copies, because a slice would keep the whole batch alive.
    return FrozenFeatures(features.maps[row : row + 1].clone(), features.class_tokens[row : row + 1].clone())
