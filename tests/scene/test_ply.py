"""PLY files written by hand with `struct`, as other tools lay them out, and what is refused."""

import struct

import numpy as np
import pytest
import torch

from fit3d_ns.scene.ply import read_ply, write_ply
from fit3d_ns.scene.splat_files import read_splats

NAMES = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"]
NAMES += ["rot_0", "rot_1", "rot_2", "rot_3"]


def write_by_hand(path, rows, layout="binary_little_endian", types=None, before=""):
    """`rows` are dictionaries of property name to value."""
    names = list(rows[0])
    types = types or {}
    lines = ["ply", f"format {layout} 1.0", "comment made by a test"]
    lines += [before] if before else []
    lines += [f"element vertex {len(rows)}"] + [f"property {types.get(name, 'float')} {name}" for name in names]
    order = "<" if layout == "binary_little_endian" else ">"
    codes = {"float": "f", "double": "d", "uchar": "B"}
    body = b"".join(struct.pack(order + codes[types.get(name, "float")], row[name]) for row in rows for name in names)
    path.write_bytes("\n".join([*lines, "end_header", ""]).encode() + (b"\x07" * 8 if before else b"") + body)


def make_row(index, **extra):
    return {**{name: 0.25 * place + index for place, name in enumerate(NAMES)}, **extra}


