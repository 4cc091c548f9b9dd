"""The normals probe against its formula, and what it says of a ViT that knows rooms and one that knows nothing."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.cli.probe import main
from fit3d_ns.probing import normals
from fit3d_ns.probing.frozen_features import Assembly, BackboneConfig, create_frozen_backbones
from fit3d_ns.probing.heads import DPTHead
from fit3d_ns.probing.multiview import SceneViews, ViewsConfig, load_views
from fit3d_ns.probing.normals import (
    NormalsConfig,
    compute_normals,
    measure_dpt_normals,
    measure_normals,
    summarise_angles,
)
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from fit3d_ns.training.processes import create_accelerator
from fit3d_ns.utils.results import load_result


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rooms")
    synthesize_scenes(SynthesisConfig(folder, num_scenes=2, num_frames=6, width=160, height=120, seed=90))
    return [folder / "room_00", folder / "room_01"]


def load_rooms(rooms: list[Path], backbone: str = "toy_rooms_vit", assembly: Assembly = "original") -> list[SceneViews]:
    backbones = create_frozen_backbones(BackboneConfig(assembly, backbone, patch_fit="resize"), norm=True)
    return [load_views(path, ViewsConfig(max_views=6), backbones, assembly, "cpu") for path in rooms]


def test_normals__are_those_of_weighted_ridge_regression(rooms: list[Path]) -> None:
    train, test = load_rooms(rooms)
    figures = measure_normals([train], [test])
    tokens, normals, weights = [], [], []
    for token_map, view in zip(train.token_maps, train.depth_views, strict=True):
        true, known = compute_normals(view)
        for row in range(15):
            for column in range(20):
                patch = (slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
                if known[patch].any():
                    tokens.append(token_map[row, column].double().numpy())
                    normals.append(F.normalize(true[patch][known[patch]].sum(dim=0), dim=0).double().numpy())
                    weights.append(known[patch].double().mean().item())
    x, y, w = np.array(tokens), np.array(normals), np.array(weights)[:, None]
    alpha = figures["ridge_strength"] * len(x) * ((x - x.mean(axis=0)) ** 2).mean()
    mx, my = (w * x).sum(axis=0) / w.sum(), (w * y).sum(axis=0) / w.sum()
    gram = (x - mx).T @ (w * (x - mx)) + alpha * np.eye(x.shape[1])
    matrix = np.linalg.solve(gram, (x - mx).T @ (w * (y - my)))
    errors = []
    for token_map, view in zip(test.token_maps, test.depth_views, strict=True):
        true, known = compute_normals(view)
        predicted = torch.from_numpy((token_map.double().numpy() - mx) @ matrix + my).permute(2, 0, 1)[None]
        full = F.interpolate(predicted, size=(120, 160), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        cosine = (F.normalize(full[known], dim=-1) * true[known]).sum(dim=-1)
        errors.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))
    assert figures["mean"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-3)
    # Of an even number it is the mean of the two in the middle.
    assert summarise_angles(torch.tensor([1.0, 2.0, 4.0, 9.0]))["median"] == 3.0
    assert (
        figures["num_pixels"] == len(torch.cat(errors)) and figures["per_scene"]["room_01"]["mean"] == figures["mean"]
    )


def test_normals__the_toy_knows_more_of_them_than_random_weights(rooms: list[Path]) -> None:
    pairs = [load_rooms(rooms), load_rooms(rooms, "random:toy_rooms_vit"), load_rooms(rooms, assembly="duplicate")]
    toy, random, twice = (measure_normals([train], [test]) for train, test in pairs)
    assert toy["mean"] < 0.9 * random["mean"] and toy["within_22.5"] > random["within_22.5"]
    # A second copy of the same features tells nothing new.
    assert twice["mean"] == pytest.approx(toy["mean"], rel=0.03)


def test_normals__of_a_dpt_head_beat_the_best_constant(
    rooms: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normals, "DPTHead", partial(DPTHead, fused_dim=16))
    words = ["normals", "--train", rooms[0], "--test", rooms[1], "--backbone", "toy_rooms_vit", "--max-views", 6]
    words += ["--device", "cpu", "--head", "dpt", "--num-iterations", 40, "--seeds", 0, 1, "--output-path"]
    main([str(word) for word in [*words, tmp_path / "dpt.json"]])
    record = load_result(tmp_path / "dpt.json")
    assert record.settings["backbones"]["original"]["norm"] is False and record.settings["config"]["head"] == "dpt"
    (train, test), truth = load_rooms(rooms), []
    for scene in (train, test):
        known = [compute_normals(view) for view in scene.depth_views]
        truth.append(torch.cat([normal[is_known] for normal, is_known in known]).double())
    # The one normal that is nearest to the training scene's on average; its errors in the test scene.
    constant = F.normalize(truth[0].mean(dim=0), dim=0)
    error = float(torch.rad2deg((truth[1] @ constant).clamp(-1, 1).acos()).mean())
    seeds = [record.metrics["per_seed"][seed] for seed in "01"]
    assert seeds[0]["mean"] != seeds[1]["mean"] and max(item["mean"] for item in seeds) < 0.9 * error
    assert seeds[0]["num_pixels"] == len(truth[1])
    # The same seed gives the same head, and one that is trained longer is better where it was trained.
    config = BackboneConfig(backbone="toy_rooms_vit", patch_fit="resize")
    features = create_frozen_backbones(config, norm=False, num_layers=4)
    scene = load_views(rooms[0], ViewsConfig(max_views=4), features, "original", "cpu")
    means = []
    for steps in (2, 20, 20):
        short = NormalsConfig(head="dpt", num_iterations=steps)
        rest = short, "original", create_accelerator("cpu", "fp32"), 0
        means.append(measure_dpt_normals(*rest, [scene], [scene])["mean"])
    assert means[1] == means[2] < means[0]
    hidden = [replace(view, depth=torch.zeros_like(view.depth)) for view in scene.depth_views]
    with pytest.raises(ValueError, match="No pixel of room_00 has a normal"):
        measure_dpt_normals(*rest, [replace(scene, depth_views=hidden)], [scene])


def test_normals__as_a_command(rooms: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "normals.json"
    words = ["normals", "--train", rooms[0], "--test", rooms[1], "--backbone", "toy_rooms_vit", "--max-views", 3]
    words += ["--output-path", path, "--device", "cpu"]
    main([str(word) for word in words])
    assert "probe/normals original: mean " in capsys.readouterr().out
    record = load_result(path)
    assert 0 < record.metrics["median"] < 90 and record.settings["train"]["scenes"] == ["room_00"]
    main([str(word) for word in words])
    assert "nothing is left to run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(word) for word in words[:1] + words[3:]])
    assert "--train" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*map(str, words), "--num-iterations", "9"])
    assert "--num-iterations trains the head of --head dpt" in capsys.readouterr().err
