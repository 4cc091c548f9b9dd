"""`SharedBatchNorm`: batch normalisation whose statistics are those of all processes, on any device.

torch's SyncBatchNorm needs CUDA; this one sums over whatever process group is there, so that two CPU processes equal
one with twice the batch. Without a process group it is torch's own batch normalisation.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SharedBatchNorm(nn.BatchNorm2d):
    """Drop-in for `nn.BatchNorm2d`; parameters and buffers have the same names."""

    def forward(self, input: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels h w"]:
        """Normalises each channel; in training by the statistics of the batch over all processes."""
        if not self.training or not _is_distributed():
            return super().forward(input)
        # Sums are taken about the running mean, so that large means do not cancel.
        assert self.running_mean is not None and self.running_var is not None
        shift = self.running_mean[:, None, None].detach()
        centered = input - shift
        sums = torch.stack([centered.sum((0, 2, 3)), centered.square().sum((0, 2, 3))])
        count = input.new_tensor([input.numel() / input.shape[1]])
        # (2, c) and (1,) travel together.
        reduced = all_reduce(torch.cat([sums.flatten(), count]))
        num_channels = input.shape[1]
        total = reduced[-1].detach()
        offset = reduced[:num_channels] / total
        variance = (reduced[num_channels : 2 * num_channels] / total - offset.square()).clamp_min(0.0)
        self._update_running_statistics(offset.detach(), variance.detach(), total)
        normalized = (centered - offset[:, None, None]) / (variance + self.eps).sqrt()[:, None, None]
        return normalized * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _update_running_statistics(self, offset: Tensor, variance: Tensor, total: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        unbiased = variance * total / (total - 1).clamp_min(1)
        self.running_mean += self.momentum * offset
        self.running_var += self.momentum * (unbiased - self.running_var)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
