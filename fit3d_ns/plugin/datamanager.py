"""`FeatureDatamanager`: full images as nerfstudio's, already undistorted, with the backbone's patch tokens beside them.

The original backbone sees each image once; tokens come from the feature cache from then on. Viewing, rendering and
exporting never load a ViT.
"""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.lifting.views import LiftView, create_lift_views
from fit3d_ns.plugin.dataset import UndistortedDataset, find_root
from fit3d_ns.plugin.token_store import KEY, TokenStore
from fit3d_ns.utils.progress import notice, track

NUM_LOADING_THREADS = 4
"""Threads that decode and undistort images; decoding releases the interpreter's lock."""

SAME_POSE_TOLERANCE = 1e-4
"""A viewer camera counts as a captured one if no number of its pose differs by more, in training units."""


@dataclass
class FeatureDatamanagerConfig(FullImageDatamanagerConfig):
    """nerfstudio's full-image options and the choice of the backbone."""

    _target: type = field(default_factory=lambda: FeatureDatamanager)
    """The datamanager's class."""
    backbone: str = "dinov2_small"
    """`dinov2_small dinov2_base dinov2_reg_small clip_base mae_base deit3_base`, any timm ViT id, a fine-tuned
    backbone's folder, or `random:<timm id>` for untrained weights (tests only)."""
    backbone_weights: Path | None = None
    """Weights file (.safetensors, .pth) instead of timm's download, for machines without network."""
    normalization: Literal["timm", "imagenet"] = "timm"
    """Mean and standard deviation: the backbone's own, or ImageNet's for all as in the authors' code."""
    feature_cache: Path = Path.home() / ".cache" / "fit3d_ns" / "features"
    """Folder of the feature cache, shared between runs and scenes."""
    feature_batch_size: int = 4
    """Images per forward pass of the backbone while features are extracted."""


