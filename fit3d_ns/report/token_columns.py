"""`TokenColumn`: the tokens of one column of a feature figure, over the pictures that share their colours.

Columns of a row are the original backbone, the fine-tuned ones, and the features that lifted scenes render. A
photograph that a scene holds is shown as the scene's view sees it (undistorted, at the view's size), so that rendered
features and the backbones' tokens belong to the same pixels; everything else is shown as it lies on disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

import cv2
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from fit3d_ns.data.images import load_image
from fit3d_ns.features import FeatureExtractor, compute_patch_grid, create_extractor
from fit3d_ns.geometry.cameras import Camera, resize_Ks
from fit3d_ns.lifting.blending import average_over_views
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.scene import FeatureScene, PosedCapture, View, load_scene
from fit3d_ns.utils.progress import notice, track

MAX_AVERAGED_VIEWS = 32
"""Pictures show features averaged over so many lifted views; with more they are no smoother."""
MAX_DEFAULT_SIDE = 640
"""Larger pictures are reduced to this longer side unless one is asked for: tokens grow with the square of it."""
_RENDERED = "lifted"
"""Label of the column of rendered features."""


@dataclass(frozen=True)
class SceneView:
    """The view of a lifted scene whose photograph a picture is."""

    scene: FeatureScene
    capture: PosedCapture
    """Its photographs, where they lie now."""
    view: View
    get_averaged: Callable[[], FeatureScene]
    """The scene with its features averaged over the lifted views, which is what pictures show: a solve also fits the
    noise of single views, which is speckle where a scene is drawn sharper than its tokens."""


@dataclass(frozen=True)
class FigureImage:
    """One picture and its short name."""

    name: str
    pixels: UInt8[Tensor, "height width 3"]
    """RGB, at the size that backbones are shown."""
    scene_views: tuple[SceneView, ...] = ()
    """Scenes that hold it, one per scene file."""

    @property
    def image(self) -> Float[Tensor, "height width 3"]:
        return self.pixels.float() / 255.0

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[0], self.pixels.shape[1]


SceneIndex = dict[Path, list[SceneView]]
"""Views of lifted scenes by the resolved path of the photograph."""


def open_scenes(paths: Sequence[Path], data_root: Path | None = None, device: str = "cpu") -> SceneIndex:
    """Opens scene files; their Gaussians are read when they are rendered.

    ValueError where one is no scene, or its photographs are gone.
    """
    scene_index: SceneIndex = {}
    for scene in (load_scene(path, device) for path in paths):
        capture = scene.capture(data_root)
        get_averaged = cache(partial(average_over_views, scene, capture, MAX_AVERAGED_VIEWS))
        for view in capture.views:
            found = scene_index.setdefault(view.frame.image_path.resolve(), [])
            found.append(SceneView(scene, capture, view, get_averaged))
    return scene_index


def load_figure_image(path: Path, scene_index: SceneIndex, longest_side: int | None = None) -> FigureImage:
    """Loads a picture, as a scene's view sees it if there is one, else upright; `longest_side` as for `resize`.

    ValueError where the file is missing or not an 8-bit photograph.
    """
    found = scene_index.get(path.resolve(), [])
    pixels = found[0].capture.load_image(found[0].view) if found else load_image(path, upright=True)
    return FigureImage(path.name, resize(pixels, longest_side), tuple(found))


def load_figure_images(
    paths: Sequence[Path], scene_index: SceneIndex, longest_side: int | None = None
) -> list[FigureImage]:
    """Loads pictures as `load_figure_image` does; says so where scenes are given that hold none of them."""
    images = [load_figure_image(path, scene_index, longest_side) for path in paths]
    if scene_index and not any(image.scene_views for image in images):
        names = dict.fromkeys(own.scene.scene_id for views in scene_index.values() for own in views)
        said = f"None of the pictures is a photograph of {', '.join(names)}"
        notice(f'{said}; the column "{_RENDERED}" stays empty.')
    return images


def resize(
    pixels: UInt8[Tensor, "height width 3"], longest_side: int | None
) -> UInt8[Tensor, "new_height new_width 3"]:
    """Resizes to a longer side in pixels, averaging areas where it shrinks; None only reduces what is beyond 640."""
    height, width = pixels.shape[:2]
    wanted = longest_side or min(max(height, width), MAX_DEFAULT_SIDE)
    scale = wanted / max(height, width)
    if scale == 1.0:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    rule = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_CUBIC
    return torch.from_numpy(cv2.resize(pixels.numpy(), size, interpolation=rule))


@dataclass(frozen=True)
class FrameTokens:
    """Tokens of one picture."""

    tokens: Float[Tensor, "h w embed"]
    alphas: Float[Tensor, "h w"]
    """How much of each token is covered: all of it but where a scene is shown."""
    render: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Where a scene is shown: takes components [c, embed] and mean [embed], and gives coefficients and opacity at every
    pixel of the picture, because a scene can be shown sharper than its tokens."""

    def project(
        self, components: Float[Tensor, "c embed"], mean: Float[Tensor, " embed"]
    ) -> tuple[Float[Tensor, "height width c"], Float[Tensor, "height width"]]:
        """Coefficients in a basis and how much is covered, as sharp as can be drawn: by pixels, else by tokens."""
        if self.render is not None:
            coefficients, alphas = self.render(components, mean)
            return coefficients.cpu(), alphas.cpu()
        return (self.tokens.float() - mean) @ components.T, self.alphas

    @property
    def rows(self) -> Float[Tensor, "n embed"]:
        """The tokens that count, float32: those that are covered by more than half."""
        # (h, w, e) -> (n, e)
        return self.tokens[self.is_covered].float()

    @property
    def is_covered(self) -> Bool[Tensor, "h w"]:
        return self.alphas > 0.5


