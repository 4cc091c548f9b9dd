"""The closed-form lift: features solved, not trained, onto any Gaussians that already exist."""

from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.decoder_fit import DecoderStatistics, fit_decoder, fit_token_basis
from fit3d_ns.lifting.feature_error import (
    FeatureLoss,
    FeatureLossConfig,
    FeatureMetrics,
    compute_masked_l1,
    evaluate_features,
)
from fit3d_ns.lifting.solver import LiftResult, solve_features
from fit3d_ns.lifting.views import LiftView, create_lift_views

__all__ = [
    "DecoderStatistics",
    "FeatureLoss",
    "FeatureLossConfig",
    "FeatureMetrics",
    "LiftConfig",
    "LiftResult",
    "LiftView",
    "compute_masked_l1",
    "create_lift_views",
    "evaluate_features",
    "fit_decoder",
    "fit_token_basis",
    "solve_features",
]
