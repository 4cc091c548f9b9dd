"""The example in docs/examples and its notebook: it runs as it stands, is as short as it says, shows what it claims."""

import ast
import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "fit3d_in_100_lines.py"


@pytest.mark.slow
def test_notebook__runs_and_fine_tuning_finds_more_points_again(tmp_path: Path) -> None:
    """In a kernel, as a reader runs it; its code is the file's (the next test)."""
    notebook = nbformat.read(EXAMPLE.with_suffix(".ipynb"), as_version=4)
    done = NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=300).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    found = re.findall(r"recall within 10 px ([\d.]+), cosine ([\d.]+)", printed)
    (recall, cosine), (recall_after, cosine_after) = [tuple(map(float, figures)) for figures in found]
    assert recall_after > recall and cosine_after > cosine + 0.2
    # Where the picture of the last cell is looked for.
    folder = tmp_path / EXAMPLE.stem
    assert f"]({folder.name}/fit3d.png)" in done.cells[-1].source and Image.open(folder / "fit3d.png").width > 4 * 160
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