@dataclass(frozen=True)
class TokenColumn:
    """One column with the label above it."""

    label: str
    frames: list[FrameTokens | None]
    """One per picture; None where there is nothing to show."""
    is_rendered: bool = False
    """True for features of a scene."""

    @property
    def is_empty(self) -> bool:
        return all(frame is None for frame in self.frames)

    def select(self, index: int) -> "TokenColumn":
        """The column of one picture alone."""
        return TokenColumn(self.label, [self.frames[index]], self.is_rendered)


def extract_tokens(extractor: FeatureExtractor, pixels: UInt8[Tensor, "height width 3"]) -> Float[Tensor, "h w embed"]:
    """A backbone's tokens of a picture, on the picture's device."""
    # (h, w, 3) -> (1, 3, h, w)
    return extractor(pixels.permute(2, 0, 1)[None] / 255.0).maps[0]


def list_column_labels(groups: Sequence[ComparedBackbones], has_scenes: bool) -> list[str]:
    """Labels of the columns of tokens, the same for every row of a figure."""
    most = max(len(group.finetuned) for group in groups)
    finetuned = ["fine-tuned"] if most == 1 else [f"fine-tuned {number + 1}" for number in range(most)]
    return ["original", *finetuned, *([_RENDERED] if has_scenes else [])]


@torch.no_grad()
def extract_columns(
    group: ComparedBackbones,
    images: Sequence[FigureImage],
    labels: Sequence[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[TokenColumn]:
    """Tokens of the pictures by every backbone of a group and by the scenes that were lifted from its original.

    Each backbone is built, used and forgotten. `labels` are of `list_column_labels`; in `dtype` tokens are kept.
    """
    columns = []
    of_backbones = [label for label in labels if label != _RENDERED]
    for label, member in zip_longest(of_backbones, [group.original, *group.finetuned]):
        if member is None:
            columns.append(TokenColumn(label, [None] * len(images)))
            continue
        extractor = create_extractor(member.description, device=device)
        frames: list[FrameTokens | None] = []
        for image in track(images, f"Extracting tokens of {member.label}"):
            tokens = extract_tokens(extractor, image.pixels).to(dtype)
            frames.append(FrameTokens(tokens, torch.ones(tokens.shape[:2])))
        columns.append(TokenColumn(label, frames))
    if _RENDERED in labels:
        columns.append(TokenColumn(_RENDERED, [_render(group, image, dtype) for image in images], is_rendered=True))
    return columns


def _render(group: ComparedBackbones, image: FigureImage, dtype: torch.dtype) -> FrameTokens | None:
    height, width = image.size
    patch_grid = compute_patch_grid(height, width, group.description.patch_size)
    for scene_view in image.scene_views:
        scene, view = scene_view.scene, scene_view.view
        if _is_lifted_from(group, scene):
            K = resize_Ks(view.K, (view.width, view.height), (width, height))
            camera = Camera(view.camera_to_world, K, width, height)
            features, alphas = scene.render_features_with_alpha(camera, patch_grid)
            draw = partial(scene_view.get_averaged().render_coefficients, camera)
            return FrameTokens(features.to("cpu", dtype), alphas.cpu(), draw)
    return None


def _is_lifted_from(group: ComparedBackbones, scene: FeatureScene) -> bool:
    """Whether a scene holds features of the group's original; a scene of its architecture that does not is named."""
    lifted, description = scene.backbone, group.description
    if lifted.architecture.split(".")[0] != description.architecture.split(".")[0]:
        return False
    if group.original is None:
        return True
    differences = description.find_differences(lifted)
    if differences:
        said = f"Scene {scene.scene_id} holds features of another {lifted.backbone} ({'; '.join(differences)})"
        notice(f"{said}; it is not shown next to {group.members[0].label}.")
    return not differences
