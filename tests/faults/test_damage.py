"""Seeded damage to ten kinds of file: a command goes on, or says in one sentence what is wrong; it never guesses.

Where a file of ours is damaged, its numbers are not used: a command refuses it, or makes the file again and ends
with the results of the undamaged one.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.faults.conftest import IS_NIGHTLY, SEED, Judge
from tests.faults.harness import Fault, Verdict, attempt, call_main, copy_folder, run_all
from tests.faults.mutations import mutate_bytes, mutate_embedded_json, mutate_json, mutate_safetensors
from tests.faults.world import CANARY, COMMANDS, RUN, Command, build_foreign, collect_results, find_differences
from tests.finetuning.finetuning_scene import BACKBONE

NUM_MUTATIONS = 1000 if IS_NIGHTLY else 30
"""Of each kind of file."""

Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file, how it is damaged, and the command that then reads it."""

    pattern: str
    """Glob below the work folder; one match is damaged."""
    mutate: tuple[Mutate, ...]
    """Ways to damage it."""
    command: Command
    """Reads the file."""
    prepare: tuple[Command, ...] = ()
    """Commands that make it."""
    is_ours: bool = False
    """Whether damage must be found."""
    stopped_by: Fault | None = None
    """Kills the preparation half-way."""


def _vary(command: Command, old: str, new: str) -> Command:
    module, arguments = command.arguments
    return replace(command, arguments=[module, [new if argument == old else argument for argument in arguments]])


LIFT, FINETUNE, PROBE = COMMANDS["fit3d-lift"], COMMANDS["fit3d-finetune"], COMMANDS["fit3d-probe"]
KEEPING = replace(FINETUNE, arguments=[FINETUNE.arguments[0], [*FINETUNE.arguments[1], "--cache-folder", "targets"]])
"""Keeps targets and averages for other runs, of which the next is one."""
KEPT = replace(_vary(KEEPING, "vit", "again"), results="again")
COLMAP = _vary(LIFT, "captures/a", "captures/colmap")
FINETUNED = Command(
    "fit3d-probe of a fine-tuned folder",
    call_main,
    [PROBE.arguments[0], [*PROBE.arguments[1], "--assembly", "finetuned", "--finetuned", "vit"]],
    "probed",
)
REPORT = Command(
    "fit3d-report",
    call_main,
    ["fit3d_ns.cli.report", ["vit/report.json", "probed/consistency.json", "--output-dir", "results"]],
    "results",
)
KINDS = {
    "scene file": Kind("scenes/room.safetensors", (mutate_safetensors, mutate_embedded_json), PROBE, is_ours=True),
    "splat PLY": Kind("captures/a.ply", (mutate_bytes,), LIFT),
    "transforms.json": Kind("captures/a/transforms.json", (mutate_json,), LIFT),
    "COLMAP model": Kind("captures/colmap/sparse/0/*.bin", (mutate_bytes,), COLMAP),
    "feature cache": Kind("cache/**/*.safetensors", (mutate_safetensors,), LIFT, is_ours=True),
    "kept targets": Kind("targets/**/*.safetensors", (mutate_safetensors,), KEPT, (KEEPING,), is_ours=True),
    "lift state": Kind(
        "lifted/*.lift-state", (mutate_safetensors, mutate_embedded_json), LIFT, (LIFT,), True, stopped_by=Fault(80)
    ),
    "weights": Kind("vit/model.safetensors", (mutate_safetensors,), FINETUNED, (FINETUNE,)),
    "config.json": Kind("vit/config.json", (mutate_json,), FINETUNED, (FINETUNE,)),
    "records": Kind("*/*.json", (mutate_json,), REPORT, (FINETUNE, PROBE)),
}


FOREIGN = Command("what others write", build_foreign, ["."], "rooms")


