import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from fit3d_ns.geometry.cameras import Lens
from fit3d_ns.geometry.undistortion import Undistortion, compute_undistortion, distort_points, find_rays, resize_lens

OPENCV = Lens(150.0, 152.0, 78.3, 61.9, 160, 120, "opencv", (-0.2, 0.06, 0.002, -0.003, 0.004))
PINCUSHION = Lens(150.0, 150.0, 90.0, 52.0, 160, 120, "opencv", (0.15, 0.02, -0.001, 0.002))
FISHEYE = Lens(80.0, 81.0, 84.0, 56.5, 160, 120, "fisheye", (0.03, -0.01, 0.004, -0.001))
LENSES = [OPENCV, PINCUSHION, FISHEYE]


def project_slowly(lens: Lens, ray: tuple[float, float]) -> tuple[float, float]:
    """One ray (x, y, 1) through the published models, in plain Python: the slow twin."""
    x, y = ray
    if lens.model == "fisheye":
        k1, k2, k3, k4 = lens.distortion
        radius = math.sqrt(x * x + y * y)
        theta = math.atan(radius)
        bent = theta + k1 * theta**3 + k2 * theta**5 + k3 * theta**7 + k4 * theta**9
        factor = bent / radius if radius > 0 else 1.0
        return lens.fx * x * factor + lens.cx, lens.fy * y * factor + lens.cy
    k1, k2, p1, p2, *rest = lens.distortion
    k3 = rest[0] if rest else 0.0
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2 + k3 * r2**3
    bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
    bent_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
    return lens.fx * bent_x + lens.cx, lens.fy * bent_y + lens.cy


def photograph_blob(lens: Lens, pinhole: Lens, target: tuple[float, float], sigma: float) -> Tensor:
    """What `lens` photographs of a flat scene that `pinhole` sees as one Gaussian blob at `target`.

    The ray of each pixel of the photograph is found by OpenCV's iteration, which the code under test does not use.
    """
    rows, columns = np.mgrid[: lens.height, : lens.width].astype(np.float64)
    pixels = np.stack([columns.ravel(), rows.ravel()], axis=-1)[:, None]
    K = np.array([[lens.fx, 0, lens.cx - 0.5], [0, lens.fy, lens.cy - 0.5], [0, 0, 1]])
    criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-10)
    if lens.model == "fisheye":
        rays = cv2.fisheye.undistortPoints(pixels, K, np.array(lens.distortion), criteria=criteria)
    else:
        rays = cv2.undistortPointsIter(pixels, K, np.array(lens.distortion), None, None, criteria)
    seen = rays.reshape(lens.height, lens.width, 2) * [pinhole.fx, pinhole.fy] + [pinhole.cx, pinhole.cy]
    picture = np.exp(-((seen - target) ** 2).sum(axis=-1) / (2 * sigma**2))
    return torch.from_numpy(np.repeat(picture[..., None], 3, axis=-1)).float()


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: f"{lens.model}{lens.distortion[0]}")
def test_compute_undistortion__maps_follow_the_published_models(lens: Lens) -> None:
    undistortion = compute_undistortion(lens)
    pinhole = undistortion.lens
    assert pinhole.model == "pinhole" and not pinhole.is_distorted
    assert (pinhole.width, pinhole.height) == (lens.width, lens.height)
    assert undistortion.columns is not None and undistortion.rows is not None
    for row, column in [(0, 0), (0, 159), (119, 0), (119, 159), (60, 80), (17, 133), (99, 5)]:
        # The centre of the pinhole camera's pixel, as a ray.
        ray = (column + 0.5 - pinhole.cx) / pinhole.fx, (row + 0.5 - pinhole.cy) / pinhole.fy
        x, y = project_slowly(lens, ray)
        assert undistortion.columns[row, column].item() == pytest.approx(x, abs=1e-3)
        assert undistortion.rows[row, column].item() == pytest.approx(y, abs=1e-3)


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: f"{lens.model}{lens.distortion[0]}")
def test_apply_to_image__world_points_land_where_the_pinhole_camera_sees_them(lens: Lens) -> None:
    undistortion = compute_undistortion(lens)
    pinhole = undistortion.lens
    for target in [(80.0, 60.0), (31.3, 25.8), (131.7, 22.4), (27.1, 97.6), (130.2, 93.9)]:
        photograph = photograph_blob(lens, pinhole, target, sigma=2.5)
        moved = undistortion.apply_to_image(photograph)[..., 0].double()
        rows, columns = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
        column = ((moved * columns).sum() / moved.sum()).item()
        row = ((moved * rows).sum() / moved.sum()).item()
        assert (column, row) == pytest.approx(target, abs=0.05)


