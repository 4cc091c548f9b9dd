"""Projection on the CPU, forward and backward; `projection.py` is the definition.

Symbols: R, t rotation and translation of `viewmats`; p = R m + t the centre in camera axes; A = R Q diag(s) the
Gaussian's half axes in camera axes, with Q the rotation of the quaternion; J the Jacobian of the projection,
[[j00, 0, j02], [0, j11, j12]]; P = J A the half axes on the image, whose products are the covariance. `v_` marks
gradients of the loss. One task handles `CHUNK` Gaussians in all cameras.
"""

import math

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.projection import FOV_MARGIN, MIN_EIGENVALUE_GAP


@compiled
def project(
    task, means, quats, scales, viewmats, Ks, width, height, near, far, radius_clip, eps2d,
    radii, means2d, depths, conics, compensations,
):  # fmt: skip
    """Fills the rows of one chunk that are drawn; others keep zeros. `compensations` has no rows in classic mode."""
    rotation, axes = np.empty((3, 3), np.float32), np.empty((3, 3), np.float32)
    plane = np.empty((2, 3), np.float32)
    for g in range(task * CHUNK, min((task + 1) * CHUNK, means.shape[0])):
        _rotation_from_quat(quats, g, rotation)
        for c in range(viewmats.shape[0]):
            x, y, z = _to_camera(viewmats, c, means, g)
            if not (z >= near and z <= far):
                continue
            _axes_in_camera(viewmats, c, rotation, scales, g, axes)
            j00, j02, j11, j12, _, _ = _jacobian(x, y, z, Ks, c, width, height)
            xx, xy, yy = _covariance(j00, j02, j11, j12, axes, plane)
            sharp = xx * yy - xy * xy
            xx, yy = xx + eps2d, yy + eps2d
            determinant = xx * yy - xy * xy
            if not determinant > 0.0:
                continue
            half_trace = np.float32(0.5) * (xx + yy)
            gap = math.sqrt(max(half_trace * half_trace - determinant, np.float32(MIN_EIGENVALUE_GAP)))
            radius = np.float32(math.ceil(np.float32(3.0) * math.sqrt(half_trace + gap)))
            u = Ks[c, 0, 0] * x / z + Ks[c, 0, 2]
            v = Ks[c, 1, 1] * y / z + Ks[c, 1, 2]
            is_inside = u + radius > 0 and u - radius < width and v + radius > 0 and v - radius < height
            if not (radius > radius_clip and is_inside):
                continue
            radii[c, g] = np.int32(min(radius, np.float32(2**30)))
            depths[c, g] = z
            means2d[c, g, 0], means2d[c, g, 1] = u, v
            conics[c, g, 0] = yy / determinant
            conics[c, g, 1] = -xy / determinant
            conics[c, g, 2] = xx / determinant
            if compensations.shape[0] > 0:
                compensations[c, g] = math.sqrt(max(sharp / determinant, np.float32(0.0)))


