"""Killed at the N-th file operation, a command that is run again ends as if it had never been killed."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import IS_NIGHTLY, run_undisturbed, start_folder
from tests.faults.harness import Fault, attempt, find_litter, run_all
from tests.faults.world import COMMANDS, collect_results

NUM_POINTS = 3


def choose_points(number: int) -> list[int]:
    """The first and the last operation, where windows of a writer open and close, and some between."""
    if IS_NIGHTLY or number <= NUM_POINTS:
        return list(range(1, number + 1))
    return sorted({1 + round(index * (number - 1) / (NUM_POINTS - 1)) for index in range(NUM_POINTS)})


@pytest.mark.parametrize("name", COMMANDS)
def test_kill__a_second_run_ends_as_the_undisturbed_one(
    name: str, base: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = COMMANDS[name]
    outcome, expected = run_undisturbed(base, command, undisturbed)
    assert outcome.num_operations > 2

    def kill_and_repeat(point: int) -> str:
        folder = start_folder(base, command, tmp_path / str(point))
        killed = attempt(command.function, command.arguments, folder, fault=Fault(point), seconds=300)
        assert killed.kind == "killed", (point, killed.kind, killed.text)
        arguments = command.arguments
        if command.again is not None and any(folder.rglob("*.ckpt")):
            arguments = command.again
        again = attempt(command.function, arguments, folder, seconds=300)
        if again.kind != "done":
            return f"operation {point}: {again.kind}\n{again.text[-1500:]}"
        found = collect_results(folder / command.results)
        different = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        litter = find_litter(folder)
        return f"operation {point}: other results in {different}, litter {litter}" if different or litter else ""

    problems = [problem for problem in run_all(choose_points(outcome.num_operations), kill_and_repeat) if problem]
    assert not problems, "\n".join(problems)


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
