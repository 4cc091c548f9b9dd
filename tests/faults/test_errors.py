"""A full disk, a quota, a missing permission or a failing device end a command in one sentence, and cost no result."""

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import IS_NIGHTLY, run_undisturbed, start_folder
from tests.faults.harness import Fault, attempt, describe, run_all
from tests.faults.world import COMMANDS, collect_results

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.EROFS)
SAYS = {
    "ENOSPC": ("full", "space"),
    "EDQUOT": ("quota",),
    "EACCES": ("permission",),
    "EIO": ("device", "disk", "input/output"),
    "EROFS": ("read-only",),
}
"""Words of which a sentence has at least one."""


@pytest.mark.parametrize("name", COMMANDS)
def test_error__one_sentence_and_a_second_run_ends_as_the_undisturbed_one(
    name: str, base: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    command = COMMANDS[name]
    outcome, expected = run_undisturbed(base, command, undisturbed)
    number = outcome.num_operations
    # Two errors, early and late, each of them at some of the commands; every combination at night.
    place = [*COMMANDS].index(name)
    cases = [(1 + number // 4, ERRORS[place % 5]), (1 + 3 * number // 4, ERRORS[(place + 2) % 5])]
    if IS_NIGHTLY:
        cases = [(point, error) for point in range(1, number + 1) for error in ERRORS]

    def fail_and_repeat(case: tuple[int, int]) -> str:
        point, error = case
        folder = start_folder(base, command, tmp_path / f"{point}-{error}")
        failed = attempt(command.function, command.arguments, folder, fault=Fault(point, error), seconds=300)
        where = f"operation {point}, {describe(error)}: "
        if failed.kind != "sentence":
            return f"{where}{failed.kind}\n{failed.text[-2500:]}"
        sentence = next((line for line in failed.text.splitlines() if "error:" in line), "").lower()
        if not any(word in sentence for word in SAYS[describe(error)]):
            return f"{where}the sentence does not say it: {sentence or failed.text[-500:]}"
        arguments = command.arguments
        if command.again is not None and any(folder.rglob("*.ckpt")):
            arguments = command.again
        again = attempt(command.function, arguments, folder, seconds=300)
        if again.kind != "done":
            return f"{where}then {again.kind}\n{again.text[-1500:]}"
        found = collect_results(folder / command.results)
        different = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
        return f"{where}other results in {different}" if different else ""

    problems = [problem for problem in run_all(cases, fail_and_repeat) if problem]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", COMMANDS)
def test_file_size_limit__is_one_sentence(name: str, base: Path, tmp_path: Path) -> None:
    """What no hook can imitate: libraries that write in other languages meet a real limit."""
    command = COMMANDS[name]
    folder = start_folder(base, command, tmp_path / "limited")
    limited = attempt(command.function, command.arguments, folder, file_mb=0.002, seconds=300)
    assert limited.kind in ("sentence", "done"), limited.text[-2500:]
