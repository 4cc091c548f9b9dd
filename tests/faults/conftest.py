"""The world of the campaigns, built once, and what undisturbed commands make in it."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.faults import world
from tests.faults.harness import Outcome, attempt, copy_folder

IS_NIGHTLY = os.environ.get("FIT3D_FAULTS", "") == "nightly"
"""All points and many more mutations, for hours; otherwise a sample that takes two minutes."""


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