@pytest.mark.parametrize("lens", LENSES, ids=lambda lens: f"{lens.model}{lens.distortion[0]}")
def test_compute_undistortion__leaves_no_border_and_wastes_little(lens: Lens) -> None:
    undistortion = compute_undistortion(lens)
    assert undistortion.inside.all()
    assert undistortion.columns is not None and undistortion.rows is not None
    seen = undistortion.columns.min().item(), undistortion.rows.min().item()
    far = undistortion.columns.max().item(), undistortion.rows.max().item()
    assert seen[0] < 0.12 * 160 and seen[1] < 0.12 * 120
    assert far[0] > 0.88 * 160 and far[1] > 0.88 * 120


@pytest.mark.parametrize("cx", [50.0, 80.0, 125.0])
@pytest.mark.parametrize("model", ["opencv", "fisheye"])
def test_compute_undistortion__principal_point_anywhere(cx: float, model: str) -> None:
    distortion = (-0.15, 0.03, 0.0, 0.0) if model == "opencv" else (0.02, 0.0, 0.0, 0.0)
    lens = Lens(130.0, 130.0, cx, 45.0, 160, 120, model, distortion)  # type: ignore[arg-type]
    undistortion = compute_undistortion(lens)
    assert undistortion.inside.all()
    assert undistortion.columns is not None and undistortion.rows is not None
    # The optical axis is seen at both principal points.
    pinhole = undistortion.lens
    column, row = pinhole.cx - 0.5, pinhole.cy - 0.5
    corner = int(row), int(column)
    step_x = undistortion.columns[corner[0], corner[1] + 1] - undistortion.columns[corner]
    step_y = undistortion.rows[corner[0] + 1, corner[1]] - undistortion.rows[corner]
    assert (undistortion.columns[corner] + step_x * (column % 1)).item() == pytest.approx(cx, abs=0.02)
    assert (undistortion.rows[corner] + step_y * (row % 1)).item() == pytest.approx(45.0, abs=0.02)


def test_compute_undistortion__centred_as_the_paper_prepares_scannetpp() -> None:
    # A lens like ScanNet++'s, halved.
    lens = Lens(394.9, 395.2, 444.8, 296.1, 876, 584, "fisheye", (-0.029, -0.0096, -0.003, 0.0006), is_centred=True)
    undistortion = compute_undistortion(lens)
    pinhole = undistortion.lens
    assert (pinhole.cx, pinhole.cy) == (438.0, 292.0)
    assert undistortion.columns is not None and undistortion.rows is not None
    for row, column in [(0, 300), (583, 0), (292, 438), (17, 133), (500, 800)]:
        ray = (column + 0.5 - 438.0) / pinhole.fx, (row + 0.5 - 292.0) / pinhole.fy
        x, y = project_slowly(lens, ray)
        assert undistortion.columns[row, column].item() == pytest.approx(x, abs=2e-3)
        assert undistortion.rows[row, column].item() == pytest.approx(y, abs=2e-3)
    # The public preparation gives OpenCV, whose pixel centres are whole numbers, K as COLMAP counts: half a pixel off.
    K, distortion = np.array([[394.9, 0.0, 444.8], [0.0, 395.2, 296.1], [0.0, 0.0, 1.0]]), np.array(lens.distortion)
    new_K = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(K, distortion, (876, 584), np.eye(3), balance=0.0)
    assert (pinhole.fx, pinhole.fy) == pytest.approx((new_K[0, 0], new_K[1, 1]), rel=2e-4)
    assert compute_undistortion(replace(lens, is_centred=False)).lens.cx == pytest.approx(new_K[0, 2], abs=5.0)
    new_K[:2, 2] = 438.0, 292.0
    maps = cv2.fisheye.initUndistortRectifyMap(K, distortion, np.eye(3), new_K, (876, 584), cv2.CV_32FC1)
    for ours, theirs in zip((undistortion.columns, undistortion.rows), maps, strict=True):
        assert np.abs(ours.numpy() - 0.5 - theirs).max() < 0.5
    # What lies past the edge, on one side, is masked.
    assert 0.99 < undistortion.inside.float().mean().item() < 1.0
    # Hashes of averaged targets hold what a lens says of itself, and the K of its view.
    assert repr(lens) == repr(replace(lens, is_centred=False))
    half = resize_lens(lens, 438, 292)
    assert half.is_centred and compute_undistortion(half).lens.cx == 219.0


