"""Semantic correspondence on SPair-71k (Min et al. 2019): do tokens find an object's part on another one of its class?

Each annotated keypoint of the first photograph is looked for in the second among a grid of a quarter of its resolution,
by cosine; photographs are shown with a longer side of 800 pixels, as probe3d does. It counts as found within
`THRESHOLD` times the longer side of the second object's bounding box. `pck` is the mean over pairs (SPair's PCK@0.1 per
image), `pck_point` that over keypoints, `pck_class` the mean over classes of the latter (probe3d's recall);
`by_viewpoint` has them for pairs of equal (0) to opposite (2) viewpoints, `per_scene` for each class. Differences to
probe3d: it pads photographs to white squares, and looks for keypoints at upper left corners of tokens.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from fit3d_ns.analysis.correspondence import find_matches
from fit3d_ns.data.images import load_image
from fit3d_ns.probing.frozen_features import Assembler, FrozenBackbones
from fit3d_ns.probing.multiview import MultiviewConfig
from fit3d_ns.probing.pictures import compute_size, to_image
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import read_json
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import draw_some

PAIRS = Path("PairAnnotation", "test")
LONG_SIDE = 800.0
THRESHOLD = 0.1
_Pair = tuple[str, int, int, int]
"""Class, difference of viewpoint, number of keypoints found, number of keypoints."""


def is_spair(path: Path) -> bool:
    """Whether a folder is the download's."""
    return (path / PAIRS).is_dir()


def measure_keypoints(
    root: Path, config: MultiviewConfig, backbones: FrozenBackbones, assembler: Assembler, seeds: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Metrics of the test pairs for each seed, which draws `max_pairs` of each class; features are computed once."""
    names: dict[str, list[Path]] = {}
    for path in sorted((root / PAIRS).glob("*.json")):
        names.setdefault(re.split("[-:]", path.stem)[-1], []).append(path)
    if not names:
        raise ValueError(f"{root / PAIRS} has no pairs; unpack SPair-71k.tar.gz again.")
    rows: dict[int, list[_Pair]] = {seed: [] for seed in seeds}
    for category, paths in names.items():
        draws = {seed: draw_some(len(paths), config.max_pairs, seed, category).tolist() for seed in seeds}
        counted: dict[int, _Pair] = {}
        features: dict[Path, tuple[torch.Tensor, tuple[int, int], tuple[int, int]]] = {}
        for index in track(sorted(set(sum(draws.values(), []))), f"Keypoints of {category}"):
            with reading(paths[index]):
                pair = read_json(paths[index])
                images = [root / "JPEGImages" / category / pair[f"{part}_imname"] for part in ("src", "trg")]
                left, top, right, bottom = pair["trg_bndbox"]
                points, truth = (torch.tensor(pair[f"{part}_kps"]).float() for part in ("src", "trg"))
                viewpoint = int(pair["viewpoint_variation"])
            for image in set(images) - features.keys():
                features[image] = _read_features(image, config, backbones, assembler)
            (tokens, size, _), (others, other_size, grid) = (features[image] for image in images)
            found = find_matches((tokens, others), (size, other_size), points, grid)
            near = (found - truth).norm(dim=1) <= THRESHOLD * max(right - left, bottom - top)
            counted[index] = category, viewpoint, int(near.sum()), len(near)
        for seed, drawn in draws.items():
            rows[seed] += [counted[index] for index in drawn]
    return {seed: _summarise_all(found) for seed, found in rows.items()}


def _read_features(
    path: Path, config: MultiviewConfig, backbones: FrozenBackbones, assembler: Assembler
) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
    """Tokens [h, w, channels], the photograph's width and height, and the grid (rows, columns) that is searched."""
    image = load_image(path).numpy()
    height, width = image.shape[:2]
    shown = compute_size(height, width, LONG_SIDE, LONG_SIDE)
    kind = cv2.INTER_AREA if shown[0] < height else cv2.INTER_CUBIC
    features = backbones(to_image(cv2.resize(image, shown[::-1], interpolation=kind))[None]).to("cpu")
    rows, columns = (max(round(side * config.grid_scale), 1) for side in shown)
    return assembler.assemble(features.maps[:, :, -1])[0], (width, height), (rows, columns)


def _summarise_all(rows: Sequence[_Pair]) -> dict[str, Any]:
    names, views = dict.fromkeys(row[0] for row in rows), sorted({row[1] for row in rows})
    classes = {name: _summarise([row for row in rows if row[0] == name]) for name in names}
    by_class = sum(item["pck_point"] for item in classes.values()) / len(classes)
    metrics = {**_summarise(rows), "pck_class": by_class, "per_scene": classes}
    if len(views) > 1:
        parts = {str(view): _summarise_all([row for row in rows if row[1] == view]) for view in views}
        metrics["by_viewpoint"] = parts
    return metrics


def _summarise(rows: Sequence[_Pair]) -> dict[str, Any]:
    found, count = sum(row[2] for row in rows), sum(row[3] for row in rows)
    pck = sum(row[2] / row[3] for row in rows) / len(rows)
    return {"pck": pck, "pck_point": found / count, "num_pairs": len(rows), "num_keypoints": count}
