"""Gaussians of surfaces: where they lie, how they are turned, what noise, holes, units and masks do to them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree

from fit3d_ns.data.layouts import read_capture
from fit3d_ns.data.scannetpp import colmap_to_world
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.lifting.sources import PlyConfig, compare_with_photographs
from fit3d_ns.lifting.surface_points import SurfaceFile, find_depth_scale, read_surface_file
from fit3d_ns.lifting.surfaces import SurfaceConfig, read_surface_source
from fit3d_ns.lifting.surfels import SurfacePoints, create_surfels, smooth_along_normals
from fit3d_ns.scene import create_posed_capture
from fit3d_ns.synthetic.rooms import build_room
from fit3d_ns.synthetic.synthesize import SynthesisConfig, synthesize_scenes
from fit3d_ns.utils.selection import derive_seed
from tests.unprojection import unproject_depth

FINE = SurfaceConfig(cell_pixels=2.0)
"""The rooms' pictures are small: a pixel is 2 cm wide where surfaces are 3 m away."""
LIMIT = 0.07
"""Median relative error of rendered depth: the mean depth of what overlaps in a pixel, by centres 2 to 7 cm wide."""


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    synthesize_scenes(SynthesisConfig(folder, num_scenes=1, num_frames=16, width=160, height=120))
    return folder / "room_00"


@pytest.fixture(scope="module")
def depth_source(room):
    return read_surface_source(room, "depth", FINE, PlyConfig())


def change_depth(room: Path, target: Path, change) -> Path:
    """A copy of the room whose depth maps (millimetres, name) went through a function."""
    shutil.copytree(room, target)
    for path in sorted((target / "dslr" / "render_depth").iterdir()):
        values = change(np.asarray(Image.open(path)).astype(np.float64), path.stem)
        Image.fromarray(np.clip(np.round(values), 0, 65535).astype(np.uint16)).save(path)
    return target


def measure_depth_errors(source, room: Path) -> tuple[np.ndarray, float]:
    """Relative errors of rendered depth in held-out views against the room's exact one, and the share that is drawn."""
    exact = create_posed_capture(read_capture(room))
    errors, alphas = [], []
    for view in source.capture.select("test"):
        nothing = torch.zeros(source.gaussians.num_gaussians, 1)
        drawn, alpha = source.activate().render(nothing, view.camera, render_mode="ED")
        true = exact.load_depth(exact.name_to_view[view.name])
        covered = alpha > 0.5
        errors.append(((drawn[..., 0] / source.capture.dataparser_scale - true).abs() / true)[covered])
        alphas.append(covered.float().mean())
    return torch.cat(errors).numpy(), float(torch.stack(alphas).mean())


def measure_distances(source, room: Path) -> np.ndarray:
    """Distance of each Gaussian's centre to the nearest of the room's exact points, all frames', in metres."""
    exact = create_posed_capture(read_capture(room))
    points = [unproject_depth(exact.load_depth(view), view.camera_to_world, view.K) for view in exact.views]
    return cKDTree(torch.stack(points).reshape(-1, 3).numpy()).query(source.gaussians.means.numpy())[0]


def find_normals(gaussians) -> np.ndarray:
    """Shortest axes."""
    w, x, y, z = torch.nn.functional.normalize(gaussians.quats.double(), dim=1).numpy().T
    # Third column of the rotation of a quaternion; Gaussians of surfaces are thin along z.
    assert bool((gaussians.log_scales.argmin(dim=1) == 2).all())
    return np.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], axis=1)


def test_depth__gaussians_lie_on_the_surfaces(depth_source, room):
    distances = measure_distances(depth_source, room)
    # Frames' pixels are some 2 cm apart in this room.
    assert np.median(distances) < 0.015 and np.percentile(distances, 99) < 0.06
    errors, share = measure_depth_errors(depth_source, room)
    assert share > 0.93 and np.median(errors) < LIMIT


def test_depth__gaussians_are_flat_along_the_surfaces(depth_source, room):
    normals, means = find_normals(depth_source.gaussians), depth_source.gaussians.means.numpy()
    size = json.loads((room.parent / "synthesis.json").read_text())["scenes"][0]["room_size_m"]
    # ScanNet++'s world has z down: the floor is its plane z = 0, the ceiling z = -height.
    for height in (0.0, -size[2]):
        near = np.abs(means[:, 2] - height) < 0.02
        assert near.sum() > 30 and np.mean(np.abs(normals[near, 2]) > 0.97) > 0.85
    scales = depth_source.gaussians.log_scales.float().exp()
    assert float((scales[:, 2] / scales[:, 0]).median()) < 0.35


