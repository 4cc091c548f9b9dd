"""`FigureImage`: a picture of a figure, and the lifted scenes that hold it as a photograph.

A photograph that a scene holds is shown as the scene's view sees it (undistorted, at the view's size), so that rendered
features and the backbones' tokens belong to the same pixels. Everything else is shown as it lies on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.data.images import load_image
from fit3d_ns.geometry.cameras import resize_Ks
from fit3d_ns.scene import FeatureScene, PosedCapture, RenderedFeatures, View, load_scene
from fit3d_ns.utils.progress import notice

MAX_DEFAULT_SIDE = 640
"""Larger pictures are reduced to this longer side unless one is asked for: tokens grow with the square of it."""


@dataclass(frozen=True)
class SceneView:
    """The view of a lifted scene whose photograph a picture is."""

    scene: FeatureScene
    """The scene."""
    capture: PosedCapture
    """Its photographs, where they lie now."""
    view: View
    """The camera."""

    def render(self, width: int, height: int, size: tuple[int, int]) -> RenderedFeatures:
        """The scene's features of a picture of this size at a token grid (h, w), on the CPU."""
        view = self.view
        K = resize_Ks(view.K, (view.width, view.height), (width, height))
        rendered = self.scene.render_features_with_alpha(view.camera_to_world, K, width, height, size)
        return RenderedFeatures(rendered.features.cpu(), rendered.alphas.cpu())


@dataclass(frozen=True)
class FigureImage:
    """One picture."""

    name: str
    """How the figure calls it."""
    pixels: UInt8[Tensor, "height width 3"]
    """RGB, at the size that backbones are shown."""
    scene_views: tuple[SceneView, ...] = ()
    """Scenes that hold it, one per scene file."""

    @property
    def image(self) -> Float[Tensor, "height width 3"]:
        """RGB in [0, 1]."""
        return self.pixels.float() / 255.0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


class SceneShelf:
    """Lifted scenes, looked up by photograph; made by `open_scenes`."""

    def __init__(self, scenes: Sequence[FeatureScene], data_root: Path | None = None) -> None:
        self.scenes = list(scenes)
        self.by_photograph: dict[Path, list[SceneView]] = {}
        for scene in scenes:
            capture = scene.capture(data_root)
            for view in capture.views:
                found = self.by_photograph.setdefault(view.frame.image_path.resolve(), [])
                found.append(SceneView(scene, capture, view))

    def find(self, path: Path) -> tuple[SceneView, ...]:
        """The views whose photograph is this file."""
        return tuple(self.by_photograph.get(Path(path).resolve(), ()))


def open_scenes(paths: Sequence[Path], data_root: Path | None = None, device: str = "cpu") -> SceneShelf:
    """Opens scene files; their Gaussians are read when they are rendered.

    Raises:
        ValueError: A file is no scene, or its photographs are gone.
    """
    return SceneShelf([load_scene(path, device) for path in paths], data_root)


def load_figure_image(path: Path, shelf: SceneShelf, longest_side: int | None = None) -> FigureImage:
    """Loads a picture, as a scene's view sees it if there is one.

    Args:
        path: The file.
        shelf: Scenes that may hold it.
        longest_side: Longer side in pixels to resize to; by default pictures stay as they are up to 640 pixels.

    Raises:
        ValueError: The file is missing or no 8-bit photograph.
    """
    found = shelf.find(path)
    pixels = found[0].capture.load_image(found[0].view) if found else load_image(path)
    return FigureImage(Path(path).name, resize(pixels, longest_side), found)


def load_figure_images(paths: Sequence[Path], shelf: SceneShelf, longest_side: int | None = None) -> list[FigureImage]:
    """Loads pictures; says so where scenes are given that hold none of them.

    Raises:
        ValueError: As `load_figure_image`.
    """
    images = [load_figure_image(path, shelf, longest_side) for path in paths]
    if shelf.scenes and not any(image.scene_views for image in images):
        notice(
            f"None of the pictures is a photograph of {', '.join(scene.scene_id for scene in shelf.scenes)}; "
            "the column of feature Gaussians stays empty."
        )
    return images


def resize(
    pixels: UInt8[Tensor, "height width 3"], longest_side: int | None
) -> UInt8[Tensor, "new_height new_width 3"]:
    """Resizes to a longer side, areas averaged where it shrinks; None only reduces what is beyond 640 pixels."""
    height, width = pixels.shape[:2]
    wanted = longest_side or min(max(height, width), MAX_DEFAULT_SIDE)
    scale = wanted / max(height, width)
    if scale == 1.0:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    rule = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_CUBIC
    return torch.from_numpy(cv2.resize(pixels.numpy(), size, interpolation=rule))
