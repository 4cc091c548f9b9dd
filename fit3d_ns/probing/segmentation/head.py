"""The segmentation probe's head: batch normalisation and one linear layer (paper section 3.3, public code)."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fit3d_ns.probing.frozen_features import Assembler, FrozenFeatures

INITIAL_DEVIATION = 0.01
"""Standard deviation of the linear layer's first weights, as mmsegmentation initialises its classifier."""


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
        return self.classifier(self.norm(self.assembler(features)))


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes, on any device; otherwise `nn.BatchNorm2d`.

    torch's SyncBatchNorm needs CUDA; this one sums over whatever process group is there, so that two CPU processes
    equal one with twice the batch.
    """

    def forward(self, input: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        if not self.training or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        # Sums are taken about the running mean, so that large means do not cancel.
        centered = input - self.running_mean[:, None, None].detach()
        sums = torch.cat([centered.sum((0, 2, 3)), centered.square().sum((0, 2, 3))])
        count = input.new_tensor([input.numel() / input.shape[1]])
        # (2 c,) and (1,) travel together.
        reduced = all_reduce(torch.cat([sums, count]))
        total = reduced[-1].detach()
        offset, square = (reduced[:-1] / total).chunk(2)
        variance = (square - offset.square()).clamp_min(0.0)
        with torch.no_grad():
            unbiased = variance * total / (total - 1).clamp_min(1)
            self.running_mean += self.momentum * offset
            self.running_var += self.momentum * (unbiased - self.running_var)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        normalized = (centered - offset[:, None, None]) / (variance + self.eps).sqrt()[:, None, None]
        return normalized * self.weight[:, None, None] + self.bias[:, None, None]
