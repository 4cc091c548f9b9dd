"""The depth probe's head: patch tokens with the class token beside them, one linear layer onto bins (section 3.3).

The public code upsamples the features four times and applies the linear layer there. A linear layer applied to each
pixel and a bilinear resize, whose weights sum to one, commute; so logits are upsampled here, which costs a fraction.
"""

from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.assembly import Assembler, FrozenFeatures
from fit3d_ns.probing.depth.bins import DepthBins
from fit3d_ns.probing.patch_fit import resize_map
from fit3d_ns.probing.segmentation.head import INITIAL_DEVIATION

UPSAMPLING = 4
"""Pixels of the prediction per token and axis."""


class LinearDepthHead(nn.Module):
    """Pre-norm tokens of the last block to depth on a grid four times as fine as the tokens'."""

    def __init__(self, assembler: Assembler, bins: DepthBins, training_upsampling: int = UPSAMPLING) -> None:
        """Args:
        assembler: Makes the map.
        bins: Make depth out of logits.
        training_upsampling: Places per token and axis at which training reads the same interpolated logits; fewer
            are cheaper.
        """
        super().__init__()
        self.assembler = assembler
        self.training_upsampling = training_upsampling
        self.bins = bins
        self.token_layer = nn.Linear(assembler.out_dim, bins.num_bins)
        # The class token is the same for all tokens: its share of the linear layer is computed once per image.
        self.class_layer = nn.Linear(assembler.class_dim, bins.num_bins, bias=False) if assembler.class_dim else None
        nn.init.normal_(self.token_layer.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.token_layer.bias)
        if self.class_layer is not None:
            nn.init.normal_(self.class_layer.weight, std=INITIAL_DEVIATION)

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch height width"]:
        """Depth in metres on `UPSAMPLING` times the token grid, or `training_upsampling` times in training."""
        # (b, c, h, w) -> (b, h, w, c) -> (b, bins, h, w)
        logits = self.token_layer(self.assembler(features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.class_layer is not None:
            logits = logits + self.class_layer(self.assembler.select_class_token(features))[:, :, None, None]
        factor = self.training_upsampling if self.training else UPSAMPLING
        height, width = logits.shape[-2:]
        return self.bins(resize_map(logits, (factor * height, factor * width)))