def test_depth__photographs_colour_it(depth_source):
    fit = compare_with_photographs(depth_source)
    assert fit.psnr > 18.0 and fit.coverage > 0.95
    plain = read_surface_source(
        depth_source.capture.root, "depth", SurfaceConfig(cell_pixels=2.0, refine_steps=0), PlyConfig()
    )
    assert fit.psnr > compare_with_photographs(plain).psnr + 1.0


def test_depth__held_out_frames_shape_nothing(depth_source, room, tmp_path):
    test = {Path(view.name).stem for view in depth_source.capture.select("test")}
    changed = change_depth(room, tmp_path / "changed", lambda depth, name: 0.5 * depth if name in test else depth)
    source = read_surface_source(changed, "depth", FINE, PlyConfig())
    assert torch.equal(source.gaussians.means, depth_source.gaussians.means)


def test_depth__noise_makes_no_layers_and_holes_no_gaps(depth_source, room, tmp_path):
    numbers = np.random.default_rng(0)

    def spoil(depth, name):
        noisy = depth * (1 + 0.01 * numbers.normal(size=depth.shape))
        noisy[numbers.random(depth.shape) < 0.3] = 0.0
        noisy[20:50, 40:80] = 0.0
        # A reflection: one frame measures half of the distance in a corner, which the others look through.
        noisy[90:, :40] *= 0.5 if name.endswith("6") else 1.0
        return noisy

    source = read_surface_source(change_depth(room, tmp_path / "noisy", spoil), "depth", FINE, PlyConfig())
    assert source.gaussians.num_gaussians < 2.0 * depth_source.gaussians.num_gaussians
    distances = measure_distances(source, room)
    # Noise of 1 % at 3 m is 3 cm.
    assert np.median(distances) < 0.02 and np.percentile(distances, 98) < 0.1
    errors, share = measure_depth_errors(source, room)
    assert share > 0.9 and np.median(errors) < LIMIT


@pytest.mark.parametrize("scale", [5000.0, 256.0])
def test_depth__finds_its_unit(depth_source, room, tmp_path, scale):
    changed = change_depth(room, tmp_path / "units", lambda depth, name: depth * scale / 1000.0)
    capture = create_posed_capture(read_capture(changed))
    assert find_depth_scale(capture) == scale
    assert find_depth_scale(create_posed_capture(read_capture(room))) == 1000.0
    given = read_surface_source(changed, "depth", SurfaceConfig(cell_pixels=2.0, depth_scale=scale), PlyConfig())
    assert np.median(measure_depth_errors(given, room)[0]) < LIMIT


@pytest.mark.parametrize("unit", [0.37, 2.7])
def test_depth__poses_of_any_unit_are_found_to_be_such(room, tmp_path, unit):
    """Poses that COLMAP made are in a unit of their own, depth maps in millimetres."""
    shutil.copytree(room, tmp_path / "room")
    for path in (tmp_path / "room" / "dslr" / "nerfstudio").iterdir():
        move_poses(path, lambda centre: centre * unit)
    capture = create_posed_capture(read_capture(tmp_path / "room"))
    assert find_depth_scale(capture) == pytest.approx(1000.0 / unit, rel=0.01)
    with pytest.raises(ValueError, match="--depth-scale 1000 and on .* use that"):
        find_depth_scale(capture, 1000.0)


def move_poses(cameras: Path, change) -> None:
    content = json.loads(cameras.read_text())
    for frame in (*content["frames"], *content["test_frames"]):
        matrix = np.array(frame["transform_matrix"])
        matrix[:3, 3] = change(matrix[:3, 3])
        frame["transform_matrix"] = matrix.tolist()
    cameras.write_text(json.dumps(content))


def test_depth__masks_are_kept_out(room, tmp_path):
    masks = {path.stem: np.asarray(Image.open(path)) for path in (room / "dslr" / "undistorted_anon_masks").iterdir()}
    assert any((mask == 0).any() for mask in masks.values())
    # What is masked measures something half a metre before every camera.
    changed = change_depth(room, tmp_path / "masked", lambda depth, name: np.where(masks[name] == 0, 500.0, depth))
    source = read_surface_source(changed, "depth", FINE, PlyConfig())
    assert np.percentile(measure_distances(source, room), 99.5) < 0.1


def test_depth__wrong_unit_and_missing_depth_are_refused(room, tmp_path):
    with pytest.raises(ValueError, match="--depth-scale"):
        read_surface_source(room, "depth", SurfaceConfig(cell_pixels=2.0, depth_scale=250.0), PlyConfig())
    shutil.copytree(room, tmp_path / "none", ignore=shutil.ignore_patterns("render_depth"))
    with pytest.raises(ValueError, match="No train frame .* has a depth map .* --surface mesh"):
        read_surface_source(tmp_path / "none", "depth", FINE, PlyConfig())
    with pytest.raises(ValueError, match=r"no mesh \(scans/mesh_aligned_0.05.ply\); give a file with --mesh"):
        read_surface_source(room, "mesh", FINE, PlyConfig())


