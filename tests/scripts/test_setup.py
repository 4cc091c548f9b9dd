"""`setup.sh` says what stands in the way before anything is downloaded; uv and Python are stood in for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup.sh"


@pytest.mark.parametrize(
    ("python", "is_good", "asked"),
    [
        ("#!/bin/sh\n[ $1 = -V ] && echo Python 3.14.1 || echo ''", False, "sync --extra nerfstudio"),
        ("#!/bin/sh\nexit 127", False, "sync --extra nerfstudio"),
        ("#!/bin/sh\necho 3.13", True, "sync --extra nerfstudio --python 3.13"),
    ],
)
def test_setup__names_a_python_that_does_not_fit_before_uv_looks_for_another(
    tmp_path: Path, python: str, is_good: bool, asked: str
) -> None:
    (tmp_path / "clone" / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, tmp_path / "clone" / "scripts")
    (tmp_path / "bin").mkdir()
    for name, text in (("python3", python), ("uv", "#!/bin/sh\necho uv $*"), ("c++", "#!/bin/sh")):
        (tmp_path / "bin" / name).write_text(text + "\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["bash", tmp_path / "clone" / "scripts" / "setup.sh"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert "about 4 GB to download" in lines[-3] and lines[-2] == f"uv {asked}" and ".venv/bin/activate" in lines[-1]
    assert ("3.10 to 3.13" in lines[0]) != is_good
    assert is_good or ("Python 3.14.1" in lines[0] or "missing" in lines[0])
