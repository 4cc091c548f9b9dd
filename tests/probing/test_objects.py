"""Miniatures of NAVI and SPair-71k in their official layouts, and probe3d's inputs; expectations are short loops."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from fit3d_ns.analysis.consistency import ConsistencyConfig, compute_consistency, create_pairs
from fit3d_ns.cli.probe import main
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.features import create_extractor
from fit3d_ns.probing.datasets import navi
from fit3d_ns.probing.datasets.navi import find_navi_sets, read_navi
from fit3d_ns.scene import create_posed_capture
from tests.probing import probe_scenes
from tests.probing.probe_scenes import BACKBONE
from tests.probing.test_multiview import create_probe

ANGLES = (0.0, 20.0, 50.0, 175.0)
PLATE = (0.06, 0.03)
"""Half the width and height of an object that is a plate in the plane z = 0, metres."""


def create_navi(root: Path) -> Path:
    """A plate that turns before a camera half a metre away, beside the middle of photographs of 160x120 pixels."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)
    folder = root / "plate" / "wild_set"
    for name in ("images", "depth"):
        (folder / name).mkdir(parents=True)
    y, x = np.mgrid[:120, :160] + 0.5
    rays = np.stack([(x - 80) / 300, (y - 60) / 300, np.ones_like(x)], axis=-1)
    entries = []
    for index, angle in enumerate(ANGLES):
        rotation = Rotation.from_euler("yx", [angle, 10.0], degrees=True)
        translation = np.array([0.03 * index - 0.04, 0.01, 0.5])
        # Where the pixel's ray meets the plate: R^T (s ray - t) has z = 0.
        directions, origin = rotation.inv().apply(rays.reshape(-1, 3)), rotation.inv().apply(-translation)
        depth = -origin[2] / directions[:, 2]
        places = origin + depth[:, None] * directions
        hit = (depth > 0) & (np.abs(places[:, 0]) <= PLATE[0]) & (np.abs(places[:, 1]) <= PLATE[1])
        columns = ((places[:, 0] / PLATE[0] + 1) * 8).astype(int).clip(0, 15)
        rows = ((places[:, 1] / PLATE[1] + 1) * 4).astype(int).clip(0, 7)
        picture = np.where(hit[:, None], colours[rows, columns], 90).astype(np.uint8).reshape(120, 160, 3)
        disparity = np.where(hit, 65535 * 10 / (1000 * depth), 0).round().astype(np.uint16).reshape(120, 160)
        Image.fromarray(picture).save(folder / "images" / f"{index:03d}.jpg", quality=95)
        Image.fromarray(disparity).save(folder / "depth" / f"{index:03d}.png")
        quat = rotation.as_quat()[[3, 0, 1, 2]].tolist()
        # Cameras and sizes are those of photographs twice as large.
        camera = {"q": quat, "t": (1000 * translation).tolist(), "focal_length": 600.0, "camera_model": "pixel_5"}
        entry = {"object_id": "plate", "camera": camera, "filename": f"{index:03d}.jpg", "image_size": [240, 320]}
        entries.append({**entry, "scene_name": "wild_set", "split": "val" if index == 3 else "train"})
    (folder / "annotations.json").write_text(json.dumps(entries))
    (root / "plate" / "multiview_00").mkdir()
    return root


def run(path: Path, *words: object) -> dict:
    flags = ["--backbone", BACKBONE, "--device", "cpu", "--output-path", path]
    main([str(word) for word in ("correspondence", *flags, *words)])
    return json.loads(path.read_text())


def read_grid(image: np.ndarray, grid: tuple[int, int], norm: bool = True) -> torch.Tensor:
    """Tokens of an image, bilinear at the cells' centres of a grid: [h, w, e]."""
    tokens = create_extractor(BACKBONE, norm=norm)(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255).maps
    resized = F.interpolate(tokens.permute(0, 3, 1, 2), size=grid, mode="bilinear", align_corners=False)
    return F.normalize(resized[0].permute(1, 2, 0), dim=-1)


