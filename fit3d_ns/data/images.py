"""Photographs, masks and depth maps on disk; a file that is missing, empty or damaged is a ValueError that names it.

EXIF orientation has one rule: a photograph with a camera or a label map is read as its pixels are stored, because both
are given for these (nerfstudio and COLMAP do the same); one without is turned upright (`upright`). Transparent pixels
are black. Sixteen bits a channel become eight; where no value needs more than 12 bits, they are taken as 12.
Reading a header (`read_image_header`) is cheap and finds wrong sizes early; other damage shows when loading.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from fit3d_ns.geometry.cameras import MAX_PIXELS
from fit3d_ns.utils.files import refuse_lfs_pointer
from fit3d_ns.utils.progress import notice_once

MILLIMETRES_PER_METRE = 1000.0
IGNORE_INDEX = 255
"""Class index of pixels that never count."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif")
"""Suffixes of photographs, in lower case."""
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
"""Suffixes of videos, in lower case."""
_OPAQUE = 250
"""Alpha from which a pixel counts as opaque; lower ones mix with what is behind."""
_HEIF_BRANDS = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1", b"ftypavif")
_SIZE_SLACK = 1.0
"""Pixels by which a resized photograph may be off its camera's aspect, because sizes are whole numbers."""
_LARGEST_RATIO = 0.95
"""Pictures of more nearly the camera's size than this were cut, not resized."""
_MAX_12_BITS, _MAX_16_BITS = 4095, 65535
_TIFF_BITS = 258
"""Tag of a TIFF that says how many bits each channel has."""
_DAMAGED = (OSError, SyntaxError, EOFError, TypeError, IndexError, KeyError, struct.error, zlib.error, OverflowError)
"""What Pillow's readers raise for files that are not what they seem."""


def read_image_header(path: Path, what: str = "Image") -> Image.Image:
    """Reads size and pixel format without decoding; `what` is what errors call the file, for example "Mask"."""
    with open_image(path, what) as image:
        return image


def list_images(folder: Path) -> list[Path]:
    """Photographs below a folder, by links too, in the order of names; hidden files (`._x.jpg` of macOS) are none."""
    found: list[Path] = []
    for top, folders, names in os.walk(folder, followlinks=True):
        is_loop = any(os.path.samefile(top, folder / above) for above in Path(top).relative_to(folder).parents)
        folders[:] = [name for name in folders if not is_loop and not is_hidden(name)]
        found += [Path(top, name) for name in names if not is_loop]
    return sorted(path for path in found if is_visible(path, IMAGE_SUFFIXES) and path.is_file())


def is_visible(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file has one of the suffixes and is not hidden by a dot at the start of its name."""
    return path.suffix.lower() in suffixes and not is_hidden(path.name)


def is_hidden(name: str) -> bool:
    """Whether people never mean a file or folder of this name."""
    return name.startswith(".") or name == "__MACOSX"


def has_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other one resized, sides rounded to whole pixels; one cut by some pixels is not."""
    small, large = sorted((size, other))
    if any(one > _LARGEST_RATIO * two for one, two in zip(small, large, strict=True)):
        return False
    return abs(large[1] * small[0] / large[0] - small[1]) <= _SIZE_SLACK


def load_image(path: Path, *, upright: bool = False) -> UInt8[Tensor, "height width 3"]:
    """Loads a photograph as 8-bit RGB; grey becomes three equal channels, what is transparent becomes black.

    `upright` turns it as its EXIF orientation says: for pictures that have neither camera nor labels.
    """
    rgba = load_rgba(path, upright=upright)
    return rgba[..., :3] if rgba.shape[-1] == 3 else composite_on_black(rgba)


def load_rgba(path: Path, *, upright: bool = False) -> UInt8[Tensor, "height width channels"]:
    """Loads a photograph as `load_image` does, with alpha and the colours under it where it has an alpha channel."""
    with open_image(path, "Image") as image:
        deep = _read_deep(image, path)
        if deep is None:
            turned = ImageOps.exif_transpose(image) if upright else image
            mode = "RGBA" if image.has_transparency_data else "RGB"
            return torch.from_numpy(np.array(turned.convert(mode), dtype=np.uint8))
    is_12_bits = deep[..., :3].max() <= _MAX_12_BITS
    if is_12_bits:
        notice_once("12 bits", f"Photographs such as {path} hold 12 bits a channel in 16; they are read as 12.")
    scale = np.full(deep.shape[-1], 255.0 / _MAX_16_BITS)
    scale[:3] = 255.0 / (_MAX_12_BITS if is_12_bits else _MAX_16_BITS)
    return torch.from_numpy(np.round(deep * scale).astype(np.uint8))


def composite_on_black(rgba: UInt8[Tensor, "height width 4"]) -> UInt8[Tensor, "height width 3"]:
    """Colours times alpha."""
    return (rgba[..., :3].float() * (rgba[..., 3:].float() / 255.0)).round().to(torch.uint8)


def find_opaque(rgba: UInt8[Tensor, "height width channels"]) -> Bool[Tensor, "height width"]:
    """True where nothing shines through a picture of `load_rgba`; everywhere without an alpha channel."""
    if rgba.shape[-1] == 3:
        return torch.ones(rgba.shape[:2], dtype=torch.bool)
    return rgba[..., 3] >= _OPAQUE


def load_mask(path: Path) -> Bool[Tensor, "height width"]:
    """Loads a mask; True (255 in the file) = use. Every lower value means the pixel is not used (paper's preparation).

    Of a mask with an alpha channel, what is transparent is not used; where its colours say nothing, because they are
    the same everywhere, alpha alone is the mask. A mask that holds values but never 255 is a ValueError.
    """
    with open_image(path, "Mask") as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"Mask {path} has pixel format {image.mode}; save it with 8 bits, 255 where pixels count.")
        if image.has_transparency_data:
            grey, alpha = np.moveaxis(np.array(image.convert("RGBA").convert("LA"), dtype=np.uint8), -1, 0)
            shown = grey[alpha > 0]
            says_nothing = shown.size == 0 or shown.min() == shown.max()
            values = alpha if says_nothing and alpha.min() < 255 else np.minimum(grey, alpha)
        else:
            values = np.array(image.convert("L"), dtype=np.uint8)
    if values.any() and values.max() < 255:
        raise ValueError(f"Mask {path} has values up to {values.max()}; write 255 where pixels count and 0 elsewhere.")
    return torch.from_numpy(values == 255)