def test_depth__through_a_fisheye_lens(tmp_path):
    synthesize_scenes(SynthesisConfig(tmp_path, num_scenes=1, num_frames=10, width=120, height=90, lens="fisheye"))
    source = read_surface_source(tmp_path / "room_00", "depth", FINE, PlyConfig())
    assert np.median(measure_depth_errors(source, tmp_path / "room_00")[0]) < LIMIT


def write_mesh(room: Path, path: Path) -> trimesh.Trimesh:
    """The room's solids, in COLMAP's world."""
    parts = []
    for solid in build_room(np.random.default_rng(derive_seed(0, "room", 0))).solids:
        transform = trimesh.transformations.rotation_matrix(solid.yaw, (0, 0, 1), (0, 0, 0))
        transform[:3, 3] = solid.centre
        if solid.num_round == 0:
            part = trimesh.creation.box(2.0 * np.array(solid.half_sizes))
        elif solid.num_round == 2:
            part = trimesh.creation.cylinder(1.0, 2.0, sections=24)
            part.apply_scale(solid.half_sizes)
        else:
            part = trimesh.creation.icosphere(2)
            part.apply_scale(solid.half_sizes)
        parts.append(part.apply_transform(transform))
    mesh = trimesh.util.concatenate(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)
    return mesh


def test_mesh__of_scannetpp_is_found_in_colmaps_world(room, tmp_path):
    scene = tmp_path / "scene"
    shutil.copytree(room, scene, ignore=shutil.ignore_patterns("render_depth"))
    write_mesh(scene, scene / "scans" / "mesh_aligned_0.05.ply")
    source = read_surface_source(scene, "mesh", FINE, PlyConfig())
    errors, share = measure_depth_errors(source, room)
    assert share > 0.97 and np.median(errors) < LIMIT
    assert compare_with_photographs(source).psnr > 16.0


def test_mesh__of_a_file_may_lie_in_either_world(room, tmp_path):
    mesh = write_mesh(room, tmp_path / "mesh.ply")
    turned = mesh.copy()
    matrix = np.eye(4)
    matrix[:3] = colmap_to_world().numpy()
    turned.apply_transform(matrix)
    turned.export(tmp_path / "turned.obj")
    for name in ("mesh.ply", "turned.obj"):
        source = read_surface_source(room, "mesh", SurfaceConfig(cell_pixels=2.0, mesh=tmp_path / name), PlyConfig())
        assert np.median(measure_depth_errors(source, room)[0]) < LIMIT


def test_mesh__lies_far_away_with_its_cameras(room, tmp_path):
    """In UTM: millions of metres, which single precision tells apart by quarters."""
    offset = np.array([500_000.0, 4_649_776.0, 120.0])
    shutil.copytree(room, tmp_path / "room", ignore=shutil.ignore_patterns("colmap"))
    move_poses(tmp_path / "room/dslr/nerfstudio/transforms_undistorted.json", lambda centre: centre + offset)
    mesh = write_mesh(room, tmp_path / "mesh.ply")
    matrix = np.eye(4)
    matrix[:3], matrix[:3, 3] = colmap_to_world().numpy(), offset
    mesh.apply_transform(matrix).export(tmp_path / "far.obj", digits=4)
    config = SurfaceConfig(cell_pixels=2.0, mesh=tmp_path / "far.obj")
    source = read_surface_source(tmp_path / "room", "mesh", config, PlyConfig())
    # Its views are those of the room, moved as little as whole numbers allow.
    assert compare_with_photographs(source).psnr > 16.0
    errors, share = measure_depth_errors(source, room)
    assert share > 0.97 and np.median(errors) < LIMIT


def test_points__of_the_capture_or_a_file(room, tmp_path):
    own = read_surface_source(room, "points", FINE, PlyConfig())
    errors, share = measure_depth_errors(own, room)
    assert share > 0.6 and np.median(errors) < 0.02
    mesh = write_mesh(room, tmp_path / "mesh.ply")
    scan = trimesh.PointCloud(trimesh.sample.sample_surface(mesh, 150_000, seed=0)[0])
    scan.export(tmp_path / "scan.ply")
    source = read_surface_source(
        room, "points", SurfaceConfig(cell_pixels=2.0, mesh=tmp_path / "scan.ply"), PlyConfig()
    )
    errors, share = measure_depth_errors(source, room)
    assert share > 0.93 and np.median(errors) < LIMIT
    with pytest.raises(ValueError, match="has no triangles; use --surface points"):
        read_surface_source(room, "mesh", SurfaceConfig(cell_pixels=2.0, mesh=tmp_path / "scan.ply"), PlyConfig())


