"""The world of the campaigns, what undisturbed commands make in it, and the table of what was survived.

`pytest -q tests/faults` takes two minutes; `FIT3D_FAULTS=nightly` tries every point and many more mutations, for
hours, and `FIT3D_FAULTS_SEED=7` others. The table is printed at the end.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import world
from tests.faults.harness import FAILURES, Outcome, Verdict, attempt, copy_folder

IS_NIGHTLY = os.environ.get("FIT3D_FAULTS", "") == "nightly"
SEED = os.environ.get("FIT3D_FAULTS_SEED", "0")

Judge = Callable[[Iterable[Verdict]], None]
_PROPERTY = "fault"


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    """Asserts that all attempts of a campaign were survived, and counts them for the table."""

    def count_and_assert(verdicts: Iterable[Verdict]) -> None:
        verdicts = list(verdicts)
        for verdict in verdicts:
            record_property(_PROPERTY, [verdict.row, verdict.failure])
        failed = [f"{verdict.row}, {verdict.case}: {verdict.text}" for verdict in verdicts if verdict.failure]
        assert not failed, f"{len(failed)} of {len(verdicts)}\n" + "\n".join(failed)

    return count_and_assert


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table, also of several processes: counts travel with the reports."""
    reports = [report for name in ("passed", "failed") for report in terminalreporter.stats.get(name, [])]
    counts = Counter(tuple(value) for report in reports for name, value in report.user_properties if name == _PROPERTY)
    if not counts:
        return
    terminalreporter.section(f"attempts and what was not survived (seed {SEED})")
    terminalreporter.write_line(f"| {'':40} | attempts | survived | " + " | ".join(FAILURES) + " |")
    terminalreporter.write_line("|---" * (3 + len(FAILURES)) + "|")
    for row in [*sorted({row for row, _ in counts}), "all"]:
        by_failure = Counter[str]()
        for (name, failure), number in counts.items():
            by_failure[failure] += number if row in (name, "all") else 0
        failed = " | ".join(f"{by_failure[failure]:{len(failure)}}" for failure in FAILURES)
        terminalreporter.write_line(f"| {row:40} | {by_failure.total():8} | {by_failure['']:8} | {failed} |")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures, splats, scenes, and a run of nerfstudio."""
    folder = tmp_path_factory.mktemp("faults") / "base"
    folder.mkdir()
    built = attempt(world.build, [folder], folder, seconds=600)
    assert built.kind == "done", built.text
    train = world.COMMANDS["ns-train"]
    run_folder = copy_folder(folder, folder.with_name("with-run"))
    trained = attempt(train.function, train.arguments, run_folder, seconds=600)
    assert trained.kind == "done", trained.text
    return folder


@pytest.fixture(scope="session")
def undisturbed(base: Path) -> dict[str, tuple[Outcome, dict[str, Any]]]:
    """Of each command: how it ended, and its results; filled by `run_undisturbed`."""
    return {}


def start_folder(base: Path, command: world.Command, target: Path) -> Path:
    """A fresh work folder with what the command needs."""
    return copy_folder(base.with_name("with-run") if command.needs else base, target)


def run_undisturbed(
    base: Path, command: world.Command, undisturbed: dict[str, tuple[Outcome, dict[str, Any]]]
) -> tuple[Outcome, dict[str, Any]]:
    """Runs a command once in peace; later calls get the same."""
    if command.name not in undisturbed:
        folder = start_folder(base, command, base.with_name(f"undisturbed {command.name}"))
        outcome = attempt(command.function, command.arguments, folder, seconds=600)
        assert outcome.kind == "done", outcome.text
        undisturbed[command.name] = outcome, world.collect_results(folder / command.results)
    return undisturbed[command.name]