def test_navi__views_show_the_plate_where_it_is(tmp_path: Path) -> None:
    root = create_navi(tmp_path)
    (folder,) = find_navi_sets(root)
    assert [find_navi_sets(path) for path in (root / "plate", folder)] == [[folder], [folder]]
    assert find_navi_sets(tmp_path / "plate" / "multiview_00") == []
    views = read_navi(folder, ("train", "val", "test"))
    assert len(views) == 4 and len(read_navi(folder, ("val",))) == 1 and len(read_navi(folder, ("train",), 2)) == 2
    for image, view in views:
        assert image.shape == (512, 512, 3) and view.depth.shape == (512, 512)
        rows, columns = (view.depth > 0).nonzero(as_tuple=True)
        pixels = torch.stack([columns + 0.5, rows + 0.5, torch.ones_like(rows)], dim=-1).double()
        in_camera = view.depth[rows, columns].double()[:, None] * pixels @ torch.linalg.inv(view.K.double()).T
        # OpenCV's axes to OpenGL's.
        pose = view.camera_to_world.double()
        places = (in_camera * torch.tensor([1.0, -1.0, -1.0])) @ pose[:, :3].T + pose[:, 3]
        # A pixel of the photograph spans 1.7 mm of the plate, the one seen a little off its ray.
        assert places[:, 2].abs().max() < 1.5e-3
        assert places[:, 0].abs().max() == pytest.approx(PLATE[0], abs=2e-3)
        assert places[:, 1].abs().max() == pytest.approx(PLATE[1], abs=2e-3)
        assert rows.float().mean() == pytest.approx(256, abs=60) and columns.max() - columns.min() > 300
    annotations = folder / "annotations.json"
    entries = json.loads(annotations.read_text())
    Image.fromarray(np.zeros((120, 160), np.uint16)).save(folder / "depth" / "001.png")
    with pytest.raises(ValueError, match=r"001\.jpg shows no object"):
        read_navi(folder, ("train",))
    del entries[0]["camera"]
    annotations.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"annotations\.json"):
        read_navi(folder, ("train",))


def test_navi__recall_in_space_by_angle_is_probe3ds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(navi, "SIDE", 96)
    root, count = create_navi(tmp_path / "navi"), 60
    record = run(tmp_path / "r.json", "--test", root, "--ratio-matches", count, "--seeds", 0, 1)
    assert record["settings"]["config"]["angle_edges"] == [0, 30, 60, 90, 120]
    assert record["metrics"]["per_seed"]["0"]["per_scene"].keys() == {"plate/wild_set"}
    views = read_navi(root / "plate" / "wild_set", ("train", "val", "test"))
    entries = json.loads((root / "plate" / "wild_set" / "annotations.json").read_text())
    cameras = [entry["camera"] for entry in entries]
    features, surface = [], []
    for (image, view), camera in zip(views, cameras, strict=True):
        cells = (torch.arange(24) + 0.5) * 4
        at = cells.long()
        depth = view.depth[at][:, at].double().numpy()
        rays = np.stack([*np.meshgrid(cells.numpy(), cells.numpy()), np.ones((24, 24))], axis=-1)
        rays = rays @ np.linalg.inv(view.K.double().numpy()).T
        rotation = Rotation.from_quat(np.roll(camera["q"], -1))
        places = rotation.inv().apply((depth[..., None] * rays).reshape(-1, 3) - np.array(camera["t"]) / 1000)
        known = depth.reshape(-1) > 0
        features.append(read_grid(image, (24, 24)).flatten(0, 1)[torch.from_numpy(known)])
        surface.append((rotation, places[known]))
    found: dict[tuple[int, int], tuple[float, np.ndarray]] = {}
    for i in range(4):
        for j in range(4):
            angle = np.degrees((surface[i][0] * surface[j][0].inv()).magnitude())
            if i != j and angle <= 120:
                distances, nearest = (1 - features[i] @ features[j].T).topk(2, largest=False)
                chosen = (distances[:, 0] / distances[:, 1]).argsort()[:count]
                other = surface[j][1][nearest[chosen, 0]]
                found[i, j] = angle, np.linalg.norm(surface[i][1][chosen] - other, axis=1) < 0.02
    assert {pair for pair in found if 3 in pair} == set()
    for seed in ("0", "1"):
        metrics = record["metrics"]["per_seed"][seed]
        # Each of three views is compared with one of the two others, in one of eight ways.
        ways = [[(0, a), (1, b), (2, c)] for a in (1, 2) for b in (0, 2) for c in (0, 1)]
        assert metrics["num_ratio_matches"] == 3 * count
        counts = metrics["by_angle"]["0-30"]["num_ratio_matches"]
        expected = []
        for way in ways:
            near, far = ([found[pair][1] for pair in way if (found[pair][0] < 30) == is_near] for is_near in (1, 0))
            if len(near) * count == counts:
                shares = [float(np.mean(part)) if part else None for part in (near, far, near + far)]
                expected.append(shares)
        figures = [metrics["by_angle"][name]["ratio_recall_2cm"] for name in ("0-30", "30-60")]
        figures.append(metrics["ratio_recall_2cm"])
        assert any(share == pytest.approx(figures, abs=1e-3) for share in expected), (figures, expected)
        assert metrics["by_angle"]["90-120"]["num_ratio_matches"] == 0
    assert 0.05 < record["metrics"]["ratio_recall_2cm"] < 0.95


