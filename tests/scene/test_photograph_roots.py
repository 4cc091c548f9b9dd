"""A scene file reads photographs from its own folder, a named one, or one that its user confirmed; from no other."""

import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from fit3d_ns.scene import load_scene
from fit3d_ns.scene.photograph_roots import check_root, confirm_root
from tests.finetuning.finetuning_scene import save_new_scene


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has confirmed nothing yet, in a process that has named no root yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("fit3d_ns.scene.photograph_roots._said", [])


def rewrite_root(path: Path, root: str) -> None:
    """Changes the recorded root, as a stranger can."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    scene = json.loads(header["__metadata__"]["fit3d_scene"])
    scene["capture"]["root"] = root
    header["__metadata__"] = {"fit3d_scene": json.dumps(scene)}
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])


def test_capture__a_scene_that_was_saved_here_finds_its_photographs(
    nobody: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_new_scene(tmp_path / "made")
    assert load_scene(path).capture().views
    assert str(tmp_path / "made" / "data" / "room") in capsys.readouterr().err


def test_capture__a_strangers_file_may_not_name_a_folder(nobody: None, tmp_path: Path) -> None:
    path = save_new_scene(tmp_path / "made")
    private = tmp_path / "private"
    shutil.copytree(tmp_path / "made" / "data" / "room", private)
    for root in (str(private), "/"):
        rewrite_root(path, root)
        with pytest.raises(ValueError, match="--data-root"):
            load_scene(path).capture()
    rewrite_root(path, str(private))
    # Named on the command line, it is read; and a folder that holds the file and its photographs needs nothing.
    assert load_scene(path).capture(private).views
    shutil.copytree(private, path.parent / "photographs")
    rewrite_root(path, str(path.parent / "photographs"))
    assert load_scene(path).capture().views


def test_check_root__asks_a_person_once(nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["n\n", "yes\n"])

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return next(answers)

        def write(self, text: str) -> None: ...

        def flush(self) -> None: ...

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(ValueError):
        check_root(tmp_path / "photographs", tmp_path / "scenes" / "a.safetensors")
    check_root(tmp_path / "photographs", tmp_path / "scenes" / "a.safetensors")
    check_root(tmp_path / "photographs" / "inner", tmp_path / "scenes" / "b.safetensors")


def test_confirm_root__tasks_side_by_side_lose_nobodys_root(nobody: None, tmp_path: Path) -> None:
    roots = [tmp_path / f"room_{index}" for index in range(1200)]
    together = Barrier(8)

    def confirm(task: int) -> None:
        together.wait()
        for root in roots[task::8]:
            confirm_root(root)

    with ThreadPoolExecutor(8) as tasks:
        list(tasks.map(confirm, range(8)))
    for root in roots:
        check_root(root, tmp_path / "scenes" / "a.safetensors")


def test_check_root__knows_what_was_confirmed_when_one_file_held_all(nobody: None, tmp_path: Path) -> None:
    memory = tmp_path / "config" / "fit3d_ns" / "photograph_roots.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(json.dumps({"roots": [str(tmp_path / "a")]}))
    check_root(tmp_path / "a" / "inner", tmp_path / "scenes" / "a.safetensors")
    with pytest.raises(ValueError):
        check_root(tmp_path / "b", tmp_path / "scenes" / "a.safetensors")


def test_check_root__a_memory_of_somebody_else_is_no_obstacle(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ValueError, match="--data-root"):
        check_root(tmp_path / "a", tmp_path / "scenes" / "a.safetensors")


def test_confirm_root__a_damaged_or_read_only_memory_is_no_obstacle(nobody: None, tmp_path: Path) -> None:
    memory = tmp_path / "config" / "fit3d_ns" / "photograph_roots.json"
    memory.parent.mkdir(parents=True)
    memory.write_text("[[[")
    confirm_root(tmp_path / "a")
    check_root(tmp_path / "a", tmp_path / "scenes" / "a.safetensors")
    shutil.rmtree(memory.parent)
    memory.parent.write_text("a file where the folder would be")
    confirm_root(tmp_path / "b")
    with pytest.raises(ValueError):
        check_root(tmp_path / "b", tmp_path / "scenes" / "a.safetensors")
