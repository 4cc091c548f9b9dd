"""Depth and label maps for the photographs of a ScanNet++ download, out of its annotated meshes.

Maps belong to `resized_images/`: they are what the lens of `nerfstudio/transforms.json` shows of the mesh at pixel
centres. As in the official benchmark, a vertex has the class of the smallest annotated object that it belongs to, under
the name that `map_benchmark.csv` gives that; a triangle has that of two of its corners, else of the first.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from fit3d_ns.data.frames import Frame
from fit3d_ns.data.images import IGNORE_INDEX, save_depth, save_index_map
from fit3d_ns.data.scannetpp import colmap_to_world, read_scannetpp
from fit3d_ns.geometry.cameras import transform_points, viewmats_from_camera_to_worlds
from fit3d_ns.lifting.surface_points import read_surface_file
from fit3d_ns.lifting.surfaces import SCANNETPP_MESH
from fit3d_ns.probing.datasets.folders import check_class_names
from fit3d_ns.probing.datasets.frames import read_lines
from fit3d_ns.probing.datasets.scannet import find_scannetpp_scenes, is_scannetpp_scene
from fit3d_ns.rasterization.cpu.triangles import LensPixels
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, remove, write_atomically, write_json
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.results import ResultRecord, load_result, save_result
from fit3d_ns.utils.selection import load_ahead

MapKind = Literal["depth", "labels"]
NEAR = 0.05
"""Metres from which a surface is seen, as in the official toolkit's depth."""
_FOLDERS: dict[MapKind, str] = {"depth": "render_depth", "labels": "labels"}
_sort_pixels = lru_cache(maxsize=2)(LensPixels)


@dataclass(frozen=True)
class ClassList:
    """The classes of label maps."""

    names: tuple[str, ...]
    indices: dict[str, int]
    """From annotators' words to indices of classes; other words have none."""


@dataclass(frozen=True)
class SceneMaps:
    """The maps that are wanted of a scene's frames, those that are not marked as bad."""

    dslr: Path
    frames: list[Frame]
    inputs: dict[MapKind, list[Path]]
    """What each kind of map is made from: the mesh, and its annotation."""
    classes: ClassList | None

    def list_missing(self, frame: Frame) -> dict[MapKind, Path]:
        """Maps of a frame that are still to be made."""
        paths = {kind: self.dslr / _FOLDERS[kind] / f"{frame.image_path.stem}.png" for kind in self.inputs}
        return {kind: path for kind, path in paths.items() if not path.is_file()}


@dataclass(frozen=True)
class AnnotatedMesh:
    """Triangles in the world of the scene's poses, and the class of each, 255 for none."""

    xyz: Float[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]
    labels: UInt8[np.ndarray, " faces"]

    def render(self, frame: Frame) -> tuple[Float[np.ndarray, "height width"], UInt8[np.ndarray, "height width"]]:
        """z-depth in metres, 0 where there is no surface, and classes, as the frame's lens sees them."""
        viewmat = viewmats_from_camera_to_worlds(frame.camera_to_world.double()).numpy()
        in_camera = self.xyz @ viewmat[:3, :3].T + viewmat[:3, 3]
        depth, faces = _sort_pixels(frame.lens).rasterize(in_camera, self.faces, NEAR)
        return depth, np.where(faces >= 0, self.labels[faces], np.uint8(IGNORE_INDEX))


