"""`TargetCache`: rendered targets kept for later epochs, in memory up to a budget and then on disk, in half precision.

A target's name hashes everything it depends on (the scene's content, the camera, the token grid, how tokens are read),
so a file is right or damaged, never out of date. A folder filled on one machine serves others that have no rasterizer.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class StoredTarget:
    """What is kept of a target: the rendering, before mask and flip."""

    features: Float[Tensor, "h w embed"]
    """Rendered and decoded features, float16."""
    confidence: Float[Tensor, "h w"]
    """Weight of each token besides the mask, float16."""

    @property
    def num_bytes(self) -> int:
        """Size in memory and, nearly, on disk."""
        return 2 * (self.features.numel() + self.confidence.numel())


class TargetCache:
    """Targets by name."""

    def __init__(self, memory_gb: float, folder: Path | None, *, keep_on_disk: bool = False):
        """Args:
        memory_gb: At most this many 1e9 bytes of targets stay in memory.
        folder: Where the others go; None renders them again each time.
        keep_on_disk: Write every target to the folder, for other runs to use.
        """
        self.folder = folder
        self.keep_on_disk = keep_on_disk and folder is not None
        self.num_rendered = 0
        self._bytes_left = int(memory_gb * 1e9)
        self._kept: dict[str, StoredTarget] = {}

    def load(self, name: str) -> StoredTarget | None:
        """The target, or None if it has to be rendered."""
        if name in self._kept:
            return self._kept[name]
        path = self._get_path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                target = StoredTarget(file.get_tensor("features"), file.get_tensor("confidence"))
        except (SafetensorError, OSError) as error:
            notice(f"Cached target {path} is damaged ({str(error).splitlines()[0]}); rendering it again.")
            return None
        # Mapped pages are the system's to drop; what fits the budget is copied and stays.
        if target.num_bytes <= self._bytes_left:
            target = StoredTarget(target.features.clone(), target.confidence.clone())
            self._keep(name, target)
        return target

    def save(self, name: str, target: StoredTarget) -> None:
        """Keeps a target that was just rendered.

        Raises:
            ValueError: The disk is full.
        """
        self.num_rendered += 1
        fits = target.num_bytes <= self._bytes_left
        if fits:
            self._keep(name, target)
        path = self._get_path(name)
        if path is not None and (self.keep_on_disk or not fits):
            with write_atomically(path) as temporary:
                tensors = {"features": target.features.contiguous(), "confidence": target.confidence.contiguous()}
                save_file(tensors, temporary)

    def _keep(self, name: str, target: StoredTarget) -> None:
        self._bytes_left -= target.num_bytes
        self._kept[name] = target

    def _get_path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name[:2] / f"{name}.safetensors"


def store_target(features: Float[Tensor, "h w embed"], confidence: Float[Tensor, "h w"]) -> StoredTarget:
    """Rounds a rendering to half precision, on the CPU.

    Raises:
        ValueError: A feature is NaN or beyond half precision.
    """
    stored = features.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(stored).all()):
        raise ValueError("rendered features are NaN, infinite or beyond half precision; lift the scene anew")
    return StoredTarget(stored, confidence.detach().to("cpu", torch.float16))
