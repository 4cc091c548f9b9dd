"""SPZ files that other people's code wrote of the same nine Gaussians, and what is refused."""

import base64
import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fit3d_ns.data.ply import read_spz

BY_SPZ_JS = (
    "H4sIAAAAAAAAAw3Oz0uUQRgA4JeFhMDKeyADXb5LMXSSugwq9vWTSS8rWQ4e5Du4MCbsrtlhEMo1KKYQWSFqKIJvwcNAHRZCmEOHPSiMF3Gl"
    "ZV9EUAg82EkJ3nz+gufRnTFZAICLAFDoBSj0wVQf3Dwg9ZvSY/pzQhs9cPWM9m/AZpsuHdDLLn2/DI+P6Nc/qhzSUJfW9qhwBYY71N2n6b+0"
    "3Q+jbZplcKtNG9fh+MLWtc5p/7f119ONhc8fSh/LX5a+vl8xjbfzy2OldzNv5p+VSp9eLA0/eTBxfzIbWSyPP79bWZs0D19NjFYHbaNz70fl"
    "6VyP/bk+uzo4Ne5uL1Z2lldPVsrWWud0zHQMnkePIgrHQ7A6yau+hS2mvDBMsCAUeiacTXfrNeuLmRDojZRMK68EY3m1Fo9SJ5lX2gYXZRDo"
    "BHqZ1liqs6q0kRvutRXcKPQ+JjWLxZQzdEFaZjAqlIihHoutOlMDaIxTPAgjeUSMQSU6HUg8awrOndQ2esmZlDrPi5loJnkzSGWlOr8GbpTF"
    "/64qIDiTAQAA"
)
"""Version 2, by npm's spz-js 1.2.5."""
BY_GSPLY = (
    "H4sIAIY+CGsA/wGcAWP+TkdTUAMAAAAJAAAAAgwAAAIQAGIQADLk/2Dc/0ju/+vy/70GABv6/+IuAMzZ/w3k/3zf/7MOAFHo/8T8/3fn/0Pf"
    "/5na/wIPAETd/9/i/2bz/9EeAFLZ/3EgADrZ/70tAO4FzSPd+R6lrIZmqXufkm2cdqKHo5GUgKmNeYlTbY5sinlebW2eeodEW0xcS19oRoJ2"
    "WXJJd5lfgE2FXFJ4QqOl84UvohTzMRIxjP5I1cVeA0Llu2hb6jIyUPh+0LDeI80oB46Tj5+fctFlc9C/qi7WrOY4yzuYM8e/jm0oqHaty+HJ"
    "HGOvPYQlQx28R2DYqiA7mZBK2ZeHkq9Za0VA27F+SE4lc1moZz4fJ6V3h9HkRqFQHrVbaJLEmsxSvUDdpkbcr05FhB9EcWZ5UpLLMoQ1rGuN"
    "Pzd+Ytq2s9Mri5HfVUsuHdijulOSJ33izV/fSdzavZvNVseYHGE443x/nWU2wkCCSC7K4d7TuF4qbUk1Ja4ctzgqLKNMcIzKrlE1JVdPd6ao"
    "VGc/uyWoublPZpJRZkJ4I70phFiQ3vGrNEWcAQAA"
)
"""Version 3, by PyPI's gsply 0.4.6."""
BY_SPLAT_TRANSFORM = (
    "TkdTUAQAAAAJAAAAAgwABiAAAAAAAAAAAAAAAAAAAABaAAAAAAAAAFEAAAAAAAAAEgAAAAAAAAAJAAAAAAAAACQAAAAAAAAAGwAAAAAAAAAkAAAAAAAA"
    "ABsAAAAAAAAALQAAAAAAAAAkAAAAAAAAAKAAAAAAAAAA2AAAAAAAAAAotS/9IFGJAgACEACe7//OGwBg3P+4EQAVDQC9BgDlBQAe0f/M2f/zGwCEIACz"
    "DgCvFwA8AwB35/+9IABnJQACDwC8IgAhHQBm8/8v4f+uJgBxIADGJgBD0v8otS/9IAlJAADuBc0j3fkepawotS/9IBvZAACGZql7n5JtnHaih6ORlICp"
    "jXmJU22ObIp5Xm0otS/9IBvZAABtnnqHRFtMXEtfaEaCdllySXeZX4BNhVxSeEIotS/9ICQhAQCjp/OlL6Ac8zEQMaz+St3FXgFK5btqU+oyMFj4ftK4"
    "3iPNICcotS/9INi9BACCzSQbsCU5wGdoUo2Lh24IPlRzaFy8qofaGJpURicCr5dek3Wmy1UIAUED8Bho9s7sirbuXoaLQtFi23/ILavpLvOHCyADgUj/"
    "86x/jlodDQkIg0RBzL/ppciUTmgE0f4szF833ebbumtjW4aIwZipvcUxS55uMhgJEii4NUZbPTXZtlP4wQajUO12bK9nJytC4nqHiAEA"
)
"""Version 4, by the format's own library in npm's @playcanvas/splat-transform 2.7.1, which turns y and z."""


def make_gaussians() -> dict[str, np.ndarray]:
    """What both were given, through a PLY."""
    random = np.random.RandomState(0)
    quats = random.randn(9, 4)
    return {
        "rot": quats / np.linalg.norm(quats, axis=1, keepdims=True),
        "xyz": random.uniform(-3, 3, (9, 3)),
        "scale": random.uniform(-6, 0, (9, 3)),
        "opacity": random.uniform(-4, 4, 9),
        "f_dc": random.uniform(-1.2, 1.2, (9, 3)),
        "rest": random.uniform(-0.8, 0.8, (9, 8, 3)),
    }


