"""`FeatureCache`: tokens of images on disk, one file per image, shared by runs and processes.

    DIRECTORY / <backbone identity> / <height>x<width>-<dtype> / <first two digits> / <hash of the pixels>.safetensors

Everything that decides the tokens is in the path: the identity names architecture, weights, normalisation, resize rule
and norm. So a file is right or damaged, never out of date, and there is no index: 140,000 images need as many
files and no memory. Files appear whole (written beside, then renamed), so processes may extract the same image twice
but never disturb each other. Each file carries a checksum, verified whenever it is read.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fit3d_ns.features.backbones import BackboneDescription
from fit3d_ns.features.preprocessing import compute_patch_grid
from fit3d_ns.utils.files import hash_bytes, write_atomically
from fit3d_ns.utils.progress import notice

_SCHEMA = "1"


@dataclass(frozen=True)
class FeatureCacheConfig:
    """Where extracted feature maps are kept between runs."""

    directory: Path = Path("cache/features")
    """Root folder; one subfolder per backbone and resolution."""
    dtype: Literal["float16", "float32"] = "float16"
    """Storage type on disk; `float16` halves the size (1.95 MB for DINOv2-small at 876x584)."""


@dataclass(frozen=True)
class FeatureKey:
    """Names one image by its content."""

    pixels_hash: str
    """Hash of the undistorted pixels, 16 hexadecimal digits."""
    height: int
    """Height of the image as the extractor gets it, in pixels."""
    width: int
    """Its width."""


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """Tokens of one image as they lie on disk, memory-mapped; copy them to keep them."""

    patch_tokens: Float[Tensor, "h w embed"]
    """The token map, float16 unless the cache is configured otherwise."""
    prefix_tokens: Float[Tensor, "prefix embed"]
    """Class token first, then registers."""


class FeatureCache:
    """The files of one backbone."""

    def __init__(self, config: FeatureCacheConfig, description: BackboneDescription) -> None:
        self.config = config
        self.description = description
        self.folder = Path(config.directory) / description.identity
        self._dtype = torch.float16 if config.dtype == "float16" else torch.float32

    def get_path(self, key: FeatureKey) -> Path:
        """Where the tokens of an image are or will be."""
        size = f"{key.height}x{key.width}-{self.config.dtype}"
        return self.folder / size / key.pixels_hash[:2] / f"{key.pixels_hash}.safetensors"

    def contains(self, key: FeatureKey) -> bool:
        """True if the image's tokens are there and whole; a damaged file is reported and counts as missing."""
        path = self.get_path(key)
        if not path.is_file():
            return False
        problem = self._read(key)
        if isinstance(problem, str):
            notice(f"Cached features {path} are damaged ({problem}); extracting them again.")
            return False
        return True

    def load(self, key: FeatureKey) -> CachedTokens:
        """Reads the tokens of an image.

        Raises:
            ValueError: They are not there, or damaged.
        """
        path = self.get_path(key)
        if not path.is_file():
            raise ValueError(f"No cached features at {path}; start the run again to extract them.")
        tokens = self._read(key)
        if isinstance(tokens, str):
            raise ValueError(
                f"Cached features {path} are damaged ({tokens}); start the run again to extract them anew."
            )
        return tokens

    def save(
        self,
        key: FeatureKey,
        patch_tokens: Float[Tensor, "h w embed"],
        prefix_tokens: Float[Tensor, "prefix embed"],
    ) -> Path:
        """Writes the tokens of an image, atomically.

        Raises:
            ValueError: The disk is full or may not be written to, or a token is NaN or too large for the storage type.
        """
        tensors = {
            "patch_tokens": patch_tokens.detach().to("cpu", self._dtype).contiguous(),
            "prefix_tokens": prefix_tokens.detach().to("cpu", self._dtype).contiguous(),
        }
        path = self.get_path(key)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"Some {name} of {self.description.label} are NaN or too large for {self.config.dtype}; "
                    "check the weights, or store float32."
                )
        metadata = {"schema": _SCHEMA, "checksum": _compute_checksum(tensors)}
        content = save(tensors, metadata={**metadata, "backbone": json.dumps(self.description.to_metadata())})
        try:
            with write_atomically(path) as temporary:
                temporary.write_bytes(content)
        except OSError as error:
            raise ValueError(f"Cannot write features to {path} ({error.strerror}); choose another folder.") from error
        return path

    def _read(self, key: FeatureKey) -> CachedTokens | str:
        """The tokens, or what is wrong with the file."""
        try:
            with safe_open(self.get_path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            return str(error).splitlines()[0]
        if metadata.get("schema") != _SCHEMA:
            return f"schema {metadata.get('schema')} instead of {_SCHEMA}"
        description = self.description
        rows, columns = compute_patch_grid(key.height, key.width, description.patch_size)
        expected = {
            "patch_tokens": (rows, columns, description.embed_dim),
            "prefix_tokens": (description.num_prefix_tokens, description.embed_dim),
        }
        for name, shape in expected.items():
            if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != self._dtype:
                return f"{name} is not {list(shape)} of {self.config.dtype}"
        if metadata.get("checksum") != _compute_checksum(tensors):
            return "its checksum is wrong"
        return CachedTokens(tensors["patch_tokens"], tensors["prefix_tokens"])


def compute_feature_key(image: Tensor) -> FeatureKey:
    """Names an image by its content.

    Args:
        image: [height, width, 3], 8-bit or floating point in [0, 1]. Both forms of the same image give the same key,
            because pixels are compared as 16-bit integers, in which v / 255 is exactly 257 v.

    Raises:
        ValueError: Another shape or type.
    """
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"Image has shape {list(image.shape)}, expected [height, width, 3].")
    if image.dtype == torch.uint8:
        levels = image.to(torch.int32) * 257
    elif image.is_floating_point():
        levels = (image.float() * 65535).round().clamp(0, 65535).to(torch.int32)
    else:
        raise ValueError(f"Image is {image.dtype}, expected uint8, or floating point in [0, 1].")
    height, width = image.shape[:2]
    pixels = levels.cpu().numpy().astype("<u2")
    return FeatureKey(hash_bytes(f"{height}x{width}".encode(), pixels.tobytes()), height, width)


def _compute_checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
