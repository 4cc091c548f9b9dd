"""Feature videos: a clip beside its tokens in colours that do not flicker, and the temporal consistency as a number.

One basis (or set of clusters) is fitted to all frames of the clip. `temporal_consistency.py` says what the number is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.analysis.pictures import compose_panel
from fit3d_ns.analysis.temporal_consistency import TemporalMetrics, compute_temporal_consistency
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.feature_figure import FeatureFigureConfig, describe_group, fit_colours_of, paint_row
from fit3d_ns.report.figure_images import FigureImage, SceneShelf, load_figure_image, resize
from fit3d_ns.report.token_colours import TokenColours
from fit3d_ns.report.token_columns import TokenColumn, extract_columns, list_column_labels
from fit3d_ns.report.video_files import Clip, write_video
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.results import collect_versions


def load_clip_images(clip: Clip, shelf: SceneShelf, longest_side: int | None = None) -> list[FigureImage]:
    """The frames of a clip, as scenes' views see them where scenes hold them.

    Raises:
        ValueError: A frame cannot be read, or differs in size from the first; the message names it.
    """
    images = []
    for frame in clip.frames:
        if frame.path is not None:
            images.append(load_figure_image(frame.path, shelf, longest_side))
        else:
            assert frame.pixels is not None
            images.append(FigureImage(frame.name, resize(frame.pixels, longest_side)))
        if images[-1].size != images[0].size:
            sizes = [f"{image.size[1]}x{image.size[0]}" for image in (images[-1], images[0])]
            raise ValueError(f"{clip.name}: {frame.name} is {sizes[0]}, the first frame {sizes[1]}; give one size.")
    return images


def save_feature_video(
    clip_name: str,
    images: Sequence[FigureImage],
    groups: Sequence[ComparedBackbones],
    path: Path,
    config: FeatureFigureConfig | None = None,
    *,
    fps: float,
    has_scenes: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes the MP4 and, beside it, a JSON with the temporal consistency of each backbone; returns its content.

    Args:
        clip_name: Name of the clip.
        images: Its frames, of one size.
        groups: The backbones; one row (two for PCA and k-means) each.
        path: The file, `.mp4`.
        config: What is drawn; `sharing` has no meaning here, colours are always the clip's.
        fps: Frames per second.
        has_scenes: Whether there is a column of rendered features.
        device: Where backbones run.

    Raises:
        ValueError: Fewer than two frames, more clusters than tokens, or no codec.
    """
    config = config or FeatureFigureConfig()
    labels = list_column_labels(groups, has_scenes)
    # Half precision: a clip's tokens are kept until its colours are known.
    columns = [extract_columns(group, images, labels, device, torch.float16) for group in groups]
    colours = [fit_colours_of(group, config) for group in columns]
    figures = measure_columns(columns, images)
    row_labels = [
        f"{group.label}: {fitted.title}; temporal consistency {_say(of)}"
        for group, of, fits in zip(groups, figures, colours, strict=True)
        for fitted in fits
    ]
    codec = write_video(_draw(images, columns, colours, ["input", *labels], row_labels), path, fps)
    content = {
        "kind": "report/feature_video",
        "clip": clip_name,
        "num_frames": len(images),
        "fps": fps,
        "codec": codec,
        "backbones": [
            {
                **describe_group(group),
                "temporal_consistency": {name: asdict(value) for name, value in of.items()},
                "colours": {fitted.title: fitted.describe() for fitted in fits},
            }
            for group, of, fits in zip(groups, figures, colours, strict=True)
        ],
        "is_random": any(member.description.is_random for group in groups for member in group.members),
        "versions": collect_versions(),
    }
    write_json(path.with_suffix(".json"), content)
    return content


def measure_columns(
    groups: Sequence[Sequence[TokenColumn]], images: Sequence[FigureImage]
) -> list[dict[str, TemporalMetrics]]:
    """Temporal consistency of every backbone's column, by the column's label; rendered features are left out."""
    measured = [
        (number, column.label, [frame.tokens for frame in column.frames if frame is not None])
        for number, columns in enumerate(groups)
        for column in columns
        if not (column.is_rendered or column.is_empty)
    ]
    figures = compute_temporal_consistency([maps for *_, maps in measured], [image.pixels for image in images])
    found: list[dict[str, TemporalMetrics]] = [{} for _ in groups]
    for (number, label, _), value in zip(measured, figures, strict=True):
        found[number][label] = value
    return found


def _draw(
    images: Sequence[FigureImage],
    columns: Sequence[Sequence[TokenColumn]],
    colours: Sequence[Sequence[TokenColours]],
    column_labels: Sequence[str],
    row_labels: Sequence[str],
) -> Iterator[np.ndarray]:
    for index, image in enumerate(track(images, "Drawing the clip")):
        rows = [
            [image.image, *paint_row(own, index, fitted, image.size)]
            for own, fits in zip(columns, colours, strict=True)
            for fitted in fits
        ]
        yield np.asarray(compose_panel(rows, column_labels, row_labels))


def _say(figures: dict[str, TemporalMetrics]) -> str:
    return ", ".join(f"{label} {value.centred_cosine:.3f}" for label, value in figures.items())
