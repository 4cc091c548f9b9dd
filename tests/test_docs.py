"""The pages in docs/: what they show can be run, what they link to exists."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fit3d_ns.features import create_extractor
from fit3d_ns.features.sources import TOY_FOLDER

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def read_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_loading__every_way_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/loading.md, one after the other; ONNX has a test of its own (tests/test_onnx.py)."""
    shutil.copytree(TOY_FOLDER, tmp_path / "vit")
    # As fit3d-finetune writes them; transformers computes in the precision of the file, and the toy's is half.
    weights = {name: tensor.float() for name, tensor in load_file(TOY_FOLDER / "model.safetensors").items()}
    save_file(weights, tmp_path / "vit" / "model.safetensors", {"format": "pt"})
    pixels = torch.randint(0, 256, (60, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = {}
    for block in read_blocks(ROOT / "docs" / "loading.md"):
        if "torch.onnx" not in block:
            exec(compile(block.replace("CLONE", str(ROOT)), "loading.md", "exec"), names)
            found[block.splitlines()[0]] = names["tokens"]
    (_, timm_tokens), _, (_, hugging), (_, piped), *_ = found.items()
    for tokens in (hugging, piped):
        torch.testing.assert_close(tokens, timm_tokens, rtol=0, atol=1e-3)
    program = torch.export.load(tmp_path / "vit.pt2").module()
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exported = program((images - 0.5) / 0.5)[:, 1:]
    torch.testing.assert_close(exported, create_extractor("vit")(images).patch_tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links__lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}, which has no such heading"
