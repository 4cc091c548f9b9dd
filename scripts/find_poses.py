"""Cameras for photographs that have none, by COLMAP's incremental mapping (pycolmap, on the CPU): a capture for --data.

    python scripts/find_poses.py --data PHOTOGRAPHS --output-dir SCENE

SCENE gets `images` (links to the photographs, or copies where the disk has no links) and COLMAP's models in `sparse`.
Photographs of one size are taken to come from one camera. Up to LARGEST_EXHAUSTIVE of them, every pair is matched; of
more, each with the NUM_NEIGHBOURS that follow it by name, as on a walk or in a video. Minutes for some dozens.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pycolmap

from fit3d_ns.cli.command import run_command
from fit3d_ns.data.images import list_images, read_image_header
from fit3d_ns.utils.progress import create_progress, notice, track

LARGEST_EXHAUSTIVE = 80
"""More photographs have too many pairs for minutes."""
NUM_NEIGHBOURS = 15
LONGEST_SIDE, NUM_KEYPOINTS = 1600, 4096
"""Of the pictures in which keypoints are looked for, and how many of those are kept."""


@dataclass(frozen=True)
class PosesCommand:
    """Photographs, and where the capture goes."""

    data: Path
    """Folder of the photographs, also in folders below."""
    output_dir: Path
    """The capture that is made; a new folder."""


def find_poses(command: PosesCommand) -> None:
    photographs = list_images(command.data)
    if len(photographs) < 3:
        raise ValueError(
            f"{command.data} has {len(photographs)} photographs; poses need three at least, better thirty."
        )
    if command.output_dir.exists():
        raise ValueError(f"{command.output_dir} is there already; name a new folder, or remove it first.")
    headers = [read_image_header(path) for path in photographs]
    is_one_size = len({(header.width, header.height) for header in headers}) == 1
    mode = pycolmap.CameraMode.SINGLE if is_one_size else pycolmap.CameraMode.AUTO
    names = [path.relative_to(command.data).as_posix() for path in photographs]
    command.output_dir.parent.mkdir(parents=True, exist_ok=True)
    # A capture appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=command.output_dir.parent, prefix=".poses-") as work:
        scene = Path(work) / "scene"
        for path, name in zip(photographs, names, strict=True):
            place = scene / "images" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), place)
            except OSError:
                shutil.copyfile(path, place)
        num_registered = map_photographs(scene, names, mode)
        os.replace(scene, command.output_dir)
    print(
        f"{num_registered} of {len(names)} photographs have cameras now; {command.output_dir} is a capture for --data."
    )


def map_photographs(scene: Path, names: list[str], mode: pycolmap.CameraMode) -> int:
    """Writes the models of a scene's photographs; returns how many the largest of them registered.

    ValueError where no two of them could be connected.
    """
    pycolmap.logging.minloglevel = pycolmap.logging.Level.ERROR.value
    database, images = scene.parent / "database.db", scene / "images"
    extraction, mapping = pycolmap.FeatureExtractionOptions(), pycolmap.IncrementalPipelineOptions()
    extraction.max_image_size, extraction.sift.max_num_features = LONGEST_SIDE, NUM_KEYPOINTS
    mapping.random_seed = 0
    for name in track(names, "Keypoints"):
        pycolmap.extract_features(database, images, [name], mode, extraction_options=extraction)
    is_exhaustive = len(names) <= LARGEST_EXHAUSTIVE
    notice(f"Matching {'every pair' if is_exhaustive else f'each with the {NUM_NEIGHBOURS} that follow'} ...")
    if is_exhaustive:
        pycolmap.match_exhaustive(database)
    else:
        pairing = pycolmap.SequentialPairingOptions()
        pairing.overlap, pairing.quadratic_overlap = NUM_NEIGHBOURS, False
        pycolmap.match_sequential(database, pairing_options=pairing)
    with create_progress() as bar:
        task = bar.add_task("Cameras", total=len(names), note="")
        found = pycolmap.incremental_mapping(
            database, images, scene.parent, mapping, next_image_callback=lambda: bar.advance(task)
        )
    if not found:
        raise ValueError("No two photographs could be connected; take more, with more overlap.")
    for number, model in found.items():
        (scene / "sparse" / str(number)).mkdir(parents=True)
        model.write(scene / "sparse" / str(number))
    return max(model.num_reg_images() for model in found.values())


def main(args: list[str] | None = None) -> None:
    description = "Makes a capture of photographs without cameras, by COLMAP's incremental mapping."
    run_command(PosesCommand, find_poses, prog="find_poses.py", description=description, args=args)


if __name__ == "__main__":
    main()
