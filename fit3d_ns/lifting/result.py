"""`LiftResult`: the lifted features, what reads them, and what was learned about each Gaussian on the way."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.decoder_fit import DecoderStatistics
from fit3d_ns.scene.feature_decoder import FeatureDecoder


@dataclass(frozen=True)
class LiftResult:
    """Features of all Gaussians that were given, in their order; invalid ones (NaN geometry) hold zeros."""

    features: Float[Tensor, "num_gaussians dim"]
    """Solved features, float32."""
    decoder: FeatureDecoder
    """From rendered features to tokens."""
    basis: PcaBasis
    """Space of the features; the decoder's start."""
    config: LiftConfig
    """What was asked for; `token_reading` belongs into the scene file."""
    numerator: Float[Tensor, "num_gaussians dim"]
    """Weighted sum before normalisation, sum over views of R^T W t; for leave-one-out targets."""
    denominator: Float[Tensor, " num_gaussians"]
    """Sum over views of R^T W 1: weight with which valid pixels taught each Gaussian."""
    blend_weight: Float[Tensor, " num_gaussians"]
    """Sum over views and all pixels, masked ones too, of the blend weight, in pixels. Where it is 0, leaving the
    Gaussian out changes no pixel of any captured view."""
    num_views: Int[Tensor, " num_gaussians"]
    """In how many views the Gaussian has a blend weight above zero."""
    feature_variance: Float[Tensor, " num_gaussians"]
    """Variance over views of the views' own weighted means, weighted as they are, averaged over the dimensions;
    zero for Gaussians that one view taught, or none."""
    is_valid: Bool[Tensor, " num_gaussians"]
    """False where the geometry has NaN or infinite numbers; those took no part."""
    num_passes: int
    """Passes over the views that blended or projected back, all phases together."""
    residuals: list[float]
    """Relative residual after each pass of the conjugate gradients."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase; after a resume, those since then."""
    decoder_statistics: DecoderStatistics
    """For a decoder that several scenes share."""

    @property
    def is_unseen(self) -> Bool[Tensor, " num_gaussians"]:
        """True for Gaussians that no captured view ever weighted."""
        return self.blend_weight <= 0

    @property
    def num_invalid(self) -> int:
        """Gaussians with NaN or infinite geometry."""
        return int((~self.is_valid).sum())
