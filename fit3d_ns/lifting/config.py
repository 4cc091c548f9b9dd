"""`LiftConfig`: every choice of the closed-form lift, with the reason for its default; and which views it sees.

`SolveConfig` is the part of it that `ns-train` offers as `--pipeline.model.lift.*`: there the model has its own options
for the size of the features, the decoder and the weighting.
"""

from dataclasses import dataclass, field
from typing import Annotated

from fit3d_ns.lifting.token_spreading import TokenSpreadingRule
from fit3d_ns.scene.feature_decoder import TokenReadingRule
from fit3d_ns.utils.limits import Limited, Limits


@dataclass(frozen=True)
class SolveConfig(Limited):
    """How features are solved, whatever their size and whatever decodes them."""

    token_to_pixel: TokenSpreadingRule = "area"
    """How a token is compared with pixels: `bilinear` upsamples the tokens (paper section 3.1), `nearest` holds each
    constant over its patch, `area` compares it with the mean of the rendered features over its patch, which the
    backbone saw as a whole. Held-out error falls in this order."""
    within_patch_weight: Annotated[float, Limits(at_least=0, at_most=1)] = 0.3
    """For `area` alone: weight of the rendered features' spread within each patch, 0 to 1. At 0 only the patch's mean
    counts and detail below the patch is noise; at 1 the rule equals `nearest`."""
    token_reading: TokenReadingRule = "area"
    """How tokens are read off a rendered map, by the decoder's fit and by all later stages: `area` averages it over
    each patch, `bilinear` samples it at the token centres (paper's stage II)."""
    max_passes: Annotated[int, Limits(at_least=0)] = 16
    """Most passes after the weighted sum, each of which renders all views and projects them back; 0 keeps the sum."""
    samples_per_patch: Annotated[int, Limits(at_least=0)] = 4
    """The solve looks at about this many pixels along a patch's side instead of all: a token describes its patch as
    a whole, so passes become several times cheaper at the same held-out error. 0 takes every pixel."""
    tolerance: float = 1e-3
    """Conjugate gradients stop when the true residual falls below this fraction of the right-hand side's norm."""
    steps_per_true_residual: Annotated[int, Limits(at_least=0)] = 8
    """The residual is computed again, at the cost of one pass, after this many passes; 0 only once it seems small."""
    regularization: Annotated[float, Limits(at_least=0)] = 0.001
    """Pull towards the weighted sum, as a fraction of the mean blend weight of a seen Gaussian; 0 or above."""
    decoder_ridge: Annotated[float, Limits(at_least=0)] = field(default=0.003, metadata={"may_be_infinite": True})
    """Pull towards the PCA decoder, as a fraction of the mean squared regressor, 0 or above; infinity keeps it."""
    decoder_share: Annotated[float, Limits(above=0, at_most=1)] = 1.0
    """Share of the views that the decoder is fitted to, above 0 and up to 1. Half costs .002 of cosine (109 views)."""
    polish_steps: Annotated[int, Limits(at_least=0)] = 0
    """Gradient steps on the L1 loss after the solve, one view each; 0 for none."""
    polish_learning_rate: float = 1e-2
    """Adam's step for the features during the polish, as a fraction of their root mean square."""
    cache_memory_mb: float | None = None
    """Projections of views are kept between passes up to this many 1e6 bytes; the others are made again each time. By
    default 1024, or half of what a CUDA card has free."""


@dataclass(frozen=True)
class LiftConfig(SolveConfig):
    """How patch tokens are lifted onto fixed Gaussians."""

    feature_dim: Annotated[int, Limits(at_least=1)] = 64
    """Numbers per Gaussian (paper section 3.1: 64); at least 1 and at most the backbone's embedding size."""
    accumulation_aware: bool = True
    """Weight each pixel by its rendered alpha, so that empty pixels teach nothing."""
    decoder_bias: bool = True
    """Give the decoder a bias, multiplied by alpha; False fits an uncentred basis, as the paper's decoder needs."""
    seconds_per_checkpoint: float = 60.0
    """Time between two writes of the state file, in seconds, where one is asked for."""

    def check_width(self, embed_dim: int, backbone: str) -> None:
        """ValueError where the features have more dimensions than a token."""
        if self.feature_dim > embed_dim:
            problem = f"feature_dim {self.feature_dim} exceeds the width {embed_dim} of {backbone}'s tokens"
            raise ValueError(f"{problem}; choose --feature-dim {embed_dim} or less.")


@dataclass(frozen=True)
class LiftSceneConfig(Limited):
    """Which views are lifted and what is kept."""

    views: Annotated[int | None, Limits(at_least=1)] = None
    """How many training views to lift, at even distances in file order; all by default."""
    drop_unseen: bool = False
    """Leave out Gaussians that no lifted view ever weighted; lifted views stay as they are."""
    feature_batch_size: int = 4
    """Photographs per pass of the backbone, at least 1."""
