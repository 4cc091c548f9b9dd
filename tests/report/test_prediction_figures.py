import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.analysis.similarity import map_clusters_to_colours
from fit3d_ns.report.prediction_figure import (
    compute_accuracy,
    compute_errors,
    label_predictions,
    read_predictions,
    save_prediction_figure,
)

SIZE = (24, 32)


def write_predictions(
    folder: Path, task: str, assembly: str, seed: int = 0, changed: dict[str, Any] | None = None
) -> Path:
    """Two frames as fit3d-probe writes them; the truth is the same for all."""
    folder.mkdir(parents=True)
    truth, guess = np.random.default_rng(0), np.random.default_rng(seed + 1)
    for index in range(2):
        prefix = folder / f"{index:03d}"
        Image.fromarray(truth.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(f"{prefix}_image.png")
        for name, generator in (("truth", truth), ("prediction", guess)):
            if task == "segmentation":
                values = generator.integers(0, 3, SIZE).astype(np.uint8)
                values[0] = 255 if name == "truth" else 0
            else:
                values = generator.integers(1000, 3000, SIZE).astype(np.uint16)
                values[0] = 0 if name == "truth" else 2000
            Image.fromarray(values).save(f"{prefix}_{name}.png")
    listing = {
        "task": task, "assembly": assembly, "seed": seed, "class_names": ["wall", "floor", "chair"],
        "max_depth": 10.0, "frames": ["a.png", "b.png"], "is_random": False, **(changed or {}),
    }  # fmt: skip
    (folder / "predictions.json").write_text(json.dumps(listing))
    return folder


def test_save_prediction_figure__accuracy_is_of_pixels_that_count(tmp_path: Path) -> None:
    folders = [
        write_predictions(tmp_path / name, "segmentation", name, seed)
        for seed, name in enumerate(("original", "finetuned"))
    ]
    path = tmp_path / "figure.png"
    content = save_prediction_figure(read_predictions(folders), path, column_width=40)
    for frame in range(2):
        truth = np.array(Image.open(folders[1] / f"{frame:03d}_truth.png"))[1:]
        predicted = np.array(Image.open(folders[1] / f"{frame:03d}_prediction.png"))[1:]
        assert content["frames"][frame]["accuracy"]["finetuned"] == pytest.approx((truth == predicted).mean())
    assert content["columns"] == ["original", "finetuned"]
    assert Image.open(path).width >= 4 * 40
    # The second row of the truth's column has the colours of its classes; the first row does not count and is black.
    assert json.loads(path.with_suffix(".json").read_text())["task"] == "segmentation"


def test_save_prediction_figure__truth_is_black_where_it_does_not_count(tmp_path: Path) -> None:
    folder = write_predictions(tmp_path / "original", "segmentation", "original")
    path = tmp_path / "figure.png"
    save_prediction_figure(read_predictions([folder]), path, column_width=SIZE[1])
    pixels = np.asarray(Image.open(path).convert("RGB"))
    top, left = 6 + 18 + 18, 6 + 2 * (SIZE[1] + 6)
    truth = pixels[top : top + SIZE[0], left : left + SIZE[1]]
    labels = np.array(Image.open(folder / "000_truth.png"))
    colours = (map_clusters_to_colours(torch.arange(3), 3).numpy() * 255).round()
    expected = np.concatenate([colours, np.zeros((1, 3))])[np.minimum(labels, 3)]
    assert np.array_equal(truth, expected.astype(np.uint8))


def test_save_prediction_figure__depth_has_an_error_map_and_its_rmse(tmp_path: Path) -> None:
    folders = [
        write_predictions(tmp_path / name, "depth", "concat", seed, {"class_names": []})
        for seed, name in enumerate(("first", "second"))
    ]
    path = tmp_path / "figure.png"
    content = save_prediction_figure(read_predictions(folders), path, column_width=40)
    assert content["columns"] == ["concat (first)", "concat (second)"]
    for name in ("first", "second"):
        truth = np.array(Image.open(tmp_path / name / "001_truth.png")).astype(float)[1:] / 1000
        predicted = np.array(Image.open(tmp_path / name / "001_prediction.png")).astype(float)[1:] / 1000
        expected = np.sqrt(((truth - predicted) ** 2).mean())
        assert content["frames"][1]["rmse"][f"concat ({name})"] == pytest.approx(expected, rel=1e-5)
    # Input, two predictions, truth, two error maps.
    assert Image.open(path).width >= 6 * 40


def test_compute_errors__leave_out_what_is_not_measured() -> None:
    errors, is_measured = compute_errors(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.5, 0.0, 1.0]]))
    assert errors.tolist() == [[0.5, 0.0, 0.0]] and is_measured.tolist() == [[True, False, False]]
    nothing = torch.full((2, 2), 255, dtype=torch.uint8)
    assert np.isnan(compute_accuracy(torch.zeros(2, 2, dtype=torch.uint8), nothing))


def test_colours__a_hundred_classes_are_a_hundred_colours() -> None:
    assert len((map_clusters_to_colours(torch.arange(100), 100) * 255).round().unique(dim=0)) == 100


def test_read_predictions__refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    first = write_predictions(tmp_path / "first", "segmentation", "original")
    for name, change, message in (
        ("task", {"task": "depth"}, "different tasks"),
        ("frames", {"frames": ["a.png", "c.png"]}, "different frames"),
        ("classes", {"class_names": ["wall", "floor", "sofa"]}, "different classes"),
        ("random", {"is_random": True}, "is of random weights"),
    ):
        other = write_predictions(tmp_path / name, "segmentation", "finetuned", changed=change)
        with pytest.raises(ValueError, match=message):
            read_predictions([first, other])
    other = write_predictions(tmp_path / "truth", "segmentation", "finetuned")
    Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(other / "001_truth.png")
    with pytest.raises(ValueError, match="another truth for b.png"):
        read_predictions([first, other])
    with pytest.raises(ValueError, match="holds no predictions"):
        read_predictions([tmp_path])
    (other / "000_prediction.png").unlink()
    with pytest.raises(ValueError, match="000_prediction.png is missing"):
        read_predictions([other])


def test_label_predictions__random_weights_are_named(tmp_path: Path) -> None:
    folder = write_predictions(tmp_path / "random", "segmentation", "original", changed={"is_random": True})
    assert label_predictions(read_predictions([folder])) == ["original, random"]
