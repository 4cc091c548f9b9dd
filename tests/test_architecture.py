"""The house rules about imports, held against the source: which room looks into which, who may know which library."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
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
    "viser": {"report"},
    "tyro": {"cli", "plugin"},
    "numba": {"rasterization"},
    "pycolmap": {"data"},
    "submitit": {"cli"},
}
"""Libraries with a room of their own."""

PRIVATE_MODULES = {"gsplat.cuda._wrapper": "rasterization/gsplat_backend.py"}
"""Private modules of other libraries that are used all the same, each in one file that says why."""

PUBLIC_API = {
    "load_scene",
    "save_scene",
    "create_extractor",
    "load_finetuned",
    "rasterization",
    "rasterize_features",
    "backproject_features",
    "available_backends",
}
"""What the README and `docs/design.md` offer to users of the library; nothing of ours has to call it."""

MAX_LINES = 400
MAX_PACKAGE_LINES = 28_000
MAX_MODULES = 190
"""Small is a feature: later ideas are built in rooms that exist."""

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


def test_files_import_each_other_in_no_circle() -> None:
    """Imports inside functions count: what has to be hidden there is a circle all the same."""
    names = {_module_name(path): path for path in list_modules()}
    imports = {
        name: sorted({target for target in _imported_modules(path, names) if target != name})
        for name, path in names.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in imports[name]:
                walk(target, [*trail, name])
            done.add(name)

    for name in names:
        walk(name, [])


def test_private_modules_of_other_libraries_are_used_where_it_is_said() -> None:
    for path in list_modules():
        for name in read_imports(path):
            parts = name.split(".")
            if parts[0] not in ("fit3d_ns", "__future__") and any(part.startswith("_") for part in parts):
                assert str(path.relative_to(PACKAGE)) == PRIVATE_MODULES.get(name), f"{path} imports {name}"


def test_public_names_have_users_beside_the_tests() -> None:
    """A public function or class that only tests call is code that no user can reach."""
    defined: dict[str, list[Path]] = {}
    used: set[str] = set()
    for path in [*list_modules(), *sorted((PACKAGE.parent / "scripts").rglob("*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.is_relative_to(PACKAGE):
            for node in tree.body:
                is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.decorator_list
                if is_definition and not node.name.startswith("_"):
                    defined.setdefault(node.name, []).append(path)
        for statement in tree.body:
            # A name inside its own definition (recursion, a class naming itself) is no use of it.
            own = getattr(statement, "name", None)
            used |= {name for name in _used_names(statement) if name != own}
    entry_points = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    unused = {
        name: paths
        for name, paths in defined.items()
        if name not in used and name not in PUBLIC_API and f":{name}" not in entry_points
    }
    assert not unused, "\n".join(f"{name}: {paths[0].relative_to(PACKAGE)}" for name, paths in unused.items())


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


def test_the_package_stays_small() -> None:
    assert len(list_modules()) <= MAX_MODULES
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in list_modules()) <= MAX_PACKAGE_LINES


def test_core_imports_without_nerfstudio_and_gsplat(tmp_path: Path) -> None:
    """A fresh interpreter in which both are absent imports every module outside the plugin."""
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


def _module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").relative_to(PACKAGE.parent).parts).removesuffix(".__init__")


def _imported_modules(path: Path, names: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports; a name taken from a package's `__init__` counts as that file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in names)
            if any(name not in names for name in inner):
                yield node.module or ""


def _used_names(statement: ast.stmt) -> set[str]:
    """Names that a statement reads, attributes and quoted annotations included; imports and exports do not count."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return set()
    if isinstance(statement, ast.Assign) and any(
        getattr(target, "id", "") == "__all__" for target in statement.targets
    ):
        return set()
    used: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            used.add(node.value)
    return used


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_commands_wait_passively_unless_told_otherwise(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import sys, os, fit3d_ns; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({} if own is None else {"OMP_WAIT_POLICY": own}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["False", own or "PASSIVE"]


@pytest.mark.parametrize(("command", "own", "expected"), [
    ("ns-train", None, "PASSIVE"), ("ns-eval", "ACTIVE", "ACTIVE"), ("other-train", None, "None"),
])  # fmt: skip
def test_nerfstudios_commands_wait_passively_too(tmp_path: Path, command: str, own: str | None, expected: str) -> None:
    """They load torch before any plugin; a line that Python runs at its start comes before that."""
    script = tmp_path / command
    script.write_text(f"#!{sys.executable}\nimport os; print(os.environ.get('OMP_WAIT_POLICY'))\n")
    script.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if own is None else {"OMP_WAIT_POLICY": own}
    result = subprocess.run([script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected
