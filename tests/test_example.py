"""The example in docs/examples: it runs as it stands, is as short as it says, and shows what it claims."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "fit3d_in_100_lines.py"


@pytest.mark.slow
def test_example__fine_tuning_finds_more_points_again(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"recall within 10 px ([\d.]+), cosine ([\d.]+)", done.stdout)
    (recall, cosine), (recall_after, cosine_after) = [tuple(map(float, figures)) for figures in found]
    assert recall_after > recall and cosine_after > cosine + 0.2
    assert Image.open(tmp_path / "fit3d.png").width > 4 * 160
    assert len(EXAMPLE.read_text().splitlines()) <= 105
