"""What others find in the root of the repository: torch.hub's entries, the citation, forms, the registry."""

import re
import runpy
from pathlib import Path

import pytest
import timm
import torch
import yaml

import fit3d_ns
from fit3d_ns.features import create_extractor
from fit3d_ns.features.sources import TOY_FOLDER

ROOT = Path(__file__).parents[1]


def test_hub__opens_a_folder_whose_tokens_are_ours() -> None:
    model = torch.hub.load(str(ROOT), "fit3d", str(TOY_FOLDER), source="local").eval()
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        tokens = model.forward_features((image - mean) / std)[:, model.num_prefix_tokens :]
    ours = create_extractor(str(TOY_FOLDER))(image).patch_tokens
    torch.testing.assert_close(tokens, ours, rtol=1e-4, atol=1e-4)


def test_hub__has_the_names_of_the_authors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = runpy.run_path(str(ROOT / "hubconf.py"))
    published = {"dinov2_small_fine", "dinov2_reg_small_fine", "clip_base_fine", "mae_base_fine", "deit3_base_fine"}
    assert {"fit3d", *published} <= {name for name, entry in entries.items() if callable(entry)}
    asked = []
    weights = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()

    def download(url: str, path: str) -> None:
        asked.append(url)
        torch.save({"model": weights}, path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        loaded = torch.hub.load(str(ROOT), "dinov2_small_fine", source="local").state_dict()
        assert torch.equal(loaded["blocks.11.mlp.fc2.weight"], weights["blocks.11.mlp.fc2.weight"])
    assert asked == ["https://huggingface.co/yuanwenyue/FiT3D/resolve/main/dinov2_small_finetuned.pth"]


def test_version__is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes is not None and fit3d_ns.__version__ == citation["version"] == changes[1]


def test_github__runs_the_test_command_of_the_readme_and_asks_for_the_machine() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == ["bash scripts/test.sh"] and commands[0] in (ROOT / "README.md").read_text()
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    machine = next(field for field in form["body"] if field["id"] == "machine")
    assert "fit3d-info --json" in machine["attributes"]["label"] and machine["validations"]["required"]


def test_registry__names_the_methods_that_there_are() -> None:
    entries = re.findall(r'^(\w+) = "fit3d_ns.plugin.method:', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    names = {name.replace("_", "-") for name in entries}
    folder = ROOT / "docs" / "nerfstudio_registry"
    text = (folder / "external_method.py").read_text()
    assert {*re.findall(r'\("(fit3d-[a-z-]+)"', text)} == names
    compile(text, "external_method.py", "exec")
    assert all(f"`{name}`" in (folder / "fit3d.md").read_text() for name in names)
