"""The demo page: PCA, clusters and similarity maps of a picture, in Gradio; `demo_server.py` serves it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fit3d_ns.analysis.pictures import Picture, to_pixels, upscale
from fit3d_ns.analysis.similarity import compute_similarity, map_similarity_to_colours
from fit3d_ns.features import create_extractor
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.demo_server import read_upload
from fit3d_ns.report.token_colours import TokenColours, fit_cluster_colours, fit_pca_colours
from fit3d_ns.report.token_columns import FigureImage, FrameTokens, TokenColumn, extract_tokens, resize

_MARK = (1.0, 0.1, 0.1)


@dataclass(frozen=True, eq=False)
class AnalysedImage:
    """A picture, at the size that backbones were shown, and a column of one frame for each of them."""

    image: FigureImage
    columns: list[TokenColumn]

    @property
    def frames(self) -> list[FrameTokens]:
        """The tokens of each backbone."""
        return [frame for column in self.columns for frame in column.frames if frame is not None]

    def paint(self, colours: TokenColours) -> list[Picture]:
        """The tokens of each backbone in colours that were fitted to the columns."""
        return [colours.paint(number, frame, self.image.size) for number, frame in enumerate(self.frames)]

    def draw_similarity(self, point: tuple[float, float]) -> list[Picture]:
        """How alike every token is to the one at a point (x, y), given in shares of width and height.

        Cosine relative to the picture's mean token: blue for -1, white for 0, red for 1.
        """
        pictures = []
        for tokens in (frame.tokens for frame in self.frames):
            query = tokens[self._find_patch(point, tokens)]
            similarity = compute_similarity(tokens, query, tokens.mean(dim=(0, 1)))
            pictures.append(upscale(map_similarity_to_colours(similarity), self.image.size))
        return pictures

    def draw_point(self, point: tuple[float, float]) -> Picture:
        """The picture with the patch of a point framed."""
        height, width = self.image.size
        tokens = self.frames[0].tokens
        (row, column), (rows, columns) = self._find_patch(point, tokens), tokens.shape[:2]
        top, bottom = (round(edge * height / rows) for edge in (row, row + 1))
        left, right = (round(edge * width / columns) for edge in (column, column + 1))
        marked = self.image.image
        inside = marked[top:bottom, left:right].clone()
        marked[max(top - 3, 0) : bottom + 3, max(left - 3, 0) : right + 3] = torch.tensor(_MARK)
        marked[top:bottom, left:right] = inside
        return marked

    def _find_patch(self, point: tuple[float, float], tokens: Tensor) -> tuple[int, int]:
        """Row and column of the token at a point; what lies beyond an edge belongs to the last one."""
        row, column = (
            min(max(int(share * count), 0), count - 1)
            for share, count in zip(point[::-1], tokens.shape[:2], strict=True)
        )
        return row, column


class ImageAnalyser:
    """Backbones that stay loaded and take one picture after another."""

    def __init__(self, group: ComparedBackbones, device: str = "cpu") -> None:
        self.labels = [f"original: {group.original.label}"] if group.original is not None else []
        self.labels += [f"fine-tuned: {member.label}" for member in group.finetuned]
        if group.is_random:
            self.labels = [f"{label} (random weights)" for label in self.labels]
        self.extractors = [create_extractor(member.description, device=device) for member in group.members]

    @torch.no_grad()
    def analyse(self, pixels: UInt8[Tensor, "height width 3"], longest_side: int | None = None) -> AnalysedImage:
        """Tokens of a picture; `longest_side` as for `resize`. A picture smaller than a patch is a ValueError."""
        image = FigureImage("picture", resize(pixels, longest_side))
        maps = [extract_tokens(extractor, image.pixels) for extractor in self.extractors]
        frames = [FrameTokens(tokens, torch.ones(tokens.shape[:2])) for tokens in maps]
        columns = [TokenColumn(label, [own]) for label, own in zip(self.labels, frames, strict=True)]
        return AnalysedImage(image, columns)


_BUTTONS: Any = ["download", "fullscreen"]
"""Gradio's third one would publish the picture."""
_SHOWN: dict[str, Any] = {"interactive": False, "format": "png"}
"""Options of a picture that is only looked at."""
_SECONDS_TO_KEEP_UPLOADS = 3600


