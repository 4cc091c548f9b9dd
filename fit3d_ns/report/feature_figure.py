"""Feature figures (the paper's figures 2 and 8 to 11): columns of input, original, fine-tuned and lifted features.

Each row has one PCA basis, fitted to the original's and the fine-tuned backbones' tokens together, or one set of
matched clusters. Backbones of different widths have rows, and bases, of their own: their colours cannot be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fit3d_ns.analysis.pictures import compose_panel, save_picture
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.token_colours import TokenColours, fit_cluster_colours, fit_pca_colours
from fit3d_ns.report.token_columns import FigureImage, TokenColumn, extract_columns, list_column_labels
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.results import collect_versions

ColourSharing = Literal["row", "backbone"]


@dataclass(frozen=True)
class FeatureFigureConfig:
    """What is drawn."""

    kind: Literal["pca", "kmeans", "both"] = "pca"
    """Principal components, clusters by cosine, or a row of each."""
    num_clusters: int = 8
    """Clusters of k-means, at least 1."""
    sharing: ColourSharing = "row"
    """`row`: every picture has a basis and clusters of its own; `backbone`: all pictures of a backbone share them, so
    that colours can be compared between pictures of one scene."""
    seed: int = 0
    """Seed of k-means."""


def save_feature_figure(
    images: Sequence[FigureImage],
    groups: Sequence[ComparedBackbones],
    path: Path,
    config: FeatureFigureConfig | None = None,
    *,
    has_scenes: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes the PNG and, next to it, a JSON with what each row shows; returns the JSON's content.

    With `has_scenes` there is a column of rendered features. ValueError for no pictures, or more clusters than tokens.
    """
    config = config or FeatureFigureConfig()
    if not images or not groups:
        raise ValueError(f"{len(images)} pictures and {len(groups)} backbones; a feature figure needs one of each.")
    labels = list_column_labels(groups, has_scenes)
    columns = [extract_columns(group, images, labels, device) for group in groups]
    shared = [fit_colours_of(group, config) for group in columns] if config.sharing == "backbone" else None
    pictures, row_labels, rows = [], [], []
    for index, image in enumerate(images):
        for number, group in enumerate(groups):
            own = [column.select(index) for column in columns[number]]
            for colours in fit_colours_of(own, config) if shared is None else shared[number]:
                pictures.append([image.image, *paint_row(own, 0, colours, image.size)])
                row_labels.append(f"{image.name}, {group.label}: {_say(colours, config.sharing)}")
                rows.append(
                    {
                        "image": image.name,
                        "backbone": group.label,
                        "colours": colours.title,
                        "columns": [column.label for column in own if not column.is_empty],
                        **colours.describe(),
                    }
                )
    content = {
        "kind": "report/features",
        "backbones": [describe_group(group) for group in groups],
        "rows": rows,
        "is_random": any(group.is_random for group in groups),
        "versions": collect_versions(),
    }
    save_picture(compose_panel(pictures, ["input", *labels], row_labels), path)
    write_json(path.with_suffix(".json"), content)
    return content


def fit_colours_of(columns: Sequence[TokenColumn], config: FeatureFigureConfig) -> list[TokenColours]:
    """The colours that the configuration asks for."""
    colours: list[TokenColours] = []
    if config.kind in ("pca", "both"):
        colours.append(fit_pca_colours(columns))
    if config.kind in ("kmeans", "both"):
        colours.append(fit_cluster_colours(columns, config.num_clusters, config.seed))
    return colours


def paint_row(
    columns: Sequence[TokenColumn], index: int, colours: TokenColours, size: tuple[int, int]
) -> list[Any | None]:
    """Pictures of one frame in all columns; None where a column has none."""
    frames = [column.frames[index] for column in columns]
    return [None if frame is None else colours.paint(number, frame, size) for number, frame in enumerate(frames)]


def describe_group(group: ComparedBackbones) -> dict[str, Any]:
    """What a JSON file says about the backbones; no path of this machine."""
    return {
        "original": None if group.original is None else group.original.description.to_metadata(),
        "finetuned": [{"name": member.label, **member.description.to_metadata()} for member in group.finetuned],
    }


def _say(colours: TokenColours, sharing: ColourSharing) -> str:
    whose = "this row" if sharing == "row" else "all rows of this backbone"
    if colours.title == "PCA":
        return f"PCA, one basis for {whose}"
    return f"k-means by cosine, colours matched to the first column, clusters of {whose}"
