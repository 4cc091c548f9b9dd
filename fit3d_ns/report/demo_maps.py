"""What the demo page shows, without the page: PCA, clusters and similarity maps of one picture by several backbones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.analysis.pictures import upscale
from fit3d_ns.analysis.similarity import compute_similarity, map_similarity_to_colours, pick_token
from fit3d_ns.features import FeatureExtractor, create_extractor
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.figure_images import FigureImage, resize
from fit3d_ns.report.token_colours import TokenColours, fit_cluster_colours, fit_pca_colours
from fit3d_ns.report.token_columns import FrameTokens, TokenColumn

Picture = Float[Tensor, "height width 3"]
_MARK = (1.0, 0.1, 0.1)


@dataclass(frozen=True, eq=False)
class AnalysedImage:
    """A picture with its tokens by every backbone."""

    image: FigureImage
    """At the size that backbones were shown."""
    columns: list[TokenColumn]
    """One per backbone, one frame each."""

    def draw_pca(self) -> list[Picture]:
        """One basis for all backbones."""
        return self._paint(fit_pca_colours(self.columns))

    def draw_kmeans(self, num_clusters: int, seed: int = 0) -> list[Picture]:
        """Clusters of each backbone in the first one's colours."""
        return self._paint(fit_cluster_colours(self.columns, num_clusters, seed))

    def draw_similarity(self, point: tuple[float, float]) -> list[Picture]:
        """How alike every token is to the one at a point (x, y), given in shares of width and height.

        Cosine relative to the picture's mean token: blue for -1, white for 0, red for 1.
        """
        height, width = self.image.size
        x, y = self._to_pixels(point)
        pictures = []
        for column in self.columns:
            tokens = self._get(column).tokens
            query = pick_token(tokens, (x, y), width, height)
            similarity = compute_similarity(tokens, query, tokens.mean(dim=(0, 1)))
            pictures.append(upscale(map_similarity_to_colours(similarity), self.image.size))
        return pictures

    def draw_point(self, point: tuple[float, float]) -> Picture:
        """The picture with the patch of a point framed."""
        height, width = self.image.size
        x, y = self._to_pixels(point)
        rows, columns = self._get(self.columns[0]).tokens.shape[:2]
        top, bottom = (round((int(y * rows / height) + step) * height / rows) for step in (0, 1))
        left, right = (round((int(x * columns / width) + step) * width / columns) for step in (0, 1))
        marked = self.image.image
        inside = marked[top:bottom, left:right].clone()
        marked[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = torch.tensor(_MARK)
        marked[top:bottom, left:right] = inside
        return marked

    def _paint(self, colours: TokenColours) -> list[Picture]:
        return [colours.paint(number, self._get(column), self.image.size) for number, column in enumerate(self.columns)]

    def _get(self, column: TokenColumn) -> FrameTokens:
        frame = column.frames[0]
        assert frame is not None
        return frame

    def _to_pixels(self, point: tuple[float, float]) -> tuple[float, float]:
        height, width = self.image.size
        # A click on the very edge belongs to the last pixel.
        x, y = (min(max(share, 0.0), 1.0) * side for share, side in zip(point, (width, height), strict=True))
        return min(x, width - 0.5), min(y, height - 0.5)


class ImageAnalyser:
    """Backbones that stay loaded and take one picture after another."""

    def __init__(self, group: ComparedBackbones, device: str = "cpu") -> None:
        self.labels = [f"original: {group.original.label}"] if group.original is not None else []
        self.labels += [f"fine-tuned: {member.label}" for member in group.finetuned]
        if any(member.description.is_random for member in group.members):
            self.labels = [f"{label} (random weights)" for label in self.labels]
        self.device = device
        self.extractors: Sequence[FeatureExtractor] = [
            create_extractor(member.description, device=device) for member in group.members
        ]

    @torch.no_grad()
    def analyse(self, pixels: UInt8[Tensor, "height width 3"], longest_side: int | None = None) -> AnalysedImage:
        """Tokens of a picture.

        Args:
            pixels: RGB.
            longest_side: Longer side in pixels to resize to; by default what is beyond 640 is reduced.

        Raises:
            ValueError: The picture is smaller than a patch.
        """
        image = FigureImage("picture", resize(pixels, longest_side))
        # (h, w, 3) -> (1, 3, h, w)
        batch = image.image.permute(2, 0, 1)[None].to(self.device)
        columns = [
            TokenColumn(label, [FrameTokens(extractor(batch).maps[0].cpu())])
            for label, extractor in zip(self.labels, self.extractors, strict=True)
        ]
        return AnalysedImage(image, columns)
