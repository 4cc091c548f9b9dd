"""Draws the animation of the README: a flight through a lifted scene, in the colours that fit3d-view shows it in.

python scripts/viewer_animation.py quickstart/scenes/room_00.safetensors docs/pictures/viewer.webp
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fit3d_ns.analysis.pictures import compose_panel
from fit3d_ns.report.scene_viewer import SceneViewer, create_flight
from fit3d_ns.report.splat_colours import SplatColours, ViewerConfig
from fit3d_ns.scene import load_scene
from fit3d_ns.utils.progress import track

COLUMNS: tuple[SplatColours, ...] = ("photograph", "features", "clusters", "similarity")
SECONDS = 12.0


@dataclass(frozen=True)
class AnimationConfig:
    """What is drawn, and how large."""

    scene: tyro.conf.Positional[Path]
    """A scene file."""
    output_path: tyro.conf.Positional[Path]
    """The picture to write, .webp."""
    data_root: Path | None = None
    """Where the photographs are, if they were moved."""
    num_frames: int = 48
    """Pictures of the flight."""
    width: int = 264
    """Width in pixels of each column."""
    quality: int = 45
    """WebP's, 0 to 100."""


def main(config: AnimationConfig) -> None:
    scene = load_scene(config.scene)
    viewers = [SceneViewer(scene, ViewerConfig(colours, data_root=config.data_root)) for colours in COLUMNS]
    frames = [
        compose_panel([[viewer.draw(pose, 4 / 3, config.width) for viewer in viewers]], COLUMNS)
        for pose in track(create_flight(scene.posed_capture.views, config.num_frames), "Drawing")
    ]
    frames[0].save(
        config.output_path, save_all=True, append_images=frames[1:], duration=round(1e3 * SECONDS / len(frames)),
        loop=0, quality=config.quality, method=6,
    )  # fmt: skip
    print(f"{config.output_path}: {config.output_path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(AnimationConfig))
