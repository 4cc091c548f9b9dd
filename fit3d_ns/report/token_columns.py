"""`TokenColumn`: the tokens of one column of a feature figure, over the frames that share their colours.

Columns of a row are: the original backbone, the fine-tuned ones, and the features that lifted scenes render.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features import compute_patch_grid, create_extractor
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.figure_images import FigureImage, SceneView
from fit3d_ns.scene import RenderedFeatures
from fit3d_ns.utils.progress import notice, track


@dataclass(frozen=True)
class FrameTokens:
    """Tokens of one picture."""

    tokens: Float[Tensor, "h w embed"]
    """The map."""
    alphas: Float[Tensor, "h w"] | None = None
    """How much of each token a scene covers; None: all of it."""

    @property
    def rows(self) -> Float[Tensor, "n embed"]:
        """The tokens that count, float32: all, or those that a scene covers by more than half."""
        # (h, w, e) -> (n, e)
        flat = self.tokens.flatten(0, 1).float()
        return flat if self.alphas is None else flat[self.is_covered.flatten()]

    @property
    def is_covered(self) -> Tensor:
        """[h, w], True where tokens count."""
        if self.alphas is None:
            return torch.ones(self.tokens.shape[:2], dtype=torch.bool)
        return self.alphas > 0.5


@dataclass(frozen=True)
class TokenColumn:
    """One column."""

    label: str
    """Above the column."""
    frames: list[FrameTokens | None]
    """One per picture; None where there is nothing to show."""
    is_rendered: bool = False
    """True for features of a scene."""

    @property
    def is_empty(self) -> bool:
        """True if no picture has tokens."""
        return all(frame is None for frame in self.frames)

    def select(self, index: int) -> "TokenColumn":
        """The column of one picture alone."""
        return TokenColumn(self.label, [self.frames[index]], self.is_rendered)


def list_column_labels(groups: Sequence[ComparedBackbones], has_scenes: bool) -> list[str]:
    """Labels of the columns of tokens, the same for every row of a figure."""
    most = max(len(group.finetuned) for group in groups)
    finetuned = ["fine-tuned"] if most == 1 else [f"fine-tuned {number + 1}" for number in range(most)]
    return ["original", *finetuned, *(["feature Gaussians"] if has_scenes else [])]


@torch.no_grad()
def extract_columns(
    group: ComparedBackbones,
    images: Sequence[FigureImage],
    labels: Sequence[str],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[TokenColumn]:
    """Tokens of the pictures by every backbone of a group and by the scenes that were lifted from its original.

    Args:
        group: The backbones; each is built, used and forgotten.
        images: The pictures.
        labels: Of `list_column_labels`.
        device: Where backbones run.
        dtype: In which tokens are kept; half precision for long clips.
    """
    members = [group.original, *group.finetuned]
    columns = []
    for label, member in zip(labels, members, strict=False):
        if member is None:
            columns.append(TokenColumn(label, [None] * len(images)))
            continue
        extractor = create_extractor(member.description, device=device)
        frames: list[FrameTokens | None] = []
        for image in track(images, f"Extracting tokens of {member.label}"):
            # (h, w, 3) -> (1, 3, h, w)
            tokens = extractor(image.image.permute(2, 0, 1)[None].to(device)).maps[0]
            frames.append(FrameTokens(tokens.to("cpu", dtype)))
        columns.append(TokenColumn(label, frames))
    num_missing = sum(label.startswith("fine-tuned") for label in labels) - len(group.finetuned)
    columns += [TokenColumn(label, [None] * len(images)) for label in labels[len(members) :][:num_missing]]
    if labels[-1] == "feature Gaussians":
        columns.append(TokenColumn(labels[-1], [_render(group, image, dtype) for image in images], is_rendered=True))
    return columns


def _render(group: ComparedBackbones, image: FigureImage, dtype: torch.dtype) -> FrameTokens | None:
    description = group.description
    for scene_view in image.scene_views:
        if not _is_lifted_from(group, scene_view):
            continue
        height, width = image.size
        size = compute_patch_grid(height, width, description.patch_size)
        rendered: RenderedFeatures = scene_view.render(width, height, size)
        return FrameTokens(rendered.features.to(dtype), rendered.alphas)
    return None


def _is_lifted_from(group: ComparedBackbones, scene_view: SceneView) -> bool:
    """Whether a scene holds features of the group's original; a scene of its architecture that does not is named."""
    lifted, description = scene_view.scene.backbone, group.description
    if lifted.architecture.split(".")[0] != description.architecture.split(".")[0]:
        return False
    if group.original is None:
        return True
    differences = description.find_differences(lifted)
    if differences:
        notice(
            f"Scene {scene_view.scene.scene_id} holds features of another {lifted.backbone} "
            f"({'; '.join(differences)}); it is not shown beside {group.members[0].label}."
        )
    return not differences
