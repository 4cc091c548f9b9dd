"""Runs the ablations; `reproduce_paper.sh` and `reproduce_small.sh` call it with `paper` and `small`.

Every command of every stage is a cell (`ablation_cells.py`), run here or by Slurm (`ablation_jobs.py`). Finished cells
are not run again, interrupted ones go on where they stopped, and those that need a failed one are left out. The tables
come from fit3d-report in the end.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from ablation_cells import Cell, Plan, ProbeData, find_missing
from ablation_jobs import REPORT, create_arrays, describe_jobs, submit
from ablation_tables import MAIN, TABLES, AblationTable, choose_tables

from fit3d_ns.cli.command import run_command, spell
from fit3d_ns.probing.datasets.frames import read_lines
from fit3d_ns.probing.datasets.scannet import find_scannetpp_scenes
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.stopping import StopRequest

RANDOM_BACKBONE = "random:vit_tiny_patch16_224"
NUM_CONSISTENCY_SCENES = 5
"""Validation scenes of ScanNet++ on which consistency and correspondence are measured."""

Execute = Callable[[Cell, Path], bool]
"""Runs a cell with its output in a log file; True if it ended well."""


@dataclass(frozen=True)
class CommonFlags:
    """Flags of both scripts."""

    output: Path = Path("ablations")
    """Folder of all results; the same folder goes on with what it holds."""
    tables: tuple[str, ...] = ()
    """Which tables: 1 to 13 of the paper, and correspondence concatenation anchors keeping targets leave-one-out; by
    default all."""
    seeds: tuple[int, ...] = (0,)
    """Of the probes."""
    show: Annotated[bool, tyro.conf.arg(name="list"), tyro.conf.FlagCreatePairsOff] = False
    """Print the cells and which are done; run nothing."""
    on: Literal["here", "slurm"] = "here"
    """One command after the other in this process, or jobs of Slurm that wait for each other."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print how many jobs there are, and how many hours of a card and how much disk they take; run nothing."""
    cell: str | None = None
    """Run this cell only, as a job of Slurm does."""


@dataclass(frozen=True)
class PaperFlags(CommonFlags):
    """The paper's tables on the official data sets; tables of sets that are not given are left out."""

    scannetpp: Path | None = None
    """Root of ScanNet++ (data/, splits/, metadata/): stages I and II learn from its nvs_sem_train scenes."""
    nyu: Path | None = None
    """Folder of nyu_depth_v2_labeled.mat and splits.mat."""
    nyu_depth: Path | None = None
    """Folder of nyu_train.txt and nyu_test.txt."""
    scannet: Path | None = None
    """Folder of scannet_frames_25k."""
    ade20k: Path | None = None
    """ADEChallengeData2016."""
    voc: Path | None = None
    """VOCdevkit or VOC2012."""
    kitti: Path | None = None
    """Root with kitti_eigen_train.txt."""
    imagenet: Path | None = None
    """Root with train/ and val/."""
    weights: tuple[str, ...] = ()
    """Weights files, NAME=FILE by the paper's names (dinov2_small ...); timm's downloads for others."""
    paper: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Every value of the public code in all stages: features are trained beside the colours, once for each backbone and
    number of features, which takes as many times as long."""


@dataclass(frozen=True)
class SmallFlags(CommonFlags):
    """The same tables on small scenes in ScanNet++'s layout; without any on synthetic rooms."""

    train: tuple[Path, ...] = ()
    """Scene folders that all stages learn from."""
    test: tuple[Path, ...] = ()
    """Scene folders that figures are about."""
    labelled: tuple[Path, ...] = ()
    """Plain folders (images/train, images/test, labels/ ...) on which segmentation is probed as well."""
    backbone: str = RANDOM_BACKBONE
    """The backbone; the default has untrained weights, whose figures say nothing about quality."""
    backbone_weights: Path | None = None
    """File with its weights."""
    more_backbones: tuple[str, ...] = ()
    """Further backbones for Tables 4, 9 and 10, NAME or NAME=FILE with weights."""
    steps: int = 400
    """Steps of stage II that stand for one epoch."""
    colour_steps: int | None = None
    """Steps of stage I; by default the method's."""
    probe_iterations: int | None = None
    """Iterations of segmentation and depth heads; by default the probe's."""


