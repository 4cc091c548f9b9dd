"""Consistency and correspondence of captures and scene files against `fit3d_ns.analysis` called by hand."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs
from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.features import create_extractor, describe_backbone
from fit3d_ns.probing.frozen_features import BackboneConfig, create_frozen_backbones
from fit3d_ns.probing.multiview import MultiviewConfig, load_views, measure_views
from fit3d_ns.scene import (
    FeatureDecoder,
    FeatureScene,
    Gaussians,
    create_posed_capture,
    save_scene,
)
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from tests.probing.probe_scenes import BACKBONE, create_scene
from tests.unprojection import unproject_depth


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return create_scene(tmp_path / "room", seed=3)


def create_probe(task: str, *paths: Path, backbone: str = BACKBONE, **changes: object) -> SimpleNamespace:
    backbones = create_frozen_backbones(BackboneConfig("duplicate", backbone, patch_fit="resize"), norm=True)
    config = MultiviewConfig(**changes)  # type: ignore[arg-type]
    scenes = [load_views(path, config, backbones, "duplicate", "cpu") for path in paths]
    return SimpleNamespace(scenes=scenes, compute=partial(measure_views, task, config, scenes))


def test_multiview__the_toy_finds_more_points_again_than_random_weights(tmp_path: Path) -> None:
    synthesize_scenes(SynthesisConfig(tmp_path / "rooms", num_scenes=1, num_frames=8, seed=90))
    names = ("toy_rooms_vit", "random:toy_rooms_vit")
    toy, random = (
        create_probe("consistency", tmp_path / "rooms" / "room_00", backbone=name).compute(0) for name in names
    )
    assert toy["recall_10px"] > 1.5 * random["recall_10px"]


def test_multiview__a_world_of_another_unit_says_the_same_in_pixels(tmp_path: Path) -> None:
    """A room in nerfstudio's layout, its world shrunk five times: depth is brought to it, centimetres are unknown."""
    synthesize_scenes(SynthesisConfig(tmp_path / "rooms", num_scenes=1, num_frames=8, seed=90))
    room, other = tmp_path / "rooms/room_00", tmp_path / "other"
    dslr = room / "dslr"
    meta = json.loads((dslr / "nerfstudio/transforms_undistorted.json").read_text())
    entries = meta["frames"] + meta["test_frames"]
    for entry in entries:
        for row in entry["transform_matrix"][:3]:
            row[3] /= 5
        name = Path(entry["file_path"]).stem
        entry |= {"file_path": f"undistorted_images/{name}.JPG", "depth_file_path": f"render_depth/{name}.png"}
        entry["mask_path"] = f"undistorted_anon_masks/{name}.png"
    shutil.copytree(dslr, other, ignore=shutil.ignore_patterns("nerfstudio", "colmap"))
    shutil.rmtree(other / "labels", ignore_errors=True)
    write = (other / "transforms.json").write_text
    write(json.dumps({**meta, "camera_model": "PINHOLE", "frames": entries, "test_frames": []}))
    metric, shrunk = (create_probe("correspondence", path).compute(0) for path in (room, other))
    assert metric["num_matches"] == shrunk["num_matches"] > 100
    for name, value in shrunk.items():
        if "px" in name:
            assert value == pytest.approx(metric[name], abs=0.01)
    assert "recall_2cm" in metric and not any("cm" in name for name in shrunk)
    for entry in entries:
        del entry["depth_file_path"]
    write(json.dumps({**meta, "camera_model": "PINHOLE", "frames": entries, "test_frames": []}))
    with pytest.raises(ValueError, match="has no depth map for"):
        create_probe("correspondence", other)


