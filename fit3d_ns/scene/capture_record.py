"""`PosedCapture` as plain JSON values: every float survives to the bit, every path is relative to the root."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.data.frames import Frame
from fit3d_ns.geometry.lenses import Lens
from fit3d_ns.scene.posed_capture import PosedCapture, View


def record_capture(capture: PosedCapture) -> dict[str, Any]:
    """The capture without its points; lenses are written once and referred to by number.

    Raises:
        ValueError: A mask or depth map lies outside the root.
    """
    lenses: dict[Lens, int] = {}
    views = [_record_view(view, capture.root, lenses) for view in capture.views]
    return {
        "root": str(Path(capture.root).absolute()),
        "scene_id": capture.scene_id,
        "layout": capture.layout,
        "num_bad": capture.num_bad,
        "dataparser_transform": _numbers(capture.dataparser_transform),
        "dataparser_scale": capture.dataparser_scale,
        "metric_scale": capture.metric_scale,
        "lenses": [_record_lens(lens) for lens in lenses],
        "views": views,
    }


def parse_capture(record: dict[str, Any]) -> PosedCapture:
    """The capture that `record_capture` wrote, with paths below the recorded root.

    Raises:
        KeyError, TypeError, IndexError, ValueError: The record is not what `record_capture` writes.
    """
    root = Path(record["root"])
    lenses = [Lens(**{**lens, "distortion": tuple(lens["distortion"])}) for lens in record["lenses"]]
    return PosedCapture(
        root=root,
        views=[_parse_view(view, root, lenses) for view in record["views"]],
        dataparser_transform=torch.tensor(record["dataparser_transform"]),
        dataparser_scale=float(record["dataparser_scale"]),
        metric_scale=None if record["metric_scale"] is None else float(record["metric_scale"]),
        num_bad=int(record["num_bad"]),
        scene_id=record["scene_id"],
        layout=record["layout"],
    )


def _record_view(view: View, root: Path, lenses: dict[Lens, int]) -> dict[str, Any]:
    frame = view.frame
    return {
        "image": view.name,
        "mask": _relative(frame.mask_path, root),
        "depth": _relative(frame.depth_path, root),
        "split": view.split,
        "lens": lenses.setdefault(frame.lens, len(lenses)),
        "dataset_camera_to_world": _numbers(frame.camera_to_world),
        "camera_to_world": _numbers(view.camera_to_world),
        "K": _numbers(view.K),
        "width": view.width,
        "height": view.height,
    }


def _parse_view(record: dict[str, Any], root: Path, lenses: list[Lens]) -> View:
    frame = Frame(
        image_path=_below(record["image"], root),
        lens=lenses[record["lens"]],
        camera_to_world=torch.tensor(record["dataset_camera_to_world"]),
        split=record["split"],
        mask_path=None if record["mask"] is None else _below(record["mask"], root),
        depth_path=None if record["depth"] is None else _below(record["depth"], root),
    )
    return View(
        name=record["image"],
        camera_to_world=torch.tensor(record["camera_to_world"]),
        K=torch.tensor(record["K"]),
        width=int(record["width"]),
        height=int(record["height"]),
        split=record["split"],
        frame=frame,
    )


def _record_lens(lens: Lens) -> dict[str, Any]:
    return {
        "fx": lens.fx,
        "fy": lens.fy,
        "cx": lens.cx,
        "cy": lens.cy,
        "width": lens.width,
        "height": lens.height,
        "model": lens.model,
        "distortion": list(lens.distortion),
    }


def _relative(path: Path | None, root: Path) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"{path} lies outside the capture's root {root}; move it below that folder.") from error


def _below(name: str, root: Path) -> Path:
    """A path of the file; one that leaves the root was not written by us."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"path {name!r} leaves the capture's root")
    return root / path


def _numbers(matrix: Tensor) -> list[list[float]]:
    # float32 to Python float and back is exact.
    return matrix.detach().cpu().float().tolist()
