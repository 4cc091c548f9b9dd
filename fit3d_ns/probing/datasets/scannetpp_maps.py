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
from fit3d_ns.probing.datasets.frames import read_lines
from fit3d_ns.probing.datasets.scannet import find_scannetpp_scenes, is_scannetpp_scene
from fit3d_ns.rasterization.cpu.triangles import LensPixels
from fit3d_ns.utils.files import hash_bytes, hash_file, read_json, remove, write_atomically, write_json
from fit3d_ns.utils.progress import PhaseTimer, track
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

    folder: Path
    frames: list[Frame]
    inputs: dict[MapKind, list[Path]]
    """What each kind of map is made from."""
    classes: ClassList | None

    def list_missing(self, frame: Frame) -> dict[MapKind, Path]:
        """Maps of a frame that are still to be made."""
        name = f"{frame.image_path.stem}.png"
        paths = {kind: self.folder / "dslr" / _FOLDERS[kind] / name for kind in self.inputs}
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


def find_scenes(root: Path, names: Sequence[str] = ()) -> list[Path]:
    """Folders of scenes, by their names or by text files that list them, of all without names; or the scene itself."""
    if is_scannetpp_scene(root):
        return [root]
    folder = find_scannetpp_scenes(root)
    if folder is None:
        raise ValueError(f"{root} holds no ScanNet++ scenes: no data/<scene>/dslr/ and no <scene>/dslr/.")
    lists = [read_lines(Path(name), "check --scenes") if name.endswith(".txt") else [name] for name in names]
    wanted = dict.fromkeys(sum(lists, [])) or sorted(path.name for path in folder.iterdir() if (path / "dslr").is_dir())
    absent = [name for name in wanted if not (folder / name / "dslr").is_dir()]
    if absent:
        raise ValueError(f"{len(absent)} scenes have no dslr/ below {folder} ({', '.join(absent[:3])}); download them.")
    return [folder / name for name in wanted]


def read_class_list(root: Path, given: Path | None = None) -> ClassList:
    """The benchmark's classes in `metadata/`, at `root` or above, or those of a `given` text file, one on each line."""
    above = (root.absolute(), *root.absolute().parents[:3])
    places = [place / "metadata" / kind for place in above for kind in ("semantic_benchmark", "semantic_classes")]
    path = given or next((place for place in places if place.is_dir()), places[0]) / "top100.txt"
    names = tuple(read_lines(path, "download ScanNet++'s metadata/, give --classes, or take --maps depth"))
    if len(names) > IGNORE_INDEX or len(set(names)) < len(names):
        raise ValueError(f"{path} lists {len(names)} names; a class list has at most {IGNORE_INDEX}, each once.")
    indices, table = {name: index for index, name in enumerate(names)}, path.with_name("map_benchmark.csv")
    if table.is_file():
        with open(table, encoding="utf-8", newline="") as file:
            renamed = {row["class"]: row["semantic_map_to"] for row in csv.DictReader(file) if row["semantic_map_to"]}
        indices |= {word: indices.get(name, IGNORE_INDEX) for word, name in renamed.items()}
    return ClassList(names, indices)


def plan_scene(folder: Path, kinds: Sequence[MapKind], classes: ClassList | None) -> SceneMaps:
    """Looks whether what maps are made from is there, a ValueError where it is not; meshes are not read."""
    frames = [frame for frame in read_scannetpp(folder, "fisheye").frames if not frame.is_bad]
    mesh, annotation = folder / SCANNETPP_MESH, ("segments.json", "segments_anno.json")
    inputs = {kind: [mesh, *(mesh.with_name(name) for name in annotation if kind == "labels")] for kind in kinds}
    missing = [path for paths in inputs.values() for path in paths if not path.is_file()]
    if missing:
        advice = "" if mesh in missing else ", or take --maps depth"
        raise ValueError(f"{missing[0]} is missing; download the scene's scans/{advice}.")
    return SceneMaps(folder, frames, inputs, classes)


