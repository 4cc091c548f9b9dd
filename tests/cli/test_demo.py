import sys

import pytest

from fit3d_ns.cli.demo import DemoCommand, demo

BACKBONE = "random:test_vit"


def test_demo__needs_gradio_and_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="needs Gradio, which is not installed"):
        demo(DemoCommand(backbone=BACKBONE))
    monkeypatch.setattr("fit3d_ns.cli.demo.check_gradio", lambda: None)
    with pytest.raises(ValueError, match="compares one architecture"):
        demo(DemoCommand(backbone=BACKBONE, finetuned=("random:vit_tiny_patch16_224",), device="cpu"))
    with pytest.raises(ValueError, match="num_clusters is 1; it must be at least 2 and at most 20"):
        demo(DemoCommand(backbone=BACKBONE, num_clusters=1))
