"""`FeatureDatamanager`: nerfstudio's full images, already undistorted, with the backbone's patch tokens.

The original backbone sees each image once; tokens come from the feature cache from then on. Viewing, rendering and
exporting never load a ViT.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.features.backbones import describe_backbone
from fit3d_ns.features.cache import FeatureCache, FeatureKey, compute_feature_key, extract_features
from fit3d_ns.features.tokens import compute_patch_grid
from fit3d_ns.lifting.surface_points import find_depth_scale, load_valid_depth
from fit3d_ns.lifting.views import LiftView, create_lift_views
from fit3d_ns.plugin.dataset import UndistortedDataset, get_feature_mask, get_photograph
from fit3d_ns.scene.posed_capture import View
from fit3d_ns.utils.progress import notice, track

KEY = "feature_key"
"""Under this name a loaded frame remembers the hash of its pixels, which is its name in the feature cache."""
SAME_POSE_TOLERANCE = 1e-4
"""A viewer camera counts as a captured one if no number of its pose differs by more, in training units."""


@dataclass
class FeatureDatamanagerConfig(FullImageDatamanagerConfig):
    """nerfstudio's full-image options and the choice of the backbone."""

    _target: type = field(default_factory=lambda: FeatureDatamanager)
    backbone: str = "dinov2_small"
    """`dinov2_small dinov2_base dinov2_reg_small clip_base mae_base deit3_base`, any timm ViT id, a fine-tuned
    backbone's folder, or `random:<timm id>` for untrained weights (tests only)."""
    backbone_weights: Path | None = None
    """Weights file (.safetensors, .pth) instead of timm's download, for machines without network."""
    normalization: Literal["timm", "imagenet"] = "timm"
    """Mean and standard deviation: the backbone's own, or ImageNet's for all as in the authors' code."""
    feature_cache: Path = Path.home() / ".cache" / "fit3d_ns" / "features"
    """Folder of the feature cache, shared between runs and scenes."""
    max_image_side: int = 0
    """Photographs with a longer side, in pixels, are halved until they fit, unless camera-res-scale-factor is given; 0
    keeps them as they are."""
    feature_batch_size: int = 4
    """Images per forward pass of the backbone while features are extracted."""


@contextmanager
def name_own_flags() -> Iterator[None]:
    """Errors about the backbone name flags as `fit3d-*` have them; here they are called by what ns-train calls them."""
    try:
        yield
    except ValueError as error:
        if "--backbone" not in str(error):
            raise
        raise ValueError(str(error).replace("--backbone", "--pipeline.datamanager.backbone")) from error


