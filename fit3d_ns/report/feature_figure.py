"""Feature figures (the paper's figures 2 and 8 to 11): columns of input, original, fine-tuned and lifted features.

Each row has one PCA basis, fitted to the original's and the fine-tuned backbones' tokens together, or one set of
matched clusters. Backbones of different widths have rows, and bases, of their own: their colours cannot be compared.

Videos show a clip so, with one basis (or set of clusters) fitted to all frames, and give its temporal consistency.
Clips are video files, read by OpenCV's own FFmpeg, or folders of frames; written is MP4 with VP9, which browsers play,
or MPEG-4 part 2 where OpenCV was built without VP9.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8

from fit3d_ns.analysis.pictures import compose_panel, save_picture
from fit3d_ns.analysis.temporal_consistency import TemporalMetrics, compute_temporal_consistency
from fit3d_ns.data.images import VIDEO_SUFFIXES, list_images
from fit3d_ns.report import token_columns
from fit3d_ns.report.compared_backbones import ComparedBackbones
from fit3d_ns.report.token_colours import TokenColours, fit_cluster_colours, fit_pca_colours
from fit3d_ns.report.token_columns import FigureImage, SceneIndex, TokenColumn
from fit3d_ns.utils.files import write_atomically
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.results import write_facts

ColourSharing = Literal["row", "backbone"]
CODECS = ("vp09", "mp4v")
"""Best first."""
DEFAULT_FPS = 10.0
"""Frames per second of folders of frames, and of files that do not say."""


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
    config: FeatureFigureConfig,
    *,
    has_scenes: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes the PNG and, next to it, a JSON with what each row shows; returns the JSON's content.

    With `has_scenes` there is a column of rendered features. ValueError for more clusters than tokens.
    """
    labels = token_columns.list_column_labels(groups, has_scenes)
    columns = [token_columns.extract_columns(group, images, labels, device) for group in groups]
    shared = [fit_colours_of(group, config) for group in columns] if config.sharing == "backbone" else None
    pictures, row_labels, rows = [], [], []
    for index, image in enumerate(images):
        for number, group in enumerate(groups):
            own = [column.select(index) for column in columns[number]]
            for colours in fit_colours_of(own, config) if shared is None else shared[number]:
                pictures.append([image.image, *paint_row(own, 0, colours, image.size)])
                row_labels.append(f"{image.name}, {group.label}: {_say(colours, config.sharing)}")
                shown = [column.label for column in own if not column.is_empty]
                facts = {"image": image.name, "backbone": group.label, "colours": colours.title, "columns": shown}
                rows.append({**facts, **colours.describe()})
    save_picture(compose_panel(pictures, ["input", *labels], row_labels), path)
    described, is_random = [describe_group(group) for group in groups], any(group.is_random for group in groups)
    return write_facts(path, "report/features", is_random, backbones=described, rows=rows)


def is_clip(path: Path) -> bool:
    """True for video files and folders."""
    return path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES


def load_clip(
    path: Path, scene_index: SceneIndex, max_frames: int, frame_stride: int = 1, longest_side: int | None = None
) -> tuple[list[FigureImage], float]:
    """Frames of a video file, or of a folder in the order of names, and how many of them pass in a second.

    Of every `frame_stride` frames one is taken, until there are `max_frames`; photographs are as scenes' views see them
    where scenes hold them. ValueError where the path cannot be read, sizes differ, or there are fewer than two.
    """
    images: list[FigureImage] = []
    if not path.is_dir():
        frames, fps = _read_video(path, frame_stride, longest_side)
    else:
        paths, fps = list_images(path)[::frame_stride], DEFAULT_FPS
        frames = (token_columns.load_figure_image(frame_path, scene_index, longest_side) for frame_path in paths)
    for frame in frames:
        if len(images) == max_frames:
            notice(f"{path.name} is longer than {max_frames} frames; the rest is left out (--max-frames).")
            break
        images.append(frame)
        if frame.size != images[0].size:
            sizes = [f"{image.size[1]}x{image.size[0]}" for image in (frame, images[0])]
            raise ValueError(f"{path.name}: {frame.name} is {sizes[0]}, the first frame {sizes[1]}; give one size.")
    if len(images) < 2:
        raise ValueError(f"{path} has {len(images)} frames that can be read; a clip needs two or more.")
    return images, fps


def write_video(frames: Iterable[UInt8[np.ndarray, "height width 3"]], path: Path, fps: float) -> str:
    """Writes RGB frames of one size, at least one, as MP4, whole or not at all; returns the codec's four letters.

    Odd sizes are padded by a pixel, which the codecs need. ValueError if OpenCV has none of the codecs.
    """
    rest = iter(frames)
    first = next(rest)
    height, width = (side + side % 2 for side in first.shape[:2])
    with write_atomically(path) as temporary:
        # FFmpeg goes by the suffix.
        draft = temporary.with_name(f"{temporary.name}.mp4")
        try:
            writer, codec = _open_writer(draft, fps, (width, height))
            for frame in chain([first], rest):
                padded = np.full((height, width, 3), 255, dtype=np.uint8)
                padded[: frame.shape[0], : frame.shape[1]] = frame
                writer.write(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))
            writer.release()
            os.replace(draft, temporary)
        finally:
            draft.unlink(missing_ok=True)
    return codec


