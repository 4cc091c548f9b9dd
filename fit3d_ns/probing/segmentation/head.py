"""The segmentation probe's head: batch normalisation and one linear layer (paper section 3.3, public code)."""

from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.probing.assembly import Assembler, FrozenFeatures
from fit3d_ns.probing.shared_batch_norm import SharedBatchNorm

INITIAL_DEVIATION = 0.01
"""Of the linear layer's weights, as mmsegmentation initialises its classifier."""


class SegmentationHead(nn.Module):
    """Features of the last block to class logits on the token grid."""

    def __init__(self, assembler: Assembler, num_classes: int) -> None:
        super().__init__()
        self.assembler = assembler
        self.norm = SharedBatchNorm(assembler.out_dim)
        self.classifier = nn.Conv2d(assembler.out_dim, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch classes h w"]:
        """Logits per token."""
        return self.classifier(self.norm(self.assembler(features)))