def test_compute_undistortion__vanishing_distortion_moves_nothing() -> None:
    lens = replace(OPENCV, distortion=(1e-9, 0.0, 0.0, 0.0))
    undistortion = compute_undistortion(lens)
    rows, columns = torch.meshgrid(torch.arange(120) + 0.5, torch.arange(160) + 0.5, indexing="ij")
    assert undistortion.columns is not None and undistortion.rows is not None
    # Half a pixel of error, the classic one, would show here; the rest is OpenCV's fit of the visible rectangle.
    centre = slice(50, 70), slice(70, 90)
    torch.testing.assert_close(undistortion.columns[centre], columns[centre], rtol=0, atol=0.1)
    torch.testing.assert_close(undistortion.rows[centre], rows[centre], rtol=0, atol=0.1)


def test_compute_undistortion__pinhole_lenses_pass_through() -> None:
    lens = Lens(150.0, 150.0, 70.0, 60.0, 160, 120, "opencv", (0.0, 0.0, 0.0, 0.0))
    undistortion = compute_undistortion(lens)
    assert undistortion == Undistortion(replace(lens, model="pinhole", distortion=()))
    image = torch.zeros(120, 160, 3, dtype=torch.uint8)
    assert undistortion.apply_to_image(image) is image


def test_compute_undistortion__fisheye_without_coefficients_still_bends() -> None:
    lens = replace(FISHEYE, distortion=(0.0, 0.0, 0.0, 0.0))
    undistortion = compute_undistortion(lens)
    assert undistortion.columns is not None
    pinhole = undistortion.lens
    # Equidistant: a ray at angle theta lands at f * theta.
    ray = (159.5 - pinhole.cx) / pinhole.fx, (60.5 - pinhole.cy) / pinhole.fy
    radius = math.hypot(*ray)
    expected = lens.cx + lens.fx * math.atan(radius) * ray[0] / radius
    assert undistortion.columns[60, 159].item() == pytest.approx(expected, abs=1e-3)


