"""What every disk layout is read into: frames with their lenses and poses, and the seed points.

All poses and points of one `CaptureFiles` share one world, the dataset's own, before any orientation or scaling.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.geometry.lenses import Lens

Split = Literal["train", "val", "test"]
Layout = Literal["scannetpp", "nerfstudio", "colmap"]


@dataclass(frozen=True)
class Frame:
    """One image on disk with its camera."""

    image_path: Path
    """The photograph; it may be distorted as `lens` says."""
    lens: Lens
    """Intrinsics and distortion of the file at `image_path`, at its own size."""
    camera_to_world: Float[Tensor, "3 4"]
    """OpenGL camera pose in the dataset's world, float32."""
    split: Split = "train"
    """`test` frames never train anything."""
    mask_path: Path | None = None
    """8-bit image of the photograph's size, 255 = use; None: every pixel is used."""
    depth_path: Path | None = None
    """16-bit z-depth in millimetres aligned with the photograph, 0 = no measurement."""
    is_bad: bool = False
    """Marked unusable by the dataset; stays out of training and evaluation."""


@dataclass(frozen=True)
class PointCloud:
    """Coloured seed points in the dataset's world."""

    xyz: Float[Tensor, "points 3"]
    """Positions, float32."""
    rgb: UInt8[Tensor, "points 3"]
    """Colours, 0-255."""


@dataclass(frozen=True)
class CaptureFiles:
    """One scene folder, read."""

    root: Path
    """The folder that was given as `--data`."""
    layout: Layout
    """Which disk layout it was read as."""
    description: str
    """One sentence for the user: what was found and which variant was taken."""
    frames: list[Frame]
    """All frames in file order, bad ones included."""
    points: PointCloud | None = None
    """Seed points, or None where the capture has none."""
    is_metric: bool = False
    """True where the dataset's world is in metres (ScanNet++)."""
    scene_id: str = field(default="")
    """Name of the scene, the folder's name by default."""
    colmap_to_world: Float[Tensor, "3 4"] | None = None
    """Moves points of the capture's COLMAP world into the dataset's world; None where no COLMAP world is known."""
