"""Killed at the N-th file operation, a command that is run again ends as if it had never been killed."""

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from fit3d_ns.utils.files import lock_folder
from tests.faults.conftest import IS_NIGHTLY, SEED, Judge, run_undisturbed, start_folder
from tests.faults.harness import Fault, Verdict, attempt, find_litter, run_all
from tests.faults.world import COMMANDS, RUN, collect_results, find_differences


def choose_points(name: str, number: int) -> list[int]:
    """The first and the last operation, where windows of a writer open and close, and one between; all at night."""
    if IS_NIGHTLY:
        return list(range(1, number + 1))
    return sorted({1, random.Random(f"{SEED} {name}").randint(1, number), number})


@pytest.mark.parametrize("name", COMMANDS)
def test_kill__a_second_run_ends_as_the_undisturbed_one(
    name: str, base: Path, undisturbed: dict[str, Any], tmp_path: Path, judge: Judge
) -> None:
    """Also after SIGTERM, which is Ctrl-C at any moment."""
    command = COMMANDS[name]
    outcome, expected = run_undisturbed(base, command, undisturbed)
    number = outcome.num_operations
    assert number > 2

    def disturb_and_repeat(fault: Fault) -> Verdict:
        verdict = Verdict(f"{signal.Signals(fault.signal).name}: {name}", f"operation {fault.at}")
        folder = start_folder(base, command, tmp_path / f"{fault.at}-{fault.signal}")
        disturbed = attempt(command.function, command.arguments, folder, fault=fault, seconds=300)
        wanted = ("killed",) if fault.signal == signal.SIGKILL else ("interrupted", "done")
        if disturbed.kind not in wanted:
            return verdict.fail(disturbed.kind, disturbed.text)
        arguments = command.arguments
        if command.again is not None and any(folder.rglob("*.ckpt")):
            arguments = command.again
        again = attempt(command.function, arguments, folder, seconds=300)
        if again.kind != "done":
            return verdict.fail(again.kind, f"the second run: {again.text[-2000:]}")
        if different := find_differences(expected, collect_results(folder / command.results)):
            return verdict.fail("silent", f"other results in {different}")
        litter = find_litter(folder)
        shutil.rmtree(folder)
        return verdict.fail("litter", str(litter)) if litter else verdict

    faults = [Fault(point) for point in choose_points(name, number)]
    faults += [Fault(point, signal=signal.SIGTERM) for point in ((1 + number) // 2, number)[: 2 if IS_NIGHTLY else 1]]
    judge(run_all(faults, disturb_and_repeat))


FLAGS = {
    "tensorboard": (),
    "viewer": ("--vis", "viewer+tensorboard", "--viewer.quit-on-train-completion", "True"),
    "no local log": ("--logging.local-writer.max-log-size", "0"),
    "a long local log": ("--logging.local-writer.max-log-size", "10", "--vis", "viewer+tensorboard"),
}


@pytest.mark.parametrize("name", FLAGS if IS_NIGHTLY else [*FLAGS][-2:])
def test_ns_train__finished_without_its_metrics_gets_them(name: str, base: Path, tmp_path: Path) -> None:
    """Killed after the last checkpoint, it can never be resumed at a step."""
    command = COMMANDS["ns-train"]
    folder = start_folder(base, COMMANDS["fit3d-export"], tmp_path / "again")
    (record,) = folder.rglob("results.json")
    expected = collect_results(folder / command.results)
    record.unlink()
    assert command.again is not None
    again = attempt(command.function, [[*command.again[0], *FLAGS[name]]], folder, seconds=300)
    assert again.kind == "done" and "nothing to train; metrics are measured now" in again.text, again.text[-2000:]
    assert collect_results(folder / command.results) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_finished__is_said_and_repeated_at_no_cost(
    name: str, base: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """The same command again in a finished folder ends well and changes no result."""
    command = COMMANDS[name]
    folder = start_folder(base, command, tmp_path / "twice")
    first = attempt(command.function, command.arguments, folder, seconds=300)
    assert first.kind == "done", first.text
    before = collect_results(folder / command.results)
    again = attempt(command.function, command.again or command.arguments, folder, seconds=300)
    assert again.kind == "done", again.text
    assert collect_results(folder / command.results) == before
    assert not find_litter(folder)


@pytest.mark.parametrize(("name", "place"), [("ns-train", RUN), ("fit3d-finetune", "vit")])
def test_lock__a_second_process_is_kept_out(name: str, place: str, base: Path, tmp_path: Path) -> None:
    command = COMMANDS[name]
    folder = start_folder(base, command, tmp_path / "locked")
    with lock_folder(folder / place):
        second = attempt(command.function, command.arguments, folder, seconds=300)
    assert second.kind == "sentence" and "Another process works in" in second.text, second.text[-1500:]
