"""Nearest-neighbour segmentation and depth against a loop, on a toy with a known answer, and as a command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fit3d_ns.cli.probe import main
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.head_probe import ProbeSets, RunConfig
from fit3d_ns.probing.probe_runs import PROBES
from fit3d_ns.probing.retrieval import RetrievalConfig, measure_retrieval, split_views
from fit3d_ns.report.result_files import read_results
from fit3d_ns.report.result_tables import write_report
from fit3d_ns.training.processes import create_accelerator
from fit3d_ns.utils.results import load_result
from tests.probing.probe_backbones import MeanColourBackbones
from tests.probing.probe_scenes import BACKBONE, create_scene

PATCH = 4
SIDES = (12, 16)


def create_set(name: str, num_frames: int, seed: int) -> LabelledSet:
    """Pictures of noise with classes, some of which do not count, and depths, some of which are unknown."""
    rng = np.random.default_rng(seed)

    def create_frame(index: int) -> LabelledFrame:
        image = torch.from_numpy(rng.integers(0, 256, (*SIDES, 3), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, 3, SIDES, dtype=np.uint8))
        depth = torch.from_numpy(rng.uniform(0.5, 4.0, SIDES).astype(np.float32))
        labels[:PATCH, :PATCH], labels[5, 5:9] = 255, 255
        depth[:PATCH, :PATCH], depth[5, 5:9] = 0.0, 0.0
        return LabelledFrame(f"{name}{index}", *(partial(torch.clone, item) for item in (image, labels, depth)))

    return LabelledSet(name, [create_frame(index) for index in range(num_frames)], ("a", "b", "c"))


def measure(labels: str, train: LabelledSet, test: LabelledSet, config: RetrievalConfig, seeds=(0,)) -> dict:
    rest = MeanColourBackbones(), "original", create_accelerator("cpu", "fp32")
    run = RunConfig(cache="never")
    probe: Any = PROBES[labels](config.configure(labels), run, ProbeSets(train, test, None), *rest)
    return measure_retrieval(probe, config, seeds)


@pytest.mark.parametrize("labels", ["segmentation", "depth"])
def test_retrieval__equals_a_loop_over_patches(labels: str) -> None:
    train, test = create_set("train", 3, 0), create_set("test", 1, 1)
    figures = measure(labels, train, test, RetrievalConfig(short_side=SIDES[0], num_neighbours=5))[0]
    keys, values = [], []
    grid = [(r, c) for r in range(0, SIDES[0], PATCH) for c in range(0, SIDES[1], PATCH)]
    for frame in train.frames:
        image, classes, depth = (part().numpy() for part in (frame.load_image, frame.load_labels, frame.load_depth))
        for r, c in grid:
            patch = slice(r, r + PATCH), slice(c, c + PATCH)
            counted = (
                classes[patch][classes[patch] != 255] if labels == "segmentation" else depth[patch][depth[patch] > 0]
            )
            if len(counted):
                token = image[patch].reshape(-1, 3).mean(axis=0) / 255
                keys.append(token / np.linalg.norm(token))
                values.append(
                    [(counted == k).mean() for k in range(3)] if labels == "segmentation" else [counted.mean()]
                )
    assert len(keys) == 3 * (len(grid) - 1)
    frame, predicted = test.frames[0], []
    for r, c in grid:
        token = frame.load_image().numpy()[r : r + PATCH, c : c + PATCH].reshape(-1, 3).mean(axis=0) / 255
        cosines = np.array(keys) @ (token / np.linalg.norm(token))
        nearest = np.argsort(-cosines)[:5]
        weights = np.exp((cosines[nearest] - cosines.max()) / 0.02)
        predicted.append(weights @ np.array(values)[nearest] / weights.sum())
    coarse = torch.tensor(np.array(predicted).reshape(3, 4, -1)).permute(2, 0, 1)[None].float()
    full = torch.nn.functional.interpolate(coarse, size=SIDES, mode="bilinear", align_corners=False)[0]
    if labels == "depth":
        truth = frame.load_depth()
        error = (full[0] - truth)[truth > 0]
        assert figures["rmse"] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-3)
    else:
        truth = frame.load_labels()
        right = (full.argmax(dim=0) == truth)[truth != 255]
        assert figures["aacc"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_retrieval__patches_that_look_the_same_are_the_same() -> None:
    # One look for each class: every patch finds its own.
    train = create_set("train", 2, 0)
    looks = torch.tensor([[250, 10, 10], [10, 250, 10], [10, 10, 250]], dtype=torch.uint8)

    def paint(frame: LabelledFrame, seed: int) -> LabelledFrame:
        blocks = torch.randint(0, 3, (2, 2), generator=torch.Generator().manual_seed(seed))
        classes = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
        depth = 1.0 + classes.float()
        return replace(
            frame,
            load_image=partial(torch.clone, looks[classes]),
            load_labels=partial(torch.clone, classes.to(torch.uint8)),
            load_depth=partial(torch.clone, depth),
        )

    train = replace(train, frames=[paint(train.frames[0], 0), paint(train.frames[1], 3)])
    test = replace(train, frames=[paint(replace(train.frames[0], name="test"), 5)])
    config = RetrievalConfig(short_side=64, num_neighbours=8)
    drawn = replace(config, memory_patches=128)
    assert measure("segmentation", train, test, config)[0]["miou"] > 0.9
    assert measure("depth", train, test, config)[0]["abs_rel"] < 0.05
    # Fewer patches are drawn by the seed, and do as well here; without drawing, seeds agree.
    figures = measure("segmentation", train, test, drawn, (0, 1))
    assert figures[0]["miou"] > 0.9 and sorted(figures) == [0, 1]
    noise = create_set("noise", 4, 4)
    few = measure("depth", noise, noise, RetrievalConfig(short_side=12, num_neighbours=2, memory_patches=12), (0, 1))
    assert few[0] != few[1]
    same = measure("depth", noise, noise, RetrievalConfig(short_side=12, num_neighbours=2), (0, 1))
    assert same[0] == same[1]


@pytest.mark.parametrize("labels", ["segmentation", "depth"])
def test_retrieval__of_views_by_the_angle_to_the_nearest_of_the_memory(labels: str) -> None:
    yaws = {"a": [0, 8, 40, 100, 170], "b": [5, 30, 31]}

    def turn(frame: LabelledFrame, group: str, number: int) -> LabelledFrame:
        angle = torch.deg2rad(torch.tensor(float(yaws[group][number])))
        turned = [[angle.cos(), 0.0, angle.sin(), number], [0.0, 1.0, 0.0, 2.0], [-angle.sin(), 0.0, angle.cos(), 0.0]]
        return replace(frame, name=f"{group}{number}", world=Path(group), camera_to_world=torch.tensor(turned))

    noise = create_set("noise", 9, 7)
    places = [(group, number) for group, listed in yaws.items() for number in range(len(listed))]
    frames = [turn(frame, *place) for frame, place in zip(noise.frames, places, strict=False)]
    # The last frame has no pose.
    given = replace(noise, frames=frames[:4]), replace(noise, frames=[*frames[4:], noise.frames[-1]])
    config = RetrievalConfig(short_side=SIDES[0], num_neighbours=5, memory_views=1)
    memory, asked = split_views(given, 1)
    # The middle one of each scene: 40 and 30 degrees.
    assert [frame.name for frame in memory.frames] == ["a2", "b1"]
    assert sorted(frame.name for frame in asked.frames) == ["a0", "a1", "a3", "a4", "b0", "b2"]
    found = measure(labels, memory, asked, config)[0]
    expected = {"0-15": ["b2"], "15-30": ["b0"], "30-60": ["a0", "a1"], "60-180": ["a3", "a4"]}
    assert list(found["by_angle"]) == list(expected)
    for bin_name, names in expected.items():
        part = replace(asked, frames=[frame for frame in asked.frames if frame.name in names])
        alone = measure(labels, memory, part, replace(config, memory_views=None))[0]
        assert found["by_angle"][bin_name] == alone
    whole = measure(labels, memory, asked, replace(config, memory_views=None))[0]
    assert whole == {name: value for name, value in found.items() if name != "by_angle"}
    with pytest.raises(ValueError, match="has more than 5 views with known poses"):
        split_views(given, 5)
    # A set that was joined with others has its name before the frames' own: they are the same frames all the same.
    joined = replace(given[0], frames=[replace(frame, name=f"noise/{frame.name}") for frame in given[0].frames])
    memory, asked = split_views((joined, given[1]), 1)
    assert [frame.name.rpartition("/")[2] for frame in memory.frames] == ["a2", "b1"] and len(asked.frames) == 6


def test_retrieval__of_views_as_a_command(tmp_path: Path) -> None:
    room = create_scene(tmp_path / "room", 0)
    transforms = room / "dslr/nerfstudio/transforms_undistorted.json"
    meta = json.loads(transforms.read_text())
    # The last but one looks another way.
    pose = np.array(meta["frames"][3]["transform_matrix"])
    half = np.deg2rad(20.0)
    pose[:3, :3] = pose[:3, :3] @ [[np.cos(half), 0, np.sin(half)], [0, 1, 0], [-np.sin(half), 0, np.cos(half)]]
    meta["frames"][3]["transform_matrix"] = pose.tolist()
    for name in ("transforms_undistorted.json", "transforms.json"):
        (room / "dslr/nerfstudio" / name).write_text(json.dumps(meta))
    path = tmp_path / "views.json"
    words = ["retrieval", "--train", room, "--test", room, "--backbone", BACKBONE, "--output-path", path]
    words += ["--memory-views", 1, "--short-side", 32, "--device", "cpu", "--seeds", 0, 1]
    main([str(word) for word in words])
    record = load_result(path)
    assert record.metrics["per_seed"]["0"] == record.metrics["per_seed"]["1"]
    assert record.settings["train"]["num_frames"] == 1 and record.settings["test"]["num_frames"] == 4
    bins = record.metrics["by_angle"]
    assert list(bins) == ["0-15", "15-30"] and all({"miou", "d1"} <= set(metrics) for metrics in bins.values())
    assert bins["15-30"]["num_images"] == 1
    tables, _ = write_report(*read_results([path]), tmp_path / "out", "Report")
    assert (tmp_path / "out/angles.png").is_file() and "d1, 15-30 deg (%) ↑" in tables[0].header


def test_retrieval__as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room, other = create_scene(tmp_path / "room", 0), create_scene(tmp_path / "other", 0, num_frames=3)
    path = tmp_path / "retrieval.json"
    words = ["retrieval", "--train", room, "--test", other, "--backbone", BACKBONE, "--output-path", path]
    words += ["--short-side", 32, "--seeds", 0, 1, "--device", "cpu"]
    main([str(word) for word in words])
    record = load_result(path)
    assert 0 < record.metrics["miou"] <= 1 and 0 <= record.metrics["abs_rel"] < 0.1
    assert record.settings["test"]["labels"] == ["segmentation", "depth"] and record.settings["seeds"] == [0, 1]
    capsys.readouterr()
    main([str(word) for word in words])
    assert "nothing is left to run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words, "--layout", "ade20k"]])
    assert "leaves out depth" in capsys.readouterr().err