def create_spair(root: Path) -> list[dict]:
    """Two classes with photographs of noise in blocks; every second pair shows the same photograph twice."""
    rng = np.random.default_rng(1)
    pairs = []
    for category, sizes in (("cat", [(90, 60), (60, 80)]), ("tvmonitor", [(64, 64), (100, 70)])):
        (root / "JPEGImages" / category).mkdir(parents=True)
        for number, (width, height) in enumerate(sizes):
            blocks = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
            picture = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
            picture.save(root / "JPEGImages" / category / f"2008_{number:06d}.jpg")
        for source, target, viewpoint in ((0, 0, 0), (0, 1, 2), (1, 0, 1), (1, 1, 0)):
            points = rng.uniform(0.2, 0.8, (3 + target, 2))
            truth = points if source == target else rng.uniform(0.2, 0.8, (3 + target, 2))
            pair = {
                "category": category, "src_imname": f"2008_{source:06d}.jpg", "trg_imname": f"2008_{target:06d}.jpg",
                "src_kps": (points * sizes[source]).round().astype(int).tolist(),
                "trg_kps": (truth * sizes[target]).round().astype(int).tolist(),
                "trg_bndbox": [5, 4, sizes[target][0] - 3, sizes[target][1] - 2], "viewpoint_variation": viewpoint,
            }  # fmt: skip
            name = f"{len(pairs):06d}-2008_{source:06d}-2008_{target:06d}:{category}.json"
            (root / "PairAnnotation" / "test").mkdir(parents=True, exist_ok=True)
            (root / "PairAnnotation" / "test" / name).write_text(json.dumps(pair))
            pairs.append(pair)
    return pairs