def test_multiview__equals_the_analysis_of_the_captures_own_tokens(room: Path) -> None:
    capture = create_posed_capture(read_capture(room))
    extractor = create_extractor(BACKBONE)
    maps, views = [], []
    for view in capture.views:
        image = capture.load_image(view).permute(2, 0, 1)[None].float() / 255
        depth = capture.load_depth(view)
        assert depth is not None
        maps.append(extractor(image).maps[0])
        views.append(DepthView(depth, view.K, view.camera_to_world, capture.load_valid_mask(view)))
    for task, scale in (("consistency", 0.0), ("correspondence", 0.25)):
        config = ConsistencyConfig(grid_scale=scale, seed=5, ratio_matches=40)
        # The scene is written and read in metres.
        expected = compute_consistency(maps, views, create_pairs(5), config, units_per_metre=1.0)
        figures = create_probe(task, room, ratio_matches=40).compute(5)
        names = ["recall_5px", "recall_20px", "num_matches", "recall_1cm", "recall_2cm", "recall_5cm"]
        names += ["ratio_recall_20px", "ratio_recall_80px", "ratio_recall_5cm", "num_ratio_matches"]
        # Two copies of a token have the cosines and the mean absolute difference of one.
        names += ["mean_cosine", "centred_cosine", "l1", "num_points"] if task == "consistency" else []
        for name in names:
            assert figures[name] == pytest.approx(expected[name], rel=1e-4), name
        assert figures["per_scene"]["room"]["num_matches"] == expected["num_matches"] > 0
        assert figures["num_ratio_matches"] == 10 * min(40, 6 if task == "consistency" else 96)
    # Points of the grid lie a fifth of a metre apart on the wall; some are found all the same.
    assert 0.0 < figures["recall_5cm"] < 1.0


def test_multiview__centimetres_follow_the_unit_of_the_capture(room: Path) -> None:
    probe = create_probe("correspondence", room)
    assert probe.scenes[0].units_per_metre == 1.0
    metric = probe.compute(0)
    # Errors are multiples of 10 cm on this wall; in a room of a fifth of the size, of 2 cm.
    probe.scenes[0] = replace(probe.scenes[0], units_per_metre=5.0)
    small = probe.compute(0)
    assert small["recall_1cm"] == metric["recall_1cm"] and small["recall_5cm"] > metric["recall_5cm"]
    assert small["recall_10px"] == metric["recall_10px"]
    probe.scenes[0] = replace(probe.scenes[0], units_per_metre=None)
    assert not any("cm" in name for name in probe.compute(0))


def test_multiview__scene_files_render_the_depth_they_need(room: Path, tmp_path: Path) -> None:
    capture = create_posed_capture(read_capture(room))
    points = []
    for view in capture.views:
        depth = capture.load_depth(view)
        assert depth is not None
        points.append(unproject_depth(depth, view.camera_to_world, view.K).reshape(-1, 3)[::3])
    means = torch.cat(points)
    count = len(means)
    gaussians = Gaussians.from_raw(
        means=means,
        quats=torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4),
        log_scales=torch.full((count, 3), math.log(0.04)),
        opacity_logits=torch.full((count, 1), 3.0),
        sh_dc=torch.zeros(count, 3),
        features=torch.zeros(count, 2),
        blend_weight=torch.ones(count),
        num_views=torch.ones(count, dtype=torch.int32),
        feature_variance=torch.zeros(count),
    )
    decoder = FeatureDecoder.from_weights(torch.zeros(64, 2, 3, 3), None)
    backbone = describe_backbone(BACKBONE)
    measured = create_probe("consistency", room).compute(0)
    # Without depth files the capture alone is of no use, the scene file is.
    shutil.rmtree(room / "dslr/render_depth")
    bare = create_posed_capture(read_capture(room))
    save_scene(FeatureScene(gaussians, decoder, bare, backbone), tmp_path / "room.safetensors")
    with pytest.raises(ValueError, match="has no depth map for"):
        create_probe("consistency", room)
    rendered = create_probe("consistency", tmp_path / "room.safetensors").compute(0)
    assert rendered["num_points"] == pytest.approx(measured["num_points"], rel=0.05)
    assert rendered["centred_cosine"] == pytest.approx(measured["centred_cosine"], rel=0.05)


def test_multiview__views_are_chosen_by_split_and_number(room: Path) -> None:
    probe = create_probe("consistency", room, max_views=3)
    assert len(probe.scenes[0].token_maps) == 3
    assert len(create_probe("consistency", room, splits=("train",)).scenes[0].token_maps) == 4
    with pytest.raises(ValueError, match="has 1 views of test; two are needed"):
        create_probe("consistency", room, splits=("test",))
