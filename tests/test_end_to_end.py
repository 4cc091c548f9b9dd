"""The quickstart itself, on a CPU: the commands of all stages, one after the other, with the toy of the package."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fit3d_ns.scene import load_scene

REPOSITORY = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("bash") is None or not (REPOSITORY / ".venv" / "bin" / "ns-train").exists(),
        reason="the quickstart works in the checkout's own .venv",
    ),
]


@pytest.mark.timeout(2400)  # Three minutes on a quiet core, and others may take most of it.
def test_quickstart__goes_from_synthetic_rooms_to_a_page_that_says_fine_tuning_helped(tmp_path: Path) -> None:
    command = ["bash", "scripts/quickstart.sh", "--output", tmp_path / "out", "--backbone", "toy_rooms_vit"]
    command += ["--finetune-steps", "48"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "Warning" not in said and "RANDOM" not in said
    out = tmp_path / "out"
    lifted = json.loads((out / "scenes" / "room_00.json").read_text())["metrics"]
    assert lifted["feature_cosine"] > lifted["feature_cosine_mean_token"] + 0.1
    scene = load_scene(out / "scenes" / "room_00.safetensors")
    assert not scene.backbone.is_random and scene.gaussians.feature_dim == 64
    report = json.loads((out / "finetuned" / "report.json").read_text())
    assert report["steps"] == 48 and report["loss_last"] < report["loss_first"]
    before, after = (json.loads((out / "probes" / f"consistency-{name}.json").read_text())["metrics"]
                     for name in ("original", "finetuned"))  # fmt: skip
    assert after["recall_10px"] > before["recall_10px"], "points are found again in a room that was in no training"
    for name in ("original", "finetuned"):
        rmse = json.loads((out / "probes" / f"depth-{name}.json").read_text())["metrics"]["rmse"]
        assert 0 < rmse < 1.5, "a linear layer reads depth from the features"
    page = (out / "index.html").read_text()
    assert all((out / name).is_file() and name in page for name in ("room.png", "features.png", "depth.png"))
    assert f"{before['recall_10px']:.1%}"[:-1] in page and "Next: with your own data" in page
    photograph, original = (np.asarray(Image.open(out / "features.png"))[60:290, x : x + 300] for x in (10, 340))
    assert photograph.std() > 20 and original.std() > 20


def test_ns_train__refuses_a_missing_scene_in_one_sentence(tmp_path: Path) -> None:
    program = REPOSITORY / ".venv" / "bin" / "ns-train"
    command = [
        program,
        "fit3d-features",
        "--data",
        tmp_path / "absent",
        "--output-dir",
        tmp_path,
        "--vis",
        "tensorboard",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "No such scene" in result.stderr and "Traceback" not in result.stderr
