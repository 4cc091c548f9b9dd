"""Depth and label maps for the photographs of a ScanNet++ download, out of its annotated meshes.

Maps belong to `resized_images/`: they are what the lens of `nerfstudio/transforms.json` shows of the mesh at pixel
centres. As in the official benchmark, a vertex has the class of the smallest annotated object that it belongs to, under
the name that `map_benchmark.csv` gives that; a triangle has that of two of its corners, else of the first.
"""

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from fit3d_ns.data.frames import Frame
from fit3d_ns.data.images import IGNORE_INDEX, save_depth, save_index_map
from fit3d_ns.data.ply import read_ply_elements
from fit3d_ns.data.scannetpp import colmap_to_world, read_scannetpp
from fit3d_ns.geometry.cameras import transform_points, viewmats_from_camera_to_worlds
from fit3d_ns.lifting.surface_points import read_surface_file
from fit3d_ns.lifting.surfaces import SCANNETPP_MESH
from fit3d_ns.probing.datasets.folders import check_class_names
from fit3d_ns.probing.datasets.frames import read_lines
from fit3d_ns.probing.datasets.scannet import find_scannetpp_scenes, is_scannetpp_scene
from fit3d_ns.rasterization.cpu.triangles import LensPixels
from fit3d_ns.utils.errors import reading
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, remove, write_atomically, write_json
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.results import ResultRecord, load_result, save_result
from fit3d_ns.utils.selection import load_ahead

NEAR = 0.05
"""Metres from which a surface is seen, as in the official toolkit's depth."""
_sort_pixels = lru_cache(maxsize=2)(LensPixels)


@dataclass(frozen=True)
class ClassList:
    """The classes of label maps."""

    names: tuple[str, ...]
    indices: dict[str, int]
    """From annotators' words to indices of classes; other words have none."""
    words: tuple[str, ...] = field(default=(), repr=False)
    """Annotators' words in the order of the labels of `mesh_aligned_0.05_semantic.ply`."""


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


