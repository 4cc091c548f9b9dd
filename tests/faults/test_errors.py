"""A full disk, a quota, a missing permission or a failing device end a command in one sentence, and cost no result."""

import errno
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import IS_NIGHTLY, SEED, Judge, run_undisturbed, start_folder
from tests.faults.harness import Fault, Verdict, attempt, describe, run_all
from tests.faults.world import COMMANDS, collect_results, find_differences

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
    name: str, base: Path, undisturbed: dict[str, Any], tmp_path: Path, judge: Judge
) -> None:
    command = COMMANDS[name]
    outcome, expected = run_undisturbed(base, command, undisturbed)
    number = outcome.num_operations
    # Each error at some operation; at each operation at night.
    random_ = random.Random(f"{SEED} {name}")
    cases = [(random_.randint(1, number), error) for error in ERRORS]
    if IS_NIGHTLY:
        cases = [(point, error) for point in range(1, number + 1) for error in ERRORS]

    def fail_and_repeat(case: tuple[int, int]) -> Verdict:
        point, error = case
        verdict = Verdict(f"error: {describe(error)}", f"{name}, operation {point}")
        folder = start_folder(base, command, tmp_path / f"{point}-{error}")
        failed = attempt(command.function, command.arguments, folder, fault=Fault(point, error), seconds=300)
        # Where files are only removed from the point on, there is nothing to fail.
        if failed.kind != ("sentence" if failed.had_error else "done"):
            return verdict.fail(failed.kind, failed.text)
        sentence = next((line for line in failed.text.splitlines() if "error:" in line), "").lower()
        if failed.had_error and not any(word in sentence for word in SAYS[describe(error)]):
            return verdict.fail("a sentence that does not say it", sentence or failed.text)
        arguments = command.arguments
        if command.again is not None and any(folder.rglob("*.ckpt")):
            arguments = command.again
        again = attempt(command.function, arguments, folder, seconds=300)
        if again.kind != "done":
            return verdict.fail(again.kind, f"the second run: {again.text[-2000:]}")
        different = find_differences(expected, collect_results(folder / command.results))
        shutil.rmtree(folder)
        return verdict.fail("silent", f"other results in {different}") if different else verdict

    judge(run_all(cases, fail_and_repeat))


@pytest.mark.parametrize("name", COMMANDS)
def test_file_size_limit__is_one_sentence(name: str, base: Path, tmp_path: Path, judge: Judge) -> None:
    """What no hook can imitate: libraries that write in other languages meet a real limit."""
    command = COMMANDS[name]
    folder = start_folder(base, command, tmp_path / "limited")
    limited = attempt(command.function, command.arguments, folder, file_mb=0.002, seconds=300)
    verdict = Verdict("error: file size limit", name)
    judge([verdict if limited.kind in ("sentence", "done") else verdict.fail(limited.kind, limited.text)])