def prepare_scene(scene: SceneMaps, jobs: int, overwrite: bool = False) -> dict[str, Any]:
    """Makes the maps that are missing, `jobs` at a time; returns metrics, which also go into `dslr/prepare.json`.

    ValueError where maps were made from other files or classes and may not be overwritten.
    """
    start, dslr = time.perf_counter(), scene.folder / "dslr"
    settings = {
        kind: hash_bytes(*map(hash_file, paths), repr(scene.classes) if kind == "labels" else "")
        for kind, paths in scene.inputs.items()
    }
    record_path = dslr / "prepare.json"
    known = load_result(record_path).settings if record_path.is_file() else {}
    for kind, origin in settings.items():
        folder = dslr / _FOLDERS[kind]
        if overwrite:
            remove(folder)
        # Depth maps that nothing is known about came with the download.
        elif folder.is_dir() and known.get(kind, origin if kind == "depth" else None) != origin:
            raise ValueError(f"{folder} was made from another mesh or class list; --overwrite makes it again.")
    frames = [frame for frame in scene.frames if scene.list_missing(frame)]
    metrics: dict[str, Any] = {"frames": len(scene.frames), "frames_made": len(frames), "seconds": 0.0}
    if not frames:
        return metrics
    record = ResultRecord("prepare/scannetpp", metrics, known | settings)
    save_result(record, record_path)
    if scene.classes is not None:
        content = {"classes": scene.classes.names, "ignore_index": IGNORE_INDEX, "variant": "fisheye"}
        write_json(dslr / _FOLDERS["labels"] / "classes.json", content)
    mesh = read_annotated_mesh(scene)
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
    shares = list(track(made, f"Maps of {scene.folder.name}", total=len(frames)))
    metrics["covered"], metrics["labelled"] = np.mean(shares, axis=0).tolist()
    metrics |= {"triangles": len(mesh.faces), "seconds": time.perf_counter() - start}
    save_result(record, record_path)
    return metrics


def forecast_seconds(scenes: Sequence[SceneMaps], jobs: int) -> float:
    """About how long the missing maps of all scenes take, by a frame of the scene that lacks most."""
    counts = [sum(bool(scene.list_missing(frame)) for frame in scene.frames) for scene in scenes]
    scene, timer = scenes[counts.index(max(counts))], PhaseTimer()
    with timer.phase("scene"):
        mesh = read_annotated_mesh(scene)
        mesh.render(scene.frames[0])
    with timer.phase("frame"):
        mesh.render(scene.frames[0])
    return timer.seconds["scene"] * sum(map(bool, counts)) + timer.seconds["frame"] * sum(counts) / jobs


def read_annotated_mesh(scene: SceneMaps) -> AnnotatedMesh:
    """Reads the files that a plan names."""
    path, *annotation = max(scene.inputs.values(), key=len)
    file = read_surface_file(path)
    classes = np.full(len(file.xyz), IGNORE_INDEX, dtype=np.uint8)
    if annotation and scene.classes is not None:
        classes = _read_vertex_classes(*annotation, scene.classes.indices, len(classes))
    first, second, third = classes[file.faces].T
    xyz = transform_points(torch.from_numpy(file.xyz), colmap_to_world(), 1.0).numpy()
    return AnnotatedMesh(xyz, file.faces, np.where(second == third, second, first))


def _read_vertex_classes(
    segments_path: Path, annotation_path: Path, indices: dict[str, int], num_vertices: int
) -> UInt8[np.ndarray, " vertices"]:
    try:
        segment_of_vertex = np.asarray(read_json(segments_path)["segIndices"], dtype=np.int64)
        objects = [
            (indices.get(entry["label"]), entry["segments"]) for entry in read_json(annotation_path)["segGroups"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{annotation_path} or {segments_path.name} is damaged ({error}); download both again."
        ) from error
    if len(segment_of_vertex) != num_vertices:
        problem = f"{segments_path} has {len(segment_of_vertex)} vertices, the mesh {num_vertices}"
        raise ValueError(f"{problem}; download both again.")
    segments, place, sizes = np.unique(segment_of_vertex, return_inverse=True, return_counts=True)
    classes = np.full(len(segments), IGNORE_INDEX, dtype=np.uint8)
    members = [(index, np.isin(segments, own)) for index, own in objects if index not in (None, IGNORE_INDEX)]
    for index, own in sorted(members, key=lambda member: -sizes[member[1]].sum()):
        classes[own] = index
    return classes[place]
