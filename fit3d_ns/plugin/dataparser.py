"""`fit3d`: the dataparser that looks at a scene folder and reads whichever layout it finds there.

nerfstudio loads this module while its own datamanagers are half imported. It must import nothing of nerfstudio but
dataparsers, cameras, the scene box and the registry, or every `ns-*` command of the user dies of a circular import.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras import camera_utils
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles, Frame
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.transforms import parse_lens
from fit3d_ns.geometry.cameras import Lens, transform_points
from fit3d_ns.utils.progress import notice, notice_once

INTRINSICS = ("fx", "fy", "cx", "cy", "width", "height")
"""What a `Lens` and nerfstudio's cameras name alike."""


@dataclass
class FeatureDataParserConfig(DataParserConfig):
    """Reads ScanNet++ (`dslr/`), nerfstudio (`transforms.json`) and COLMAP (`sparse/`, `colmap/`) scene folders."""

    _target: type = field(default_factory=lambda: FeatureDataParser)
    data: Path = Path()
    """Scene folder; its content tells the layout."""
    layout: Literal["auto", "scannetpp", "nerfstudio", "colmap"] = "auto"
    """Which layout to read; `auto` looks for `dslr/`, then `transforms.json`, then a COLMAP model."""
    strict: bool = False
    """Refuse a capture with missing photographs; otherwise their frames are left out where most are there."""
    scale_factor: float = 1.0
    """Extra factor on camera positions and points, positive."""
    orientation_method: Literal["pca", "up", "vertical", "none"] = "up"
    """How the world is turned; `up` makes the mean camera up vector point along +z."""
    center_method: Literal["poses", "focus", "none"] = "poses"
    """What becomes the origin: the mean camera position, the point cameras look at, or nothing."""
    auto_scale_poses: bool = True
    """Scale the world so that all cameras lie within [-1, 1]; depth in metres divides by the stored scale."""
    scene_scale: float = 1.5
    """Half the side of the scene box in scaled units, for the viewer."""
    eval_mode: Literal["split", "all"] = "split"
    """`split` trains on training frames only; `all` trains on test frames too, as the authors' public code does."""
    center_principal_point: bool = False
    """Undistorted photographs get their principal point in the middle, as the authors' preparation does."""


class FeatureDataParser(DataParser):
    """Turns a `CaptureFiles` into nerfstudio's dataparser outputs; cameras keep their lens distortion here."""

    config: FeatureDataParserConfig
    downscale_factor: int | None = None

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
        files = self._files
        usable = [frame for frame in files.frames if not frame.is_bad]
        poses, transform, scale = self._place_world(usable)
        indices = _select_frames(usable, split, self.config.eval_mode)
        frames = [usable[index] for index in indices]
        metadata: dict[str, Any] = {
            "mask_paths": [frame.mask_path for frame in frames],
            "lenses": [replace(frame.lens, is_centred=self.config.center_principal_point) for frame in frames],
            "depth_paths": [frame.depth_path for frame in frames],
            "scene_id": files.scene_id or files.root.name,
            "metric_scale": scale if files.is_metric else None,
        }
        if files.points is not None and split == "train":
            metadata["points3D_xyz"] = transform_points(files.points.xyz, transform, scale)
            metadata["points3D_rgb"] = files.points.rgb
        half = self.config.scene_scale * (1.0 if self.config.auto_scale_poses else float(poses[:, :3, 3].abs().max()))
        return DataparserOutputs(
            image_filenames=[frame.image_path for frame in frames],
            cameras=create_cameras([frame.lens for frame in frames], poses[indices]),
            scene_box=SceneBox(aabb=torch.tensor([[-half] * 3, [half] * 3])),
            dataparser_transform=transform,
            dataparser_scale=scale,
            metadata=metadata,
        )

    @cached_property
    def _files(self) -> CaptureFiles:
        files = read_capture(self.config.data, self.config.layout, self.config.strict)
        bad = sum(frame.is_bad for frame in files.frames)
        notice(files.description + (f" {bad} frames marked bad are left out." if bad else ""))
        if files.points is None:
            notice("The capture has no seed points; Gaussians start at random positions, which takes longer.")
        return files

    def _place_world(self, frames: list[Frame]) -> tuple[Float[Tensor, "frames 3 4"], Float[Tensor, "3 4"], float]:
        """Poses after orientation, centring and scaling, with the transform and the scale that did it."""
        last_row = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
        poses, transform = camera_utils.auto_orient_and_center_poses(
            torch.stack([torch.cat([frame.camera_to_world, last_row]) for frame in frames]),
            method=self.config.orientation_method,
            center_method=self.config.center_method,
        )
        scale = float(self.config.scale_factor)
        if self.config.auto_scale_poses:
            reach = float(poses[:, :3, 3].abs().max())
            scale /= reach if reach > 0 else 1.0
        poses = poses[:, :3, :4].clone()
        poses[:, :, 3] *= scale
        return poses, transform[:3, :4], scale


