import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image

from fit3d_ns.data.images import (
    find_opaque,
    load_depth,
    load_image,
    load_mask,
    load_rgba,
    read_image_header,
    save_depth,
    save_image,
    save_index_map,
)
from tests.data.miniature_captures import write_picture


def random_picture(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def test_load_image__returns_rows_columns_and_channels(tmp_path: Path) -> None:
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[1, 2] = [10, 20, 30]
    Image.fromarray(picture).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.shape == (2, 3, 3) and loaded.dtype == torch.uint8
    assert loaded[1, 2].tolist() == [10, 20, 30]
    assert int(loaded.sum()) == 60


def test_save_image__png_is_exact_and_jpeg_is_close(tmp_path: Path) -> None:
    picture = random_picture(5, 7)
    save_image(picture, tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png"), picture)
    grey = torch.full((16, 16, 3), 130, dtype=torch.uint8)
    save_image(grey, tmp_path / "b.JPG")
    assert (load_image(tmp_path / "b.JPG").int() - 130).abs().max() <= 1


@pytest.mark.parametrize(("mode", "value"), [("L", 9), ("RGBA", (9, 9, 9, 255)), ("P", 9)])
def test_load_image__makes_rgb_of_other_formats(tmp_path: Path, mode: str, value: int | tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 2), value)
    if mode == "P":
        image.putpalette([channel for index in range(256) for channel in (index, index, index)])
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").unique().tolist() == [9]


def test_load_image__ignores_the_orientation_mark(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "Rotate by 90 degrees"
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (4, 6, 3)
    header = read_image_header(tmp_path / "a.jpg")
    assert (header.width, header.height) == (6, 4)


def test_load_image__a_truncated_jpeg_passes_the_header_and_fails_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    save_image(random_picture(64, 64), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_image_header(path).width == 64
    with pytest.raises(ValueError, match=r"Image .*cut.jpg is truncated or damaged"):
        load_image(path)


@pytest.mark.parametrize("content", [b"no picture at all", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_load_image__damage_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is truncated or damaged"):
        load_image(tmp_path / "a.png")


def test_load_image__refuses_missing_and_empty_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Image .*none.png is missing"):
        load_image(tmp_path / "none.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="Image .*empty.png is empty"):
        load_image(tmp_path / "empty.png")


def test_load_mask__only_255_counts(tmp_path: Path) -> None:
    save_index_map(torch.tensor([[255, 254, 0, 128]], dtype=torch.uint8), tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").tolist() == [[True, False, False, False]]


def test_load_mask__one_bit_and_empty_masks_are_fine_others_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert load_mask(tmp_path / "bit.png").tolist() == [[True, False]]
    write_picture(tmp_path / "nothing.png", 0, mode="L")
    assert not load_mask(tmp_path / "nothing.png").any()
    write_picture(tmp_path / "ones.png", 1, mode="L")
    with pytest.raises(ValueError, match="values up to 1; write 255"):
        load_mask(tmp_path / "ones.png")


def test_load_depth__millimetres_become_metres(tmp_path: Path) -> None:
    values = np.array([[0, 1, 1000], [2345, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    depth = load_depth(tmp_path / "d.png")
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth, torch.tensor([[0.0, 0.001, 1.0], [2.345, 40.0, 65.535]]))


def test_save_depth__rounds_and_drops_what_does_not_fit(tmp_path: Path) -> None:
    save_depth(torch.tensor([[1.2344, 1.2346, 70.0, 0.0]]), tmp_path / "d.png")
    torch.testing.assert_close(load_depth(tmp_path / "d.png"), torch.tensor([[1.234, 1.235, 0.0, 0.0]]))


def test_load_depth__refuses_eight_bits(tmp_path: Path) -> None:
    write_picture(tmp_path / "d.png", 30, mode="L")
    with pytest.raises(ValueError, match="pixel format L; write 16-bit grey PNGs in millimetres"):
        load_depth(tmp_path / "d.png")


def test_load_image__what_is_transparent_is_black(tmp_path: Path) -> None:
    rgba = np.full((2, 3, 4), 200, np.uint8)
    rgba[..., 3] = [[255, 255, 0], [0, 128, 255]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[..., 1].tolist() == [[200, 200, 0], [0, 100, 200]]
    assert find_opaque(load_rgba(tmp_path / "a.png")).tolist() == [[True, True, False], [False, False, True]]
    # A palette whose colour 1 is transparent.
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([90, 90, 90, 250, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    assert load_image(tmp_path / "p.png").tolist() == [[[90, 90, 90], [0, 0, 0]]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("largest", "shown"), [(4095, 255), (65535, 255), (30000, 117)])
def test_load_image__sixteen_bits_become_eight(tmp_path: Path, channels: int, largest: int, shown: int) -> None:
    values = np.zeros((2, 3, channels), np.uint16)
    values[1] = largest
    for name in ("a.png", "a.tif"):
        assert cv2.imwrite(str(tmp_path / name), values)
        assert load_image(tmp_path / name)[..., 0].tolist() == [[0] * 3, [shown] * 3]


def test_load_image__upright_turns_as_exif_says(tmp_path: Path) -> None:
    picture = random_picture(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored lying on its side: to be turned by 90 degrees clockwise.
    Image.fromarray(picture.numpy()).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "a.png"), picture)
    assert torch.equal(load_image(tmp_path / "a.png", upright=True), picture.rot90(-1))


@pytest.mark.parametrize("colour", [0, 255])
def test_load_mask__alpha_is_the_mask_where_colours_say_nothing(tmp_path: Path, colour: int) -> None:
    rgba = np.full((1, 3, 4), colour, np.uint8)
    rgba[..., 3] = [[255, 0, 254]]
    Image.fromarray(rgba).save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").tolist() == [[True, False, False]]
    rgba[0, :, :3] = [[255] * 3, [0] * 3, [0] * 3]
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").tolist() == [[True, False, False]]


def test_load_image__heic_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python's way to say that a module is not there, whatever this machine has.
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    with pytest.raises(ValueError, match="a.HEIC is in HEIC or AVIF format; install .*pip install pillow-heif"):
        load_image(tmp_path / "a.HEIC")
    # Where the package is there, a file that it cannot read is a damaged one.
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: None))
    with pytest.raises(ValueError, match="a.HEIC is truncated or damaged"):
        load_image(tmp_path / "a.HEIC")


def test_load_image__reads_heic_as_a_phone_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[0:48, 0:64]
    picture = np.stack([columns * 4, rows * 5, 255 - columns * 3], axis=-1).astype(np.uint8)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "IMG_0001.HEIC", quality=95)
    monkeypatch.setattr(Image, "OPEN", {name: way for name, way in Image.OPEN.items() if name != "HEIF"})
    # HEIC turns pictures by itself, whatever EXIF says.
    for upright in (False, True):
        found = load_image(tmp_path / "IMG_0001.HEIC", upright=upright).numpy().astype(np.int16)
        assert np.abs(found - picture).mean() < 3  # Compression loses some.