def create_page(analyser: ImageAnalyser, num_clusters: int = 8, longest_side: int = 640) -> Any:
    """Builds the page (`gradio.Blocks`); its sliders of clusters and of the longer side start at the given values."""
    import gradio as gr

    def show(pixels: np.ndarray | None, clusters: float, side: float) -> list[Any]:
        """PCA and clusters of a new image; similarity maps are emptied."""
        if pixels is None:
            return [None] * (2 + 3 * len(analyser.labels))
        analysed = analyser.analyse(torch.from_numpy(np.ascontiguousarray(pixels)), int(side))
        columns = analysed.columns
        # One basis for all backbones, and clusters of each in the first one's colours.
        colours: list[TokenColours] = [fit_pca_colours(columns), fit_cluster_colours(columns, int(clusters))]
        maps = [picture for fitted in colours for picture in analysed.paint(fitted)]
        return [analysed, None, *(to_pixels(picture) for picture in maps), *([None] * len(analyser.labels))]

    def cluster(analysed: AnalysedImage | None, clusters: float) -> list[Any]:
        """Clusters again, with another number of them."""
        if analysed is None:
            return [None] * len(analyser.labels)
        colours = fit_cluster_colours(analysed.columns, int(clusters))
        return [to_pixels(picture) for picture in analysed.paint(colours)]

    def compare(analysed: AnalysedImage | None, shown: np.ndarray | None, event: gr.SelectData) -> list[Any]:
        """Similarity to the clicked pixel of a picture of any size."""
        if analysed is None or shown is None:
            return [None] * (1 + len(analyser.labels))
        point = find_share(event.index, shown)
        return [to_pixels(picture) for picture in (analysed.draw_point(point), *analysed.draw_similarity(point))]

    with gr.Blocks(
        title="fit3d-demo",
        analytics_enabled=False,
        delete_cache=(_SECONDS_TO_KEEP_UPLOADS, _SECONDS_TO_KEEP_UPLOADS),
        fill_width=True,
    ) as page:
        analysed = gr.State(None)
        gr.Markdown(Path(__file__).with_name("demo_help.md").read_text(encoding="utf-8"))
        with gr.Row():
            source = _create_picture("Input", "input", sources=["upload", "clipboard"])
            pca = _create_maps("PCA", analyser.labels)
        # Right below what is clicked, so that the answer is on the screen.
        with gr.Row():
            clicked = _create_picture("Clicked patch", "clicked", **_SHOWN)
            similarity = _create_maps("Similarity", analyser.labels)
        with gr.Row():
            with gr.Column():
                clusters = gr.Slider(2, 20, value=num_clusters, step=1, label="clusters")
                side = gr.Slider(112, 1344, value=longest_side, step=16, label="longer side the backbones see, pixels")
            kmeans = _create_maps("k-means", analyser.labels)
        everything = [analysed, clicked, *pca, *kmeans, *similarity]
        for event in (source.change, side.release):
            event(show, [source, clusters, side], everything, show_progress="minimal", api_visibility="private")
        clusters.release(cluster, [analysed, clusters], kmeans, show_progress="minimal", api_visibility="private")
        for picture in (source, clicked, *pca, *kmeans, *similarity):
            picture.select(
                compare, [analysed, picture], [clicked, *similarity],
                show_progress="hidden", api_visibility="private",
            )  # fmt: skip
    return page


def find_share(index: Any, shown: np.ndarray | Tensor) -> tuple[float, float]:
    """A click (x, y) on a picture's pixels, in shares of its width and height."""
    x, y = index
    return (float(x) + 0.5) / shown.shape[1], (float(y) + 0.5) / shown.shape[0]


def _create_maps(title: str, labels: list[str]) -> list[Any]:
    slug = title.lower().replace("-", "")
    titles = [f"{title}, {label}" for label in labels]
    return [_create_picture(title, f"{slug}-{number}", **_SHOWN) for number, title in enumerate(titles)]


def _create_picture(title: str, elem_id: str, **options: Any) -> Any:
    """A picture below its title, which Gradio would put over a corner; what browsers send is judged undecoded."""
    import gradio as gr

    with gr.Column():
        gr.Markdown(f"**{title}**")
        image: Any = gr.Image(show_label=False, elem_id=elem_id, buttons=_BUTTONS, **options)
    image.preprocess = read_upload
    return image
