"""Pieces of miniature captures, written by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 12, 8
INTRINSICS = {"fl_x": 10.0, "fl_y": 11.0, "cx": 5.5, "cy": 4.25, "w": WIDTH, "h": HEIGHT}


def make_pose(index: int) -> list[list[float]]:
    """A rotation about z by 0.1 * index and a position that names the index."""
    angle = 0.1 * index
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    return [[cosine, -sine, 0.0, index], [sine, cosine, 0.0, 2.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, 1.0]]


def write_picture(path: Path, value: int = 100, size: tuple[int, int] = (WIDTH, HEIGHT), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, value // 2, 7)).save(path)


def write_json_file(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    """Sets or, where the value is None, removes keys of a JSON file."""
    content = json.loads(path.read_text())
    content.update(changes)
    write_json_file(path, {key: value for key, value in content.items() if value is not None})