def create_cameras(lenses: list[Lens], camera_to_worlds: Float[Tensor, "frames 3 4"]) -> Cameras:
    """nerfstudio cameras of lenses and poses; distortion in nerfstudio's order k1 k2 k3 k4 p1 p2."""
    types = [CameraType.FISHEYE if lens.model == "fisheye" else CameraType.PERSPECTIVE for lens in lenses]
    return Cameras(
        camera_to_worlds=camera_to_worlds,
        **{name: torch.tensor([[getattr(lens, name)] for lens in lenses]) for name in INTRINSICS},
        distortion_params=torch.tensor([_distortion_parameters(lens) for lens in lenses]),
        camera_type=torch.tensor([[camera_type.value] for camera_type in types]),
    )


def read_lens(cameras: Cameras, index: int) -> Lens:
    """The lens of one nerfstudio camera, whichever dataparser made it; a ValueError if it cannot be undistorted."""
    camera_type = CameraType(int(cameras.camera_type[index].item()))
    models = {CameraType.PERSPECTIVE: "OPENCV", CameraType.FISHEYE: "OPENCV_FISHEYE"}
    if camera_type not in models:
        raise ValueError(f"Camera {index} has type {camera_type.name}; taken are PERSPECTIVE and FISHEYE.")
    values, keys = [getattr(cameras, name)[index].item() for name in INTRINSICS], ("fl_x", "fl_y", "cx", "cy", "w", "h")
    entry = {"camera_model": models[camera_type], **dict(zip(keys, values, strict=True))}
    if cameras.distortion_params is not None:
        entry["distortion_params"] = cameras.distortion_params[index].tolist()
    return parse_lens(entry, f"Camera {index}")


def _distortion_parameters(lens: Lens) -> list[float]:
    given = [float(value) for value in lens.distortion] + [0.0] * 5
    if lens.model == "fisheye":
        return [*given[:4], 0.0, 0.0]
    k1, k2, p1, p2, k3 = given[:5]
    if any(lens.distortion[5:]):
        notice_once("rational", "Distortion k4 to k6 is read by fit3d-features only; other methods see k1 to k3.")
    return [k1, k2, k3, 0.0, p1, p2]


def _select_frames(frames: list[Frame], split: str, eval_mode: str) -> list[int]:
    if split == "train":
        chosen = [i for i, frame in enumerate(frames) if eval_mode == "all" or frame.split == "train"]
        if not chosen:
            raise ValueError("The capture has no training frames; check its train/test list.")
        return chosen
    # nerfstudio asks for `val` while training and `test` in `ns-eval`; both mean the held-out frames.
    held_out = [i for i, frame in enumerate(frames) if frame.split != "train"]
    if not held_out:
        notice("The capture holds out no frame: its metrics are of training frames.")
    exact = [i for i in held_out if frames[i].split == split]
    return exact or held_out or list(range(len(frames)))


fit3d_dataparser = DataParserSpecification(
    config=FeatureDataParserConfig(),
    description="ScanNet++, nerfstudio or COLMAP scene folders, recognised by their content.",
)
