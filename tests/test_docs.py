"""The pages in docs/: what they show can be run, what they link to exists."""

import importlib
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_words__of_code_are_in_the_code(page: Path) -> None:
    """What stands in backticks: flags, files, names of functions and keys; what troubleshooting.md quotes is said."""
    kinds = ("py", "sh", "toml", "yml", "csv", "sbatch")
    places = [ROOT / "fit3d_ns", ROOT / "scripts", ROOT / "tests", ROOT / "docs"]
    files = [file for place in places for kind in kinds for file in place.rglob(f"*.{kind}")]
    code = "\n".join(
        file.read_text(encoding="utf-8") for file in (*files, ROOT / "pyproject.toml", ROOT / "hubconf.py")
    )
    known = set(re.findall(r"\w+", code))
    text = page.read_text(encoding="utf-8")
    # What changed long ago keeps the names of its time.
    text = re.split(r"^## \d", text, flags=re.MULTILINE)[0] if page.name == "CHANGELOG.md" else text
    rooms = "|".join(path.name for path in (ROOT / "fit3d_ns").iterdir() if path.is_dir())
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)):
        for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9.-]*)", quoted):
            own = flag.rpartition(".")[2].removeprefix("no-").replace("-", "_")
            assert own in known or f"--{flag}" in code, f"{page.name}: --{flag}"
        for path in re.findall(rf"(?<![\w./{{-])((?:scripts|tests|docs|fit3d_ns|{rooms})/[\w./-]*\w)", quoted):
            assert (ROOT / path).exists() or (ROOT / "fit3d_ns" / path).exists(), f"{page.name}: {path}"
        words = set(re.findall(r"(?<![\w/.<-])[a-z]+(?:_[a-z0-9]+)+(?![\w/-])", quoted))
        assert words <= known or "_mine" in quoted or "_my_" in quoted, f"{page.name}: {words - known}"
    if page.name == "troubleshooting.md":
        said = re.sub(r'"\s*\n\s*f?"', "", code)
        assert all(quote in said for quote in re.findall(r'^\| "([^"]+)"', text, re.MULTILINE))


def test_site__has_every_page_once_and_its_links_stay_in_it() -> None:
    """What `mkdocs build --strict` of scripts/build_docs.sh would say, without mkdocs."""
    hook = runpy.run_path(str(ROOT / "scripts" / "docs_hook.py"))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {*hook["COPIED"], "commands.md", "api.md"}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for entry in nav for value in entry.values() for page in _list_pages(value)]
    assert len(listed) == len(set(listed)) and set(listed) == pages
    for source in hook["COPIED"].values():
        for target in re.findall(r"\]\(([^)\s]+)\)", hook["copy_page"](source)):
            name = target.partition("#")[0]
            assert target.startswith("http") or not name or name in pages or (ROOT / "docs" / name).is_file(), target
    for names in hook["PUBLIC"].values():
        for name in names:
            module, _, member = f"fit3d_ns.{name}".rpartition(".")
            assert hasattr(importlib.import_module(module), member), name


def _list_pages(value: str | list[dict[str, str]]) -> list[str]:
    return [value] if isinstance(value, str) else [page for entry in value for page in entry.values()]