@compiled
def project_backward(
    task, means, quats, scales, viewmats, Ks, width, height, eps2d, radii, compensations,
    v_means2d, v_depths, v_conics, v_compensations, v_means, v_quats, v_scales, v_viewmats,
):  # fmt: skip
    """Adds the gradients of one chunk; `v_viewmats` [tasks, C, 4, 4] (float64) holds one partial sum per task."""
    zero = np.float32(0.0)
    rotation, axes = np.empty((3, 3), np.float32), np.empty((3, 3), np.float32)
    plane, v_plane = np.empty((2, 3), np.float32), np.empty((2, 3), np.float32)
    v_axes, v_rotation = np.empty((3, 3), np.float32), np.empty((3, 3), np.float32)
    v_point = np.empty(3, np.float32)
    for g in range(task * CHUNK, min((task + 1) * CHUNK, means.shape[0])):
        _rotation_from_quat(quats, g, rotation)
        v_rotation[:] = zero
        for c in range(viewmats.shape[0]):
            if radii[c, g] <= 0:
                continue
            x, y, z = _to_camera(viewmats, c, means, g)
            _axes_in_camera(viewmats, c, rotation, scales, g, axes)
            j00, j02, j11, j12, is_free_x, is_free_y = _jacobian(x, y, z, Ks, c, width, height)
            xx, xy, yy = _covariance(j00, j02, j11, j12, axes, plane)
            compensation, v_compensation = zero, zero
            if compensations.shape[0] > 0:
                compensation, v_compensation = compensations[c, g], v_compensations[c, g]
            v_xx, v_xy, v_yy = _covariance_gradient(
                xx, xy, yy, eps2d, v_conics[c, g, 0], v_conics[c, g, 1], v_conics[c, g, 2], compensation, v_compensation
            )
            v_j00, v_j02, v_j11, v_j12 = zero, zero, zero, zero
            for k in range(3):
                v_plane[0, k] = np.float32(2.0) * v_xx * plane[0, k] + v_xy * plane[1, k]
                v_plane[1, k] = np.float32(2.0) * v_yy * plane[1, k] + v_xy * plane[0, k]
                v_j00 += v_plane[0, k] * axes[0, k]
                v_j02 += v_plane[0, k] * axes[2, k]
                v_j11 += v_plane[1, k] * axes[1, k]
                v_j12 += v_plane[1, k] * axes[2, k]
                v_axes[0, k] = j00 * v_plane[0, k]
                v_axes[1, k] = j11 * v_plane[1, k]
                v_axes[2, k] = j02 * v_plane[0, k] + j12 * v_plane[1, k]
            # The point: through its image position, its depth, and the place where the Jacobian is taken.
            fx, fy = Ks[c, 0, 0], Ks[c, 1, 1]
            v_u, v_v = v_means2d[c, g, 0], v_means2d[c, g, 1]
            v_slope_x, v_slope_y = -j00 * v_j02, -j11 * v_j12
            v_point[0] = j00 * v_u
            v_point[1] = j11 * v_v
            v_point[2] = v_depths[c, g] - (j00 * x * v_u + j11 * y * v_v) / z
            v_point[2] -= (fx * v_j00 / z + fy * v_j11 / z + j02 * v_j02 + j12 * v_j12) / z
            if is_free_x:
                v_point[0] += v_slope_x / z
                v_point[2] -= v_slope_x * x / (z * z)
            if is_free_y:
                v_point[1] += v_slope_y / z
                v_point[2] -= v_slope_y * y / (z * z)
            # Back through R and t: p = R m + t, A = R (Q diag(s)).
            for i in range(3):
                v_viewmats[task, c, i, 3] += v_point[i]
                for j in range(3):
                    v_means[g, j] += viewmats[c, i, j] * v_point[i]
                    v_viewmats[task, c, i, j] += v_point[i] * means[g, j]
            for k in range(3):
                for j in range(3):
                    world_axis, v_world = rotation[j, k] * scales[g, k], zero
                    for i in range(3):
                        v_world += viewmats[c, i, j] * v_axes[i, k]
                        v_viewmats[task, c, i, j] += v_axes[i, k] * world_axis
                    v_scales[g, k] += v_world * rotation[j, k]
                    v_rotation[j, k] += v_world * scales[g, k]
        _quat_gradient(quats, g, v_rotation, v_quats)


@compiled
def _rotation_from_quat(quats, g, rotation):
    w, x, y, z = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
    scale = np.float32(1.0) / math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    one, two = np.float32(1.0), np.float32(2.0)
    rotation[0, 0] = one - two * (y * y + z * z)
    rotation[0, 1] = two * (x * y - w * z)
    rotation[0, 2] = two * (x * z + w * y)
    rotation[1, 0] = two * (x * y + w * z)
    rotation[1, 1] = one - two * (x * x + z * z)
    rotation[1, 2] = two * (y * z - w * x)
    rotation[2, 0] = two * (x * z - w * y)
    rotation[2, 1] = two * (y * z + w * x)
    rotation[2, 2] = one - two * (x * x + y * y)


@compiled
def _quat_gradient(quats, g, v, v_quats):
    """Gradient by the quaternion from that by its rotation matrix; none along the quaternion itself."""
    w, x, y, z = quats[g, 0], quats[g, 1], quats[g, 2], quats[g, 3]
    scale = np.float32(1.0) / math.sqrt(w * w + x * x + y * y + z * z)
    w, x, y, z = w * scale, x * scale, y * scale, z * scale
    two = np.float32(2.0)
    d_x, d_y, d_z = v[2, 1] - v[1, 2], v[0, 2] - v[2, 0], v[1, 0] - v[0, 1]
    s_yz, s_zx, s_xy = v[1, 2] + v[2, 1], v[0, 2] + v[2, 0], v[0, 1] + v[1, 0]
    v_w = two * (x * d_x + y * d_y + z * d_z)
    v_x = two * (w * d_x - two * x * (v[1, 1] + v[2, 2]) + y * s_xy + z * s_zx)
    v_y = two * (w * d_y + x * s_xy - two * y * (v[0, 0] + v[2, 2]) + z * s_yz)
    v_z = two * (w * d_z + x * s_zx + y * s_yz - two * z * (v[0, 0] + v[1, 1]))
    along = v_w * w + v_x * x + v_y * y + v_z * z
    v_quats[g, 0] = (v_w - along * w) * scale
    v_quats[g, 1] = (v_x - along * x) * scale
    v_quats[g, 2] = (v_y - along * y) * scale
    v_quats[g, 3] = (v_z - along * z) * scale


