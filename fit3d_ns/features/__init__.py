"""Images to tokens: backbones, their weights, preprocessing, the extractor and its cache; the only room with timm."""

from fit3d_ns.features.backbones import BackboneDescription, describe_backbone
from fit3d_ns.features.cache import CachedTokens, FeatureCache, FeatureCacheConfig, FeatureKey, compute_feature_key
from fit3d_ns.features.extraction import LazyImage, extract_features
from fit3d_ns.features.extractor import FeatureExtractor, create_extractor, create_token_model
from fit3d_ns.features.preprocessing import (
    compute_patch_grid,
    compute_token_centers,
    compute_token_coordinates,
    compute_token_footprints,
)
from fit3d_ns.features.sources import PAPER_BACKBONES, list_backbones
from fit3d_ns.features.tokens import TokenModel, Tokens
from fit3d_ns.features.weights import load_weights

__all__ = [
    "PAPER_BACKBONES",
    "BackboneDescription",
    "CachedTokens",
    "FeatureCache",
    "FeatureCacheConfig",
    "FeatureExtractor",
    "FeatureKey",
    "LazyImage",
    "TokenModel",
    "Tokens",
    "compute_feature_key",
    "compute_patch_grid",
    "compute_token_centers",
    "compute_token_coordinates",
    "compute_token_footprints",
    "create_extractor",
    "create_token_model",
    "describe_backbone",
    "extract_features",
    "list_backbones",
    "load_weights",
]
