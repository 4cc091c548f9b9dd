"""`fit3d-prepare`: what a folder lacks: cameras of its photographs, or depth and labels out of ScanNet++'s meshes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.data.photograph_poses import find_poses
from fit3d_ns.probing.datasets.scannetpp_maps import find_scenes, prepare_scene, read_class_list
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class PrepareCommand:
    """What is made, and of what; options but --overwrite are for ScanNet++."""

    dataset: Annotated[Literal["scannetpp", "photos"], tyro.conf.Positional]
    """`scannetpp`: depth and labels that probes need, for its download. `photos`: cameras of photographs that have
    none, by COLMAP's mapping (pycolmap): minutes for some dozens of them."""
    root: Annotated[Path, tyro.conf.Positional]
    """The download (`data/`, `metadata/`), or the folder of one scene; maps go into each scene's `dslr/`. The folder
    of the photographs, or one with `images`; COLMAP's models go into its `sparse/`."""
    scenes: Annotated[tuple[str, ...], Heading("input")] = ()
    """Names of scenes, or text files that list them (`splits/nvs_sem_val.txt`); all that are there without this."""
    classes: Path | None = None
    """Text file with the name of a class on each line; by default `metadata/semantic_benchmark/top100.txt`. Annotated
    words are renamed as a `map_benchmark.csv` beside it says."""
    depth_only: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make no labels, for which scenes without annotation have nothing."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff, Heading("output")] = False
    """Make all maps again, also those that came with the download; find cameras again. Without this, maps that are
    there are passed over, so that the same command goes on after an interruption."""
    jobs: Annotated[int | None, Heading("machine")] = None
    """Photographs at a time; as many as the machine has cores without this."""


def prepare(command: PrepareCommand) -> None:
    if command.dataset == "photos":
        if command.scenes or command.classes or command.depth_only or command.jobs:
            raise ValueError("--scenes, --classes, --depth-only and --jobs are for ScanNet++; leave them out.")
        registered, number = find_poses(command.root, command.overwrite)
        print(f"{registered} of {number} photographs have cameras now; {command.root} is a capture for --data.")
        return
    if command.depth_only and command.classes is not None:
        raise ValueError("--classes changes nothing with --depth-only; leave it out.")
    scenes, num_failed = find_scenes(command.root, command.scenes), 0
    classes = None if command.depth_only else read_class_list(command.root, command.classes)
    for scene in scenes:
        try:
            made = prepare_scene(scene, classes, command.jobs or os.cpu_count() or 1, command.overwrite)
            print(f"{scene}: {made['frames_made']} of {made['frames']} frames in {made['seconds']:.1f} s")
        except ValueError as error:
            num_failed += 1
            notice(f"{scene}: {error}")
    if num_failed:
        raise ValueError(f"{num_failed} of {len(scenes)} scenes failed; the reasons stand above.")


main = create_main("fit3d-prepare", PrepareCommand, prepare)