def _lift_surface(*surface: str) -> Command:
    inputs = ["--surface", *surface, "--data", "rooms/room_00", "--output-path", "surface", "--backbone", BACKBONE]
    common = ["--feature-dim", "4", "--max-passes", "3", "--feature-cache", "cache", "--device", "cpu"]
    return Command("fit3d-lift --surface", call_main, ["fit3d_ns.cli.lift", [*inputs, *common]], "surface")


SEGMENT = [
    "segmentation", "--train", "rooms/room_00", "--test", "rooms/room_00", "--backbone", BACKBONE, "--device", "cpu",
    "--num-iterations", "4", "--batch-size", "2", "--output-path", "labelled/r.json",
]  # fmt: skip
WEIGHTS = ["finetuning_vit" if argument == BACKBONE else argument for argument in PROBE.arguments[1]]
if IS_NIGHTLY:
    room = "rooms/room_00/dslr"
    KINDS |= {
        "a run": Kind(f"{RUN}/**/*.*", (mutate_bytes,), COMMANDS["fit3d-export"], (COMMANDS["ns-train"],)),
        "a room": Kind(f"{room}/**/*.*", (mutate_bytes,), _lift_surface("depth"), (FOREIGN,)),
        "cloud": Kind(f"{room}/colmap/*.txt", (mutate_bytes,), _lift_surface("points"), (FOREIGN,)),
        "labels": Kind(
            f"{room}/labels/*.png", (mutate_bytes,), Command("", call_main, [PROBE.arguments[0], SEGMENT], "labelled"),
            (FOREIGN,),
        ),
        "pickled weights": Kind(
            "weights.pth", (mutate_bytes,),
            Command("", call_main, [PROBE.arguments[0], [*WEIGHTS, "--backbone-weights", "weights.pth"]], "probed"),
            (FOREIGN,),
        ),
    }  # fmt: skip
    for suffix in ("obj", "glb", "ply"):
        file = f"mesh.{suffix}"
        KINDS[file] = Kind(file, (mutate_bytes,), _lift_surface("mesh", "--mesh", file), (FOREIGN,))


@pytest.mark.parametrize("name", KINDS)
def test_damage__is_found_or_harmless(name: str, base: Path, tmp_path: Path, judge: Judge) -> None:
    kind = KINDS[name]
    start = copy_folder(base, tmp_path / "start")
    for command in kind.prepare:
        prepared = attempt(command.function, command.arguments, start, fault=kind.stopped_by, seconds=300)
        assert prepared.kind == ("killed" if kind.stopped_by else "done"), prepared.text
    matches = sorted(path for path in start.glob(kind.pattern) if path.is_file() and path.stat().st_size)
    assert matches, list(start.rglob("*"))
    intact = copy_folder(start, tmp_path / "intact")
    outcome = attempt(kind.command.function, kind.command.arguments, intact, seconds=300)
    assert outcome.kind == "done", outcome.text
    expected = collect_results(intact / kind.command.results)

    def damage_and_read(number: int) -> Verdict:
        random_ = random.Random(f"{SEED} {name} {number}")
        folder = copy_folder(start, tmp_path / str(number))
        path = folder / random_.choice(matches).relative_to(start)
        verdict = Verdict(f"damage: {name}", f"{number}, {path.name}")
        content = path.read_bytes()
        damaged = random_.choice(kind.mutate)(content, random_)
        path.write_bytes(damaged)
        canary = folder / CANARY
        outcome = attempt(kind.command.function, kind.command.arguments, folder, seconds=40, memory_gb=2)
        if outcome.kind not in ("done", "sentence"):
            verdict = verdict.fail(outcome.kind, outcome.text)
        elif outcome.kind == "done" and kind.is_ours and damaged != content:
            found = collect_results(folder / kind.command.results)
            if different := find_differences(expected, found):
                verdict = verdict.fail("silent", f"other results in {different}")
        if canary.exists():
            verdict = verdict.fail("code", outcome.text)
        shutil.rmtree(folder)
        return verdict

    judge(run_all(range(NUM_MUTATIONS), damage_and_read))
