"""Images to tokens: backbones, their weights, preprocessing, the extractor and its cache; the only room with timm."""

from fit3d_ns.features.backbones import BackboneDescription, describe_backbone
from fit3d_ns.features.cache import FeatureCache, FeatureKey, compute_feature_key, extract_features
from fit3d_ns.features.extractor import FeatureExtractor, create_extractor, create_token_model
from fit3d_ns.features.tokens import TokenModel, compute_patch_grid