def run_paper(flags: PaperFlags) -> None:
    """Tables on the official sets."""
    tables = choose_tables(flags.tables)
    weights = dict(_split_weights(text, must_have_file=True) for text in flags.weights)
    scenes: tuple[Path, ...] = ()
    consistency: tuple[Path, ...] = ()
    if flags.scannetpp is not None:
        scenes = _list_scenes(flags.scannetpp, "nvs_sem_train")
        consistency = _list_scenes(flags.scannetpp, "nvs_sem_val")[:NUM_CONSISTENCY_SCENES]
    roots = {name.split(":")[1] for table in TABLES.values() for name in table.data}
    given = {name: getattr(flags, name.replace("-", "_")) for name in roots}
    data = {}
    for name in dict.fromkeys(name for table in TABLES.values() for name in table.data):
        root = given[name.split(":")[1]]
        if root is not None:
            is_trained = not name.startswith(("consistency", "correspondence"))
            data[name] = ProbeData(name, (root,), (root,)) if is_trained else ProbeData(name, (), consistency)
    plan = Plan(
        output=flags.output.absolute(),
        scenes=scenes,
        data=(),
        backbone="dinov2_small",
        weights=weights,
        seeds=flags.seeds,
        paper=flags.paper,
    )
    cells: dict[str, list[Cell]] = {}
    for name, table in tables.items():
        present = tuple(data[item] for item in table.data if item in data)
        if flags.paper and table.needs_lift:
            notice(f"Table {name} is left out: it needs lifted features, and --paper trains them beside the colours.")
            continue
        if not scenes:
            raise ValueError("Stages I and II learn from ScanNet++; give its root with --scannetpp.")
        for missing in (item for item in table.data if item not in data):
            notice(f"Table {name} goes without {missing}: give its root with --{missing.split(':')[1]}.")
        cells[name] = replace(plan, data=present).create_cells(table)
    run_tables(tables, cells, plan.output, flags, len(scenes))


def run_small(flags: SmallFlags) -> None:
    """Tables on small scenes."""
    tables = choose_tables(flags.tables)
    output = flags.output.absolute()
    train, test = _absolute(flags.train), _absolute(flags.test)
    if not train and not test:
        train, test = _synthesize(output / "rooms")
    if not train or not test:
        raise ValueError("Give scenes to learn from with --train and others to test on with --test.")
    if flags.backbone.startswith("random:"):
        notice(f"{flags.backbone} has RANDOM weights: figures show that everything runs, not what features are worth.")
    further = dict(_split_weights(text) for text in flags.more_backbones)
    weights = {name: path for name, path in further.items() if path is not None}
    if flags.backbone_weights is not None:
        weights[flags.backbone] = flags.backbone_weights.absolute()
    plan = Plan(
        output=output,
        scenes=train,
        data=(*find_scene_data(train, test), *(_name_labelled(path) for path in _absolute(flags.labelled))),
        backbone=flags.backbone,
        weights=weights,
        seeds=flags.seeds,
        colour_steps=flags.colour_steps,
        finetune_steps=flags.steps,
        probe_iterations=flags.probe_iterations,
    )
    cells: dict[str, list[Cell]] = {}
    for name, table in tables.items():
        if table.backbones != (MAIN,):
            # The paper's other backbones are those at hand here.
            mains = tuple(backbone for backbone in table.backbones if backbone == MAIN)
            table = replace(table, backbones=(*mains, *further))
        cells[name] = plan.create_cells(table)
        if not cells[name]:
            why = "--more-backbones" if not table.backbones else f"data to probe {table.only_task} on"
            notice(f"Table {name} is left out: it needs {why}.")
            del cells[name]
    run_tables(tables, cells, output, flags, len(train))


def run_tables(
    tables: dict[str, AblationTable],
    cells: dict[str, list[Cell]],
    output: Path,
    flags: CommonFlags,
    num_scenes: int,
    execute: Execute | None = None,
) -> None:
    """Lists or runs the cells of all tables, then makes the report of what is finished.

    Raises:
        ValueError: Cells have failed.
    """
    if flags.show:
        print(describe_cells(tables, cells))
        return
    execute = execute or execute_cell
    probes = [cell for group in cells.values() for cell in group]
    missing = find_missing(probes)
    if flags.dry_run or flags.on == "slurm":
        arrays = create_arrays(missing)
        print(describe_jobs(arrays, num_scenes))
        if not flags.dry_run:
            mode = "paper" if isinstance(flags, PaperFlags) else "small"
            same = replace(flags, output=output, on="here")
            numbers = submit(arrays, output, num_scenes, lambda name: (mode, *spell(replace(same, cell=name))))
            print(f"Submitted: {' '.join(numbers)}. The same command submits again what has failed.")
        return
    if flags.cell is not None:
        missing = [cell for cell in missing if cell.name == flags.cell]
    failed = run_cells(missing, output / "logs", execute)
    finished = {cell.result for probe in probes for cell in (probe, *probe.needs) if cell.is_done()}
    if finished and flags.cell in (None, REPORT):
        folder = output / "report"
        arguments = (*map(str, sorted(finished)), "--output-dir", str(folder))
        cell = Cell("report", (sys.executable, "-m", "fit3d_ns.cli.report", *arguments), folder / "tables.json")
        if execute(cell, output / "logs" / "report.log"):
            print(f"Report: {folder / 'tables.html'}")
        else:
            failed.append("report")
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed or were left out because of that: {', '.join(failed)}; see {output / 'logs'}, "
            "then run the same command again."
        )


