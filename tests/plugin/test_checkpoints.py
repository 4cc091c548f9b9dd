"""Checkpoints: whole or absent, plain values only, damaged ones passed over."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fit3d_ns.plugin import checkpoints
from fit3d_ns.plugin.checkpoints import (
    load_latest_checkpoint,
    make_plain,
    save_checkpoint_file,
)


def create_state(step: int) -> dict[str, Any]:
    return {"step": step, "pipeline": {"_model.x": torch.full((4,), float(step))}, "optimizers": {}}


def test_save__keeps_only_the_latest_and_leaves_nothing_else_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "nerfstudio_models"
    for step in (1, 2):
        save_checkpoint_file(create_state(step), folder / f"step-{step:09d}.ckpt")
    assert [path.name for path in folder.iterdir()] == ["step-000000002.ckpt"]
    assert [path.name for path in folder.parent.iterdir()] == ["nerfstudio_models"]


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_load_latest__passes_over_a_damaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    for step in (1, 2):
        save_checkpoint_file(create_state(step), tmp_path / f"step-{step:09d}.ckpt", keep_older=True)
    newest = tmp_path / "step-000000002.ckpt"
    whole = newest.read_bytes()
    numbers = torch.full((4,), 2.0).numpy().tobytes()
    assert whole.count(numbers) == 1
    newest.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole.replace(numbers, bytes(16)))
    state, path = load_latest_checkpoint(tmp_path)
    assert (state["step"], path.name) == (1, "step-000000001.ckpt")
    assert "step-000000002.ckpt" in capsys.readouterr().err


def test_load_latest__of_only_damaged_files_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "step-000000001.ckpt").write_bytes(b"half")
    with pytest.raises(ValueError, match="No readable checkpoint"):
        load_latest_checkpoint(tmp_path)


def test_load_latest__finds_the_folder_below_the_run(tmp_path: Path) -> None:
    save_checkpoint_file(create_state(7), tmp_path / "nerfstudio_models" / "step-000000007.ckpt")
    assert load_latest_checkpoint(tmp_path)[0]["step"] == 7


def test_load__names_a_missing_folder_and_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No checkpoint folder"):
        load_latest_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="step-000000009.ckpt"):
        load_latest_checkpoint(tmp_path, step=9)


def test_save__on_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    save_checkpoint_file(create_state(1), folder / "step-000000001.ckpt")

    def fail(state: Any, file: Any) -> None:
        file.write(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(ValueError, match=r"step-000000002.ckpt cannot be written: the disk is full"):
        save_checkpoint_file(create_state(2), folder / "step-000000002.ckpt")
    assert [path.name for path in folder.iterdir()] == ["step-000000001.ckpt"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_make_plain__turns_numpy_numbers_into_pythons_everywhere() -> None:
    plain = make_plain(
        {"lr": np.float64(0.5), "list": [np.int64(3), {"deep": np.float32(1)}], "tuple": (np.bool_(True),)}
    )
    assert plain == {"lr": 0.5, "list": [3, {"deep": 1.0}], "tuple": (True,)}
    assert type(plain["lr"]) is float and type(plain["list"][0]) is int
