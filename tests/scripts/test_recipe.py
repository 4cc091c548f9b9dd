import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes

SCRIPT = Path(__file__).parents[2] / "scripts" / "recipe.sh"


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # The commands of the environment that runs the tests.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )


@pytest.mark.slow
def test_recipe__goes_from_captures_with_depth_to_one_backbone(tmp_path: Path) -> None:
    synthesize_scenes(SynthesisConfig(output_dir=tmp_path / "rooms", num_scenes=1, num_frames=6, width=64, height=48))
    arguments = ["--scenes", "rooms/room_00", "--backbone", "toy_rooms_vit", "--output-dir", "out", "--steps", "2"]
    first = run(arguments, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    report = json.loads((tmp_path / "out" / "vit" / "report.json").read_text())
    assert report["steps"] == 2 and (tmp_path / "out" / "vit" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "round-1" / "scenes" / "room_00.safetensors").is_file()


def test_recipe__says_what_is_missing(tmp_path: Path) -> None:
    assert "--scenes is missing" in run(["--backbone", "a", "--output-dir", "out"], tmp_path).stderr
    absent = run(["--scenes", "absent", "--backbone", "a", "--output-dir", "out"], tmp_path)
    assert absent.returncode != 0 and "No such scene" in absent.stderr and not (tmp_path / "out" / "vit").exists()