def plan_scenes(
    root: Path, names: Sequence[str], kinds: Sequence[MapKind], class_list: Path | None = None
) -> list[SceneMaps]:
    """The scenes of a download by their names, or by text files that list them, all of them without names.

    `root` may be a scene itself. ValueError where something that maps are made from is missing; no mesh is read yet.
    """
    classes = read_class_list(root, class_list) if "labels" in kinds else None
    above, is_scene = find_scannetpp_scenes(root), is_scannetpp_scene(root)
    if not is_scene and above is None:
        raise ValueError(f"{root} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    lists = [read_lines(Path(name), "check --scenes") if name.endswith(".txt") else [name] for name in names]
    folders = [(above or root.parent) / name for name in dict.fromkeys(sum(lists, []))]
    scenes = []
    for folder in folders or ([root] if is_scene else sorted(path.parent for path in (above or root).glob("*/dslr"))):
        mesh, annotation = folder / SCANNETPP_MESH, ("segments.json", "segments_anno.json")
        frames = [frame for frame in read_scannetpp(folder, "fisheye").frames if not frame.is_bad]
        inputs = {kind: [mesh, *(mesh.with_name(name) for name in annotation if kind == "labels")] for kind in kinds}
        missing = [path for paths in inputs.values() for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"{missing[0]} is missing; download the scene's scans/ (of the mesh alone: --maps depth).")
        scenes.append(SceneMaps(folder / "dslr", frames, inputs, classes))
    return scenes


def read_class_list(root: Path, given: Path | None = None) -> ClassList:
    """The benchmark's classes in `metadata/`, at `root` or above, or those of a `given` text file, one on each line."""
    above = (root.absolute(), *root.absolute().parents[:3])
    places = [place / "metadata" / kind for place in above for kind in ("semantic_benchmark", "semantic_classes")]
    path = given or next((place for place in places if place.is_dir()), places[0]) / "top100.txt"
    names = read_lines(path, "download ScanNet++'s metadata/, give --classes, or take --maps depth")
    check_class_names(names, path)
    indices, table = {name: index for index, name in enumerate(names)}, path.with_name("map_benchmark.csv")
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as file:
            renamed = {row["class"]: row["semantic_map_to"] for row in csv.DictReader(file) if row["semantic_map_to"]}
        indices |= {word: indices.get(name, IGNORE_INDEX) for word, name in renamed.items()}
    return ClassList(tuple(names), indices)


def prepare_scene(scene: SceneMaps, jobs: int, overwrite: bool = False) -> dict[str, Any]:
    """Makes the maps that are missing, `jobs` at a time; returns metrics, which also go into `dslr/prepare.json`.

    ValueError where maps were made from other files or classes and may not be overwritten.
    """
    start, record_path = time.perf_counter(), scene.dslr / "prepare.json"
    origins = {kind: hash_bytes(*map(hash_file, paths)) for kind, paths in scene.inputs.items()}
    if scene.classes is not None:
        origins["labels"] = hash_bytes(origins["labels"], repr(scene.classes))
    known = load_result(record_path).settings if record_path.is_file() else {}
    for kind, origin in origins.items():
        folder = scene.dslr / _FOLDERS[kind]
        if overwrite:
            remove(folder)
        # Depth maps that nothing is known about came with the download.
        elif folder.is_dir() and known.get(kind, origin if kind == "depth" else None) != origin:
            raise ValueError(f"{folder} was made from another mesh or class list; --overwrite makes it again.")
    frames = [frame for frame in scene.frames if scene.list_missing(frame)]
    metrics: dict[str, Any] = {"frames": len(scene.frames), "frames_made": len(frames), "seconds": 0.0}
    if not frames:
        return metrics
    record = ResultRecord("prepare/scannetpp", metrics, known | origins)
    save_result(record, record_path)
    if scene.classes is not None:
        content = {"classes": scene.classes.names, "ignore_index": IGNORE_INDEX, "variant": "fisheye"}
        write_json(scene.dslr / _FOLDERS["labels"] / "classes.json", content)
    mesh = _read_mesh(scene)
    _sort_pixels(frames[0].lens)  # Once, before several threads ask for it.

    def make(frame: Frame) -> tuple[float, float]:
        depth, labels = mesh.render(frame)
        for kind, path in scene.list_missing(frame).items():
            with write_atomically(path) as temporary:
                if kind == "depth":
                    save_depth(torch.from_numpy(depth).float(), temporary)
                else:
                    save_index_map(torch.from_numpy(labels), temporary)
        return float((depth > 0).mean()), float((labels != IGNORE_INDEX).mean())

    made = load_ahead(frames, make, jobs, depth=2 * jobs)
    shares = list(track(made, f"Maps of {scene.dslr.absolute().parent.name}", total=len(frames)))
    metrics["covered"], metrics["labelled"] = np.mean(shares, axis=0).tolist()
    metrics |= {"triangles": len(mesh.faces), "seconds": time.perf_counter() - start}
    save_result(record, record_path)
    return metrics


def _read_mesh(scene: SceneMaps) -> AnnotatedMesh:
    path, *annotation = max(scene.inputs.values(), key=len)
    file = read_surface_file(path)
    classes = np.full(len(file.xyz), IGNORE_INDEX, dtype=np.uint8)
    if annotation and scene.classes is not None:
        classes = _read_vertex_classes(scene.classes.indices, len(classes), *annotation)
    first, second, third = classes[file.faces].T
    xyz = transform_points(torch.from_numpy(file.xyz), colmap_to_world(), 1.0).numpy()
    return AnnotatedMesh(xyz, file.faces, np.where(second == third, second, first))


def _read_vertex_classes(
    indices: dict[str, int], num_vertices: int, segments_path: Path, annotation_path: Path
) -> UInt8[np.ndarray, " vertices"]:
    """From the annotation, whose errors are ValueErrors, and the `indices` of annotators' words."""
    try:
        vertices = np.asarray(read_json(segments_path)["segIndices"], dtype=np.int64)
        groups = [(indices.get(group["label"]), group["segments"]) for group in read_json(annotation_path)["segGroups"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{segments_path} or {annotation_path.name} lacks {error}; download both again.") from error
    if len(vertices) != num_vertices:
        raise ValueError(f"{segments_path} has {len(vertices)} vertices, the mesh {num_vertices}; download both again.")
    segments, place, sizes = np.unique(vertices, return_inverse=True, return_counts=True)
    classes = np.full(len(segments), IGNORE_INDEX, dtype=np.uint8)
    members = [(index, np.isin(segments, own)) for index, own in groups if index not in (None, IGNORE_INDEX)]
    for index, own in sorted(members, key=lambda member: -sizes[member[1]].sum()):
        classes[own] = index
    return classes[place]