def save_feature_video(
    clip_name: str,
    images: Sequence[FigureImage],
    groups: Sequence[ComparedBackbones],
    path: Path,
    config: FeatureFigureConfig,
    *,
    fps: float,
    has_scenes: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Writes the MP4 and, next to it, a JSON with the temporal consistency of each backbone; returns its content.

    Each backbone has a row, or two for PCA and k-means; with `has_scenes` there is a column of rendered features.
    The configuration's `sharing` has no meaning here: colours are always the clip's. ValueError for fewer than two
    frames, more clusters than tokens, or no codec.
    """
    labels = token_columns.list_column_labels(groups, has_scenes)
    # Half precision: a clip's tokens are kept until its colours are known.
    columns = [token_columns.extract_columns(group, images, labels, device, torch.float16) for group in groups]
    colours = [fit_colours_of(group, config) for group in columns]
    measured = measure_columns(columns, images)
    row_labels, row_parts, described = [], [], []
    for group, own, of, fits in zip(groups, columns, measured, colours, strict=True):
        found = ", ".join(f"{label} {value.centred_cosine:.3f}" for label, value in of.items())
        row_labels += [f"{group.label}: {fitted.title}; temporal consistency {found}" for fitted in fits]
        row_parts += [(own, fitted) for fitted in fits]
        values = {name: asdict(value) for name, value in of.items()}
        shown = {fitted.title: fitted.describe() for fitted in fits}
        described.append({**describe_group(group), "temporal_consistency": values, "colours": shown})

    def draw() -> Iterator[np.ndarray]:
        for index, image in enumerate(track(images, "Drawing the clip")):
            rows = [[image.image, *paint_row(own, index, fitted, image.size)] for own, fitted in row_parts]
            yield np.asarray(compose_panel(rows, ["input", *labels], row_labels))

    facts = {"clip": clip_name, "num_frames": len(images), "fps": fps, "codec": write_video(draw(), path, fps)}
    is_random = any(group.is_random for group in groups)
    return write_facts(path, "report/feature_video", is_random, **facts, backbones=described)


def measure_columns(
    groups: Sequence[Sequence[TokenColumn]], images: Sequence[FigureImage]
) -> list[dict[str, TemporalMetrics]]:
    """Temporal consistency of every backbone's column, by the column's label; rendered features are left out."""
    measured = [[column for column in columns if not (column.is_rendered or column.is_empty)] for columns in groups]
    clips = [[frame.tokens for frame in column.frames if frame] for columns in measured for column in columns]
    metrics = iter(compute_temporal_consistency(clips, [image.pixels for image in images]))
    return [{column.label: next(metrics) for column in columns} for columns in measured]


def fit_colours_of(columns: Sequence[TokenColumn], config: FeatureFigureConfig) -> list[TokenColours]:
    """The colours that the configuration asks for."""
    colours: list[TokenColours] = []
    if config.kind in ("pca", "both"):
        colours.append(fit_pca_colours(columns))
    if config.kind in ("kmeans", "both"):
        colours.append(fit_cluster_colours(columns, config.num_clusters, config.seed))
    return colours


def paint_row(columns: Sequence[TokenColumn], index: int, colours: TokenColours, size: tuple[int, int]) -> list[Any]:
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


def _open_writer(path: Path, fps: float, size: tuple[int, int]) -> tuple[cv2.VideoWriter, str]:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, size)
        if writer.isOpened():
            return writer, codec
    problem = f"This OpenCV ({cv2.__version__}) can write neither VP9 nor MPEG-4 video"
    raise ValueError(f"{problem}; install opencv-python-headless from the package index.")


def _read_video(path: Path, frame_stride: int, longest_side: int | None) -> tuple[Iterator[FigureImage], float]:
    """Frames, and how many of them pass in a second."""
    if not path.is_file():
        raise ValueError(f"No such video: {path}.")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    if not capture.isOpened():
        raise ValueError(f"Video {path} cannot be read; OpenCV's FFmpeg does not know its format, or it is damaged.")
    fps = capture.get(cv2.CAP_PROP_FPS)

    def read() -> Iterator[FigureImage]:
        for number in count():
            is_read, frame = capture.read()
            if not is_read:
                return
            if number % frame_stride == 0:
                pixels = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                yield FigureImage(f"frame {number}", token_columns.resize(pixels, longest_side))

    return read(), (fps if fps > 0 else DEFAULT_FPS) / frame_stride