class FeatureDatamanager(FullImageDatamanager[UndistortedDataset]):
    """Hands out (camera, batch) pairs; a batch has `image`, perhaps `mask`, and `patch_tokens` [h, w, E]."""

    config: FeatureDatamanagerConfig
    train_dataset: UndistortedDataset
    eval_dataset: UndistortedDataset
    train_unseen_cameras: list[int]
    eval_unseen_cameras: list[int]
    tokens_in_training: bool = True
    """False where no training step reads tokens, because features are solved; the pipeline knows."""

    def __init__(self, config: FeatureDatamanagerConfig, device: Any = "cpu", **kwargs: Any) -> None:
        if torch.device(device).type == "cpu":
            config.cache_images = "cpu"
        super().__init__(config, device=device, **kwargs)
        if len(self.eval_dataset) == 0:
            raise ValueError("The dataparser holds out no frame for evaluation; hold out at least one.")
        self.tokens = self._create_token_store(torch.device(device))
        if self.tokens is not None:
            for dataset in (self.train_dataset, self.eval_dataset):
                dataset.metadata |= self.tokens.describe(dataset)

    def _create_token_store(self, device: torch.device) -> TokenStore | None:
        """The store; None where a finished run is only looked at and its weights file is no longer there."""
        config = self.config
        try:
            return TokenStore(
                config.backbone,
                config.backbone_weights,
                config.normalization,
                config.feature_cache,
                device,
                config.feature_batch_size,
            )
        except ValueError as error:
            if self.test_mode == "val":
                raise
            notice(f"{error} Going on without the backbone's own tokens: no feature figures, no original picture.")
            return None

    def create_train_dataset(self) -> UndistortedDataset:
        """Training frames with pinhole cameras."""
        return self._create_dataset(self.train_dataparser_outputs, "train")

    def create_eval_dataset(self) -> UndistortedDataset:
        """Held-out frames with pinhole cameras."""
        outputs = self.dataparser.get_dataparser_outputs(split=self.test_split)
        return self._create_dataset(outputs, "test")

    def _create_dataset(self, outputs: DataparserOutputs, split: Split) -> UndistortedDataset:
        root = find_root(Path(self.config.dataparser.data))
        return UndistortedDataset(outputs, self.config.camera_res_scale_factor, root, split)

    @cached_property
    def train_cameras(self) -> Cameras:
        """Pinhole cameras of the training frames, on the device."""
        return self.train_dataset.cameras.to(self.device)

    def extract_missing_tokens(self) -> None:
        """Runs the backbone on every image whose tokens are not in the cache, with a progress bar."""
        if self.tokens is not None:
            self.tokens.extract(self.cached_train)
            self.tokens.extract(self.cached_eval)

    def create_lift_views(self, camera_to_worlds: Float[Tensor, "views 3 4"] | None = None) -> list[LiftView]:
        """The training views as the lift takes them; tokens are read from the cache when they are needed.

        Args:
            camera_to_worlds: Poses of the training views, corrected where a camera optimizer moved them.
        """
        assert self.tokens is not None
        capture, load_tokens = self.train_dataset.capture, self.tokens.load
        frames = {view.name: data for view, data in zip(capture.views, self.cached_train, strict=True)}
        views = capture.views
        if camera_to_worlds is not None:
            views = [
                replace(view, camera_to_world=pose.to(self.device))
                for view, pose in zip(views, camera_to_worlds, strict=True)
            ]
        return create_lift_views(
            capture,
            views,
            load_tokens=lambda view: load_tokens(frames[view.name]),
            load_mask=lambda view: _load_mask(frames[view.name]),
        )

    def load_tokens_of_camera(self, camera: Cameras) -> Float[Tensor, "h w embed"] | None:
        """Tokens of the captured frame at the camera's pose, if there is one and its tokens are in the cache."""
        if self.tokens is None:
            return None
        pose = camera.camera_to_worlds.reshape(3, 4).cpu()
        for dataset, name in ((self.train_dataset, "cached_train"), (self.eval_dataset, "cached_eval")):
            difference = (dataset.cameras.camera_to_worlds - pose).abs().amax(dim=(1, 2))
            nearest = int(difference.argmin())
            if float(difference[nearest]) <= SAME_POSE_TOLERANCE:
                return self.tokens.load_if_cached(getattr(self, name)[nearest])
        return None

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """The next training frame; the order is an own generator's, saved with the run."""
        index = self.train_unseen_cameras.pop(0)
        if not self.train_unseen_cameras:
            self.train_unseen_cameras = self.sample_train_cameras()
        camera = self.train_cameras[index : index + 1]
        camera.metadata = {"cam_idx": index}
        return camera, self._create_batch(self.cached_train[index], self.tokens_in_training)

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """A held-out frame that was not drawn since all had been."""
        position = random.randint(0, len(self.eval_unseen_cameras) - 1)
        index = self.eval_unseen_cameras.pop(position)
        if not self.eval_unseen_cameras:
            self.eval_unseen_cameras = list(range(len(self.eval_dataset)))
        camera = self.eval_dataset.cameras[index : index + 1].to(self.device)
        return camera, self._create_batch(self.cached_eval[index])

    @property
    def fixed_indices_eval_dataloader(self) -> list[tuple[Cameras, dict[str, Any]]]:  # type: ignore[override]
        """All held-out frames in order, with tokens extracted where they are missing."""
        if self.tokens is not None:
            self.tokens.extract(self.cached_eval)
        cameras = self.eval_dataset.cameras.to(self.device)
        return [(cameras[i : i + 1], self._create_batch(data)) for i, data in enumerate(self.cached_eval)]

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
        """Puts back what `capture_order` took.

        Raises:
            ValueError: The checkpoint saw another number of frames.
        """
        train_is_short = any(index >= len(self.train_dataset) for index in state["train"])
        if train_is_short or any(index >= len(self.eval_dataset) for index in state["eval"]):
            raise ValueError("The checkpoint was made with more frames than --data has now; restore the data.")
        self.train_unseen_cameras = list(state["train"])
        self.eval_unseen_cameras = list(state["eval"])
        if "generator" in state:
            version, keys, gauss = state["generator"]
            self.random_generator.setstate((version, tuple(keys), gauss))
        if "epochs" in state:
            self.train_unsampled_epoch_count = state["epochs"].numpy()

    def _create_batch(self, data: dict[str, Any], with_tokens: bool = True) -> dict[str, Any]:
        batch = {key: value for key, value in data.items() if key != KEY}
        batch["image"] = batch["image"].to(self.device)
        if self.tokens is not None and with_tokens:
            batch["patch_tokens"] = self.tokens.load(data)
        return batch

    def _load_images(self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]) -> list[Any]:
        dataset = self.train_dataset if split == "train" else self.eval_dataset

        def load(index: int) -> dict[str, Any]:
            return dataset.get_data(index, image_type=self.config.cache_images_type)

        with ThreadPoolExecutor(max_workers=NUM_LOADING_THREADS) as executor:
            loaded = executor.map(load, range(len(dataset)))
            frames = list(track(loaded, f"Loading {split} images", total=len(dataset)))
        if cache_images_device == "gpu":
            return [_to_device(frame, self.device) for frame in frames]
        return frames


def _load_mask(data: dict[str, Any]) -> Tensor | None:
    return data["mask"][..., 0] if "mask" in data else None


def _to_device(frame: dict[str, Any], device: Any) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in frame.items()}
