"""`FeatureBranch`: everything of the model that knows about features: decoder, loss, metrics and pictures.

It reads the render that the colour branch made and gives nothing back to it: its random numbers come from its own
generator, and the features are blended through a detached projection.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.analysis.pca import PcaBasis, fit_pca, map_to_colours
from fit3d_ns.analysis.pictures import Picture, draw_pca, draw_words
from fit3d_ns.lifting.feature_error import COVERED, FeatureLoss, FeatureLossConfig, FeatureMetrics, sum_view_errors
from fit3d_ns.plugin.dataset import get_feature_mask
from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.utils.selection import create_generator

Features = Float[Tensor, "num_gaussians dim"]
FEATURE_SEED = 0
"""Seed of the feature branch's own random numbers."""
INITIAL_FEATURE_SCALE = 0.01
"""Standard deviation of `feature_init="random"`; the paper's text gives none."""
PICTURE_BUFFERS = {
    "pca_mean": "mean",
    "pca_components": "components",
    "pca_variance": "explained_variance",
    "pca_total_variance": "total_variance",
    "pca_low": "colour_low",
    "pca_high": "colour_high",
}
"""Buffers of the state dict, and the part of the picture basis that each holds."""
MAX_COLOUR_ROWS = 20_000
"""Pixels whose decoded features a refitted basis is fitted to."""


