"""`FeatureCache`: tokens of images on disk, shared by runs and processes, and `extract_features`, which fills it.

    DIRECTORY / <backbone identity> / <height>x<width>-float16 / <first two digits> / <hash of the pixels>.safetensors

Everything that decides the tokens is in the path: the identity names architecture, weights, normalisation, resize rule
and norm. So a file is right or damaged, never out of date, and there is no index: 140,000 images need as many files and
no memory. Files appear whole, so processes may extract the same image twice but never disturb each other. Each file
carries a checksum, verified whenever it is read.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.backbones import BackboneDescription
from fit3d_ns.features.extractor import FeatureExtractor, create_extractor
from fit3d_ns.features.tokens import compute_patch_grid
from fit3d_ns.utils.device import choose_num_workers
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import load_ahead
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors

LazyImage = Callable[[], Tensor]
"""Returns one undistorted image [height, width, 3], 8-bit or floating point in [0, 1]."""
_SCHEMA = "1"
_MAX_PENDING_BATCHES = 4


@dataclass(frozen=True)
class FeatureKey:
    """Names one image by its content and its size in pixels, as the extractor gets it."""

    pixels_hash: str
    """Hash of the undistorted pixels, 16 hexadecimal digits."""
    height: int
    width: int


class FeatureCache:
    """The files of one backbone in a folder that runs share: 1.95 MB an image for DINOv2-small at 876x584."""

    def __init__(self, directory: Path, description: BackboneDescription) -> None:
        self.directory = Path(directory)
        self.description = description
        self.folder = self.directory / description.identity

    def get_path(self, key: FeatureKey) -> Path:
        name = key.pixels_hash
        return self.folder / f"{key.height}x{key.width}-float16" / name[:2] / f"{name}.safetensors"

    def contains(self, key: FeatureKey) -> bool:
        """True if the image's tokens are there and whole; a damaged file is reported and counts as missing."""
        found = self._read(key) if self.get_path(key).is_file() else None
        if isinstance(found, str):
            notice(f"Cached features are damaged and extracted again: {found}")
        return isinstance(found, Tensor)

    def load(self, key: FeatureKey) -> Float[Tensor, "h w embed"]:
        """The patch tokens of an image, mapped from its file, float16; ValueError where they are missing or damaged."""
        path = self.get_path(key)
        if not path.is_file():
            raise ValueError(f"No cached features at {path}; start the run again to extract them.")
        tokens = self._read(key)
        if isinstance(tokens, str):
            raise ValueError(f"Cached features are damaged, start the run again to extract them: {tokens}")
        return tokens

    def save(
        self, key: FeatureKey, patch_tokens: Float[Tensor, "h w embed"], prefix_tokens: Float[Tensor, "prefix embed"]
    ) -> Path:
        """Writes the tokens of an image, atomically.

        ValueError where the disk is full or may not be written to, or a token is NaN or too large for the storage type.
        """
        tensors = {"patch_tokens": patch_tokens, "prefix_tokens": prefix_tokens}
        path = self.get_path(key)
        for name, tensor in tensors.items():
            tensors[name] = tensor = tensor.detach().to("cpu", torch.float16).contiguous()
            if not torch.isfinite(tensor).all():
                problem = f"Some {name} of {self.description.label} are NaN or too large for half precision"
                raise ValueError(f"{problem}; check the weights.")
        try:
            save_tensors(path, tensors, {"schema": _SCHEMA, "backbone": json.dumps(self.description.to_metadata())})
        except ValueError as error:
            raise ValueError(
                f"{error} The feature cache is {self.directory}; --feature-cache names another (ns-train: "
                "--pipeline.datamanager.feature-cache)."
            ) from error
        return path

    def _read(self, key: FeatureKey) -> Tensor | str:
        """The patch tokens, or what is wrong with the file."""
        path = self.get_path(key)
        try:
            file = open_tensors(path, known=("schema", "backbone"))
            file.check()
        except ValueError as error:
            return str(error)
        tensors, schema = file.tensors, file.metadata.get("schema")
        if schema != _SCHEMA or file.checksums is None:
            return f"{path} has {'no checksum' if schema == _SCHEMA else f'schema {schema} instead of {_SCHEMA}'}"
        description = self.description
        rows, columns = compute_patch_grid(key.height, key.width, description.patch_size)
        prefix = (description.num_prefix_tokens, description.embed_dim)
        for name, shape in (("patch_tokens", (rows, columns, description.embed_dim)), ("prefix_tokens", prefix)):
            if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != torch.float16:
                return f"{path}: {name} is not {list(shape)} of float16"
        return tensors["patch_tokens"]