def test_spair__pck_is_that_of_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = create_spair(tmp_path / "SPair-71k")
    metrics = run(tmp_path / "r.json", "--test", tmp_path / "SPair-71k")["metrics"]
    hits: dict[str, list[list[bool]]] = {}
    for pair in pairs:
        grids, sizes = [], []
        for part in ("src", "trg"):
            image = Image.open(tmp_path / "SPair-71k" / "JPEGImages" / pair["category"] / pair[f"{part}_imname"])
            scale = 800 / max(image.size)
            shown = round(image.width * scale), round(image.height * scale)
            grids.append(
                read_grid(np.array(image.resize(shown, Image.Resampling.BICUBIC)), (shown[1] // 4, shown[0] // 4))
            )
            sizes.append(image.size)
        found = []
        for (x, y), truth in zip(pair["src_kps"], pair["trg_kps"], strict=True):
            # The nearest of the source's own grid stands for the keypoint; both are smooth.
            h, w, _ = grids[0].shape
            token = grids[0][int(y / sizes[0][1] * h), int(x / sizes[0][0] * w)]
            best = int((grids[1] @ token).argmax())
            h, w, _ = grids[1].shape
            place = ((best % w + 0.5) / w * sizes[1][0], (best // w + 0.5) / h * sizes[1][1])
            left, top, right, bottom = pair["trg_bndbox"]
            found.append(np.hypot(*np.subtract(place, truth)) <= 0.1 * max(right - left, bottom - top))
        hits.setdefault(pair["category"], []).append(found)
    flat = [found for rows in hits.values() for found in rows]
    assert metrics["pck"] == pytest.approx(np.mean([np.mean(found) for found in flat]), abs=1e-6)
    assert metrics["pck_point"] == pytest.approx(np.mean(sum(flat, [])), abs=1e-6)
    assert metrics["pck_class"] == pytest.approx(np.mean([np.mean(sum(rows, [])) for rows in hits.values()]), abs=1e-6)
    assert metrics["num_pairs"] == 8 and metrics["num_keypoints"] == 28
    # A photograph's keypoints are found in itself.
    assert metrics["by_viewpoint"]["0"]["pck"] == 1.0 > metrics["by_viewpoint"]["2"]["pck"]
    assert metrics["per_seed"]["0"]["per_scene"]["cat"]["num_pairs"] == 4
    few = run(tmp_path / "s.json", "--test", tmp_path / "SPair-71k", "--max-pairs", 1, "--seeds", 0, 1, 2)["metrics"]
    assert few["num_pairs"] == 2 and len({str(few["per_seed"][seed]) for seed in "012"}) > 1
    with pytest.raises(SystemExit):
        main(["consistency", "--test", str(tmp_path / "SPair-71k"), "--output-path", str(tmp_path / "c.json")])
    assert "keypoints instead of depth" in capsys.readouterr().err


def test_probe3d__its_inputs_and_its_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sides that are no multiples of the patch.
    monkeypatch.setattr(probe_scenes, "WIDTH", 56)
    monkeypatch.setattr(probe_scenes, "HEIGHT", 40)
    room = probe_scenes.create_scene(tmp_path / "room", seed=3, num_frames=3)
    record = run(tmp_path / "r.json", "--test", room, "--probe3d")
    backbone = record["settings"]["backbones"]["original"]
    assert (backbone["mean"], backbone["std"], backbone["norm"]) == ([0.5] * 3, [0.5] * 3, False)
    views = create_probe("correspondence", room).scenes[0].depth_views
    model = create_extractor(BACKBONE).model
    blocks = next(module for module in model.modules() if isinstance(module, timm.models.VisionTransformer))
    maps = []
    capture = create_posed_capture(read_capture(room))
    for view in capture.views:
        image = capture.load_image(view).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        (tokens,) = blocks.get_intermediate_layers(F.pad(image, (4, 4, 4, 4)), n=1, norm=False)
        maps.append(tokens[0].unflatten(0, (3, 4)).detach())
    assert len(maps) == len(views) == 3
    config = ConsistencyConfig(ratio_matches=1000)
    expected = compute_consistency(maps, views, create_pairs(3), config, units_per_metre=1.0)
    names = [name for name in expected if "recall" in name]
    assert len(names) == 14 and all(
        record["metrics"][name] == pytest.approx(expected[name], rel=1e-4) for name in names
    )
    plain = run(tmp_path / "p.json", "--test", room, "--ratio-matches", 1000)
    assert "is_probe3d" not in plain["settings"]["config"] and record["settings"]["config"]["is_probe3d"]
    assert plain["metrics"]["ratio_recall_10px"] != record["metrics"]["ratio_recall_10px"]
    with pytest.raises(SystemExit):
        main(["depth", "--test", str(room), "--probe3d", "--output-path", str(tmp_path / "d.json")])
