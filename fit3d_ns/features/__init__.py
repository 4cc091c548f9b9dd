"""Images to tokens: backbones, their weights, preprocessing, the extractor and its cache; the only room with timm."""

from fit3d_ns.features.backbones import PAPER_BACKBONES, BackboneDescription, describe_backbone, list_backbones
from fit3d_ns.features.extractor import FeatureExtractor, TokenModel, Tokens, create_extractor, create_token_model
from fit3d_ns.features.preprocessing import (
    compute_patch_grid,
    compute_token_centers,
    compute_token_coordinates,
    compute_token_footprints,
)
from fit3d_ns.features.weights import load_weights

__all__ = [
    "PAPER_BACKBONES",
    "BackboneDescription",
    "FeatureExtractor",
    "TokenModel",
    "Tokens",
    "compute_patch_grid",
    "compute_token_centers",
    "compute_token_coordinates",
    "compute_token_footprints",
    "create_extractor",
    "create_token_model",
    "describe_backbone",
    "list_backbones",
    "load_weights",
]
