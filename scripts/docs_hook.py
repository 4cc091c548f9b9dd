"""A hook of mkdocs: the pages of the site that nobody writes twice.

From files outside docs/: the start page (README), how to add things (CONTRIBUTING), changes, the packaged ViT's card.
Generated: commands, from their `--help`; Python, from the docstrings of what the design page calls public.
"""

import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COPIED = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "toy_rooms_vit.md": "fit3d_ns/features/toy_rooms_vit/README.md",
}
"""Pages, and the files that they are."""
PUBLIC = {
    "Scenes": ("scene.load_scene", "scene.save_scene", "scene.FeatureScene", "scene.PosedCapture", "scene.Gaussians"),
    "Backbones": (
        "features.create_extractor",
        "features.FeatureExtractor",
        "finetuning.backbone_folder.load_finetuned",
    ),
    "Rasterization": (
        "rasterization.rasterization",
        "rasterization.rasterize_features",
        "rasterization.backproject_features",
        "rasterization.available_backends",
    ),
}
"""What the page about Python shows, below `fit3d_ns`."""


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages; mkdocs calls it."""
    from mkdocs.structure.files import File

    pages = {name: copy_page(source) for name, source in COPIED.items()}
    pages |= {"commands.md": write_commands(), "api.md": write_api()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def copy_page(source: str) -> str:
    """A Markdown file as a page of the site, with links to its other pages; links to other files become words."""
    text = (ROOT / source).read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    pages = {file: page for page, file in COPIED.items()}

    def move(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        name, _, anchor = target.partition("#")
        if re.match(r"https?:|#", target):
            return match[0]
        page = pages.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if page is None or page.endswith(".py"):
            return f"`{label}`"
        return f"[{label}]({page}{'#' + anchor if anchor else ''})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", move, text)


def write_commands() -> str:
    """What every command says to `--help`."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    scripts = re.findall(r'^(fit3d-\w+) = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    parts = ["# Commands\n\nThe `--help` of each. `ns-train fit3d-features --help` has that of the plugin.\n"]
    for name, module, function in scripts:
        main = getattr(importlib.import_module(module), function)
        variants = [[]] if name != "fit3d-report" else [[], ["features"], ["predictions"]]
        for words in variants:
            page = io.StringIO()
            sys.argv = [name, *words, "--help"]
            with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
                main()
            text = re.sub(r"\x1b\[[0-9;]*m", "", page.getvalue()).rstrip()
            parts.append(f"## {' '.join([name, *words])}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def write_api() -> str:
    """Directives that mkdocstrings fills with signatures and docstrings."""
    parts = ["# Python\n\nWhat the commands are made of and what stays as it is; the rest of the package may move.\n"]
    for heading, names in PUBLIC.items():
        parts += [f"## {heading}\n", *(f"::: fit3d_ns.{name}\n" for name in names)]
    return "\n".join(parts)
