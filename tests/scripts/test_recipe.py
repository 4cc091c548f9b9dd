import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fit3d_ns.scene import load_scene
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
    small = SynthesisConfig(output_dir=tmp_path / "rooms", num_scenes=1, num_frames=6, width=64, height=48)
    synthesize_scenes(small)
    # A frame that its capture marks as bad has no depth; the others' is taken all the same.
    cameras = tmp_path / "rooms/room_00/dslr/nerfstudio/transforms_undistorted.json"
    content = json.loads(cameras.read_text())
    content["frames"][0]["is_bad"] = True
    cameras.write_text(json.dumps(content))
    # Synthetic rooms that are there are taken; the script's own are too large for a test.
    synthesize_scenes(replace(small, output_dir=tmp_path / "out" / "rooms", num_scenes=2, seed=1))
    arguments = ["--scenes", "rooms/room_00", "--backbone", "toy_rooms_vit", "--output-dir", "out", "--steps", "2"]
    first = run(arguments, tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "taking the 2 rooms" in first.stderr
    report = json.loads((tmp_path / "out" / "vit" / "report.json").read_text())
    assert (
        report["steps"] == 2
        and len(report["scenes"]) == 3
        and (tmp_path / "out" / "vit" / "model.safetensors").is_file()
    )
    lifted = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("round-1/*/*.safetensors"))
    assert [*map(str, lifted)] == [
        f"round-1/{name}.safetensors" for name in ("rooms/room_00", "rooms/room_01", "scenes/room_00")
    ]
    scenes = [load_scene(tmp_path / "out" / path) for path in lifted]
    assert {scene.gaussians.feature_dim for scene in scenes} == {192}, "all channels of the toy"


def test_recipe__says_what_is_missing(tmp_path: Path) -> None:
    assert "--scenes is missing" in run(["--backbone", "a", "--output-dir", "out"], tmp_path).stderr
    # Hubs keep files under their hashes, and links to them under their names.
    (tmp_path / "0a1b2c").touch()
    (tmp_path / "linked.safetensors").symlink_to("0a1b2c")
    linked = run(["--scenes", "linked.safetensors", "nowhere", "--backbone", "a", "--output-dir", "out"], tmp_path)
    assert "No such scene" in linked.stderr and "0a1b2c" not in linked.stderr
    absent = run(["--scenes", "absent", "--backbone", "a", "--output-dir", "out"], tmp_path)
    rest = ["--backbone", "a", "--output-dir", "out"]
    for name in ("room", "a", "b"):
        (tmp_path / name).mkdir()
    for words, sentence in (
        (["--scenes", "room/dslr", "room.safetensors"], "several scenes are called room"),
        (["--scenes", "a/dslr", "b/dslr"], "No such scene: "),
        (["--scenes", "room", "--synthetic-rooms", "eight"], "--synthetic-rooms and --rounds take a number"),
    ):
        assert sentence in run([*words, *rest], tmp_path).stderr
    assert absent.returncode != 0 and "No such scene" in absent.stderr and not (tmp_path / "out" / "vit").exists()