def load_depth(path: Path, units_per_metre: float = MILLIMETRES_PER_METRE) -> Float[Tensor, "height width"]:
    """Loads z-depth in metres from a 16-bit PNG, in millimetres by default; 0 = no measurement."""
    with open_image(path, "Depth map") as image:
        check_depth_mode(path, image.mode)
        values = np.array(image, dtype=np.float32)
    return torch.from_numpy(values / units_per_metre)


def check_depth_mode(path: Path, mode: str) -> None:
    """Raises ValueError if Pillow's `mode` of the file is not 16-bit grey (or 32-bit, as older Pillows open it)."""
    if not mode.startswith("I"):
        raise ValueError(f"Depth map {path} has pixel format {mode}; write 16-bit grey PNGs in millimetres.")


def save_image(image: UInt8[Tensor, "height width 3"], path: Path, quality: int = 95) -> None:
    """Writes an RGB picture; the suffix chooses the format, `quality` is JPEG's (without colour subsampling)."""
    Image.fromarray(image.numpy()).save(path, quality=quality, subsampling=0)


def save_index_map(indices: UInt8[Tensor, "height width"], path: Path) -> None:
    """Writes an 8-bit grey PNG: a mask or a map of class indices."""
    Image.fromarray(indices.numpy()).save(path, "PNG")


def save_depth(
    depth: Float[Tensor, "height width"], path: Path, units_per_metre: float = MILLIMETRES_PER_METRE
) -> None:
    """Writes z-depth in metres as 16-bit PNG; depths that do not fit (65.535 m in millimetres) become 0."""
    units = (depth.double() * units_per_metre).round()
    units = torch.where(units <= 65535, units, 0.0)
    Image.fromarray(units.numpy().astype(np.uint16)).save(path, "PNG")


@contextmanager
def open_image(path: Path, what: str) -> Iterator[Image.Image]:
    """Opens an image; everything Pillow dislikes about the file becomes one sentence."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{what} {path} is missing; check its name, or restore the file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} {path} is empty; copy the file again.")
    refuse_lfs_pointer(path)
    with open(path, "rb") as file:
        lacks_reader = file.read(12)[4:].startswith(_HEIF_BRANDS)
    if lacks_reader:
        with suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
            lacks_reader = False
    try:
        with warnings.catch_warnings():
            # Large photographs are not decompression bombs here: the user named them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{what} {path} has more than {MAX_PIXELS} pixels; make it smaller.") from error
    except _DAMAGED as error:
        if lacks_reader:
            raise ValueError(
                f"{what} {path} is in HEIC or AVIF format; install what reads it (`pip install pillow-heif`), or "
                "convert the photographs to JPEG."
            ) from error
        raise ValueError(f"{what} {path} is truncated or damaged ({error}); copy the file again.") from error


def _read_deep(image: Image.Image, path: Path) -> np.ndarray | None:
    """A picture of 16 bits a channel as [H, W, 3 or 4], unscaled; None for one of 8. Pillow would cut off the rest."""
    with open(path, "rb") as file:
        is_png_of_16_bits = image.format == "PNG" and file.read(25)[24] == 16
    is_tiff_of_16_bits = image.format == "TIFF" and 16 in getattr(image, "tag_v2", {}).get(_TIFF_BITS, ())
    if not (image.mode.startswith(("I", "F")) or is_png_of_16_bits or is_tiff_of_16_bits):
        return None
    values = None if image.mode.startswith("F") else cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise ValueError(f"Image {path} has pixel format {image.mode}; convert it to 8 bits a channel.")
    if values.ndim == 2:
        return np.repeat(values[..., None], 3, axis=2)
    return values[..., [2, 1, 0, 3][: values.shape[-1]]]  # OpenCV's order is blue, green, red, alpha.
