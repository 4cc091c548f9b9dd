"""`read_surface_source`: flat Gaussians on the surface that a capture comes with, to lift from without any training."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import CaptureFiles
from fit3d_ns.data.layouts import read_capture
from fit3d_ns.lifting import surface_points
from fit3d_ns.lifting.sources import LiftSource, PlyConfig, compare_with_photographs
from fit3d_ns.lifting.surfels import SurfacePoints, create_point_surfels, create_surfels, smooth_along_normals
from fit3d_ns.lifting.worlds import PlyWorld, find_changes
from fit3d_ns.rasterization import backproject_features, rasterize_features
from fit3d_ns.scene import Gaussians, PosedCapture, create_posed_capture
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import PhaseTimer, notice, track
from fit3d_ns.utils.selection import select_evenly

Surface = Literal["depth", "mesh", "points"]
SCANNETPP_MESH = "scans/mesh_aligned_0.05.ply"
_MAX_COLOUR_VIEWS = 120
"""Photographs that colours are read from."""
_LEAST_VISIBLE = 0.05
"""Points whose weight in every view is below this share of what they cover in the nearest one are hidden."""
_SH = 2.0 * np.sqrt(np.pi)


@dataclass(frozen=True)
class SurfaceConfig(Limited):
    """How Gaussians are made of a surface."""

    mesh: Path | None = None
    """With --surface mesh or points: the file of the mesh or cloud (PLY, OBJ, GLB, STL, OFF), in the world of the poses
    or of the capture's COLMAP model. Without it, ScanNet++'s `scans/mesh_aligned_0.05.ply` or the capture's own
    points."""
    depth_scale: Annotated[float | None, Limits(above=0)] = None
    """With --surface depth: units of the depth maps per unit of the capture's world, 1000 where depth is in millimetres
    and poses are in metres. By default the unit at which views agree, a usual one if it can be."""
    cell_pixels: Annotated[float, Limits(above=0)] = 5.0
    """With --surface: side of the smallest Gaussians' cells in pixels of a near photograph, above 0. Smaller cells
    follow edges better and cost time and memory."""
    refine_steps: Annotated[int, Limits(at_least=0)] = 3
    """With --surface: rounds over the photographs that fit colours to them, 0 or more."""


def read_surface_source(
    data: Path, surface: Surface, config: SurfaceConfig, world: PlyConfig, device: torch.device | str = "cpu"
) -> LiftSource:
    """Reads a capture and makes Gaussians of its surface, coloured by its photographs.

    ValueError where the capture has no such surface, or renderings of it are not what the photographs show.
    """
    files = read_capture(data, is_strict=world.strict)
    notice(files.description)
    capture = create_posed_capture(files, downscale_factor=world.choose_factor(files))
    path = None if surface == "depth" else _find_file(files, surface, config)
    if surface == "depth":
        scale = surface_points.find_depth_scale(capture, config.depth_scale)
        if scale != (config.depth_scale or 1000.0):
            notice(f"Views agree where depth maps have {scale:g} units per unit of the poses; else give --depth-scale.")
        paths = [path for view in surface_points.list_depth_views(capture) if (path := view.frame.depth_path)]
        recipe = f"depth {scale} {hash_bytes(*(hash_file(path).encode() for path in paths))}"
        find_points = partial(surface_points.fuse_depth, capture, scale, config.cell_pixels)
        source = _build(capture, find_points, recipe, config, device)
    elif path is None:
        assert capture.points is not None
        xyz, rgb = (part.double().numpy() for part in (capture.points.xyz, capture.points.rgb))
        file = surface_points.SurfaceFile(xyz, np.empty((0, 3), np.int64), rgb / 255.0)
        find_points = partial(surface_points.sample_surface, file, capture, config.cell_pixels)
        source = _build(capture, find_points, f"points {hash_bytes(xyz.tobytes())}", config, device)
    else:
        source = _read_file_source(path, files, surface, config, world, device)
    fit = compare_with_photographs(source, device)
    if world.smallest_psnr > 0 and not (fit.is_seen and fit.psnr >= world.smallest_psnr):
        raise ValueError(
            f"The {surface} of {data} does not show what its photographs show ({fit.psnr:.1f} dB, "
            f"{world.smallest_psnr:g} dB are needed); check poses and, for depth, --depth-scale."
        )
    return source


def _read_file_source(
    path: Path, files: CaptureFiles, surface: Surface, config: SurfaceConfig, world: PlyConfig, device: Any
) -> LiftSource:
    """From a mesh or cloud, in the world of the poses or of the capture's COLMAP model, whichever fits better."""
    file, recipe = surface_points.read_surface_file(path), f"{surface} {hash_file(path)}"
    if surface == "mesh" and not len(file.faces):
        raise ValueError(f"{path} has no triangles; use --surface points for a cloud.")

    def create(name: PlyWorld, cell_pixels: float) -> LiftSource:
        change = find_changes(name, files, path)[0]
        capture = create_posed_capture(files, change.transform, change.scale, world.choose_factor(files))
        placed = replace(file, xyz=file.xyz - files.origin) if name == "dataset" else file
        find_points = partial(surface_points.sample_surface, placed, capture, cell_pixels)
        return _build(capture, find_points, recipe, config, device)

    # ScanNet++'s meshes lie in the world of its COLMAP model.
    names: list[PlyWorld] = ["dataset", "colmap"] if config.mesh is not None else ["colmap"]
    fits = {}
    for name in names if files.colmap_to_world is not None and len(names) > 1 else []:
        with suppress(ValueError):
            fits[name] = compare_with_photographs(create(name, 3.0 * config.cell_pixels), device).psnr
    best = max(fits, key=lambda name: fits[name], default=names[0])
    if fits:
        listed = ", ".join(f"{name} {fit:.1f} dB" for name, fit in fits.items())
        notice(f"{path} lies in the {best} world ({listed} from the photographs).")
    return create(best, config.cell_pixels)


