"""Files that are whole or absent, in the presence of kills, links, other processes and full disks."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fit3d_ns.utils.files import hash_bytes, lock_folder, write_atomically

KILLED = """
import os, sys
from pathlib import Path
from fit3d_ns.utils.files import write_atomically
with write_atomically(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os._exit(9)
"""


def test_write_atomically__leaves_a_file_that_others_may_read(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    with write_atomically(tmp_path / "written") as temporary:
        temporary.write_bytes(b"content")
        temporary.chmod(0o600)
    assert stat.S_IMODE((tmp_path / "written").stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_write_atomically__leaves_the_old_content_and_nothing_else_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_write_atomically__removes_what_a_killed_writer_left_and_nothing_of_a_living_one(tmp_path: Path) -> None:
    path = tmp_path / "scene[1].safetensors"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".tmp")
    living = left.with_name(left.name.replace(left.name.split(".")[-2], f"{os.getppid()}-0"))
    living.write_text("a living process writes here")
    with write_atomically(path) as temporary:
        temporary.write_text("whole")
        # Another thread of this process at the same file does not disturb.
        with write_atomically(path) as other:
            other.write_text("other")
    assert path.read_text() == "whole"
    assert {item.name for item in tmp_path.iterdir()} == {path.name, living.name}


def test_write_atomically__follows_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    target, link = tmp_path / "big-disk" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with write_atomically(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_write_atomically__makes_whole_folders(tmp_path: Path) -> None:
    with write_atomically(tmp_path / "checkpoint") as temporary:
        temporary.mkdir()
        (temporary / "state").write_text("x")
    assert (tmp_path / "checkpoint" / "state").read_text() == "x"
    with pytest.raises(KeyboardInterrupt), write_atomically(tmp_path / "other") as temporary:
        temporary.mkdir()
        (temporary / "state").write_text("x")
        raise KeyboardInterrupt
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_write_atomically__says_what_cannot_be_written_and_why(tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "replace", refuse)
    with (
        pytest.raises(ValueError, match=r"scene.*cannot be written.*quota"),
        write_atomically(tmp_path / "scene") as part,
    ):
        part.write_text("x")
    assert list(tmp_path.iterdir()) == []
    # What the block reads is not what it writes.
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "scene") as part:
        Path("/nowhere/at/all").read_text()


def test_hash_bytes__takes_names_that_are_no_text() -> None:
    assert hash_bytes(os.fsdecode(b"caf\xe9.png")) != hash_bytes("café.png") == hash_bytes("café.png".encode())


def test_lock_folder__keeps_another_process_out_until_this_one_is_done(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fit3d_ns.utils.files import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1])): print('in')"

    def enter() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)

    with lock_folder(tmp_path):
        refused = enter()
        assert refused.returncode == 1 and f"Another process works in {tmp_path}" in refused.stderr
    assert enter().stdout == "in\n"
