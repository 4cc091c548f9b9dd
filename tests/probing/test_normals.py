"""The normals probe against its formula, and what it says of a ViT that knows rooms and one that knows nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fit3d_ns.analysis.normals import compute_normals
from fit3d_ns.cli.probe import main
from fit3d_ns.probing.frozen_features import BackboneConfig, create_frozen_backbones
from fit3d_ns.probing.multiview import ViewsConfig
from fit3d_ns.probing.normals import NormalsProbe
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from fit3d_ns.utils.results import load_result


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rooms")
    synthesize_scenes(SynthesisConfig(folder, num_scenes=2, num_frames=6, width=160, height=120, seed=90))
    return [folder / "room_00", folder / "room_01"]


def create_probe(rooms: list[Path], backbone: str = "toy_rooms_vit", assembly: str = "original") -> NormalsProbe:
    backbones = create_frozen_backbones(BackboneConfig(assembly, backbone, patch_fit="resize"), norm=True)
    return NormalsProbe(ViewsConfig(max_views=6), rooms[:1], rooms[1:], backbones, assembly)  # type: ignore[arg-type]


def test_normals__are_those_of_weighted_ridge_regression(rooms: list[Path]) -> None:
    probe = create_probe(rooms)
    figures = probe.compute()
    tokens, normals, weights = [], [], []
    for token_map, view in zip(probe.train[0].token_maps, probe.train[0].depth_views, strict=True):
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
    for token_map, view in zip(probe.test[0].token_maps, probe.test[0].depth_views, strict=True):
        true, known = compute_normals(view)
        predicted = torch.from_numpy((token_map.double().numpy() - mx) @ matrix + my).permute(2, 0, 1)[None]
        full = F.interpolate(predicted, size=(120, 160), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        cosine = (F.normalize(full[known], dim=-1) * true[known]).sum(dim=-1)
        errors.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))
    assert figures["mean"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-3)
    assert (
        figures["num_pixels"] == len(torch.cat(errors)) and figures["per_scene"]["room_01"]["mean"] == figures["mean"]
    )


def test_normals__the_toy_knows_more_of_them_than_random_weights(rooms: list[Path]) -> None:
    toy, random = (create_probe(rooms, name).compute() for name in ("toy_rooms_vit", "random:toy_rooms_vit"))
    assert toy["mean"] < 0.9 * random["mean"] and toy["within_22.5"] > random["within_22.5"]
    # A second copy of the same features tells nothing new.
    twice = create_probe(rooms, assembly="duplicate").compute()
    assert twice["mean"] == pytest.approx(toy["mean"], rel=0.03)


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
