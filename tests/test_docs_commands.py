"""What README and docs/ tell people to type: Python blocks run, command lines are those that the programs take.

Executed: every block of Python (those of docs/loading.md in tests/test_docs.py, ONNX in tests/test_onnx.py) on a small
lifted scene and the packaged ViT. Parsed: every line of `fit3d-*` and `ns-*` by the command's own parser, whose values
have to fit the types; what stands within a sentence, and synopses with `|`, by the names of the flags. Of scripts, the
file and the flags have to exist. `test_end_to_end.py` runs the chain, and CI's quickstart the first lines of README.
"""

import contextlib
import importlib
import io
import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import tyro

from fit3d_ns.cli import command as command_module
from fit3d_ns.features.sources import TOY_FOLDER
from tests.report.figure_scenes import BACKBONE, write_photographs, write_scene
from tests.test_options import parse_trainer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "fit3d_ns/features/toy_rooms_vit/README.md")]
PAGES += sorted(ROOT.glob("docs/**/*.md"))
RUN_ELSEWHERE = ("loading.md",)
PROGRAM = r"(?:fit3d-\w+|ns-\w+|bash scripts/\S+|python scripts/\S+|sbatch|scripts/\S+\.(?:sh|py))"
WORDS = {"TASK": "depth", "USER/NAME": "me/vit", "USER/vit": "me/vit", "N": "1", "X": "0.5"}
"""Placeholders where not any word will do."""
OTHERS = ("pip install", "pip uninstall", "ns-install-cli")
"""Lines of blocks that are other people's programs."""


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def list_blocks(page: Path, languages: tuple[str, ...]) -> list[str]:
    """Code blocks, also indented ones; `` is a block without a language."""
    found = re.findall(r"^ *```([^\n]*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def list_lines(page: Path) -> list[str]:
    """Every command of bash blocks, and of README's table of what one has and what one then types; no comments."""
    joined = re.sub(r"\\\n\s*", " ", "\n".join(list_blocks(page, ("bash",))))
    lines = [re.sub(r"\s+# .*$", "", line).strip() for line in joined.splitlines() if line.strip()]
    rows = re.findall(r"^\|.*$", page.read_text(encoding="utf-8"), re.MULTILINE) if page.name == "README.md" else []
    return lines + [line for row in rows for line in re.findall(rf"`({PROGRAM} [^`]*)`", row)]


def list_mentions(page: Path) -> list[str]:
    """Commands with options within sentences, the lines of synopses, and lines that leave something out."""
    text = page.read_text(encoding="utf-8")
    for block in list_blocks(page, ("bash", "python", "")):
        text = text.replace(block, "")
    inline = [" ".join(found.split()) for found in re.findall(rf"`({PROGRAM} --?[^`]*)`", text)]
    synopses = re.sub(r"\n {8,}", " ", "\n".join(list_blocks(page, ("",)))).splitlines()
    cut = [line for line in list_lines(page) if line.endswith("...")]
    return inline + cut + [line.strip() for line in synopses if re.match(PROGRAM, line.strip())]


def expand(line: str) -> Iterator[list[str]]:
    """The words of a line, once for each choice of its {a,b}."""
    parts = re.split(r"\{([^{}]*)\}", line)
    for choice in itertools.product(*(part.split(",") for part in parts[1::2])):
        whole = "".join(itertools.chain(*itertools.zip_longest(parts[::2], choice, fillvalue="")))
        yield [WORDS.get(word, word) for word in shlex.split(whole)]


def find_config(program: str, words: list[str]) -> tuple[type, list[str]]:
    """The dataclass that a `fit3d-*` command parses these words into, and the words that are left to it."""
    module = importlib.import_module(f"fit3d_ns.cli.{program.removeprefix('fit3d-')}")
    if program == "fit3d-report" and words[:1] in (["features"], ["predictions"]):
        figures = importlib.import_module("fit3d_ns.cli.figures")
        return {"features": figures.FeaturesCommand, "predictions": figures.PredictionsCommand}[words[0]], words[1:]
    with patch.object(command_module, "run_command") as called:
        module.main(words)
    return called.call_args.args[0], list(called.call_args.kwargs["args"])


def parse_nerfstudio(program: str, words: list[str]) -> Any:
    if program == "ns-train":
        # The method's own name comes first; nerfstudio chooses its config by it.
        assert words[0] in ("fit3d-features", "fit3d-features-paper")
        return parse_trainer(words[1:])
    module, name = {
        "ns-eval": ("eval", "ComputePSNR"),
        "ns-viewer": ("viewer.run_viewer", "RunViewer"),
        "ns-process-data": ("process_data", "Commands"),
    }[program]
    return tyro.cli(getattr(importlib.import_module(f"nerfstudio.scripts.{module}"), name), args=words)


def list_flags(program: str, words: list[str]) -> set[str]:
    """Every flag that a command's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        if program.startswith("ns-"):
            parse_nerfstudio(program, [*words[: program == "ns-train"], "--help"])
        else:
            command_module.parse(find_config(program, words)[0], ["--help"])
    return set(re.findall(r"--[a-z][\w.-]*", shown.getvalue()))


def check_script(words: list[str]) -> None:
    """The script is there, and it or what it calls knows the flags."""
    path = ROOT / next(word for word in words if word.startswith("scripts/"))
    assert path.is_file(), path
    texts = [path.read_text()]
    texts += [other.read_text() for other in (ROOT / "scripts").glob("*.py") if other.name in texts[0]]
    for flag in (word for word in words if word.startswith("--")):
        option = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        assert any(re.search(rf"{flag}\b|^    {option}: ", text, re.MULTILINE) for text in texts), f"{path.name} {flag}"


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_lines__can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for line in list_lines(page):
        if line.startswith(OTHERS) or line.endswith("..."):
            continue
        for program, *words in expand(line):
            if program.startswith("fit3d-"):
                config, left = find_config(program, words)
                assert isinstance(command_module.parse(config, left), config), line
            elif program.startswith("ns-"):
                parse_nerfstudio(program, words)
            elif program == "sbatch":
                own = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
                check_script(words[: own + 1])
                assert {word for word in words[own:] if word.startswith("--")} <= list_flags("fit3d-finetune", [])
            else:
                assert program in ("bash", "python") or program.startswith("scripts/"), f"{line}: not known"
                check_script([program, *words])


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_mentions__name_flags_that_exist(page: Path) -> None:
    for line in list_mentions(page):
        program, *words = re.sub(r"[{}|,]", " ", line).split()
        given = {word for word in words if re.match(r"--[a-z]", word)}
        if program.startswith(("fit3d-", "ns-")):
            known = list_flags(program, words[:1])
            assert given <= known, f"{line}: {sorted(given - known)}"
        elif "_{" not in line:
            check_script([program, *words])


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Any]:
    """A folder with what blocks of Python open, and the names that they take for given."""
    shutil.copytree(TOY_FOLDER, tmp_path / "vit")
    write_scene(tmp_path / "scene.safetensors", write_photographs(tmp_path / "photographs"))
    shutil.copy(tmp_path / "scene.safetensors", tmp_path / "kitchen.safetensors")
    (tmp_path / "fit3d_ns").symlink_to(ROOT / "fit3d_ns")
    draw = torch.Generator().manual_seed(0)
    camera = {"camera_to_world": torch.eye(4)[:3], "K": torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])}
    splats = {name: torch.rand(5, 3, generator=draw) for name in ("means", "scales", "colors")}
    splats |= {"quats": torch.rand(5, 4, generator=draw), "opacities": torch.rand(5, generator=draw)}
    features = {"features": torch.rand(5, 4, generator=draw), "feature_maps": torch.rand(1, 48, 64, 2, generator=draw)}
    cameras = {"viewmats": torch.eye(4)[None], "Ks": camera["K"][None], "width": 64, "height": 48}
    images = {"images": torch.rand(1, 3, 48, 64, generator=draw), "backbone": BACKBONE, "h": 6, "w": 8}
    return {
        "torch": torch,
        "timm": importlib.import_module("timm"),
        **camera,
        **splats,
        **features,
        **cameras,
        **images,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN_ELSEWHERE], ids=name_page)
def test_python__runs(
    page: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in list_blocks(page, ("python",)):
        exec(compile(block, page.name, "exec"), places)


def test_blocks__are_of_languages_that_are_tested() -> None:
    for page in PAGES:
        languages = re.findall(r"^ *```([^\n]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(languages) <= {"bash", "python", "{button-link} REPOSITORY"}, page
