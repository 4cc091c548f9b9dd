"""`TokenStore`: patch tokens of a dataset's frames, from the feature cache; the backbone is built only to fill it."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.backbones import describe_backbone
from fit3d_ns.features.cache import (
    FeatureCache,
    FeatureCacheConfig,
    FeatureKey,
    compute_feature_key,
    extract_features,
)
from fit3d_ns.features.tokens import compute_patch_grid
from fit3d_ns.plugin.dataset import UndistortedDataset

KEY = "feature_key"
"""Under this name a loaded frame remembers the hash of its pixels."""


class TokenStore:
    """Reads tokens of loaded frames: dicts with `image` [H, W, 3], uint8 or in [0, 1]."""

    def __init__(
        self,
        backbone: str,
        weights: Path | None,
        normalization: Any,
        cache_directory: Path,
        device: torch.device,
        batch_size: int,
    ) -> None:
        """Describes the backbone; its weights are not read.

        Raises:
            ValueError: Unknown backbone, or a weights file that is not there.
        """
        self.description = describe_backbone(backbone, weights, normalization)
        self.cache = FeatureCache(FeatureCacheConfig(directory=cache_directory), self.description)
        self.device = device
        self.batch_size = batch_size

    def describe(self, dataset: UndistortedDataset) -> dict[str, Any]:
        """`embed_dim`, `patch_grid` of the first frame, and the backbone's identity, for the dataset's metadata."""
        view = dataset.capture.views[0]
        return {
            "embed_dim": self.description.embed_dim,
            "patch_grid": compute_patch_grid(view.height, view.width, self.description.patch_size),
            "backbone": self.description.to_metadata(),
        }

    def extract(self, frames: list[dict[str, Any]]) -> None:
        """Fills the cache for all frames, with a progress bar.

        Raises:
            ValueError: The backbone's weights cannot be had or do not fit, or the disk is full.
        """
        if all(KEY in frame for frame in frames):
            return
        images = [_lazy_image(frame) for frame in frames]
        keys = extract_features(images, self.cache, device=self.device, batch_size=self.batch_size)
        for frame, key in zip(frames, keys, strict=True):
            frame[KEY] = key

    def load(self, frame: dict[str, Any]) -> Float[Tensor, "h w embed"]:
        """Patch tokens of a frame, on the store's device, in the cache's half precision.

        Raises:
            ValueError: They are not in the cache.
        """
        return self.cache.load(_key_of(frame)).patch_tokens.to(self.device)

    def load_if_cached(self, frame: dict[str, Any]) -> Float[Tensor, "h w embed"] | None:
        """As `load`, or None where the tokens were never extracted."""
        key = _key_of(frame)
        return self.load(frame) if self.cache.contains(key) else None


def _key_of(frame: dict[str, Any]) -> FeatureKey:
    if KEY not in frame:
        frame[KEY] = compute_feature_key(frame["image"])
    return frame[KEY]


def _lazy_image(frame: dict[str, Any]) -> Any:
    return lambda: frame["image"]
