"""The heads that probes train: one linear layer onto classes or depth bins (section 3.3), and the DPT head of Table 12.

The linear depth head reads patch tokens with the class token next to them. The public code upsamples the features four
times and applies the linear layer there. A linear layer applied to each pixel and a bilinear resize, whose weights sum
to one, commute; so logits are upsampled here, which costs a fraction.

The DPT head (Ranftl et al. 2021) brings four layers of tokens to four scales and fuses them from coarse to fine by
residual convolutions. Channels before the fusion are a quarter, a half, once and once the fused width.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fit3d_ns.probing.frozen_features import Assembler, FrozenFeatures
from fit3d_ns.probing.pictures import resize_map

INITIAL_DEVIATION = 0.01
"""Standard deviation of a linear layer's first weights, as in mmsegmentation's and DINOv2's evaluations."""
SHARE_OF_EACH_BIN = 0.1
"""Added to each rectified logit before normalising, so that no bin is ever empty (DINOv2's evaluation)."""
UPSAMPLING = 4
"""Pixels of the linear head's prediction per token and axis."""


class SegmentationHead(nn.Sequential):
    """Features of the last block to class logits [batch, classes, h, w] on the token grid."""

    def __init__(self, assembler: Assembler, num_classes: int) -> None:
        classifier = nn.Conv2d(assembler.out_dim, num_classes, kernel_size=1)
        initialise(classifier)
        super().__init__(assembler, SharedBatchNorm(assembler.out_dim), classifier)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes, on any device; otherwise `nn.BatchNorm2d`.

    torch's SyncBatchNorm needs CUDA; this one sums over any process group: two processes equal one of twice the batch.
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


class DepthBins(nn.Module):
    """Logits over uniform bins to the expected depth in metres (AdaBins)."""

    centers: Tensor

    def __init__(self, min_depth: float, max_depth: float, num_bins: int = 256) -> None:
        super().__init__()
        self.register_buffer("centers", torch.linspace(min_depth, max_depth, num_bins), persistent=False)

    def forward(self, logits: Float[Tensor, "batch bins height width"]) -> Float[Tensor, "batch height width"]:
        # Numerator and denominator are one product; the share of each bin adds a constant to both.
        both = torch.stack([self.centers, torch.ones_like(self.centers)])
        sums = torch.einsum("bkhw,jk->bjhw", logits.relu(), both) + SHARE_OF_EACH_BIN * both.sum(dim=1)[:, None, None]
        return sums[:, 0] / sums[:, 1]