@compiled
def _to_camera(viewmats, c, means, g):
    m0, m1, m2 = means[g, 0], means[g, 1], means[g, 2]
    x = viewmats[c, 0, 0] * m0 + viewmats[c, 0, 1] * m1 + viewmats[c, 0, 2] * m2 + viewmats[c, 0, 3]
    y = viewmats[c, 1, 0] * m0 + viewmats[c, 1, 1] * m1 + viewmats[c, 1, 2] * m2 + viewmats[c, 1, 3]
    z = viewmats[c, 2, 0] * m0 + viewmats[c, 2, 1] * m1 + viewmats[c, 2, 2] * m2 + viewmats[c, 2, 3]
    return x, y, z


@compiled
def _axes_in_camera(viewmats, c, rotation, scales, g, axes):
    for i in range(3):
        for k in range(3):
            total = viewmats[c, i, 0] * rotation[0, k]
            total += viewmats[c, i, 1] * rotation[1, k]
            total += viewmats[c, i, 2] * rotation[2, k]
            axes[i, k] = total * scales[g, k]


@compiled
def _jacobian(x, y, z, Ks, c, width, height):
    """The four entries of J, and whether the point itself (True) or the edge of the widened view was used in x, y."""
    fx, fy, cx, cy = Ks[c, 0, 0], Ks[c, 1, 1], Ks[c, 0, 2], Ks[c, 1, 2]
    margin_x = np.float32(FOV_MARGIN * 0.5) * np.float32(width) / fx
    margin_y = np.float32(FOV_MARGIN * 0.5) * np.float32(height) / fy
    low_x, high_x = -(cx / fx + margin_x), (np.float32(width) - cx) / fx + margin_x
    low_y, high_y = -(cy / fy + margin_y), (np.float32(height) - cy) / fy + margin_y
    slope_x, slope_y = x / z, y / z
    is_free_x = slope_x >= low_x and slope_x <= high_x
    is_free_y = slope_y >= low_y and slope_y <= high_y
    slope_x = min(max(slope_x, low_x), high_x)
    slope_y = min(max(slope_y, low_y), high_y)
    return fx / z, -fx * slope_x / z, fy / z, -fy * slope_y / z, is_free_x, is_free_y


@compiled
def _covariance(j00, j02, j11, j12, axes, plane):
    """Fills P = J A and returns the entries xx, xy, yy of its products."""
    for k in range(3):
        plane[0, k] = j00 * axes[0, k] + j02 * axes[2, k]
        plane[1, k] = j11 * axes[1, k] + j12 * axes[2, k]
    xx = plane[0, 0] * plane[0, 0] + plane[0, 1] * plane[0, 1] + plane[0, 2] * plane[0, 2]
    xy = plane[0, 0] * plane[1, 0] + plane[0, 1] * plane[1, 1] + plane[0, 2] * plane[1, 2]
    yy = plane[1, 0] * plane[1, 0] + plane[1, 1] * plane[1, 1] + plane[1, 2] * plane[1, 2]
    return xx, xy, yy


@compiled
def _covariance_gradient(sharp_xx, xy, sharp_yy, eps2d, v_a, v_b, v_c, compensation, v_compensation):
    """Gradient by the entries of the sharp covariance from those by the conic (a, b, c) and the compensation.

    The inverse W of a matrix has the gradient -W G W, where the off-diagonal entry b stands in G half in each place.
    """
    xx, yy = sharp_xx + eps2d, sharp_yy + eps2d
    determinant = xx * yy - xy * xy
    a, b, c = yy / determinant, -xy / determinant, xx / determinant
    half = np.float32(0.5) * v_b
    row0_0, row0_1 = v_a * a + half * b, v_a * b + half * c
    row1_0, row1_1 = half * a + v_c * b, half * b + v_c * c
    v_xx = -(a * row0_0 + b * row1_0)
    v_xy = -(a * row0_1 + b * row1_1) - (b * row0_0 + c * row1_0)
    v_yy = -(b * row0_1 + c * row1_1)
    if compensation > 0.0:
        # compensation^2 = sharp determinant / blurred determinant.
        v_ratio = np.float32(0.5) * v_compensation / compensation
        v_sharp = v_ratio / determinant
        v_blurred = -v_ratio * compensation * compensation / determinant
        v_xx += v_sharp * sharp_yy + v_blurred * yy
        v_yy += v_sharp * sharp_xx + v_blurred * xx
        v_xy -= np.float32(2.0) * xy * (v_sharp + v_blurred)
    return v_xx, v_xy, v_yy