class FeatureBranch(nn.Module):
    """The decoder (E x D x 3 x 3), and the fixed PCA basis that colours the pictures."""

    pca_mean: Tensor
    is_solved: Tensor

    def __init__(self, config: FeatureSplatfactoModelConfig, metadata: dict[str, Any]) -> None:
        """Args: options of the model, and the dataset's metadata with `embed_dim` where features are on."""
        super().__init__()
        self.config = config
        self.resize(int(metadata.get("embed_dim", 1)) if self.is_on else 1)
        self.register_buffer("pca_low", torch.zeros(3))
        self.register_buffer("pca_high", torch.ones(3))
        self.register_buffer("pca_variance", torch.zeros(3))
        self.register_buffer("pca_total_variance", torch.zeros(()))
        self.register_buffer("is_solved", torch.zeros((), dtype=torch.bool))
        self.load_tokens: Callable[[Cameras], Tensor | None] | None = None
        weighting, multiple = config.accumulation_weighting, config.feature_grid_multiple
        self.loss_config = FeatureLossConfig(multiple=multiple, alpha_weighting=weighting)
        self._last_picture: tuple[Tensor, dict[str, Any], Tensor] | None = None

    def resize(self, embed_dim: int) -> None:
        """Makes a new decoder and picture basis, for tokens of another width."""
        self.embed_dim = embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FEATURE_SEED)
            self.decoder = FeatureDecoder(self.config.feature_dim, embed_dim, bias=self.config.decoder_bias)
        self.register_buffer("pca_mean", torch.zeros(embed_dim))
        self.register_buffer("pca_components", torch.zeros(3, embed_dim))

    @staticmethod
    def create_features(config: FeatureSplatfactoModelConfig, num_gaussians: int) -> Features:
        """Initial features; never drawn from the global generator."""
        if config.feature_init == "zeros":
            return torch.zeros(num_gaussians, config.feature_dim)
        generator = create_generator(FEATURE_SEED, "features")
        return torch.randn(num_gaussians, config.feature_dim, generator=generator) * INITIAL_FEATURE_SCALE

    @property
    def is_on(self) -> bool:
        """Whether there are features at all."""
        return self.config.feature_loss_weight > 0

    @property
    def is_joint(self) -> bool:
        """Whether features and decoder take gradient steps along with the colours."""
        return self.is_on and self.config.feature_schedule == "joint"

    def compute_loss(
        self, features: Features, info: dict[str, Any], alpha: Float[Tensor, "height width"], batch: dict[str, Any]
    ) -> Float[Tensor, ""]:
        """L1 between decoded features and the backbone's tokens (paper, equation 3, L_f), for a render of this step.

        Weighted by the valid mask and, unless switched off, by the detached opacity. Taken at `feature_grid_multiple`
        times the token grid, or at image size, where the target is the bilinearly upsampled token map (paper).
        """
        height, width = alpha.shape
        tokens = batch["patch_tokens"].to(alpha.device).float()
        loss = FeatureLoss(width, height, (tokens.shape[0], tokens.shape[1]), self.loss_config, alpha.device)
        features_low = loss.blend(features, info)
        mask = get_feature_mask(batch)
        mask = None if mask is None else _resize_mask(mask.to(alpha.device), height, width)
        return loss.compute(features_low, alpha, self.decoder, tokens, mask)

    @torch.no_grad()
    def compute_metrics(self, features: Features, info: dict[str, Any], batch: dict[str, Any]) -> dict[str, float]:
        """Errors over covered tokens, and the share of tokens that are covered; NaN errors where none is."""
        if not self.is_on:
            return {}
        tokens = batch["patch_tokens"].to(features.device).float()
        width, height = int(info["width"]), int(info["height"])
        mask = get_feature_mask(batch)
        valid = tokens.new_ones(height, width) if mask is None else _resize_mask(mask.to(tokens.device), height, width)
        reading = self.config.token_reading
        sums = sum_view_errors(features, info, self.decoder, tokens, valid, self.pca_mean, reading)
        metrics = FeatureMetrics.from_sums(sums)
        return {
            "feature_l1": metrics.feature_l1,
            "feature_cosine": metrics.feature_cosine,
            "feature_cosine_mean_token": metrics.mean_token_cosine,
            "feature_coverage": metrics.num_tokens / (tokens.shape[0] * tokens.shape[1]),
        }

    @torch.no_grad()
    def render_picture(
        self, features: Features, info: dict[str, Any], alpha: Float[Tensor, "height width 1"]
    ) -> Picture:
        """PCA colours of the features; words before they are solved, black without a backbone."""
        basis = self.picture_basis if self.is_on else None
        if basis is None:
            return alpha.new_zeros(*alpha.shape[:2], 3)
        if self.config.feature_schedule == "solve" and not bool(self.is_solved):
            return draw_words("features are solved at the end", (alpha.shape[0], alpha.shape[1])).to(alpha)
        self._last_picture = (features, info, alpha[..., 0])
        # Projecting after decoding is a convolution to 3 channels: the 384 are never made.
        projection = self.decoder.project(basis.components, basis.mean)
        if projection.weight.shape[0] * 9 < features.shape[1]:
            features, projection = projection.decode_before_rendering(features)
        coefficients = projection(rasterize_features(features, info)[0], alpha[..., 0])
        return map_to_colours(coefficients, basis, alpha[..., 0])

    @torch.no_grad()
    def draw_tokens(self, camera: Cameras, height: int, width: int) -> Picture:
        """PCA colours of the backbone's own tokens where the camera is a captured one; black elsewhere."""
        basis = self.picture_basis if self.is_on else None
        device = self.decoder.weight.device
        tokens = None if self.load_tokens is None or basis is None else self.load_tokens(camera)
        if tokens is None or basis is None:
            return torch.zeros(height, width, 3, device=device)
        return draw_pca(tokens.to(device).float(), basis, (height, width))

    def set_decoder(self, decoder: FeatureDecoder) -> None:
        """Copies a solved decoder in place, so that the optimizer keeps its parameters; no bias leaves a zero bias."""
        with torch.no_grad():
            self.decoder.weight.copy_(decoder.weight)
            if self.decoder.bias is not None:
                self.decoder.bias.copy_(torch.zeros_like(self.decoder.bias) if decoder.bias is None else decoder.bias)
        self.is_solved.fill_(True)

    def set_picture_basis(self, basis: PcaBasis) -> None:
        """Fixes the colours of feature pictures: three components of the backbone's tokens and their ranges."""
        with torch.no_grad():
            for buffer, part in PICTURE_BUFFERS.items():
                getattr(self, buffer).copy_(torch.as_tensor(getattr(basis, part)))

    @property
    def picture_basis(self) -> PcaBasis | None:
        """The basis of the pictures, or None before it is fitted."""
        return read_picture_basis(dict(self.named_buffers(recurse=False)))

    @torch.no_grad()
    def fit_basis_to_last_picture(self) -> PcaBasis | None:
        """PCA of the decoded features of the last picture's covered pixels, or None where nothing was covered.

        The decoder's taps are summed, which is exact for a map that is smooth over three pixels.
        """
        if self._last_picture is None:
            return None
        features, info, alpha = self._last_picture
        features_low = rasterize_features(features, info)[0]
        covered = alpha > COVERED
        if int(covered.sum()) < self.config.feature_dim:
            return None
        rows = features_low[covered] / alpha[covered][:, None]
        decoded = rows[:: max(len(rows) // MAX_COLOUR_ROWS, 1)] @ self.decoder.weight.detach().sum(dim=(2, 3)).T
        return fit_pca(decoded if self.decoder.bias is None else decoded + self.decoder.bias.detach(), 3)


def read_picture_basis(buffers: Mapping[str, Tensor]) -> PcaBasis | None:
    """The picture basis out of a feature branch's buffers, or None where it was never fitted."""
    if not bool(buffers["pca_components"].any()):
        return None
    parts: dict[str, Any] = {part: buffers[buffer].clone() for buffer, part in PICTURE_BUFFERS.items()}
    return PcaBasis(**parts | {"total_variance": float(parts["total_variance"])})


def _resize_mask(mask: Float[Tensor, "rows columns 1"], height: int, width: int) -> Float[Tensor, "height width"]:
    """The valid mask at the size of a render, which early in training is a fraction of the image's."""
    return F.interpolate(mask.float().permute(2, 0, 1)[None], size=(height, width), mode="area")[0, 0]
