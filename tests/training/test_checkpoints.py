"""Checkpoints are whole or absent, and refuse to continue another run."""

import errno
from dataclasses import replace

import pytest
import torch

from fit3d_ns.training import checkpoints as module
from fit3d_ns.training.accelerator import create_accelerator
from fit3d_ns.training.checkpoints import CheckpointFolder, CheckpointProgress, check_resumable
from fit3d_ns.training.processes import Processes

PROGRESS = CheckpointProgress(4, 1, 2, 1, 1.5, {"sampling": {"seed": 42}, "scenes": ["a"]})


@pytest.fixture
def processes():
    return Processes(create_accelerator("cpu"))


def test_checkpoint__comes_back_with_its_random_state(tmp_path, processes):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    torch.manual_seed(3)
    torch.rand(5)
    folder.save(PROGRESS, {"module": {"weight": torch.arange(3.0)}, "scaler": None}, processes)
    expected = torch.rand(4)
    torch.manual_seed(99)
    progress, state = folder.load(4)
    assert progress == PROGRESS and state["scaler"] is None
    assert torch.equal(state["module"]["weight"], torch.arange(3.0))
    assert torch.equal(torch.rand(4), expected)


def test_checkpoint__keeps_the_last_ones(tmp_path, processes):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (2, 4, 6, 11):
        folder.save(replace(PROGRESS, step=step), {"step": step}, processes)
    assert folder.find_steps() == [6, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000011"]


FULL = {
    "Python": OSError(errno.ENOSPC, "No space left on device"),
    "torch": RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
}
"""A full disk as each of them reports it."""


@pytest.mark.parametrize("failing_file", ["rng-0.pt", "state.pt"])
@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_checkpoint__full_disk_leaves_the_previous_one_whole(tmp_path, processes, monkeypatch, failing_file, error):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(PROGRESS, {"step": 4}, processes)
    save = torch.save

    def fill_up(content, path):
        if path.name == failing_file:
            path.write_bytes(b"half")
            raise error
        save(content, path)

    monkeypatch.setattr(module.torch, "save", fill_up)

    with pytest.raises(ValueError, match="No space left for the checkpoint"):
        folder.save(replace(PROGRESS, step=5), {"step": 5}, processes)
    assert folder.find_steps() == [4] and folder.load(4)[1] == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_checkpoint__a_kill_while_writing_leaves_no_trace_that_counts(tmp_path, processes):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(PROGRESS, {"step": 4}, processes)
    temporary = tmp_path / "step-00000005.tmp"
    temporary.mkdir()
    (temporary / "state.pt").write_bytes(b"half")
    (temporary / "progress.json").write_text("{}")
    assert folder.find_steps() == [4]
    folder.save(replace(PROGRESS, step=5), {"step": 5}, processes)
    assert folder.find_steps() == [4, 5] and not temporary.exists()
    # The same command with another interval never comes by the step at which it was killed.
    temporary = tmp_path / "step-00000006.tmp"
    temporary.mkdir()
    folder.save(replace(PROGRESS, step=8), {"step": 8}, processes)
    assert not temporary.exists()


def test_checkpoint__damage_is_named(tmp_path, processes):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(PROGRESS, {"step": 4}, processes)
    (folder.get_path(4) / "state.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="step-00000004 cannot be read.*remove the folder"):
        folder.load(4)


def test_resume__refuses_other_processes_and_settings(tmp_path):
    check_resumable(PROGRESS, replace(PROGRESS, step=0, seconds=0.0), tmp_path)
    with pytest.raises(ValueError, match="num_processes 1 against 2"):
        check_resumable(PROGRESS, replace(PROGRESS, num_processes=2), tmp_path)
    other = {"sampling": {"seed": 1}, "scenes": ["a"]}
    with pytest.raises(ValueError, match=r"sampling.seed 42 against 1 \(checkpoint against now\)"):
        check_resumable(PROGRESS, replace(PROGRESS, settings=other), tmp_path)
