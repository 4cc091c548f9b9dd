"""`fit3d-report features` and `fit3d-report predictions`: the commands that draw figures and videos."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fit3d_ns.cli.command import Heading, run_named
from fit3d_ns.features.backbones import Normalization
from fit3d_ns.report import feature_figure
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.feature_figure import FeatureFigureConfig, is_clip
from fit3d_ns.report.prediction_figure import read_predictions, save_prediction_figure
from fit3d_ns.report.token_columns import load_figure_images, open_scenes
from fit3d_ns.utils.device import DeviceChoice, choose_device
from fit3d_ns.utils.limits import Limited, Limits

Paths = tuple[Path, ...]


@dataclass(frozen=True)
class FeaturesCommand(Limited):
    """Which pictures are shown, by which backbones, and where the figure goes."""

    images: Annotated[Paths, tyro.conf.Positional]
    """Photographs, video files, and folders of frames in the order of their names. Photographs make one PNG. Every
    video or folder makes an MP4 with one basis for the whole clip, and a JSON with its temporal consistency."""
    models: Annotated[tuple[str, ...], Heading("backbone")]
    """Backbones: a name (one of the paper's, any timm id, `random:NAME`), NAME=FILE with a weights file, a folder of
    fit3d-finetune, or a fine-tuned weights file after the name of its backbone. Fine-tuned ones go after their
    original. Several architectures make several rows, each with a basis of its own."""
    output_path: Annotated[Path, Heading("output")]
    """The PNG; a clip takes the same name with `.mp4` (and its own name in it, if there are several)."""
    backbone_weights: Annotated[Paths, Heading("backbone")] = ()
    """Weights files of the names in --models that have none, in their order."""
    normalization: Normalization = "timm"
    """Whose mean and deviation normalise images."""
    scenes: Annotated[Paths, Heading("input")] = ()
    """Scene files; where one holds a picture as a photograph, its rendered features are the last column."""
    data_root: Path | None = None
    """Where the photographs of scene files are now, if they were moved: a capture's folder or one above several."""
    longest_side: Annotated[int | None, Limits(at_least=1)] = None
    """Longer side in pixels that backbones are shown; by default pictures stay as they are up to 640."""
    max_frames: Annotated[int, Limits(at_least=2)] = 240
    """Clips end after this many frames; their tokens are kept in memory."""
    frame_stride: Annotated[int, Limits(at_least=1)] = 1
    """Takes every n-th frame of a clip."""
    figure: FeatureFigureConfig = field(default_factory=FeatureFigureConfig)
    fps: Annotated[float | None, Heading("output")] = None
    """Frames per second of the MP4; by default the video's own, and 10 for folders."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where backbones run; `auto` takes CUDA where there is one."""


@dataclass(frozen=True)
class PredictionsCommand(Limited):
    """Which predictions are compared, and where the figure goes."""

    folders: Annotated[Paths, tyro.conf.Positional]
    """Folders of fit3d-probe --predictions, of one task and test set: the original's first, then the fine-tuned's."""
    output_path: Path
    """The PNG; a JSON with the metrics of each frame goes next to it."""
    max_frames: Annotated[int, Limits(at_least=1)] = 4
    """Frames to show, evenly spread over those that were written."""
    column_width: Annotated[int, Limits(at_least=16)] = 320
    """Width of each picture in pixels."""


def main(args: Sequence[str] | None = None) -> None:
    """Entry point; the first word chooses the figure."""
    kind, *arguments = sys.argv[1:] if args is None else args
    if kind == "features":
        run_named("fit3d-report features", FeaturesCommand, draw_features, arguments)
    else:
        run_named("fit3d-report predictions", PredictionsCommand, draw_predictions, arguments)


def draw_features(command: FeaturesCommand) -> None:
    """Writes the figure of the photographs and the video of each clip, and says where they are."""
    if command.output_path.suffix.lower() not in (".png", ".mp4"):
        raise ValueError(f"--output-path {command.output_path} must end in .png (photographs) or .mp4 (clips).")
    if not command.images:
        raise ValueError("No pictures to draw; name photographs, videos or folders of frames.")
    device = choose_device(command.device).type
    groups = read_models(command.models, command.backbone_weights, command.normalization)
    scene_index = open_scenes(command.scenes, command.data_root, device)
    has_scenes = bool(command.scenes)
    photographs = [path for path in command.images if not is_clip(path)]
    clips = [path for path in command.images if is_clip(path)]
    if photographs:
        images = load_figure_images(photographs, scene_index, command.longest_side)
        path = command.output_path.with_suffix(".png")
        _check_is_no_input(path, photographs)
        feature_figure.save_feature_figure(images, groups, path, command.figure, has_scenes=has_scenes, device=device)
        print(f"Figure: {path}\nWhat it shows: {path.with_suffix('.json')}")
    for source in clips:
        # The clip's JSON must not take the name of the figure's.
        is_alone = len(clips) == 1 and not photographs
        stem = command.output_path.stem if is_alone else f"{command.output_path.stem}-{source.stem}"
        path = command.output_path.with_name(f"{stem}.mp4")
        _check_is_no_input(path, clips)
        choices = command.max_frames, command.frame_stride, command.longest_side
        images, fps = feature_figure.load_clip(source, scene_index, *choices)
        content = feature_figure.save_feature_video(
            source.name, images, groups, path, command.figure,
            fps=command.fps or fps, has_scenes=has_scenes, device=device,
        )  # fmt: skip
        for group, described in zip(groups, content["backbones"], strict=True):
            for label, metrics in described["temporal_consistency"].items():
                print(f"{group.label}, {label}: temporal consistency {metrics['centred_cosine']:.4f}")
        print(f"Video: {path}\nMetrics: {path.with_suffix('.json')}")


def _check_is_no_input(path: Path, inputs: Sequence[Path]) -> None:
    if any(path.resolve() == source.resolve() for source in inputs):
        raise ValueError(f"{path} is one of the pictures to draw and would be lost; choose another --output-path.")


def draw_predictions(command: PredictionsCommand) -> None:
    path = command.output_path
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output-path {path} must end in .png.")
    folders = read_predictions(command.folders)
    save_prediction_figure(folders, path, max_frames=command.max_frames, column_width=command.column_width)
    print(f"Figure: {path}\nMetrics of each frame: {path.with_suffix('.json')}")
