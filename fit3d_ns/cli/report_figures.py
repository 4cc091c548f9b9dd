"""`fit3d-report features` and `fit3d-report predictions`: the paper's figures of feature maps and of predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from fit3d_ns.cli.command import run_command
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.feature_figure import FeatureFigureConfig, save_feature_figure
from fit3d_ns.report.feature_video import load_clip_images, save_feature_video
from fit3d_ns.report.figure_images import load_figure_images, open_scenes
from fit3d_ns.report.prediction_figure import save_prediction_figure
from fit3d_ns.report.prediction_files import read_predictions
from fit3d_ns.report.video_files import is_clip, read_clip

Paths = tuple[Path, ...]
_FLAT = tyro.conf.arg(name="")


@dataclass(frozen=True)
class FeaturesCommand:
    """Which pictures are shown, by which backbones, and where the figure goes."""

    images: Annotated[Paths, tyro.conf.Positional]
    """Photographs, video files, and folders of frames in the order of their names. Photographs make one PNG, every
    video or folder an MP4 with one basis for the whole clip and its temporal consistency in a JSON beside it."""
    models: tuple[str, ...]
    """Backbones: a name (one of the paper's, any timm id, `random:NAME`), NAME=FILE with a weights file, a folder of
    fit3d-finetune, or a fine-tuned weights file after the name of its backbone. Fine-tuned ones go after their
    original. Several architectures make several rows, each with a basis of its own."""
    output_path: Path
    """The PNG; a clip takes the same name with `.mp4` (and its own name in it, if there are several)."""
    backbone_weights: Paths = ()
    """Weights files of the names in --models that have none, in their order."""
    scenes: Paths = ()
    """Scene files; where one holds a picture as a photograph, its rendered features are the last column."""
    data_root: Path | None = None
    """Where the photographs of scene files lie now, if they were moved."""
    figure: Annotated[FeatureFigureConfig, _FLAT] = field(default_factory=FeatureFigureConfig)
    """What is drawn."""
    longest_side: int | None = None
    """Longer side in pixels that backbones are shown; by default pictures stay as they are up to 640."""
    max_frames: int = 240
    """Clips end after so many frames; their tokens are kept in memory."""
    frame_stride: int = 1
    """Every so many frames of a clip one is taken."""
    fps: float | None = None
    """Frames per second of the MP4; by default the video's own, and 10 for folders."""
    normalization: Literal["timm", "imagenet"] = "timm"
    """Whose mean and deviation normalise images."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where backbones run; `auto` takes CUDA where there is one."""


@dataclass(frozen=True)
class PredictionsCommand:
    """Which predictions are compared, and where the figure goes."""

    folders: Annotated[Paths, tyro.conf.Positional]
    """Folders that fit3d-probe --predictions wrote, one column each: the original's first, then the fine-tuned's. All
    of one task and one test set."""
    output_path: Path
    """The PNG; each frame's figures go into a JSON beside it."""
    max_frames: int = 4
    """Frames to show, evenly spread over those that were written."""
    column_width: int = 320
    """Width of each picture in pixels."""


def main_features(args: Sequence[str]) -> None:
    """Entry point of `fit3d-report features`."""
    run_command(
        FeaturesCommand,
        draw_features,
        prog="fit3d-report features",
        description="Draws feature maps of original and fine-tuned backbones and of lifted scenes side by side.",
        args=args,
    )


def main_predictions(args: Sequence[str]) -> None:
    """Entry point of `fit3d-report predictions`."""
    run_command(
        PredictionsCommand,
        draw_predictions,
        prog="fit3d-report predictions",
        description="Draws segmentation or depth predictions of several probes beside the truth.",
        args=args,
    )


def draw_features(command: FeaturesCommand) -> None:
    """Writes the figure of the photographs and the video of each clip, and says where they are."""
    if command.output_path.suffix.lower() not in (".png", ".mp4"):
        raise ValueError(f"--output-path {command.output_path} must end in .png (photographs) or .mp4 (clips).")
    if not command.images:
        raise ValueError("No pictures to draw; name photographs, videos or folders of frames.")
    if command.longest_side is not None and command.longest_side < 1:
        raise ValueError(f"--longest-side {command.longest_side} is no size; give pixels.")
    device = _choose_device(command.device)
    groups = read_models(command.models, command.backbone_weights, command.normalization)
    shelf = open_scenes(command.scenes, command.data_root, device)
    has_scenes = bool(command.scenes)
    photographs = [path for path in command.images if not is_clip(path)]
    clips = [path for path in command.images if is_clip(path)]
    if photographs:
        images = load_figure_images(photographs, shelf, command.longest_side)
        path = command.output_path.with_suffix(".png")
        save_feature_figure(images, groups, path, command.figure, has_scenes=has_scenes, device=device)
        print(f"Figure: {path}")
        print(f"What it shows: {path.with_suffix('.json')}")
    for source in clips:
        clip = read_clip(source, command.max_frames, command.frame_stride)
        images = load_clip_images(clip, shelf, command.longest_side)
        # Beside a PNG the clip's JSON must not take the name of the figure's.
        is_alone = len(clips) == 1 and not photographs
        stem = command.output_path.stem if is_alone else f"{command.output_path.stem}-{source.stem}"
        path = command.output_path.with_name(f"{stem}.mp4")
        content = save_feature_video(
            clip.name, images, groups, path, command.figure,
            fps=command.fps or clip.fps, has_scenes=has_scenes, device=device,
        )  # fmt: skip
        for group, described in zip(groups, content["backbones"], strict=True):
            for label, figures in described["temporal_consistency"].items():
                print(f"{group.label}, {label}: temporal consistency {figures['centred_cosine']:.4f}")
        print(f"Video: {path}")
        print(f"Figures: {path.with_suffix('.json')}")


def draw_predictions(command: PredictionsCommand) -> None:
    """Writes the figure and says where it is."""
    if command.output_path.suffix.lower() != ".png":
        raise ValueError(f"--output-path {command.output_path} must end in .png.")
    folders = read_predictions(command.folders)
    save_prediction_figure(
        folders, command.output_path, max_frames=command.max_frames, column_width=command.column_width
    )
    print(f"Figure: {command.output_path}")
    print(f"Figures of each frame: {command.output_path.with_suffix('.json')}")


def _choose_device(device: Literal["auto", "cuda", "cpu"]) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine offers no CUDA device (see fit3d-info); take --device cpu.")
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