class FeatureDatamanager(FullImageDatamanager[UndistortedDataset]):
    """Hands out (camera, batch) pairs; a batch has `image`, perhaps `mask`, and `patch_tokens` [h, w, E]."""

    config: FeatureDatamanagerConfig
    train_dataset: UndistortedDataset
    eval_dataset: UndistortedDataset
    tokens_in_training: bool = True
    """False where no training step reads tokens, because features are solved; the pipeline knows."""
    depth_in_training: bool = False
    """Whether training frames with a depth map bring it as `depth` [H, W]: units of the training frame, 0 unknown."""

    def __init__(self, config: FeatureDatamanagerConfig, device: Any = "cpu", **kwargs: Any) -> None:
        if torch.device(device).type == "cpu":
            config.cache_images = "cpu"
        super().__init__(config, device=device, **kwargs)
        if len(self.eval_dataset) == 0:
            raise ValueError("The dataparser holds out no frame for evaluation; hold out at least one.")
        self.train_cameras = self.train_dataset.cameras.to(self.device)
        self.cache = self._open_cache()
        if self.cache is not None:
            backbone = self.cache.description
            for dataset in (self.train_dataset, self.eval_dataset):
                view = dataset.capture.views[0]
                dataset.metadata |= {
                    "embed_dim": backbone.embed_dim,
                    "patch_grid": compute_patch_grid(view.height, view.width, backbone.patch_size),
                    "backbone": backbone.to_metadata(),
                }

    def _open_cache(self) -> FeatureCache | None:
        """The feature cache of the backbone, whose weights are not read; None where a finished run is only looked at
        and its weights file is no longer there."""
        config = self.config
        try:
            with name_own_flags():
                backbone = describe_backbone(config.backbone, config.backbone_weights, config.normalization)
        except ValueError as error:
            if self.test_mode == "val":
                raise
            notice(f"{error} Going on without the backbone's own tokens: no feature metrics, no original picture.")
            return None
        return FeatureCache(config.feature_cache, backbone)

    def create_train_dataset(self) -> UndistortedDataset:
        """Training frames with pinhole cameras."""
        return self._create_dataset(self.train_dataparser_outputs, "train")

    def create_eval_dataset(self) -> UndistortedDataset:
        """Held-out frames with pinhole cameras."""
        return self._create_dataset(self.dataparser.get_dataparser_outputs(split=self.test_split), "test")

    def _create_dataset(self, outputs: DataparserOutputs, split: Split) -> UndistortedDataset:
        data = Path(self.config.dataparser.data)
        return UndistortedDataset(outputs, self.config.camera_res_scale_factor, data, split, self.config.max_image_side)

    def extract_tokens(self, frames: list[dict[str, Any]]) -> None:
        """Runs the backbone on every frame whose tokens are not in the cache; a ValueError says why it cannot."""
        if self.cache is None or all(KEY in frame for frame in frames):
            return
        images = [partial(get_photograph, frame) for frame in frames]
        with name_own_flags():
            keys = extract_features(images, self.cache, device=self.device, batch_size=self.config.feature_batch_size)
        for frame, key in zip(frames, keys, strict=True):
            frame[KEY] = key

    def load_tokens(self, frame: dict[str, Any]) -> Float[Tensor, "h w embed"]:
        """Patch tokens of a loaded frame, in the cache's half precision; a ValueError where it does not have them."""
        assert self.cache is not None
        return self.cache.load(_get_key(frame)).to(self.device)

    def create_lift_views(self, camera_to_worlds: Float[Tensor, "views 3 4"]) -> list[LiftView]:
        """The training views as the lift takes them, at these poses; tokens are read when they are needed."""
        capture = self.train_dataset.capture
        frames = {view.name: frame for view, frame in zip(capture.views, self.cached_train, strict=True)}
        poses = camera_to_worlds.to(self.device)
        views = [replace(view, camera_to_world=pose) for view, pose in zip(capture.views, poses, strict=True)]

        def load_tokens(view: View) -> Tensor:
            return self.load_tokens(frames[view.name])

        def load_mask(view: View) -> Tensor | None:
            mask = get_feature_mask(frames[view.name])
            return None if mask is None else mask[..., 0]

        return create_lift_views(capture, views, load_tokens, load_mask)

    def load_tokens_of_camera(self, camera: Cameras) -> Float[Tensor, "h w embed"] | None:
        """Tokens of the captured frame at the camera's pose, if there is one and its tokens are in the cache."""
        if self.cache is None:
            return None
        pose = camera.camera_to_worlds.reshape(3, 4).cpu()
        for dataset, name in ((self.train_dataset, "cached_train"), (self.eval_dataset, "cached_eval")):
            difference = (dataset.cameras.camera_to_worlds - pose).abs().amax(dim=(1, 2))
            nearest = int(difference.argmin())
            if float(difference[nearest]) <= SAME_POSE_TOLERANCE:
                frame = getattr(self, name)[nearest]
                return self.load_tokens(frame) if self.cache.contains(_get_key(frame)) else None
        return None

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The next training frame; the order comes from a generator of its own, saved with the run."""
        camera, frame = super().next_train(step)
        return camera, self._create_batch(frame, self.tokens_in_training)

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A held-out frame, sampled without replacement until all have been used."""
        camera, frame = super().next_eval_image(step)
        return camera, self._create_batch(frame)

    @property
    def fixed_indices_eval_dataloader(self) -> list[tuple[Cameras, dict[str, Any]]]:  # type: ignore[override]
        """All held-out frames in order, with tokens extracted where they are missing."""
        self.extract_tokens(self.cached_eval)
        return [(camera, self._create_batch(frame)) for camera, frame in super().fixed_indices_eval_dataloader]

    def capture_order(self) -> dict[str, Any]:
        """Which frames are still to come, as plain values."""
        state: dict[str, Any] = {"train": list(self.train_unseen_cameras), "eval": list(self.eval_unseen_cameras)}
        if hasattr(self, "random_generator"):
            version, keys, gauss = self.random_generator.getstate()
            state["generator"] = [version, list(keys), gauss]
        if hasattr(self, "train_unsampled_epoch_count"):
            state["epochs"] = torch.as_tensor(self.train_unsampled_epoch_count)
        return state

    def restore_order(self, state: dict[str, Any]) -> None:
        """Puts back what `capture_order` took; a ValueError where the checkpoint saw more frames than there are."""
        for name, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if any(index >= len(dataset) for index in state[name]):
                raise ValueError("The checkpoint was made with more frames than --data has now; restore the data.")
        self.train_unseen_cameras = list(state["train"])
        self.eval_unseen_cameras = list(state["eval"])
        if "generator" in state:
            version, keys, gauss = state["generator"]
            self.random_generator.setstate((version, tuple(keys), gauss))
        if "epochs" in state:
            self.train_unsampled_epoch_count = state["epochs"].numpy()

    def _create_batch(self, frame: dict[str, Any], with_tokens: bool = True) -> dict[str, Any]:
        if self.cache is not None and with_tokens:
            frame["patch_tokens"] = self.load_tokens(frame)
        frame.pop(KEY, None)
        return frame

    def _load_images(self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]) -> list[Any]:
        dataset = self.train_dataset if split == "train" else self.eval_dataset
        capture, with_depth = dataset.capture, self.depth_in_training and split == "train"
        depth_scale = find_depth_scale(capture) if with_depth else 0.0

        def load(index: int) -> dict[str, Any]:
            frame, view = dataset.get_data(index, image_type=self.config.cache_images_type), capture.views[index]
            if with_depth and view.frame.depth_path is not None:
                frame["depth"] = load_valid_depth(capture, view, depth_scale)
            return frame

        # Decoding releases the interpreter's lock.
        with ThreadPoolExecutor(max_workers=4) as executor:
            loaded = executor.map(load, range(len(dataset)))
            frames = list(track(loaded, f"Loading {split} images", total=len(dataset)))
        if cache_images_device == "gpu":
            for frame in frames:
                frame |= {key: value.to(self.device) for key, value in frame.items() if isinstance(value, Tensor)}
        return frames


def _get_key(frame: dict[str, Any]) -> FeatureKey:
    if KEY not in frame:
        frame[KEY] = compute_feature_key(get_photograph(frame))
    return frame[KEY]
