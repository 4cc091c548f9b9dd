"""The ablations' cells as jobs of Slurm, and what they take: `reproduce_paper.sh --on slurm`, `--dry-run`.

Cells of one kind that need the same others are one array, which waits until those have ended well; the report waits for
the end of all. A task runs the same command with `--cell NAME`: one whose result is there ends at once, one that is
preempted or out of time is told so, saves, and goes back into the queue. sbatch's variables choose the rest:
SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=1 SBATCH_ACCOUNT=me.
"""

import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ablation_cells import Cell

MAX_TASKS = 1000
"""Of an array; Slurm refuses more unless its administrator allows them."""
REPORT = "report"
"""The cell that comes last."""

_HOURS = {"colour": 300 / 3600, "scene": 37 / 3600}
"""On one H100, at the paper's size (docs/costs.md)."""
_STEP_SECONDS = {"small": 0.0604, "base": 0.0943}
_STEPS_PER_SCENE = 300
"""Of an epoch of stage II (docs/costs.md)."""
_PROBE_HOURS = {"segmentation": 2.3, "depth": 2.2, "classification": 4.7, "consistency": 0.1, "correspondence": 0.1}
"""Computed, not measured: 16 views of 13 ms a step, 1.3 million photographs of ImageNet."""
_GB = {"colour": 0.7, "scene": 0.17, "average": 0.126, "features": 1.2}
_WEIGHTS_GB = {"small": 0.09, "base": 0.35}


