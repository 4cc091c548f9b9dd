"""Depth as an expectation over uniform bins with linear normalisation (paper section 3.3, AdaBins)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

NUM_BINS = 256
"""Paper section 3.3."""
SHARE_OF_EACH_BIN = 0.1
"""Added to each rectified logit before normalising, so that no bin is ever empty (DINOv2's evaluation)."""

BinNormalization = Literal["linear", "softmax"]


class DepthBins(nn.Module):
    """Logits over bins to depth in metres."""

    centers: Tensor

    def __init__(
        self,
        min_depth: float,
        max_depth: float,
        num_bins: int = NUM_BINS,
        normalization: BinNormalization = "linear",
    ) -> None:
        super().__init__()
        self.normalization: BinNormalization = normalization
        self.register_buffer("centers", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return len(self.centers)

    def forward(self, logits: Float[Tensor, "batch bins height width"]) -> Float[Tensor, "batch height width"]:
        """The expected depth, between the range's ends."""
        if self.normalization == "softmax":
            weights = logits.softmax(dim=1)
            return torch.einsum("bkhw,k->bhw", weights, self.centers)
        # Numerator and denominator are one product; the share of each bin adds a constant to both.
        both = torch.stack([self.centers, torch.ones_like(self.centers)])
        sums = torch.einsum("bkhw,jk->bjhw", logits.relu(), both) + SHARE_OF_EACH_BIN * both.sum(dim=1)[:, None, None]
        return sums[:, 0] / sums[:, 1]