def run_cells(cells: Sequence[Cell], logs: Path, execute: Execute) -> list[str]:
    """Runs cells in order; those that need a failed one are left out.

    Returns:
        Names of cells without a result.
    """
    failed: list[str] = []
    for number, cell in enumerate(cells, start=1):
        if any(needed.name in failed for needed in cell.needs):
            failed.append(cell.name)
            continue
        notice(f"[{number}/{len(cells)}] {cell.name}")
        start = time.perf_counter()
        log = logs / f"{cell.name.replace('/', '-')}.log"
        if execute(cell, log) and cell.is_done():
            notice(f"    done in {time.perf_counter() - start:.0f} s")
        else:
            failed.append(cell.name)
            notice(f"    failed; see {log}")
    return failed


def execute_cell(cell: Cell, log: Path) -> bool:
    """Runs a command; on Ctrl-C and SIGTERM it is given the time to save what it has."""
    log.parent.mkdir(parents=True, exist_ok=True)
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        environment = {"PYTHONWARNINGS": "ignore", **os.environ}
        process = subprocess.Popen(cell.create_command(), stdout=file, stderr=subprocess.STDOUT, env=environment)
        with StopRequest() as stop:
            while process.poll() is None and not stop.is_requested:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
            if stop.is_requested:
                notice(f"    stopping; {cell.name} saves what it has")
                if stop.signal == signal.SIGTERM:
                    # A terminal sends Ctrl-C to both; this may have come to the parent alone.
                    process.terminate()
                process.wait()
                raise KeyboardInterrupt
        return process.returncode == 0


def describe_cells(tables: dict[str, AblationTable], cells: dict[str, list[Cell]]) -> str:
    """What `--list` prints."""
    lines = []
    for name, group in cells.items():
        lines.append(f"Table {name}: {tables[name].title}")
        lines += [f"  {'done   ' if cell.is_done() else 'missing'} {cell.name}" for cell in group]
    missing = find_missing([cell for group in cells.values() for cell in group])
    lines.append(f"{len(missing)} commands to run:")
    return "\n".join([*lines, *(f"  {cell.name}" for cell in missing)])


def find_scene_data(train: Sequence[Path], test: Sequence[Path]) -> list[ProbeData]:
    """What scenes can be probed on: depth and labels have to be there in all of them."""
    found = []
    for task, folder in (("segmentation", "labels"), ("depth", "render_depth")):
        if all((scene / "dslr" / folder).is_dir() for scene in (*train, *test)):
            found.append(ProbeData(f"{task}:scenes", tuple(train), tuple(test)))
    if all((scene / "dslr" / "render_depth").is_dir() for scene in test):
        found += [ProbeData(f"{task}:scenes", (), tuple(test)) for task in ("consistency", "correspondence")]
    if not found:
        raise ValueError(f"{train[0]} and the other scenes have neither depth (dslr/render_depth) nor dslr/labels.")
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: `paper` or `small`, then its flags."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["paper"]:
        run_command(PaperFlags, run_paper, prog="reproduce_paper.sh", description="", args=arguments[1:])
    elif arguments[:1] == ["small"]:
        run_command(SmallFlags, run_small, prog="reproduce_small.sh", description="", args=arguments[1:])
    else:
        sys.exit("ablations.py: say `paper` or `small` first.")


def _absolute(paths: Sequence[Path]) -> tuple[Path, ...]:
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"No such folder: {path}.")
    return tuple(path.absolute() for path in paths)


def _split_weights(text: str, must_have_file: bool = False) -> tuple[str, Path | None]:
    name, _, file = text.partition("=")
    if not file:
        if must_have_file:
            raise ValueError(f"{text} names no weights; give NAME=FILE.")
        return name, None
    if not Path(file).is_file():
        raise ValueError(f"No such weights file: {file}.")
    return name, Path(file).absolute()


def _list_scenes(root: Path, split: str) -> tuple[Path, ...]:
    folder = find_scannetpp_scenes(root)
    if folder is None:
        raise ValueError(f"{root} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    names = read_lines(root / "splits" / f"{split}.txt", "download the splits folder of ScanNet++")
    return tuple((folder / name).absolute() for name in names)


def _name_labelled(path: Path) -> ProbeData:
    return ProbeData(f"segmentation:{path.name}", (path,), (path,))


def _synthesize(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Three rooms, the last of them to test on."""
    if not folder.is_dir():
        notice(f"No scenes are given: making synthetic rooms in {folder}.")
        command = [sys.executable, "-m", "fit3d_ns.cli.synthesize", "--output-dir", str(folder), "--num-scenes", "3"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rooms = sorted(path for path in folder.iterdir() if path.is_dir())
    return tuple(rooms[:-1]), tuple(rooms[-1:])


if __name__ == "__main__":
    main()
