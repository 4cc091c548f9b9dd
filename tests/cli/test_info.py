import json
from pathlib import Path

import pytest

from fit3d_ns.cli import info as module


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