def find_scenes(root: Path, names: Sequence[str] = ()) -> list[Path]:
    """Scenes of a download by their names, or by text files that list them; without names all, or `root` itself."""
    folder = find_scannetpp_scenes(root)
    if folder is None and (names or not is_scannetpp_scene(root)):
        raise ValueError(f"{root} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    if folder is None:
        return [root]
    lists = [read_lines(Path(name), "check --scenes") if name.endswith(".txt") else [name] for name in names]
    named = [folder / name for name in dict.fromkeys(sum(lists, []))]
    return named or sorted(path.parent for path in folder.glob("*/dslr"))


def read_class_list(root: Path, given: Path | None = None) -> ClassList:
    """The benchmark's classes in `metadata/`, at `root` or above, or those of a `given` text file, one on each line."""
    above = (root.absolute(), *root.absolute().parents[:3])
    places = [place / "metadata" / kind for place in above for kind in ("semantic_benchmark", "semantic_classes")]
    path = given or next((place for place in places if place.is_dir()), places[0]) / "top100.txt"
    names = read_lines(path, "download ScanNet++'s metadata/, give --classes, or take --depth-only")
    check_class_names(names, path)
    indices, table = {name: index for index, name in enumerate(names)}, path.with_name("map_benchmark.csv")
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as file:
            renamed = {row["class"]: row["semantic_map_to"] for row in csv.DictReader(file) if row["semantic_map_to"]}
        indices |= {word: indices.get(name, IGNORE_INDEX) for word, name in renamed.items()}
    listed = next((at for place in above if (at := place / "metadata/semantic_classes.txt").is_file()), None)
    return ClassList(tuple(names), indices, tuple(read_lines(listed, "download metadata/")) if listed else ())


def prepare_scene(folder: Path, classes: ClassList | None, jobs: int, overwrite: bool = False) -> dict[str, Any]:
    """Makes the maps that a scene lacks, `jobs` at a time, only depth without `classes`; returns metrics.

    They also go into `dslr/prepare.json`. ValueError where a file is missing that maps are made from, or where maps
    were made from other files or classes and may not be overwritten.
    """
    start, dslr = time.perf_counter(), folder / "dslr"
    frames = [frame for frame in read_scannetpp(folder, "fisheye").frames if not frame.is_bad]
    mesh_path, annotation = folder / SCANNETPP_MESH, []
    if classes is not None:
        annotation = [mesh_path.with_name(name) for name in ("segments.json", "segments_anno.json")]
        of_vertices = mesh_path.with_name(f"{mesh_path.stem}_semantic.ply")
        annotation = annotation if all(map(Path.is_file, annotation)) or not of_vertices.is_file() else [of_vertices]
    for path in (mesh_path, *annotation):
        if not path.is_file():
            raise ValueError(f"{path} is missing; download the scene's scans/ (of the mesh alone: --depth-only).")
    origins = {"render_depth": hash_file(mesh_path)}
    if classes is not None:
        origins["labels"] = hash_bytes(*map(hash_file, (mesh_path, *annotation)), repr(classes))
    record_path = dslr / "prepare.json"
    known = load_result(record_path).settings if record_path.is_file() else {}
    for kind, origin in origins.items():
        if overwrite:
            remove(dslr / kind)
        # Depth maps that nothing is known about came with the download.
        elif (dslr / kind).is_dir() and known.get(kind, origin if kind == "render_depth" else None) != origin:
            raise ValueError(f"{dslr / kind} was made from another mesh or class list; --overwrite makes it again.")

    def list_missing(frame: Frame) -> list[Path]:
        paths = [dslr / kind / f"{frame.image_path.stem}.png" for kind in origins]
        return [path for path in paths if not path.is_file()]

    missing = list(filter(list_missing, frames))
    metrics: dict[str, Any] = {"frames": len(frames), "frames_made": len(missing), "seconds": 0.0}
    if not missing:
        return metrics
    record = ResultRecord("prepare/scannetpp", metrics, known | origins)
    save_result(record, record_path)
    mesh = _read_mesh(mesh_path, classes, annotation)
    if classes is not None:
        content = {"classes": classes.names, "ignore_index": IGNORE_INDEX, "variant": "fisheye"}
        write_json(dslr / "labels" / "classes.json", content)
    _sort_pixels(missing[0].lens)  # Once, before several threads ask for it.

    def make(frame: Frame) -> tuple[float, float]:
        depth, labels = mesh.render(frame)
        for path in list_missing(frame):
            with write_atomically(path) as temporary:
                if path.parent.name == "labels":
                    save_index_map(torch.from_numpy(labels), temporary)
                else:
                    save_depth(torch.from_numpy(depth).float(), temporary)
        return float((depth > 0).mean()), float((labels != IGNORE_INDEX).mean())

    made = track(load_ahead(missing, make, jobs, depth=2 * jobs), f"Maps of {folder.name}", total=len(missing))
    metrics["covered"], metrics["labelled"] = np.mean(list(made), axis=0).tolist()
    metrics |= {"triangles": len(mesh.faces), "seconds": time.perf_counter() - start}
    save_result(record, record_path)
    return metrics


def _read_mesh(path: Path, classes: ClassList | None, annotation: Sequence[Path]) -> AnnotatedMesh:
    file = read_surface_file(path)
    indices = np.full(len(file.xyz), IGNORE_INDEX, dtype=np.uint8)
    if classes is not None:
        read: Any = _read_vertex_labels if len(annotation) == 1 else _read_vertex_classes
        indices = read(classes, *annotation)
    if len(indices) != len(file.xyz):
        problem = f"{annotation[0]} has {len(indices)} vertices, the mesh {len(file.xyz)}"
        raise ValueError(f"{problem}; download both again.")
    first, second, third = indices[file.faces].T
    xyz = transform_points(torch.from_numpy(file.xyz), colmap_to_world(), 1.0).numpy()
    return AnnotatedMesh(xyz, file.faces, np.where(second == third, second, first))


def _read_vertex_labels(classes: ClassList, path: Path) -> UInt8[np.ndarray, " vertices"]:
    """From the labelled mesh: a vertex's `label` is the place of its word among all, below 0 for none."""
    table = [*(classes.indices.get(word, IGNORE_INDEX) for word in classes.words), IGNORE_INDEX]
    with reading(f"{path} or metadata/semantic_classes.txt"):
        vertices = read_ply_elements(path)["vertex"]
        labels = {name: vertices[name] for name in vertices.dtype.names or ()}["label"].astype(np.int64)
        return np.array(table, dtype=np.uint8)[np.maximum(labels, -1)]


def _read_vertex_classes(classes: ClassList, *paths: Path) -> UInt8[np.ndarray, " vertices"]:
    """From the annotation, segments and their groups, whose errors are ValueErrors."""
    with reading(f"{paths[0]} or {paths[1].name}"):
        vertices = np.asarray(read_json(paths[0])["segIndices"], dtype=np.int64)
        groups = read_json(paths[1])["segGroups"]
        known = [(classes.indices.get(group["label"], IGNORE_INDEX), group["segments"]) for group in groups]
    segments, place, sizes = np.unique(vertices, return_inverse=True, return_counts=True)
    found = np.full(len(segments), IGNORE_INDEX, dtype=np.uint8)
    members = [(index, np.isin(segments, own)) for index, own in known if index != IGNORE_INDEX]
    for index, own in sorted(members, key=lambda member: -sizes[member[1]].sum()):
        found[own] = index
    return found[place]