def write(path: Path, text: str) -> Path:
    path.write_bytes(base64.b64decode(text))
    return path


@pytest.mark.parametrize(("text", "step"), [(BY_SPZ_JS, 1 / 127), (BY_GSPLY, 1 / 511), (BY_SPLAT_TRANSFORM, 1 / 511)])
def test_read_spz__is_what_was_written(tmp_path: Path, text: str, step: float) -> None:
    vertices, expected = read_spz(write(tmp_path / "a.spz", text)), make_gaussians()
    if text == BY_SPLAT_TRANSFORM:
        # A half turn about x. Harmonics -m..m of degree l are polynomials in x, y, z: y z x, then xy yz 3zz-1 xz xx-yy.
        expected["xyz"] *= [1, -1, -1]
        expected["rot"] *= [1, 1, -1, -1]
        expected["rest"] *= np.array([-1, -1, 1, -1, 1, 1, -1, 1])[:, None]

    def take(*names: str) -> np.ndarray:
        return np.stack([vertices[name] for name in names], axis=1)

    np.testing.assert_allclose(take("x", "y", "z"), expected["xyz"], atol=2**-12)
    np.testing.assert_allclose(take(*(f"scale_{i}" for i in range(3))), expected["scale"], atol=1 / 16)
    opacities = 1 / (1 + np.exp(-expected["opacity"]))
    np.testing.assert_allclose(1 / (1 + np.exp(-vertices["opacity"])), opacities, atol=1 / 255)
    np.testing.assert_allclose(take(*(f"f_dc_{i}" for i in range(3))), expected["f_dc"], atol=1 / 0.15 / 255)
    quats = take(*(f"rot_{i}" for i in range(4)))
    # A quaternion and its negative are the same rotation; w is what the other numbers leave over in version 2.
    np.testing.assert_allclose(np.linalg.norm(quats, axis=1), 1.0, atol=1e-5)
    assert np.abs((quats * expected["rot"]).sum(axis=1)).min() > 1 - 4 * step
    # Stored in steps of a 16th (degree 1 of an 8th), from -1 to 1; in a PLY all of red comes first.
    rest = take(*(f"f_rest_{i}" for i in range(24))).reshape(9, 3, 8).transpose(0, 2, 1)
    np.testing.assert_allclose(rest, expected["rest"], atol=1 / 16 + 1 / 128)


def damage(text: str, place: int) -> bytes:
    content = bytearray(base64.b64decode(text))
    content[place] ^= 0x55
    return bytes(content)


def compress(version: int = 3, num: int = 9, degree: int = 2, places: int = 12, body: bytes = b"") -> bytes:
    return gzip.compress(struct.pack("<4s2I4B", b"NGSP", version, num, degree, places, 0, 0) + body, mtime=0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (base64.b64decode(BY_GSPLY)[:-20], "is not SPZ of version 2 to 4, or damaged"),
        (base64.b64decode(BY_GSPLY)[:-8] + bytes(8), "damaged .CRC check failed"),
        (b"a text, not NGSP", "SPZ version"),
        (b"NGSP\4\0\0\0" + bytes(8), "is not SPZ of version 2 to 4, or damaged"),
        (base64.b64decode(BY_SPLAT_TRANSFORM)[:-20], "is cut short"),
        (base64.b64decode(BY_SPLAT_TRANSFORM)[:100], "is not SPZ of version 2 to 4, or damaged"),
        # Of a frame's first bytes, of a table's size, of the number of Gaussians.
        (damage(BY_SPLAT_TRANSFORM, 128), "is not SPZ of version 2 to 4, or damaged"),
        (damage(BY_SPLAT_TRANSFORM, 40), "is cut short"),
        (damage(BY_SPLAT_TRANSFORM, 47), "is cut short"),
        (damage(BY_SPLAT_TRANSFORM, 11), "is cut short"),
        (gzip.compress(b"ply", mtime=0), "is not SPZ of version 2 to 4"),
        (gzip.compress(b"PK34" + bytes(12), mtime=0), "SPZ version 0"),
        (compress(version=1, body=bytes(5000)), "SPZ version 1 .*splat-transform a.spz splat.ply"),
        (compress(degree=7, body=bytes(5000)), "with degree 7, which is not read"),
        (compress(places=40, body=bytes(5000)), "which is not read"),
        (compress(num=4_000_000_000, body=bytes(5000)), "a.spz is cut short"),
        (compress(body=bytes(9 * 44 - 1)), "a.spz is cut short"),
        (b"", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_spz__refuses_what_is_none_or_damaged(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.spz").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_spz(tmp_path / "a.spz")
    with pytest.raises(ValueError, match="b.spz is missing"):
        read_spz(tmp_path / "b.spz")


def test_read_spz__says_that_gaussians_were_trained_antialiased(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(gzip.decompress(base64.b64decode(BY_SPZ_JS)))
    content[14] = 1
    (tmp_path / "a.spz").write_bytes(gzip.compress(content))
    assert len(read_spz(tmp_path / "a.spz")) == 9
    assert "--rasterize-mode antialiased" in capsys.readouterr().err
