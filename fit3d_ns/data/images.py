"""Photographs, masks and depth maps on disk; a file that is missing, empty or damaged is a ValueError that names it.

EXIF orientation is ignored on purpose: cameras are given for the pixels as stored, and nerfstudio reads them so too.
Reading a header (`read_image_header`) is cheap and finds wrong sizes early; other damage shows when loading.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

MILLIMETRES_PER_METRE = 1000.0
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Suffixes of photographs, in lower case."""
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
"""Suffixes of videos, in lower case."""


@dataclass(frozen=True)
class ImageHeader:
    """What the first bytes of an image file say."""

    width: int
    height: int
    mode: str
    """Pillow's name of the pixel format, for example `RGB`, `L` or `I;16`."""


def read_image_header(path: Path, what: str = "Image") -> ImageHeader:
    """Reads size and pixel format without decoding; `what` is what errors call the file, for example "Mask"."""
    with _open_image(path, what) as image:
        return ImageHeader(image.width, image.height, image.mode)


def list_images(folder: Path) -> list[Path]:
    """Photographs below a folder, in the order of names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def load_image(path: Path) -> UInt8[Tensor, "height width 3"]:
    """Loads an 8-bit photograph as RGB; grey becomes three equal channels, an alpha channel is dropped."""
    with _open_image(path, "Image") as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"Image {path} has pixel format {image.mode}; convert it to 8 bits a channel.")
        return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8))


def load_mask(path: Path) -> Bool[Tensor, "height width"]:
    """Loads a mask; True (255 in the file) = use. Every lower value means the pixel is not used (paper's preparation).

    A mask that holds values but never 255 is a ValueError.
    """
    with _open_image(path, "Mask") as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"Mask {path} has pixel format {image.mode}; save it with 8 bits, 255 where pixels count.")
        values = np.array(image.convert("L"), dtype=np.uint8)
    if values.any() and values.max() < 255:
        raise ValueError(f"Mask {path} has values up to {values.max()}; write 255 where pixels count and 0 elsewhere.")
    return torch.from_numpy(values == 255)


def load_depth(path: Path, units_per_metre: float = MILLIMETRES_PER_METRE) -> Float[Tensor, "height width"]:
    """Loads z-depth in metres from a 16-bit PNG, in millimetres by default; 0 = no measurement."""
    with _open_image(path, "Depth map") as image:
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
    Image.fromarray(indices.numpy()).save(path)


def save_depth(
    depth: Float[Tensor, "height width"], path: Path, units_per_metre: float = MILLIMETRES_PER_METRE
) -> None:
    """Writes z-depth in metres as 16-bit PNG; depths that do not fit (65.535 m in millimetres) become 0."""
    units = (depth.double() * units_per_metre).round()
    units = torch.where(units <= 65535, units, 0.0)
    Image.fromarray(units.numpy().astype(np.uint16)).save(path)


@contextmanager
def _open_image(path: Path, what: str) -> Iterator[Image.Image]:
    """Opens an image; everything Pillow dislikes about the file becomes one sentence."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{what} {path} is missing; restore the file or take its frame out of the camera file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} {path} is empty; copy the file again.")
    try:
        with warnings.catch_warnings():
            # Large photographs are not decompression bombs here: the user named them.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what} {path} is truncated or damaged ({error}); copy the file again.") from error
