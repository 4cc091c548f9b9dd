"""The house rules about imports, held against the source: which room looks into which, who may know which library."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fit3d_ns"

LAYERS = [
    {"utils"},
    {"geometry"},
    {"rasterization", "features", "analysis", "data"},
    {"synthetic"},
    {"scene"},
    {"lifting", "training"},
    {"plugin", "finetuning", "probing", "report"},
    {"cli"},
]
"""From the ground up; a room imports only rooms of lower layers."""

ONLY_IN = {
    "nerfstudio": {"plugin"},
    "gsplat": {"rasterization", "plugin"},
    "timm": {"features"},
    "peft": {"features"},
    "matplotlib": {"report"},
    "gradio": {"report"},
    "tyro": {"cli", "plugin"},
    "numba": {"rasterization"},
    "pycolmap": {"data"},
}
"""Libraries with a room of their own."""

MAX_LINES = 400

DATAPARSER_MAY_IMPORT = (
    "nerfstudio.data.dataparsers",
    "nerfstudio.data.scene_box",
    "nerfstudio.cameras",
    "nerfstudio.plugins.registry_dataparser",
)


def list_modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def read_imports(path: Path) -> list[str]:
    """Every module a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole path"
            names.append(node.module or "")
    return names


def find_layer(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def test_every_room_has_a_layer() -> None:
    rooms = {room_of(path) for path in list_modules()} - {""}
    assert rooms <= set.union(*LAYERS)


@pytest.mark.parametrize("path", list_modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name in read_imports(path):
        parts = name.split(".")
        if parts[0] != "fit3d_ns" or len(parts) < 2 or parts[1] == room:
            continue
        if room == "cli" and parts[1] == "plugin":
            continue
        assert room, f"{path.name} at the top of the package imports {name}"
        assert find_layer(parts[1]) < find_layer(room), f"{room} imports {name}, which is not below it"


@pytest.mark.parametrize("path", list_modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    for name in read_imports(path):
        library = name.split(".")[0]
        if library in ONLY_IN:
            assert room_of(path) in ONLY_IN[library], f"{path.relative_to(PACKAGE)} imports {name}"


def test_gsplat_is_imported_by_one_file_of_rasterization() -> None:
    users = [path.name for path in list_modules() if room_of(path) == "rasterization" and _uses(path, "gsplat")]
    assert len(users) <= 1, users


def test_plugin_package_is_empty_and_its_dataparser_stays_outside_the_import_cycle() -> None:
    assert (PACKAGE / "plugin" / "__init__.py").read_text() == ""
    for name in read_imports(PACKAGE / "plugin" / "dataparser.py"):
        if name.startswith("nerfstudio"):
            assert name.startswith(DATAPARSER_MAY_IMPORT), f"dataparser.py imports {name}"


@pytest.mark.parametrize("path", list_modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short_documented_and_without_future_annotations(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    if source:
        assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert "__future__" not in read_imports(path)


def test_core_imports_without_nerfstudio_and_gsplat(tmp_path: Path) -> None:
    """A fresh interpreter in which both are absent imports every module outside the plugin."""
    import subprocess

    modules = [
        ".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts).removesuffix(".__init__")
        for path in list_modules()
        if room_of(path) != "plugin" and path.name != "gsplat_backend.py"
    ]
    code = (
        "import sys, importlib\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('nerfstudio', 'gsplat'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _uses(path: Path, library: str) -> bool:
    return any(name.split(".")[0] == library for name in read_imports(path))
