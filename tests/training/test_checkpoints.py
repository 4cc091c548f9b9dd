"""Checkpoints are whole or absent, and refuse to continue another run."""

import errno
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fit3d_ns.training.checkpoints import CheckpointFolder, CheckpointProgress, check_resumable
from fit3d_ns.training.processes import Processes, create_accelerator

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

    def fill_up(content, file):
        if file.name.endswith(failing_file):
            file.write(b"half")
            raise error
        save(content, file)

    monkeypatch.setattr(torch, "save", fill_up)

    with pytest.raises(ValueError, match="step-00000005 cannot be written: the disk is full"):
        folder.save(replace(PROGRESS, step=5), {"step": 5}, processes)
    assert folder.find_steps() == [4] and folder.load(4)[1] == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


KILLED = """
import os, sys
from pathlib import Path
import torch
from fit3d_ns.training.processes import create_accelerator
from fit3d_ns.training.checkpoints import CheckpointFolder, CheckpointProgress
from fit3d_ns.training.processes import Processes
torch.save = lambda content, file: (file.write(b"half"), os._exit(9))
processes = Processes(create_accelerator("cpu"))
CheckpointFolder(Path(sys.argv[1]), 2).save(CheckpointProgress(5, 1, 2, 1, 1.5, {}), {}, processes)
"""


def test_checkpoint__a_kill_while_writing_leaves_no_trace_that_counts(tmp_path, processes):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(PROGRESS, {"step": 4}, processes)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    assert folder.find_steps() == [4] and len(list(tmp_path.iterdir())) == 2
    # The same command with another interval never comes by the step at which it was killed.
    folder.save(replace(PROGRESS, step=8), {"step": 8}, processes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("file", ["state.pt", "rng-0.pt", "progress.json"])
def test_checkpoint__a_damaged_one_falls_back_to_the_one_before_and_is_replaced(tmp_path, processes, capsys, file):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (4, 6):
        folder.save(replace(PROGRESS, step=step), {"step": step}, processes)
    (folder.get_path(6) / file).write_bytes(b"half")
    progress, state = folder.load_newest(processes)
    assert progress.step == 4 and state == {"step": 4}
    assert "step-00000006 cannot be read" in capsys.readouterr().err
    folder.save(replace(PROGRESS, step=6), {"step": 6}, processes)
    assert CheckpointFolder(tmp_path, keep=2).load_newest(processes)[0].step == 6


def test_checkpoint__only_damaged_ones_are_one_sentence(tmp_path, processes):
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load_newest(processes) is None
    folder.save(PROGRESS, {"step": 4}, processes)
    (folder.get_path(4) / "state.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="step-00000004 cannot be read.*--resume never"):
        folder.load_newest(processes)


def test_resume__refuses_other_processes_and_settings(tmp_path):
    check_resumable(PROGRESS, replace(PROGRESS, step=0, seconds=0.0), tmp_path)
    with pytest.raises(ValueError, match="num_processes 1 against 2"):
        check_resumable(PROGRESS, replace(PROGRESS, num_processes=2), tmp_path)
    other = {"sampling": {"seed": 1}, "scenes": ["a"]}
    with pytest.raises(ValueError, match=r"sampling.seed 42 against 1 \(checkpoint against now\)"):
        check_resumable(PROGRESS, replace(PROGRESS, settings=other), tmp_path)
