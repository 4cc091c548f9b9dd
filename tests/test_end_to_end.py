"""The quickstart itself, on a CPU with random weights: the commands of all stages, one after the other."""

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


def test_quickstart__goes_from_a_synthetic_room_to_a_probed_backbone(tmp_path: Path) -> None:
    command = ["bash", "scripts/quickstart.sh", "--output", tmp_path / "out", "--steps", "60", "--finetune-steps", "6"]
    command += ["--backbone", "random:vit_tiny_patch16_224"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "RANDOM" in result.stdout, "random weights must be called random"
    scene_name = "room_00"
    figures = json.loads((tmp_path / "out" / f"{scene_name}-eval.json").read_text())["results"]
    assert figures["psnr"] > 12 and figures["feature_cosine"] > figures["feature_cosine_mean_token"]
    assert {"ssim", "feature_l1", "psnr_std", "feature_l1_std", "feature_cosine_std"} <= set(figures)
    picture = np.asarray(Image.open(tmp_path / "out" / f"{scene_name}-pictures" / "eval_features_pca_0000.png"))
    assert picture.shape == (120, 320, 3) and picture.std() > 10
    scene = load_scene(tmp_path / "out" / f"{scene_name}.safetensors")
    assert scene.backbone.is_random and scene.gaussians.feature_dim == 64
    run = json.loads(
        (tmp_path / "out" / "runs" / scene_name / "fit3d-features" / "latest" / "results.json").read_text()
    )
    assert run["is_random"] is True and run["metrics"]["num_train_views"] == 21
    report = json.loads((tmp_path / "out" / "finetuned" / "report.json").read_text())
    assert report["steps"] == 6 and report["is_random"] is True
    assert set(report["consistency"]) >= {"original", "finetuned"}
    assert (tmp_path / "out" / "finetuned" / "model.safetensors").is_file()
    probes = [json.loads((tmp_path / "out" / "probes" / f"{scene_name}-{name}.json").read_text())
              for name in ("original", "finetuned")]  # fmt: skip
    assert all(probe["kind"] == "probe/depth" and 0 < probe["metrics"]["rmse"] < 5 for probe in probes)
    assert probes[0]["metrics"] != probes[1]["metrics"]
    tables = (tmp_path / "out" / "report" / "tables.md").read_text()
    assert "random" in tables.lower() and "RMSE" in tables


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