class LinearDepthHead(nn.Module):
    """Tokens of the last block to depth on a grid four times as fine as the tokens'.

    Training reads the same interpolated logits at `training_upsampling` places per token and axis; fewer are cheaper.
    """

    def __init__(
        self, assembler: Assembler, bins: DepthBins, training_upsampling: int = UPSAMPLING, has_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.assembler = assembler
        self.batch_norm = SharedBatchNorm(assembler.out_dim) if has_batch_norm else nn.Identity()
        self.training_upsampling, self.bins = training_upsampling, bins
        self.token_layer = nn.Linear(assembler.out_dim, len(bins.centers))
        # The class token is the same for all tokens: its share of the linear layer is computed once per image.
        dim, num_bins = assembler.class_dim, len(bins.centers)
        self.class_layer = nn.Linear(dim, num_bins, bias=False) if dim else None
        initialise(self.token_layer)
        if self.class_layer is not None:
            initialise(self.class_layer)

    def initialise_as_published(self) -> None:
        """Draws the first weights as torch does for one layer over patch and class token together."""
        bound = (self.assembler.out_dim + self.assembler.class_dim) ** -0.5
        for weights in self.token_layer.parameters():
            nn.init.uniform_(weights, -bound, bound)
        if self.class_layer is not None:
            nn.init.uniform_(self.class_layer.weight, -bound, bound)

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch height width"]:
        """Depth in metres on `UPSAMPLING` times the token grid, or `training_upsampling` times in training."""
        # (b, c, h, w) -> (b, h, w, c) -> (b, bins, h, w)
        tokens = self.batch_norm(self.assembler(features)).permute(0, 2, 3, 1)
        logits = self.token_layer(tokens).permute(0, 3, 1, 2)
        if self.class_layer is not None:
            logits = logits + self.class_layer(self.assembler.select_class_token(features))[:, :, None, None]
        factor = self.training_upsampling if self.training else UPSAMPLING
        height, width = logits.shape[-2:]
        return self.bins(resize_map(logits, (factor * height, factor * width)))


class DPTHead(nn.Module):
    """Pre-norm tokens of four blocks to depth, or without bins to vectors [3], on a grid eight times as fine."""

    def __init__(self, assembler: Assembler, bins: DepthBins | None = None, fused_dim: int = 256) -> None:
        super().__init__()
        self.assembler = assembler
        self.bins = bins or nn.Identity()
        widths = [max(fused_dim // 4, 1), max(fused_dim // 2, 1), fused_dim, fused_dim]
        in_dim = assembler.out_dim
        read_dim = in_dim + assembler.class_dim
        self.readouts = nn.ModuleList(nn.Sequential(nn.Linear(read_dim, in_dim), nn.GELU()) for _ in widths)
        self.projections = nn.ModuleList(nn.Conv2d(in_dim, width, kernel_size=1) for width in widths)
        # To four times, twice, once and half the token grid.
        upscalings = [nn.ConvTranspose2d(widths[n], widths[n], side, stride=side) for n, side in enumerate((4, 2))]
        halving = nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1)
        self.rescalings = nn.ModuleList([*upscalings, nn.Identity(), halving])
        self.reductions = nn.ModuleList(
            nn.Conv2d(width, fused_dim, kernel_size=3, padding=1, bias=False) for width in widths
        )
        self.fusions = nn.ModuleList(_Fusion(fused_dim, has_lateral=index < 3) for index in range(4))
        hidden, out_dim = nn.Conv2d(fused_dim, fused_dim, kernel_size=3, padding=1), len(bins.centers) if bins else 3
        self.output = nn.Sequential(hidden, nn.ReLU(), nn.Conv2d(fused_dim, out_dim, kernel_size=1))

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch *out height width"]:
        levels = [self._reassemble(features, layer) for layer in range(4)]
        fused = self.fusions[-1](levels[-1], None)
        for level, fusion in zip(levels[-2::-1], list(self.fusions)[-2::-1], strict=True):
            fused = fusion(level, resize_map(fused, (level.shape[-2], level.shape[-1])))
        height, width = fused.shape[-2:]
        return self.bins(self.output(resize_map(fused, (2 * height, 2 * width))))

    def _reassemble(self, features: FrozenFeatures, layer: int) -> Tensor:
        tokens = self.assembler(features, layer)
        class_token = self.assembler.select_class_token(features, layer)
        # The class token is read next to each patch token, then projected away.
        class_map = class_token[:, :, None, None].expand(-1, -1, *tokens.shape[-2:])
        # (b, c, h, w) -> (b, h, w, c) -> (b, c, h, w)
        joined = torch.cat([tokens, class_map], dim=1).permute(0, 2, 3, 1)
        mixed = self.readouts[layer](joined).permute(0, 3, 1, 2)
        return self.reductions[layer](self.rescalings[layer](self.projections[layer](mixed)))


def initialise(layer: nn.Module) -> None:
    """Draws the first weights of a linear layer from torch's global generator; its bias, if it has one, is 0."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    nn.init.normal_(layer.weight, std=INITIAL_DEVIATION)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _create_unit(dim: int) -> nn.Sequential:
    """What a residual unit adds."""
    convolutions = (nn.Conv2d(dim, dim, kernel_size=3, padding=1) for _ in range(2))
    return nn.Sequential(*(layer for convolution in convolutions for layer in (nn.ReLU(), convolution)))


class _Fusion(nn.Module):
    """Adds the coarser result to a level, if there is one, and refines the sum."""

    def __init__(self, dim: int, has_lateral: bool) -> None:
        super().__init__()
        self.lateral = _create_unit(dim) if has_lateral else None
        self.refine = _create_unit(dim)
        self.project = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, level: Tensor, coarser: Tensor | None) -> Tensor:
        if self.lateral is not None and coarser is not None:
            level = coarser + (level + self.lateral(level))
        return self.project(level + self.refine(level))
