import stat
from pathlib import Path

import pytest

from fit3d_ns.utils.files import write_atomically


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
