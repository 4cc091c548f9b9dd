"""Spherical harmonics on the CPU, forward and backward; `reference.py` is the definition.

One task handles `CHUNK` Gaussians in all cameras. Coefficients are [V, N, K, 3], V = 1 (shared by the cameras) or C.
"""

import math

import numpy as np

from fit3d_ns.rasterization.cpu.runtime import CHUNK, compiled
from fit3d_ns.rasterization.reference import COLOR_OFFSET


@compiled
def evaluate(task, sh_degree, means, centres, coefficients, radii, colors):
    """Fills `colors` [C, N, 3] of one chunk where drawn; `centres` [C, 3] are the cameras' positions."""
    num_bases = (sh_degree + 1) ** 2
    basis, slopes = np.empty(25, np.float32), np.empty((25, 3), np.float32)
    for g in range(task * CHUNK, min((task + 1) * CHUNK, means.shape[0])):
        for c in range(centres.shape[0]):
            if radii[c, g] <= 0:
                continue
            x, y, z, _ = _direction(means, g, centres, c)
            _fill_basis(sh_degree, x, y, z, basis, slopes, False)
            source = c if coefficients.shape[0] > 1 else 0
            red, green, blue = np.float32(COLOR_OFFSET), np.float32(COLOR_OFFSET), np.float32(COLOR_OFFSET)
            for k in range(num_bases):
                red += basis[k] * coefficients[source, g, k, 0]
                green += basis[k] * coefficients[source, g, k, 1]
                blue += basis[k] * coefficients[source, g, k, 2]
            colors[c, g, 0] = max(red, np.float32(0.0))
            colors[c, g, 1] = max(green, np.float32(0.0))
            colors[c, g, 2] = max(blue, np.float32(0.0))


@compiled
def evaluate_backward(
    task, sh_degree, means, centres, coefficients, radii, colors, v_colors, v_means, v_coefficients, v_centres
):
    """Gradients of one chunk; `v_centres` [tasks, C, 3] (float64, zero) holds one partial sum per task."""
    num_bases = (sh_degree + 1) ** 2
    zero = np.float32(0.0)
    basis, slopes = np.empty(25, np.float32), np.empty((25, 3), np.float32)
    for g in range(task * CHUNK, min((task + 1) * CHUNK, means.shape[0])):
        v_means[g] = zero
        v_coefficients[:, g] = zero
        for c in range(centres.shape[0]):
            if radii[c, g] <= 0:
                continue
            x, y, z, scale = _direction(means, g, centres, c)
            _fill_basis(sh_degree, x, y, z, basis, slopes, True)
            source = c if coefficients.shape[0] > 1 else 0
            # A colour that was clamped at zero has no gradient.
            v_red = v_colors[c, g, 0] if colors[c, g, 0] > zero else zero
            v_green = v_colors[c, g, 1] if colors[c, g, 1] > zero else zero
            v_blue = v_colors[c, g, 2] if colors[c, g, 2] > zero else zero
            v_x, v_y, v_z = zero, zero, zero
            for k in range(num_bases):
                v_coefficients[source, g, k, 0] += basis[k] * v_red
                v_coefficients[source, g, k, 1] += basis[k] * v_green
                v_coefficients[source, g, k, 2] += basis[k] * v_blue
                v_basis = v_red * coefficients[source, g, k, 0]
                v_basis += v_green * coefficients[source, g, k, 1]
                v_basis += v_blue * coefficients[source, g, k, 2]
                v_x += v_basis * slopes[k, 0]
                v_y += v_basis * slopes[k, 1]
                v_z += v_basis * slopes[k, 2]
            # Through the normalisation: only what is across the direction remains.
            along = v_x * x + v_y * y + v_z * z
            v_x, v_y, v_z = (v_x - along * x) * scale, (v_y - along * y) * scale, (v_z - along * z) * scale
            v_means[g, 0] += v_x
            v_means[g, 1] += v_y
            v_means[g, 2] += v_z
            v_centres[task, c, 0] -= v_x
            v_centres[task, c, 1] -= v_y
            v_centres[task, c, 2] -= v_z


@compiled
def _direction(means, g, centres, c):
    """Unit direction from the camera to the Gaussian, and one over the distance (kept finite as PyTorch does)."""
    x, y, z = means[g, 0] - centres[c, 0], means[g, 1] - centres[c, 1], means[g, 2] - centres[c, 2]
    scale = np.float32(1.0) / max(math.sqrt(x * x + y * y + z * z), np.float32(1e-12))
    return x * scale, y * scale, z * scale, scale


