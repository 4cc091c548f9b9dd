"""The example in docs/examples and its notebook: it runs as it stands, is as short as it says, shows what it claims."""

import ast
import json
import re
import runpy
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


def test_notebook__has_the_code_of_the_file_and_no_outputs() -> None:
    source, notebook = EXAMPLE.read_text(), EXAMPLE.with_suffix(".ipynb")
    script = runpy.run_path(str(EXAMPLE.parents[2] / "scripts" / "write_notebook.py"))
    assert notebook.read_text() == script["format_notebook"](source), "run scripts/write_notebook.py"
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 8 and not any(cell["outputs"] for cell in cells)
    code = ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    expected = ast.parse(source)
    assert ast.dump(ast.Module(expected.body[1:], [])) == ast.dump(code)
    # A kernel has words of its own on its command line, and no file.
    assert "is_notebook" in source