@torch.no_grad()
def fit_colours(
    gaussians: Gaussians, capture: PosedCapture, num_rounds: int, device: torch.device | str = "cpu"
) -> tuple[Gaussians, Float[Tensor, " num_gaussians"]]:
    """The Gaussians with colours nearer to the train photographs, and the largest blend weight each has in one of them.

    A round adds to each colour the mean difference between photographs and renderings where it is seen, by blend
    weight: a simultaneous algebraic reconstruction, which goes towards the least squares.
    """
    views = select_evenly(capture.select("train"), _MAX_COLOUR_VIEWS)
    activated = gaussians.to(device).activate()
    colours, largest = 0.5 + gaussians.sh_dc.to(device).float() / _SH, activated.means.new_zeros(len(activated))
    for index in range(num_rounds):
        sums = colours.new_zeros(len(colours), 4)
        for view in track(views, f"Colours, round {index + 1}"):
            info = activated.project(view.camera)
            mask = capture.load_valid_mask(view).to(colours)[..., None]
            photograph = capture.load_image(view).to(colours) / 255.0
            residual = (photograph - rasterize_features(colours, info)[0]) * mask
            _, weights = backproject_features(torch.cat([residual, mask], dim=-1)[None].contiguous(), info, add_to=sums)
            largest = torch.maximum(largest, weights)
        colours = (colours + sums[:, :3] / sums[:, 3:].clamp(min=1e-6)).clamp(0.0, 1.0)
    return replace(gaussians, sh_dc=((colours - 0.5) * _SH).to(gaussians.sh_dc.dtype).cpu()), largest.cpu()


def _build(
    capture: PosedCapture,
    find_points: Callable[[], tuple[SurfacePoints, float]],
    recipe: str,
    config: SurfaceConfig,
    device: torch.device | str,
) -> LiftSource:
    timer, kind = PhaseTimer(), recipe.split()[0]
    with timer.phase("setup"):
        points, cell = find_points()
        if kind != "mesh":
            points = smooth_along_normals(points, cell)
        if kind != "depth":
            # Photographs say what no view sees, and by their colours where cells may be merged.
            seen, weights = fit_colours(create_point_surfels(points, 0.5 * cell), capture, 1, device)
            visible = weights.double().numpy() > _LEAST_VISIBLE * (0.5 * cell / points.spacing) ** 2
            points = replace(points, rgb=0.5 + seen.sh_dc.double().numpy() / _SH).select(visible)
        gaussians = create_surfels(points, cell, config.cell_pixels)
    with timer.phase("colour"):
        gaussians, _ = fit_colours(gaussians, capture, config.refine_steps, device)
    decisive = {"cell_pixels": config.cell_pixels, "refine_steps": config.refine_steps, "version": 1}
    description = f"surface of {kind}, cells of {cell:.3g}"
    recipe = json.dumps([recipe, decisive])
    return LiftSource(gaussians, capture, description, training_seconds=timer.seconds, recipe=recipe)


def _find_file(files: CaptureFiles, surface: Surface, config: SurfaceConfig) -> Path | None:
    """The mesh or cloud; None where the capture's own points are meant."""
    if config.mesh is not None:
        return config.mesh
    if surface == "points" and files.points is not None:
        return None
    root = files.root if files.root.is_dir() else files.root.parent
    places = [folder / SCANNETPP_MESH for folder in (root, root.absolute().parent)]
    found = [path for path in places if path.is_file()]
    if surface == "mesh" and found:
        return found[0]
    missing = f"mesh ({SCANNETPP_MESH})" if surface == "mesh" else "points"
    raise ValueError(f"{files.root} has no {missing}; give a file with --mesh.")
