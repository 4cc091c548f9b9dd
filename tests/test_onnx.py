"""The ONNX block of docs/loading.md; scripts/test.sh runs it apart: nerfstudio forbids onnx's protobuf."""

import shutil
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

from fit3d_ns.features.sources import TOY_FOLDER
from tests.test_docs import ROOT, read_blocks


def test_onnx__gives_the_same_tokens_at_other_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(TOY_FOLDER, tmp_path / "vit")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "timm": timm}
    for block in read_blocks(ROOT / "docs" / "loading.md"):
        if "torch.export.save" in block or "torch.onnx" in block:
            exec(compile(block, "loading.md", "exec"), names)
    session = onnxruntime.InferenceSession("vit.onnx")
    model = timm.create_model("local-dir:vit", pretrained=True).eval()
    for num, height, width in ((1, 48, 64), (3, 120, 160), (2, 64, 40)):
        images = torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(height))
        (tokens,) = session.run(["tokens"], {"images": images.numpy()})
        with torch.no_grad():
            expected = model.forward_features(images)
        torch.testing.assert_close(torch.from_numpy(tokens), expected, rtol=0, atol=1e-4)
