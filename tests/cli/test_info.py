import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fit3d_ns.cli import info as module
from tests.finetuning.finetuning_scene import save_new_scene


def test_info__prints_square_brackets_and_writes_the_same_as_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *args: None if name == "gradio" else find_spec(name, *args)
    )
    monkeypatch.setenv("COLUMNS", "250")
    module.info(module.InfoConfig(output_path=tmp_path / "info.json"))
    printed = capsys.readouterr().out
    assert "pip install '.[demo]'" in printed
    content = json.loads((tmp_path / "info.json").read_text())
    assert any("'.[demo]'" in line for line in content["missing"]) and content["rasterization_backends"]
    assert all(name.replace("_", " ") in printed for name in content)


def test_verify__names_the_damaged_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = save_new_scene(tmp_path)
    (tmp_path / "scenes" / "record.json").write_text('{"a": 1}')
    save_file({"weight": torch.ones(3)}, tmp_path / "scenes" / "plain.safetensors")
    module.info(module.InfoConfig(verify=(tmp_path / "scenes",), json=True))
    found = json.loads(capsys.readouterr().out)
    assert {Path(path).name: text.split(":")[0] for path, text in found.items()} == {
        "plain.safetensors": "whole",
        "record.json": "whole",
        "room.safetensors": "whole",
    }
    assert "checksums right" in found[str(scene)]
    assert "no checksums" in found[str(tmp_path / "scenes" / "plain.safetensors")]

    content = bytearray(scene.read_bytes())
    content[-1] ^= 1
    scene.write_bytes(content)
    (tmp_path / "scenes" / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"2 of 3 files are not whole: .*record.json, .*room.safetensors"):
        module.info(module.InfoConfig(verify=(tmp_path / "scenes",)))
    assert "checksum of" in capsys.readouterr().out


def test_verify__refuses_what_it_cannot_judge(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_bytes(b"ply")
    with pytest.raises(ValueError, match=r"2 of 2 files are not whole: .*a.ply, .*absent"):
        module.info(module.InfoConfig(verify=(tmp_path / "a.ply", tmp_path / "absent.json")))
