"""`fit3d-bench`: what backbones and data are worth by all measures, in one table and one figure."""

import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.probing.datasets import LabelledOptions
from fit3d_ns.probing.frozen_features import Assembly, BackboneConfig, list_parts
from fit3d_ns.probing.probe_runs import ProbeRequest, Task, choose_values, forecast_seconds, run_probe
from fit3d_ns.report.compared_backbones import ComparedBackbones, read_models
from fit3d_ns.report.result_files import read_results
from fit3d_ns.report.result_tables import write_report
from fit3d_ns.report.table import save_bars, write_tables
from fit3d_ns.utils.device import DeviceChoice
from fit3d_ns.utils.progress import SECONDS_PER_HOUR, notice


@dataclass(frozen=True)
class BenchCommand:
    """Which backbones are measured on which data."""

    backbones: Annotated[tuple[str, ...], Heading("backbone")]
    """Originals, each before what was fine-tuned from it, as `fit3d-report features --models` takes them. Fine-tuned
    ones are measured alone and concatenated with their original, and the original also with itself."""
    data: Annotated[tuple[str, ...], Heading("input")]
    """Folders as fit3d-probe takes them, with a train and a test part of their own, or TRAIN,TRAIN:TEST of several."""
    output_dir: Annotated[Path, Heading("output")] = Path("bench")
    """Folder for records, tables and figures; what it holds already is not measured again."""
    measures: Annotated[tuple[Task, ...], Heading("measure")] = (
        "segmentation", "depth", "normals", "retrieval", "correspondence", "consistency",
    )  # fmt: skip
    """What is measured, where the data have what it needs."""
    seeds: int = 3
    """Number of seeds."""
    max_frames: int | None = None
    """Most images of each part of a set, evenly spread; by default all. It also holds for the views of a scene that
    normals are read from, by default 32; views that are compared with each other are always 32."""
    num_iterations: int | None = None
    """Training iterations of heads; by default as fit3d-probe chooses them."""
    labelled: Annotated[LabelledOptions, Heading("input")] = LabelledOptions()
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where everything runs."""


def bench(command: BenchCommand) -> None:
    """Says how long it will take, measures what is missing, and writes tables and figures of all."""
    known: dict[Any, float] = {}
    cases = product(read_models(command.backbones), command.data, command.measures)
    plan = [planned for case in cases for planned in _plan(command, known, *case)]
    if not plan:
        raise ValueError("None of the measures can be taken on --data; the lines above say why.")
    total, start, done = sum(seconds for _, seconds in plan), time.monotonic(), 0.0
    notice(f"{len(plan)} measurements, of which the missing ones take about {total / SECONDS_PER_HOUR:.2f} hours.")
    for number, (request, seconds) in enumerate(plan, 1):
        run_probe(request)
        done += seconds
        left = (total - done) * (time.monotonic() - start) / done if done else 0.0
        notice(f"[{number}/{len(plan)}] {request.output_path.stem}; about {left / 60:.1f} minutes left.")
    probes, _ = read_results([request.output_path for request, _ in plan])
    tables, files = write_report(probes, [], command.output_dir, "Bench", summed=True)
    files.append(command.output_dir / "bars.png")
    save_bars(tables[0], files[-1])
    print(write_tables(tables[:1], "Bench", ".md"), "Bench: " + ", ".join(map(str, files)), sep="\n")


def _plan(
    command: BenchCommand, known: dict[Any, float], group: ComparedBackbones, entry: str, task: Task
) -> list[tuple[ProbeRequest, float]]:
    """The requests of a group with their forecasts in seconds, 0 for finished ones; `known` has those of each shape."""
    shape = entry, task, group.description.num_blocks, group.description.patch_size, group.description.embed_dim
    first, _, second = (entry, "", "") if Path(entry).exists() else entry.partition(":")
    train, test = (tuple(map(Path, part.split(","))) for part in (first, second or first))
    config: Any = choose_values(task, test)[0]
    # Few views of a scene, where they are compared, would not see the same places.
    num_views = None if hasattr(config, "max_pairs") else command.max_frames
    # The layer that normals are read by is solved.
    given = {"num_iterations": None if task == "normals" else command.num_iterations, "max_views": num_views}
    config = replace(config, **{name: value for name, value in given.items() if value and hasattr(config, name)})
    stem = command.output_dir / "records" / f"{task}-{'+'.join(dict.fromkeys(path.name for path in (*train, *test)))}"
    shared: dict[str, Any] = {"config": config, "options": command.labelled, "max_frames": command.max_frames}
    shared |= {"seeds": tuple(range(command.seeds)), "device": command.device}
    requests = [
        ProbeRequest(task, backbones, Path(f"{stem}-{label}.json"), train, test, **shared)
        for label, backbones in _list_assemblies(group)
    ]
    missing = [request for request in requests if not request.output_path.is_file()]
    try:
        if task == "normals" and not second:
            raise ValueError("its layer is fitted on other scenes; name them as TRAIN:TEST.")
        if missing and shape not in known:
            known[shape] = forecast_seconds(missing[0])
    except ValueError as error:
        notice(f"No {task} on {entry}: {error}")
        return []
    each = known.get(shape, 0.0)
    return [(item, each * len(list_parts(item.backbones.assembly)) * (item in missing)) for item in requests]


def _list_assemblies(group: ComparedBackbones) -> list[tuple[str, BackboneConfig]]:
    """Original, its duplicate, and each fine-tuned one alone and concatenated, with names fit for files."""
    found: list[tuple[str, BackboneConfig]] = []
    for member in group.members:
        is_own, first = member is group.original, (group.original or member).description
        place = None if is_own else Path(member.description.place or "")
        names: tuple[Assembly, ...] = ("original", "duplicate") if is_own else ("finetuned", "concat")
        for name in names if group.original else names[:1]:
            config = BackboneConfig(name, first.backbone, first.weights, place, "timm", "pad")
            found.append((f"{first.identity}-{member.description.weights_hash[:6]}-{name}", config))
    return found


main = create_main("fit3d-bench", BenchCommand, bench)
