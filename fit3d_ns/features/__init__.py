"""Images to tokens: backbones, their weights, preprocessing, the extractor and its cache; the only room with timm."""

from fit3d_ns.features.backbones import BackboneDescription, describe_backbone
from fit3d_ns.features.cache import (
    FeatureCache,
    FeatureKey,
    LazyImage,
    compute_feature_key,
    extract_features,
)
from fit3d_ns.features.extractor import FeatureExtractor, create_extractor, create_token_model
from fit3d_ns.features.sources import PAPER_BACKBONES, list_backbones
from fit3d_ns.features.tokens import TokenModel, Tokens, compute_patch_grid
from fit3d_ns.features.weights import load_weights

__all__ = [
    "PAPER_BACKBONES",
    "BackboneDescription",
    "FeatureCache",
    "FeatureExtractor",
    "FeatureKey",
    "LazyImage",
    "TokenModel",
    "Tokens",
    "compute_feature_key",
    "compute_patch_grid",
    "create_extractor",
    "create_token_model",
    "describe_backbone",
    "extract_features",
    "list_backbones",
    "load_weights",
]
