"""`extract_features`: fills the cache with the tokens of many images, building the backbone only if one is missing."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fit3d_ns.features.backbones import BackboneDescription
from fit3d_ns.features.cache import FeatureCache, FeatureKey, compute_feature_key
from fit3d_ns.features.extractor import FeatureExtractor, create_extractor
from fit3d_ns.utils.progress import track

LazyImage = Callable[[], Tensor]
"""Returns one undistorted image [height, width, 3], 8-bit or floating point in [0, 1]."""

_MAX_PENDING_BATCHES = 4


def extract_features(
    images: Sequence[LazyImage],
    description: BackboneDescription,
    cache: FeatureCache,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 4,
    create: Callable[[BackboneDescription, torch.device | str], FeatureExtractor] | None = None,
) -> list[FeatureKey]:
    """Makes sure that the tokens of all images are in the cache.

    Every image is read once, by one thread beside the backbone, to know its content; at most a few batches are in
    memory at a time. Images whose tokens are cached and whole cost no more than that. Images of one size form batches.
    Nothing here draws from a global random generator.

    Args:
        images: Called once each, in order.
        description: The backbone, as `describe_backbone` gives it.
        cache: Where tokens are kept; of the same backbone.
        device: Where the backbone runs.
        batch_size: Images per pass of the backbone.
        create: How to build the extractor; `create_extractor` by default. Called at most once.

    Returns:
        One key per image, in the order of `images`, for `cache.load`.

    Raises:
        ValueError: The backbone cannot be built, or the disk is full. What was extracted until then stays.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1.")
    if cache.description.identity != description.identity:
        raise ValueError(
            f"The cache holds features of {cache.description.label}, not of {description.label}; "
            "make it from the same description."
        )
    worker = _Worker(description, cache, device, create or _create)
    keys: list[FeatureKey] = []
    pending: dict[tuple[int, int], list[tuple[FeatureKey, Tensor]]] = {}
    submitted: set[FeatureKey] = set()
    title = f"Extracting features ({description.label})"
    for image in track(_prefetch(images, 2 * batch_size), title, total=len(images)):
        key = compute_feature_key(image)
        keys.append(key)
        if key in submitted or cache.contains(key):
            continue
        submitted.add(key)
        group = pending.setdefault((key.height, key.width), [])
        group.append((key, image))
        is_crowded = sum(map(len, pending.values())) >= _MAX_PENDING_BATCHES * batch_size
        if len(group) == batch_size:
            worker.run(pending.pop((key.height, key.width)))
        elif is_crowded:
            worker.run(pending.pop(max(pending, key=lambda size: len(pending[size]))))
    for group in pending.values():
        worker.run(group)
    return keys


class _Worker:
    """Runs batches; the backbone is built for the first one."""

    def __init__(
        self,
        description: BackboneDescription,
        cache: FeatureCache,
        device: torch.device | str,
        create: Callable[[BackboneDescription, torch.device | str], FeatureExtractor],
    ) -> None:
        self.description = description
        self.cache = cache
        self.device = device
        self.create = create
        self.extractor: FeatureExtractor | None = None

    def run(self, group: Sequence[tuple[FeatureKey, Tensor]]) -> None:
        if self.extractor is None:
            self.extractor = self.create(self.description, self.device)
        # (h, w, 3) each -> (b, 3, h, w)
        batch = torch.stack([_as_float(image).permute(2, 0, 1) for _, image in group])
        tokens = self.extractor(batch.to(self.device))
        for (key, _), patch_tokens, prefix_tokens in zip(group, tokens.maps, tokens.prefix_tokens, strict=True):
            self.cache.save(key, patch_tokens, prefix_tokens)


def _create(description: BackboneDescription, device: torch.device | str) -> FeatureExtractor:
    return create_extractor(description, device=device)


def _as_float(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _prefetch(images: Sequence[LazyImage], depth: int) -> Iterator[Tensor]:
    """Reads ahead in one thread, so that decoding goes on while the backbone runs."""
    with ThreadPoolExecutor(max_workers=1) as executor:
        waiting: list[Future[Tensor]] = []
        try:
            for image in images:
                waiting.append(executor.submit(image))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