def test_compute_undistortion__refuses_coefficients_of_no_lens() -> None:
    with pytest.raises(ValueError, match="cannot be undone|leaves no part"):
        compute_undistortion(Lens(100.0, 100.0, 80.0, 60.0, 160, 120, "opencv", (-40.0, 0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="at most 4"):
        compute_undistortion(Lens(100.0, 100.0, 80.0, 60.0, 160, 120, "fisheye", (0.1,) * 5))


def test_apply_to_image__keeps_uint8_and_is_deterministic() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (120, 160, 3), generator=generator, dtype=torch.uint8)
    undistortion = compute_undistortion(FISHEYE)
    first = undistortion.apply_to_image(image)
    assert first.dtype == torch.uint8
    assert torch.equal(first, undistortion.apply_to_image(image.clone()))
    constant = torch.full_like(image, 77)
    assert torch.equal(undistortion.apply_to_image(constant), constant)


def test_apply_to_mask__all_valid_stays_so_and_invalid_grows() -> None:
    undistortion = compute_undistortion(OPENCV)
    everything = torch.ones(120, 160, dtype=torch.bool)
    assert undistortion.apply_to_mask(everything).all()
    hole = everything.clone()
    hole[40:50, 100:110] = False
    moved = undistortion.apply_to_mask(hole)
    assert undistortion.columns is not None and undistortion.rows is not None
    columns, rows = undistortion.columns.double(), undistortion.rows.double()
    # A pixel mixes an invalid one where it reads less than one pixel away from the hole's pixel centres.
    distance_x = (columns - columns.clamp(100.5, 109.5)).abs()
    distance_y = (rows - rows.clamp(40.5, 49.5)).abs()
    touches = (distance_x < 0.95) & (distance_y < 0.95)
    clear = (distance_x > 1.05) | (distance_y > 1.05)
    assert touches.any() and not moved[touches].any()
    assert moved[clear].all()


def test_apply__what_lies_outside_of_the_photograph_is_invalid() -> None:
    # Hand-made maps that look 3 pixels past the left edge and copy the rest.
    rows, columns = torch.meshgrid(torch.arange(4) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    undistortion = Undistortion(Lens(5.0, 5.0, 4.0, 2.0, 8, 4), columns - 3.0, rows)
    mask = undistortion.apply_to_mask(torch.ones(4, 8, dtype=torch.bool))
    depth = undistortion.apply_to_depth(torch.full((4, 8), 2.5))
    expected = (torch.arange(8) >= 3).expand(4, 8)
    assert torch.equal(mask, expected)
    assert torch.equal(depth, expected * 2.5)


def test_apply_to_depth__takes_the_nearest_measurement() -> None:
    undistortion = compute_undistortion(PINCUSHION)
    depth = (torch.arange(120)[:, None] * 160 + torch.arange(160)).float()
    moved = undistortion.apply_to_depth(depth)
    assert undistortion.columns is not None and undistortion.rows is not None
    # Away from ties, the pixel that holds the point is the nearest one.
    clear = ((undistortion.columns % 1 - 0.5).abs() < 0.4) & ((undistortion.rows % 1 - 0.5).abs() < 0.4)
    expected = undistortion.rows.floor() * 160 + undistortion.columns.floor()
    assert clear.sum() > 5000
    assert torch.equal(moved[clear], expected[clear])


def test_distort_points__matches_the_slow_twin_with_rational_terms() -> None:
    rays = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2))
    for lens in LENSES:
        expected = [project_slowly(lens, (x, y)) for x, y in rays]
        np.testing.assert_allclose(distort_points(lens, rays), expected, rtol=1e-12)
    rational = replace(OPENCV, distortion=(0.1, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0))
    # Numerator and denominator cancel.
    np.testing.assert_allclose(distort_points(rational, rays), rays * [150.0, 152.0] + [78.3, 61.9], rtol=1e-12)


@pytest.mark.parametrize("lens", [*LENSES, replace(OPENCV, distortion=())], ids=lambda lens: lens.model)
def test_find_rays__leads_back_to_the_pixels(lens: Lens) -> None:
    pixels = np.random.default_rng(0).uniform([2.0, 2.0], [158.0, 118.0], (50, 2))
    for pixel, (x, y) in zip(pixels, find_rays(lens, pixels), strict=True):
        seen = project_slowly(lens, (x, y)) if lens.distortion else (lens.fx * x + lens.cx, lens.fy * y + lens.cy)
        assert seen == pytest.approx(tuple(pixel), abs=1e-4)


def test_resize_lens__scales_pixels_and_keeps_distortion() -> None:
    half = resize_lens(OPENCV, 80, 60)
    ray = np.array([[0.2, -0.1]])
    # A point keeps its place relative to the picture.
    np.testing.assert_allclose(distort_points(half, ray), distort_points(OPENCV, ray) / 2, rtol=1e-12)
    assert (half.width, half.height) == (80, 60)


def test_compute_undistortion__a_fisheye_that_sees_behind_itself_is_refused_in_a_sentence():
    # Equidistant: 90 degrees are pi / 2 focal lengths from the middle, here 235.6 pixels.
    lens = Lens(150.0, 150.0, 320.0, 240.0, 640, 480, "fisheye", (0.0, 0.0, 0.0, 0.0))
    with pytest.raises(
        ValueError, match="fisheye with focal length 150 sees 180 degrees and more.*crop the photographs"
    ):
        compute_undistortion(lens)
    compute_undistortion(Lens(150.0, 150.0, 200.0, 150.0, 400, 300, "fisheye", (0.0, 0.0, 0.0, 0.0)))