def extract_features(
    images: Sequence[LazyImage], cache: FeatureCache, *, device: torch.device | str = "cpu", batch_size: int = 4
) -> list[FeatureKey]:
    """Makes sure that the tokens of all images are in the cache; the backbone is built only if some are missing.

    Every image is read once to know its content; at most a few batches are in memory at a time. Images of one size form
    batches. Threads read and hash ahead of the backbone, and on CUDA also write behind it. Nothing here draws from a
    global random generator. Returned is one key per image, in the order of `images`, for `cache.load`. ValueError where
    the backbone cannot be built or the disk is full; what was extracted until then stays.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    keys: list[FeatureKey] = []
    is_fast = torch.device(device).type == "cuda"
    num_threads = choose_num_workers(torch.device(device)) if is_fast else 1
    batches = _find_missing(images, cache, batch_size, keys, num_threads)
    tokens = _extract_batches(batches, cache.description, device)
    for _ in load_ahead(tokens, lambda found: cache.save(*found), num_threads if is_fast else 0, 4 * batch_size):
        pass
    return keys


def _extract_batches(
    batches: Iterator[list[tuple[FeatureKey, Tensor]]], description: BackboneDescription, device: torch.device | str
) -> Iterator[tuple[FeatureKey, Tensor, Tensor]]:
    """Patch and prefix tokens of each image, on the device."""
    extractor: FeatureExtractor | None = None
    for batch in batches:
        if extractor is None:
            extractor = create_extractor(description, device=device)
        # (h, w, 3) each -> (b, 3, h, w)
        scaled = [image.to(device).float() / (255 if image.dtype == torch.uint8 else 1) for _, image in batch]
        tokens = extractor(torch.stack([image.permute(2, 0, 1) for image in scaled]))
        for (key, _), patch_tokens, prefix_tokens in zip(batch, tokens.maps, tokens.prefix_tokens, strict=True):
            yield key, patch_tokens, prefix_tokens


def compute_feature_key(image: Tensor) -> FeatureKey:
    """Names an image [height, width, 3], 8-bit or floating point in [0, 1], by its content.

    Both forms of an image give the same key: pixels are compared as 16-bit integers, in which v / 255 is exactly 257 v.
    """
    if image.dtype == torch.uint8:
        levels = image.to(torch.int32) * 257
    else:
        levels = (image.float() * 65535).round().clamp(0, 65535).to(torch.int32)
    height, width = image.shape[:2]
    pixels = levels.cpu().numpy().astype("<u2")
    return FeatureKey(hash_bytes(f"{height}x{width}".encode(), pixels.tobytes()), height, width)


def _find_missing(
    images: Sequence[LazyImage], cache: FeatureCache, batch_size: int, keys: list[FeatureKey], num_threads: int
) -> Iterator[list[tuple[FeatureKey, Tensor]]]:
    """Batches of images of one size whose tokens are not in the cache; appends the keys of all images to `keys`."""
    pending: dict[tuple[int, int], list[tuple[FeatureKey, Tensor]]] = {}
    yielded: set[FeatureKey] = set()
    title = f"Extracting features ({cache.description.label})"

    def read(image: LazyImage) -> tuple[FeatureKey, Tensor]:
        pixels = image()
        return compute_feature_key(pixels), pixels

    ahead = load_ahead(images, read, num_threads, max(2 * batch_size, 2 * num_threads))
    for key, image in track(ahead, title, total=len(images)):
        keys.append(key)
        if key in yielded or cache.contains(key):
            continue
        yielded.add(key)
        size = (key.height, key.width)
        pending.setdefault(size, []).append((key, image))
        if len(pending[size]) == batch_size:
            yield pending.pop(size)
        elif sum(map(len, pending.values())) >= _MAX_PENDING_BATCHES * batch_size:
            yield pending.pop(max(pending, key=lambda size: len(pending[size])))
    yield from pending.values()