@pytest.mark.parametrize("layout", ["binary_little_endian", "binary_big_endian"])
def test_read_ply__any_order_types_and_elements(tmp_path, layout):
    rows = []
    for index in range(3):
        row = make_row(index, sem_1=7.0 + index, red=200, sem_0=3.0)
        rows.append(dict(sorted(row.items(), key=lambda item: hash_name(item[0]))))
    types = {"red": "uchar", "scale_1": "double"}
    before = "element camera 2\nproperty float focal" if layout == "binary_little_endian" else ""
    write_by_hand(tmp_path / "scene.ply", rows, layout, types, before)
    gaussians = read_ply(tmp_path / "scene.ply")[0]
    torch.testing.assert_close(gaussians.means[2], torch.tensor([2.0, 2.25, 2.5]))
    torch.testing.assert_close(gaussians.sh_dc[1].float(), torch.tensor([1.75, 2.0, 2.25]))
    torch.testing.assert_close(gaussians.opacity_logits.float(), torch.tensor([1.5, 2.5, 3.5]))
    torch.testing.assert_close(gaussians.log_scales[0].float(), torch.tensor([1.75, 2.0, 2.25]))
    expected = torch.tensor([2.5, 2.75, 3.0, 3.25])
    torch.testing.assert_close(gaussians.quats[0].float(), expected / expected.norm(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gaussians.features.float(), torch.tensor([[3.0, 7.0], [3.0, 8.0], [3.0, 9.0]]))
    assert gaussians.sh_degree == 0


def hash_name(name):
    """An order that is neither alphabetic nor that of any tool."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(name)) % 17, name


def test_read_ply__harmonics_are_stored_channel_by_channel(tmp_path):
    rows = [make_row(0, **{f"f_rest_{i}": float(i) for i in range(9)})]
    write_by_hand(tmp_path / "scene.ply", rows)
    rest = read_ply(tmp_path / "scene.ply")[0].sh_rest
    # Red has coefficients 0 1 2, green 3 4 5, blue 6 7 8.
    assert rest[0].tolist() == [[0.0, 3.0, 6.0], [1.0, 4.0, 7.0], [2.0, 5.0, 8.0]]


def test_read_ply__drops_and_counts_what_is_not_finite(tmp_path):
    rows = [make_row(0), make_row(1, x=float("nan")), make_row(2, scale_2=float("inf")), make_row(3)]
    write_by_hand(tmp_path / "scene.ply", rows)
    gaussians, num_dropped = read_ply(tmp_path / "scene.ply")
    assert num_dropped == 2
    assert gaussians.means[:, 0].tolist() == [0.0, 3.0]
    write_by_hand(tmp_path / "none.ply", [make_row(0, x=float("nan"))])
    with pytest.raises(ValueError, match="no usable Gaussian .1 in the file"):
        read_ply(tmp_path / "none.ply")


@pytest.mark.parametrize("sh_degree", [0, 1, 3])
def test_write_ply__is_read_back_and_laid_out_as_inria_does(make_scene, tmp_path, sh_degree):
    gaussians = make_scene(sh_degree=sh_degree).gaussians
    path = tmp_path / "out" / "scene.ply"
    write_ply(gaussians, path)
    header, body = path.read_bytes().split(b"end_header\n")
    names = [line.split()[2].decode() for line in header.splitlines() if line.startswith(b"property float")]
    assert names[:9] == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    num_rest = 3 * ((sh_degree + 1) ** 2 - 1)
    assert [name for name in names if name.startswith("f_rest")] == [f"f_rest_{i}" for i in range(num_rest)]
    assert names[9 + num_rest : 17 + num_rest] == [
        *("opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
    ]
    table = np.frombuffer(body, dtype="<f4").reshape(30, len(names))
    np.testing.assert_allclose(table[:, names.index("y")], gaussians.means[:, 1])
    np.testing.assert_allclose(table[:, names.index("sem_4")], gaussians.features[:, 4].float())
    read, num_dropped = read_ply(path)
    assert num_dropped == 0
    for name in ("means", "log_scales", "opacity_logits", "sh_dc", "features", "sh_rest"):
        expected, actual = getattr(gaussians, name), getattr(read, name)
        assert (actual is None and expected is None) or torch.equal(actual, expected), name
    # Normalising a quaternion of half precision again may round its last bit.
    torch.testing.assert_close(read.quats, gaussians.quats, rtol=2e-3, atol=1e-3)


def test_write_ply__fills_up_or_cuts_the_degree(make_scene, tmp_path):
    gaussians = make_scene(sh_degree=1).gaussians
    write_ply(gaussians, tmp_path / "scene.ply", sh_degree=2)
    rest = read_ply(tmp_path / "scene.ply")[0].sh_rest
    assert torch.equal(rest[:, :3], gaussians.sh_rest) and not rest[:, 3:].any()
    write_ply(gaussians, tmp_path / "scene.ply", sh_degree=0)
    assert read_ply(tmp_path / "scene.ply")[0].sh_rest is None


def test_errors__say_what_the_file_is(tmp_path, make_scene):
    path = tmp_path / "scene.ply"
    with pytest.raises(ValueError, match="scene.ply is missing"):
        read_ply(path)
    path.write_text("solid cube\n")
    with pytest.raises(ValueError, match="is not a PLY file"):
        read_ply(path)
    path.write_text("ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n")
    with pytest.raises(ValueError, match="holds no Gaussians"):
        read_ply(path)
    write_by_hand(path, [{"x": 0.0, "y": 0.0, "z": 0.0}])
    with pytest.raises(ValueError, match="has no `opacity`"):
        read_ply(path)
    write_by_hand(path, [{"packed_position": 0.0}])
    with pytest.raises(ValueError, match="compressed PLY without packed_rotation, packed_scale"):
        read_ply(path)
    row = make_row(0)
    del row["scale_2"], row["rot_1"]
    write_by_hand(path, [row])
    with pytest.raises(ValueError, match="lacks scale_2, rot_1"):
        read_ply(path)
    write_by_hand(path, [make_row(0, **{f"f_rest_{i}": 0.0 for i in range(10)})])
    with pytest.raises(ValueError, match="has 10 f_rest properties"):
        read_ply(path)
    write_by_hand(path, [make_row(0), make_row(1)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a PLY file, damaged or cut short .element .vertex.: row 1"):
        read_ply(path)


def write_many(path, num=20, **columns):
    write_by_hand(path, [make_row(i, **{name: values[i] for name, values in columns.items()}) for i in range(num)])
    return path


def test_read_ply__opacities_that_are_activated_are_recognised(tmp_path, capsys):
    opacities = np.linspace(0.0, 1.0, 20)
    gaussians, num_dropped = read_ply(write_many(tmp_path / "a.ply", opacity=opacities))
    assert "are taken as opacities" in capsys.readouterr().err
    # Of opacity 0 nothing is left to draw; that of 1 stays.
    assert num_dropped == 1
    np.testing.assert_allclose(gaussians.opacity_logits.float().sigmoid(), opacities[1:], atol=1e-3)
    gaussians, _ = read_ply(write_many(tmp_path / "a.ply", opacity=np.linspace(-0.1, 1.0, 20)))
    assert gaussians.opacity_logits[0].item() == pytest.approx(-0.1, abs=1e-3)


def test_read_ply__infinite_logits_are_opaque(tmp_path):
    logits = np.array([np.inf, -np.inf, np.nan, 1e9] + [-1.0] * 16)
    gaussians, num_dropped = read_ply(write_many(tmp_path / "a.ply", opacity=logits))
    assert num_dropped == 2
    assert gaussians.opacity_logits[:3].float().sigmoid().tolist() == pytest.approx([1.0, 1.0, 0.2689], abs=1e-4)


def test_read_ply__the_filter_of_mip_splatting_is_applied(tmp_path):
    widths = np.linspace(0.0, 0.5, 20)
    path = write_many(tmp_path / "a.ply", filter_3D=widths, scale_0=np.full(20, -1.0), opacity=np.full(20, -0.5))
    gaussians, _ = read_ply(path)
    bare, _ = read_ply(write_many(tmp_path / "b.ply", scale_0=np.full(20, -1.0), opacity=np.full(20, -0.5)))
    for index, width in enumerate(widths):
        before = np.diag(np.exp(2.0 * bare.log_scales[index].double().numpy()))
        after = before + width**2 * np.eye(3)
        share = np.sqrt(np.linalg.det(before) / np.linalg.det(after))
        opacity = gaussians.opacity_logits[index].double().sigmoid()
        assert opacity.item() == pytest.approx(share / (1 + np.exp(0.5)), abs=1e-3)
        np.testing.assert_allclose(gaussians.log_scales[index].double(), 0.5 * np.log(np.diag(after)), atol=2e-3)


def pack(values, bits):
    word = 0
    for value, size in zip(values, bits, strict=True):
        word = (word << size) | round(min(max(value, 0.0), 1.0) * (2**size - 1))
    return word


def write_compressed(path, splats, with_colour_bounds=True):
    """Splat by splat, as SuperSplat's description of the format says; `splats` maps names to columns."""
    num = len(splats["means"])
    chunks, vertices, harmonics = [], [], []
    for start in range(0, num, 256):
        rows = slice(start, min(start + 256, num))
        bounds = []
        for name in ("means", "log_scales", "colours"):
            bounds.append((splats[name][rows].min(axis=0), splats[name][rows].max(axis=0)))
        kept = bounds if with_colour_bounds else bounds[:2]
        chunks.append(b"".join(struct.pack("<6f", *low, *high) for low, high in kept))
        for index in range(rows.start, rows.stop):
            (low, high), (low_scale, high_scale), (low_colour, high_colour) = bounds
            quat = splats["quats"][index]
            which = int(np.abs(quat).argmax())
            # q and -q are one rotation: the number that is left out is positive.
            others = np.delete(quat * np.sign(quat[which]), which) / np.sqrt(2) + 0.5
            colour = splats["colours"][index]
            if with_colour_bounds:
                colour = (colour - low_colour) / (high_colour - low_colour)
            position = pack((splats["means"][index] - low) / (high - low), (11, 10, 11))
            scale = pack((splats["log_scales"][index] - low_scale) / (high_scale - low_scale), (11, 10, 11))
            rotation = (which << 30) | pack(others, (10, 10, 10))
            rgba = pack([*colour, splats["opacities"][index]], (8, 8, 8, 8))
            vertices.append(struct.pack("<4I", position, rotation, scale, rgba))
            harmonics.append(bytes(int((value / 8 + 0.5) * 256) for value in splats["harmonics"][index]))
    axes = [("x", "y", "z"), ("scale_x", "scale_y", "scale_z"), ("r", "g", "b")][: 3 if with_colour_bounds else 2]
    lines = ["ply", "format binary_little_endian 1.0", f"element chunk {len(chunks)}"]
    lines += [f"property float {end}_{axis}" for group in axes for end in ("min", "max") for axis in group]
    lines += [f"element vertex {num}"] + [
        f"property uint packed_{n}" for n in ("position", "rotation", "scale", "color")
    ]
    lines += [f"element sh {num}"] + [f"property uchar f_rest_{i}" for i in range(9)] + ["end_header", ""]
    path.write_bytes("\n".join(lines).encode() + b"".join([*chunks, *vertices, *harmonics]))


@pytest.mark.parametrize("with_colour_bounds", [True, False])
def test_read_ply__compressed(tmp_path, with_colour_bounds):
    rng = np.random.default_rng(3)
    quats = rng.normal(size=(300, 4))
    splats = {
        "means": rng.normal(size=(300, 3)),
        "log_scales": rng.uniform(-6, -1, (300, 3)),
        "quats": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "colours": rng.uniform(0, 1, (300, 3)),
        "opacities": rng.uniform(0.05, 0.95, 300),
        "harmonics": rng.uniform(-0.5, 0.5, (300, 9)),
    }
    write_compressed(tmp_path / "a.ply", splats, with_colour_bounds)
    gaussians, num_dropped = read_splats(tmp_path / "a.ply")
    assert (gaussians.num_gaussians, num_dropped, gaussians.sh_degree) == (300, 0, 1)
    np.testing.assert_allclose(gaussians.means, splats["means"], atol=5e-3)
    np.testing.assert_allclose(gaussians.log_scales.float(), splats["log_scales"], atol=7e-3)
    np.testing.assert_allclose(gaussians.opacity_logits.float().sigmoid(), splats["opacities"], atol=3e-3)
    np.testing.assert_allclose(0.5 + 0.28209479 * gaussians.sh_dc.float(), splats["colours"], atol=3e-3)
    alignment = (gaussians.quats.double().numpy() * splats["quats"]).sum(axis=1)
    # Stored in half precision.
    assert np.abs(alignment).min() > 1 - 1e-3
    # All of red first.
    rest = splats["harmonics"].reshape(300, 3, 3).transpose(0, 2, 1)
    np.testing.assert_allclose(gaussians.sh_rest.float(), rest, atol=0.017)