@dataclass
class Array:
    """Commands of one kind that may run at the same time."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    needs: list["Array"] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """`colour`, `scene`, `finetune` or `probe`."""
        return self.name.split("/")[0]


def create_arrays(cells: Sequence[Cell]) -> list[Array]:
    """Arrays of cells, which come after those they need, as `find_missing` orders them; needed arrays come first."""
    open_arrays: dict[tuple[str, ...], Array] = {}
    arrays: list[Array] = []
    found: dict[str, Array] = {}
    for cell in cells:
        needs = list({array.name: array for needed in cell.needs if (array := found.get(needed.name))}.values())
        # Scenes of one backbone and number of features, all else by what it waits for.
        kind = cell.name.rsplit("/", 1)[0]
        same = (kind, *(array.name for array in needs))
        if same not in open_arrays or len(open_arrays[same].cells) == MAX_TASKS:
            open_arrays[same] = Array(f"{kind}/{len(arrays)}", [], needs)
            arrays.append(open_arrays[same])
        open_arrays[same].cells.append(cell)
        found[cell.name] = open_arrays[same]
    return arrays


def estimate_hours(cell: Cell, num_scenes: int) -> float:
    """Hours of a card that a cell takes."""
    kind, label = cell.name.split("/")[:2]
    if kind == "finetune":
        epochs = int(cell.command[cell.command.index("--epochs") + 1]) if "--epochs" in cell.command else 1
        return epochs * num_scenes * _STEPS_PER_SCENE * _STEP_SECONDS["base" if "base" in label else "small"] / 3600
    return _HOURS[kind] if kind in _HOURS else _PROBE_HOURS[label.split("-")[0]]


def estimate_gb(cell: Cell, num_scenes: int) -> float:
    """Disk that a cell fills, without the cache of features."""
    kind, label = cell.name.split("/")[:2]
    if kind == "finetune":
        # Averages of its scenes, and weights with two checkpoints of them and of the optimizer.
        return num_scenes * _GB["average"] + 7 * _WEIGHTS_GB["base" if "base" in label else "small"]
    return _GB.get(kind, 0.0)


def describe_jobs(arrays: Sequence[Array], num_scenes: int) -> str:
    """What `--dry-run` prints: jobs, hours of a card, disk."""
    lines = [f"{'jobs':<10} {'commands':>8} {'arrays':>6} {'card hours':>10} {'longest':>8} {'GB':>8}"]
    totals, chain = [0.0, 0.0], 0.0
    for kind in ("colour", "scene", "finetune", "probe"):
        own = [array for array in arrays if array.kind == kind]
        hours = [estimate_hours(cell, num_scenes) for array in own for cell in array.cells]
        disk = sum(estimate_gb(cell, num_scenes) for array in own for cell in array.cells)
        lines.append(
            f"{kind:<10} {len(hours):>8} {len(own):>6} {sum(hours):>10.1f} {max(hours, default=0):>8.2f} {disk:>8.0f}"
        )
        totals, chain = [totals[0] + sum(hours), totals[1] + disk], chain + max(hours, default=0)
    caches = {
        (cell.name.split("/")[1].split("-d")[0], cell.name.split("/")[2])
        for array in arrays
        for cell in array.cells
        if array.kind == "scene"
    }
    cache = len(caches) * _GB["features"]
    num_jobs = sum(len(array.cells) for array in arrays) + 1
    longest = (
        f"{totals[0]:.0f} card hours, {max(totals[0] / 8, chain):.0f} h on eight cards, never less than {chain:.1f} h"
    )
    return "\n".join([
        *lines,
        f"{num_jobs} jobs in {len(arrays)} arrays and the report: {longest} (one H100 each, at the paper's size; "
        "probes are computed, not measured)",
        f"Disk: {totals[1] + cache:.0f} GB, of which {cache:.0f} GB are cached features, which may go after the lifts; "
        "data sets not counted",
    ])  # fmt: skip


def submit(
    arrays: Sequence[Array],
    output: Path,
    num_scenes: int,
    spell: Callable[[str], Sequence[str]],
    sbatch: Callable[[Path], str] | None = None,
) -> list[str]:
    """Hands all arrays and the report to Slurm; returns their numbers.

    Args:
        arrays: Those of `create_arrays`.
        output: Folder of all results; scripts, lists of cells and what jobs print go to `jobs` in it.
        num_scenes: Scenes of stages I and II.
        spell: The words of this program that run a cell of this name.
        sbatch: Submits a script; returns its number.
    """
    folder, numbers, sbatch = output / "jobs", dict[str, str](), sbatch or _sbatch
    folder.mkdir(parents=True, exist_ok=True)
    report = Array(REPORT, [Cell(REPORT, (), folder)], list(arrays))
    for array in (*arrays, report):
        stem = folder / array.name.replace("/", "-")
        names = stem.with_suffix(".txt")
        names.write_text("".join(f"{cell.name}\n" for cell in array.cells))
        hours = 1.0 if array is report else max(estimate_hours(cell, num_scenes) for cell in array.cells)
        wait = "afterany" if array is report else "afterok"
        after = (
            [f"--dependency={wait}:{':'.join(numbers[needed.name] for needed in array.needs)}"] if array.needs else []
        )
        words = shlex.join([sys.executable, str(Path(__file__).with_name("ablations.py")), *spell("CELL")])
        options = [
            f"--job-name=fit3d-{array.kind}", f"--array=0-{len(array.cells) - 1}", f"--output={stem}-%a.log",
            f"--time={max(60, math.ceil(4 * 60 * hours))}", "--requeue", "--open-mode=append", "--signal=B:USR2@120",
            "--kill-on-invalid-dep=yes", *after,
        ]  # fmt: skip
        script = stem.with_suffix(".sh")
        script.write_text("\n".join([
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            f'cell=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(names))})',
            "# Told that the time is up or the node is wanted, it saves, and goes on later.",
            "again=",
            """trap 'again=1; kill -TERM "$command"' USR2""",
            f'{words.replace("CELL", chr(34) + "$cell" + chr(34))} &',
            "command=$!",
            'wait "$command"',
            "status=$?",
            '[ -z "$again" ] || { wait "$command"; scontrol requeue "$SLURM_JOB_ID"; }',
            'exit "$status"',
            "",
        ]))  # fmt: skip
        numbers[array.name] = sbatch(script)
    return list(numbers.values())


def _sbatch(script: Path) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("--on slurm needs Slurm's sbatch; it is not installed here.") from None
    if done.returncode:
        raise ValueError(f"Slurm does not take {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
