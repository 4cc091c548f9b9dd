"""Gaussians that `fit3d-lift --train` has nerfstudio train first; nerfstudio itself is only in the slow test."""

import json
import os
import shlex
import sys

import pytest

from fit3d_ns.cli import runs
from tests.cli.test_lift import run_main
from tests.lift_capture import BACKBONE, write_capture

PRETENDER = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
assert words[:3] == ["-m", "nerfstudio.scripts.train", "fit3d-features"], words
given = dict(zip(words[3::2], words[4::2]))
run = pathlib.Path(given["--output-dir"], given["--experiment-name"], "fit3d-features", given["--timestamp"])
starts = pathlib.Path(given["--output-dir"], "starts.json")
before = json.loads(starts.read_text()) if starts.exists() else []
starts.write_text(json.dumps([*before, given]))
if not before:
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "nerfstudio_models" / "step-000000002.ckpt").touch()
    sys.exit("The disk is full.")
if len(before) == 1:
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
(run / "results.json").touch()
"""


def test_train_splats__goes_on_from_checkpoints_stops_with_its_command_and_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HOLDING_PYTHON", shlex.join([sys.executable, "-c", PRETENDER]))
    read = []
    monkeypatch.setattr(runs, "read_run_source", lambda *args: read.append(args[0]))

    def train():
        getattr(runs.train_splats, "__wrapped__", runs.train_splats)(tmp_path / "splats", 9, "cpu", tmp_path, "room")

    with pytest.raises(ValueError, match=r"status 1 \(The disk is full.\).*room.log"):
        train()
    # A signal is passed on, and the training has ended before its command does.
    with pytest.raises(KeyboardInterrupt):
        train()
    train()
    train()
    first, second, third = json.loads((tmp_path / "splats" / "starts.json").read_text())
    folder = tmp_path / "splats" / "room" / "fit3d-features" / "steps_9"
    assert "--load-dir" not in first and second == third and second["--load-dir"] == str(folder / "nerfstudio_models")
    assert first["--max-num-iterations"] == "9" and first["--pipeline.model.feature-loss-weight"] == "0"
    assert read == [folder, folder]


def test_lift__train_wants_captures(tmp_path, capsys):
    words = ["--train", "9", "--output-path", tmp_path / "out"]
    assert "--train needs the folders of the scenes with --data" in run_main(capsys, words)[2]
    assert "--dry-run needs Gaussians" in run_main(capsys, [*words, "--data", tmp_path, "--dry-run"])[2]


@pytest.mark.slow
def test_lift__trains_what_has_no_geometry_and_lifts_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    write_capture(tmp_path / "room")
    words = ["--train", "6", "--data", tmp_path / "room", "--output-path", tmp_path / "out", "--feature-dim", "4"]
    words += ["--backbone", BACKBONE, "--feature-cache", tmp_path / "cache", "--device", "cpu", "--max-passes", "1"]
    code, out, err = run_main(capsys, words)
    assert code == 0, err + (tmp_path / "out" / "splats" / "room.log").read_text()
    assert f"Scene: {tmp_path / 'out' / 'room.safetensors'}" in out
    metrics = json.loads((tmp_path / "out" / "room.json").read_text())["metrics"]
    assert "steps_6" in metrics["source"] and metrics["training_seconds"]["colour"] > 0
    assert "lifted already" in run_main(capsys, words)[2]
