"""`TargetCache`: rendered targets kept for later epochs, in memory up to a budget and then on disk, in half precision.

A target's name hashes everything it depends on: the scene's content, the views and masks its features were averaged
over, the camera, the token grid, how tokens are read. A folder filled on one machine serves others that have no
rasterizer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.utils.tensor_store import TensorStore


@dataclass(frozen=True)
class StoredTarget:
    """What is kept of a target: the rendering, before mask and flip."""

    features: Float[Tensor, "h w embed"]
    """Rendered and decoded features, float16."""
    confidence: Float[Tensor, "h w"]
    """Weight of each token besides the mask, float16."""


class TargetCache:
    """Targets by name."""

    def __init__(self, memory_gb: float, folder: Path | None, *, keep_on_disk: bool = False):
        """Args:
        memory_gb: At most this many 1e9 bytes of targets stay in memory.
        folder: Where the others go; None renders them again each time.
        keep_on_disk: Write every target to the folder, for other runs to use.
        """
        self.store = TensorStore(memory_gb, folder, keep_on_disk=keep_on_disk)
        self.num_rendered = 0

    def load(self, name: str) -> StoredTarget | None:
        """The target, or None if it has to be rendered."""
        tensors = self.store.load(name)
        return None if tensors is None else StoredTarget(tensors["features"], tensors["confidence"])

    def save(self, name: str, target: StoredTarget) -> None:
        """Keeps a target that was just rendered.

        Raises:
            ValueError: The disk is full.
        """
        self.num_rendered += 1
        self.store.save(name, {"features": target.features, "confidence": target.confidence})


def store_target(features: Float[Tensor, "h w embed"], confidence: Float[Tensor, "h w"]) -> StoredTarget:
    """Rounds a rendering to half precision, on the CPU.

    Raises:
        ValueError: A feature is NaN or beyond half precision.
    """
    stored = features.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError("rendered features are NaN, infinite or beyond half precision; lift the scene anew")
    return StoredTarget(stored, confidence.detach().to("cpu", torch.float16))