@compiled
def _fill_basis(degree, x, y, z, basis, slopes, with_slopes):
    """Values of the basis at a unit direction, and their derivatives by x, y, z."""
    basis[0] = 0.28209479177387814
    if degree >= 1:
        a = np.float32(0.48860251190291992)
        basis[1], basis[2], basis[3] = -a * y, a * z, -a * x
    xx, yy, zz = x * x, y * y, z * z
    if degree >= 2:
        a, b, c = np.float32(1.0925484305920792), np.float32(0.94617469575756008), np.float32(0.54627421529603959)
        basis[4], basis[5] = a * x * y, -a * y * z
        basis[6] = b * zz - np.float32(0.31539156525252005)
        basis[7], basis[8] = -a * x * z, c * (xx - yy)
    one, three, five, seven = np.float32(1.0), np.float32(3.0), np.float32(5.0), np.float32(7.0)
    if degree >= 3:
        a, b = np.float32(0.59004358992664352), np.float32(2.8906114426405538)
        c, d = np.float32(0.45704579946446577), np.float32(0.37317633259011540)
        basis[9], basis[10] = -a * y * (three * xx - yy), b * x * y * z
        basis[11], basis[12] = -c * y * (five * zz - one), d * z * (five * zz - three)
        basis[13], basis[14] = -c * x * (five * zz - one), np.float32(0.5) * b * z * (xx - yy)
        basis[15] = -a * x * (xx - three * yy)
    if degree >= 4:
        a, b = np.float32(2.5033429417967046), np.float32(1.7701307697799304)
        c, d = np.float32(0.94617469575756008), np.float32(0.66904654355728921)
        e, f = np.float32(0.10578554691520430), np.float32(0.62583573544917614)
        basis[16], basis[17] = a * x * y * (xx - yy), -b * y * z * (three * xx - yy)
        basis[18], basis[19] = c * x * y * (seven * zz - one), -d * y * z * (seven * zz - three)
        basis[20] = e * ((np.float32(35.0) * zz - np.float32(30.0)) * zz + three)
        basis[21], basis[22] = -d * x * z * (seven * zz - three), np.float32(0.5) * c * (xx - yy) * (seven * zz - one)
        basis[23] = -b * x * z * (xx - three * yy)
        basis[24] = f * (xx * (xx - three * yy) - yy * (three * xx - yy))
    if with_slopes:
        _fill_slopes(degree, x, y, z, slopes)


@compiled
def _fill_slopes(degree, x, y, z, slopes):
    """Derivatives of the polynomials in `_fill_basis`."""
    zero, one, three = np.float32(0.0), np.float32(1.0), np.float32(3.0)
    _set_row(slopes, 0, zero, zero, zero)
    if degree >= 1:
        a = np.float32(0.48860251190291992)
        _set_row(slopes, 1, zero, -a, zero)
        _set_row(slopes, 2, zero, zero, a)
        _set_row(slopes, 3, -a, zero, zero)
    xx, yy, zz = x * x, y * y, z * z
    if degree >= 2:
        a, b, c = np.float32(1.0925484305920792), np.float32(1.8923493915151202), np.float32(1.0925484305920792)
        _set_row(slopes, 4, a * y, a * x, zero)
        _set_row(slopes, 5, zero, -a * z, -a * y)
        _set_row(slopes, 6, zero, zero, b * z)
        _set_row(slopes, 7, -a * z, zero, -a * x)
        _set_row(slopes, 8, c * x, -c * y, zero)
    five, six, ten = np.float32(5.0), np.float32(6.0), np.float32(10.0)
    if degree >= 3:
        a, b = np.float32(0.59004358992664352), np.float32(2.8906114426405538)
        c, d = np.float32(0.45704579946446577), np.float32(0.37317633259011540)
        _set_row(slopes, 9, -a * six * x * y, -a * three * (xx - yy), zero)
        _set_row(slopes, 10, b * y * z, b * x * z, b * x * y)
        _set_row(slopes, 11, zero, -c * (five * zz - one), -c * ten * y * z)
        _set_row(slopes, 12, zero, zero, d * (np.float32(15.0) * zz - three))
        _set_row(slopes, 13, -c * (five * zz - one), zero, -c * ten * x * z)
        _set_row(slopes, 14, b * x * z, -b * y * z, np.float32(0.5) * b * (xx - yy))
        _set_row(slopes, 15, -a * three * (xx - yy), a * six * x * y, zero)
    if degree >= 4:
        seven, fourteen = np.float32(7.0), np.float32(14.0)
        a, b = np.float32(2.5033429417967046), np.float32(1.7701307697799304)
        c, d = np.float32(0.94617469575756008), np.float32(0.66904654355728921)
        e, f = np.float32(0.10578554691520430), np.float32(2.5033429417967046)
        cap, tilt = seven * zz - one, seven * zz - three
        steep = np.float32(21.0) * zz - three
        _set_row(slopes, 16, a * y * (three * xx - yy), a * x * (xx - three * yy), zero)
        _set_row(slopes, 17, -b * six * x * y * z, -b * three * z * (xx - yy), -b * y * (three * xx - yy))
        _set_row(slopes, 18, c * y * cap, c * x * cap, c * fourteen * x * y * z)
        _set_row(slopes, 19, zero, -d * z * tilt, -d * y * steep)
        _set_row(slopes, 20, zero, zero, e * z * (np.float32(140.0) * zz - np.float32(60.0)))
        _set_row(slopes, 21, -d * z * tilt, zero, -d * x * steep)
        _set_row(slopes, 22, c * x * cap, -c * y * cap, c * seven * z * (xx - yy))
        _set_row(slopes, 23, -b * three * z * (xx - yy), b * six * x * y * z, -b * x * (xx - three * yy))
        _set_row(slopes, 24, f * x * (xx - three * yy), f * y * (yy - three * xx), zero)


@compiled
def _set_row(slopes, row, x, y, z):
    slopes[row, 0], slopes[row, 1], slopes[row, 2] = x, y, z
