"""`fit3d-prepare`: what probes need and a download lacks: depth and label maps out of ScanNet++'s annotated meshes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.probing.datasets.scannetpp_maps import (
    MapKind,
    find_scenes,
    forecast_seconds,
    plan_scene,
    prepare_scene,
    read_class_list,
)
from fit3d_ns.utils.progress import notice


@dataclass(frozen=True)
class PrepareCommand:
    """Which scenes get which maps."""

    dataset: Annotated[Literal["scannetpp"], tyro.conf.Positional]
    """Whose download it is."""
    root: Annotated[Path, tyro.conf.Positional]
    """The download (`data/`, `metadata/`), or the folder of one scene; maps go into each scene's `dslr/`."""
    scenes: Annotated[tuple[str, ...], Heading("input")] = ()
    """Names of scenes, or text files that list them (`splits/nvs_sem_val.txt`); all that are there without this."""
    classes: Path | None = None
    """Text file with the name of a class on each line; by default `metadata/semantic_benchmark/top100.txt`. Annotated
    words are renamed as a `map_benchmark.csv` beside it says."""
    maps: Annotated[tuple[MapKind, ...], Heading("output")] = ("depth", "labels")
    """What is made. Maps that are there are passed over, so an interrupted command is repeated as it was."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make all maps again, those that came with the download too."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only say how many maps are missing and about how long they take."""
    jobs: Annotated[int | None, Heading("machine")] = None
    """Photographs at a time; as many as the machine has cores without this."""


def prepare(command: PrepareCommand) -> None:
    jobs = command.jobs or os.cpu_count() or 1
    classes = read_class_list(command.root, command.classes) if "labels" in command.maps else None
    scenes = [plan_scene(path, command.maps, classes) for path in find_scenes(command.root, command.scenes)]
    if command.dry_run:
        seconds = forecast_seconds(scenes, jobs)
        print(f"{len(scenes)} scenes, {sum(len(scene.frames) for scene in scenes)} frames: about {seconds:.0f} s")
        return
    failed = {}
    for scene in scenes:
        try:
            metrics = prepare_scene(scene, jobs, command.overwrite)
        except ValueError as error:
            failed[scene.folder.name] = str(error)
            notice(f"{scene.folder}: {error}")
            continue
        made = f"{metrics['frames_made']} of {metrics['frames']} frames"
        print(f"{scene.folder / 'dslr'}: {made} in {metrics['seconds']:.1f} s")
    if failed:
        raise ValueError(f"{len(failed)} of {len(scenes)} scenes failed: {', '.join(failed)}; the reasons stand above.")


main = create_main("fit3d-prepare", PrepareCommand, prepare)


if __name__ == "__main__":
    main()