def test_points__a_single_one_is_taken_where_nothing_is_checked(room, tmp_path):
    points = read_capture(room).points
    trimesh.PointCloud(points.xyz[:1].numpy()).export(tmp_path / "one.ply")
    config = SurfaceConfig(cell_pixels=2.0, mesh=tmp_path / "one.ply")
    with pytest.raises(ValueError, match="does not show what its photographs show"):
        read_surface_source(room, "points", config, PlyConfig())
    assert read_surface_source(room, "points", config, PlyConfig(smallest_psnr=0.0)).gaussians.num_gaussians == 1


def create_plane(noise: float, edge: bool) -> SurfacePoints:
    """A square metre of points every 1 cm, tilted, with noise along its normal; white beyond a line if `edge`."""
    numbers = np.random.default_rng(1)
    u, v = np.meshgrid(np.arange(0.005, 1, 0.01), np.arange(0.005, 1, 0.01))
    xyz = np.stack([u.ravel(), v.ravel(), 0.3 * u.ravel() + noise * numbers.normal(size=u.size)], axis=1)
    normal = np.array([-0.3, 0.0, 1.0]) / np.hypot(0.3, 1.0)
    rgb = np.where((v.ravel() > 0.43)[:, None] & edge, 1.0, 0.2) * np.ones((1, 3))
    return SurfacePoints(xyz, np.tile(normal, (u.size, 1)), rgb, np.full(u.size, 0.002))


def test_smoothing__pulls_noise_onto_one_sheet():
    points = create_plane(0.004, edge=False)
    smooth = smooth_along_normals(points, 0.01)
    before, after = (np.std(p.xyz[:, 2] - 0.3 * p.xyz[:, 0]) for p in (points, smooth))
    assert after < 0.5 * before


def test_surfels__plain_walls_take_few_and_edges_many():
    plain, edged = (create_surfels(create_plane(0.0, edge), 0.01, 5.0) for edge in (False, True))
    # A cell of 1 cm each would be 10,000; four together at most, but none across the edge.
    assert plain.num_gaussians < 3300 and edged.num_gaussians >= plain.num_gaussians + 100
    largest = edged.log_scales.float().exp()[:, :2].amax(dim=1)
    near_edge = (edged.means[:, 1] - 0.43).abs() < 0.015
    assert float(largest[near_edge].max()) < 0.7 * float(largest[~near_edge].max())
    normals = find_normals(plain)
    expected = np.array([-0.3, 0.0, 1.0]) / np.hypot(0.3, 1.0)
    assert np.abs(normals @ expected).min() > 0.999


def test_surfels__cover_a_plane_without_gaps():
    gaussians = create_surfels(create_plane(0.0, edge=True), 0.01, 5.0).activate()
    camera = torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 1.4]])
    K = torch.tensor([[100.0, 0.0, 32.0], [0.0, 100.0, 32.0], [0.0, 0.0, 1.0]])
    depth, alpha = gaussians.render(torch.zeros(len(gaussians), 1), Camera(camera, K, 64, 64), render_mode="ED")
    assert float(alpha.min()) > 0.8
    # The plane z = 0.3 x seen from above: z-depth d at x = 0.5 + d (column - 32) / 100.
    slope = (torch.arange(64) + 0.5 - 32.0) / 100.0
    expected = (1.4 - 0.15) / (1.0 + 0.3 * slope)
    assert float((depth[..., 0] - expected).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flat.obj", "v 0 0\nv 1 0\nv 0 1\nf 1 2 3\n", "corners are no triples"),
        ("torn.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 900\n", "cannot be read as a mesh"),
        ("empty.ply", "", "cannot be read as a mesh"),
        ("nan.off", "OFF\n1 0 0\nnan 0 0\n", "holds no points"),
    ],
)
def test_mesh__damaged_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_surface_file(tmp_path / name)


def test_mesh__with_a_face_without_end_is_refused():
    corners = np.array([[0.0, 0, 0], [1e9, 0, 0], [0, 1e9, 0]])
    file = SurfaceFile(corners, np.array([[0, 1, 2]]), np.full((3, 3), 0.5))
    for scale in (1.0, 1e200):
        with pytest.raises(ValueError, match="cut off what is far away"):
            replace(file, xyz=scale * corners).sample(0.01)
