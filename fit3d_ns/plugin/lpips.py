"""`LazyLPIPS`: the perceptual metric where its weights are at hand, without a download and outside the state dict."""

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.utils.progress import notice

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
"""Name under which torch's hub cache keeps torchvision's AlexNet."""


class LazyLPIPS:
    """LPIPS (AlexNet), built on first use; says once why it is missing where it is. No module: nothing is saved."""

    def __init__(self, mode: Literal["auto", "off"]) -> None:
        self.mode = mode
        self._metric: Any = None
        self._said = False

    def compute(
        self, truth: Float[Tensor, "1 3 height width"], prediction: Float[Tensor, "1 3 height width"]
    ) -> float | None:
        """LPIPS of two images in [0, 1], or None where it is off or its weights are not at hand."""
        if self.mode == "off":
            return None
        weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
        if not weights.is_file():
            if not self._said:
                notice(f"LPIPS is left out: torch's hub cache has no {ALEXNET_FILE} (torchvision's AlexNet).")
                self._said = True
            return None
        if self._metric is None:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self._metric = LearnedPerceptualImagePatchSimilarity(normalize=True).to(truth.device)
        return float(self._metric(truth.clamp(0, 1), prediction.clamp(0, 1)))
