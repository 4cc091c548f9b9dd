"""`UndistortedDataset`: nerfstudio's view of a capture in which every camera is a pinhole camera already.

Pixels come from `PosedCapture`, the one place that loads and undistorts them for every stage. nerfstudio's own
datamanager undistorts while caching and rewrites cameras as it goes, so what they say depends on when one asks.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from nerfstudio.cameras.camera_optimizers import CameraOptimizer
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs, transform_poses_to_original_space
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from fit3d_ns.data.frames import Frame, Split
from fit3d_ns.geometry.undistortion import compute_undistortion, resize_lens
from fit3d_ns.plugin.dataparser import create_cameras, read_lens
from fit3d_ns.scene.posed_capture import PosedCapture, View, choose_downscale_factor

_KEEP_SIZE = "--pipeline.datamanager.max-image-side 0"
"""What the notice about large photographs names."""


class UndistortedDataset(InputDataset):
    """Photographs and masks of one split, undistorted, with pinhole cameras that never change afterwards."""

    def __init__(
        self, outputs: DataparserOutputs, scale_factor: float, data: Path, split: Split, max_side: int = 0
    ) -> None:
        """Reads lenses and poses of any dataparser's frames; no image is opened.

        Photographs are resized by `scale_factor`, in (0, 1], before they are undistorted; where that is 1, those with a
        longer side than `max_side` are halved until they fit (0: never). `data` is the scene folder or camera file
        given as `--data`. A ValueError names a camera model that cannot be undistorted.
        """
        super().__init__(outputs, scale_factor=1.0)
        if not 0.0 < scale_factor <= 1.0:
            raise ValueError(f"camera_res_scale_factor must be in (0, 1], not {scale_factor}.")
        root = data.parent if data.is_file() else data
        self.capture = _create_capture(outputs, scale_factor, root, split, max_side)
        lenses = [view.undistortion.lens for view in self.capture.views]
        self.cameras = create_cameras(lenses, outputs.cameras.camera_to_worlds)

    def get_numpy_image(self, image_idx: int) -> UInt8[np.ndarray, "height width channels"]:
        """The undistorted photograph, with its alpha channel if it has one.

        nerfstudio puts the dataparser's `alpha_color` behind it, else the model its background. A ValueError names a
        file that is missing, damaged or of the wrong size.
        """
        return self.capture.load_rgba(self.capture.views[image_idx]).numpy()

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        """One frame: `image` [H, W, 3 or 4], `image_idx`, and `mask` [H, W, 1] where some pixels may not be used.

        Where the photograph is transparent somewhere, colours learn the background there and features nothing: then
        `feature_mask` [H, W, 1] is what features use instead of `mask`, and `photograph` what the backbone sees.
        """
        image = self.get_image_uint8(image_idx) if image_type == "uint8" else self.get_image_float32(image_idx)
        data: dict[str, Any] = {"image_idx": image_idx, "image": image}
        view = self.capture.views[image_idx]
        valid_mask, opaque = self.capture.load_mask(view), self.capture.load_opaque_mask(view)
        if not bool(valid_mask.all()):
            data["mask"] = valid_mask[..., None].float()
        if opaque is not None:
            data["feature_mask"] = (valid_mask & opaque)[..., None].float()
            data["photograph"] = self.capture.load_image(view)
        return data


def get_photograph(frame: dict[str, Any]) -> Shaped[Tensor, "height width 3"]:
    """What the backbone sees of a loaded frame."""
    return frame.get("photograph", frame["image"])


def get_feature_mask(frame: dict[str, Any]) -> Float[Tensor, "height width 1"] | None:
    """Where features may be learnt from a loaded frame; None: everywhere."""
    return frame.get("feature_mask", frame.get("mask"))


@torch.no_grad()
def correct_poses(optimizer: CameraOptimizer, cameras: Cameras) -> Float[Tensor, "cameras 3 4"]:
    """Training poses after the camera optimizer, as rendering in training applies it, on the cameras' device."""
    corrected = []
    for index in range(len(cameras)):
        camera = cameras[index : index + 1]
        camera.metadata = {"cam_idx": index}
        corrected.append(optimizer.apply_to_camera(camera)[0])
    return torch.stack(corrected)


def _create_capture(
    outputs: DataparserOutputs, scale_factor: float, root: Path, split: Split, max_side: int
) -> PosedCapture:
    masks, depths = _collect_paths(outputs, "mask"), _collect_paths(outputs, "depth")
    transform, scale = outputs.dataparser_transform[:3, :4], float(outputs.dataparser_scale)
    poses = outputs.cameras.camera_to_worlds
    original_poses = transform_poses_to_original_space(poses, transform, scale, "opengl")
    views = []
    for index, path in enumerate(map(Path, outputs.image_filenames)):
        # Ours say lenses that nerfstudio's cameras have no place for.
        lens = outputs.metadata["lenses"][index] if "lenses" in outputs.metadata else read_lens(outputs.cameras, index)
        frame = Frame(
            image_path=path,
            lens=lens,
            camera_to_world=original_poses[index],
            split=split,
            mask_path=masks[index],
            depth_path=depths[index],
        )
        factor = scale_factor
        if factor == 1.0:
            factor /= choose_downscale_factor(max(lens.width, lens.height), max_side, _KEEP_SIZE)
        width, height = (max(round(side * factor), 1) for side in (lens.width, lens.height))
        K = compute_undistortion(resize_lens(lens, width, height)).lens.K
        name = path.relative_to(root) if path.is_relative_to(root) else path
        views.append(View(name.as_posix(), poses[index], K, width, height, split, frame))
    return PosedCapture(
        root=root,
        views=views,
        dataparser_transform=transform.float(),
        dataparser_scale=scale,
        metric_scale=outputs.metadata.get("metric_scale"),
        scene_id=outputs.metadata.get("scene_id", root.name),
    )


def _collect_paths(outputs: DataparserOutputs, kind: Literal["mask", "depth"]) -> list[Path | None]:
    """Ours name masks and depths frame by frame; nerfstudio's parsers name all or none."""
    if f"{kind}_paths" in outputs.metadata:
        return list(outputs.metadata[f"{kind}_paths"])
    if kind == "mask" and outputs.mask_filenames is not None:
        return [Path(path) for path in outputs.mask_filenames]
    return [None] * len(outputs.image_filenames)
