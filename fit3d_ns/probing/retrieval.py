"""The retrieval probe: segmentation and depth from the nearest patches of labelled images; nothing is trained.

The protocol of Balazevic et al. 2023 (docs/paper_notes.md): the memory holds the patch tokens of the training images,
scaled to length 1, with the shares of the classes among each patch's labelled pixels or their mean depth. A patch of a
test image takes the mean over its `num_neighbours` most similar ones, weighted by softmax(cosine / `TEMPERATURE`),
which is read between patches bilinearly. Data, sizes and metrics are those of the segmentation and depth probes. The
seed draws patches where there are more than the memory takes, the same number of each image.

With `memory_views` it is the multi-view protocol of Lilova et al. 2025: the memory holds a few views of each scene, its
other views ask it, and `by_angle` has the metrics by the rotation between a view and its nearest one in the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fit3d_ns.analysis.consistency import ConsistencyConfig
from fit3d_ns.analysis.correspondence import measure_rotation
from fit3d_ns.probing.datasets.frames import IGNORE_INDEX, LabelledFrame, LabelledSet
from fit3d_ns.probing.depth import DepthConfig
from fit3d_ns.probing.frozen_features import Assembler, FrozenFeatures
from fit3d_ns.probing.head_probe import MapProbe
from fit3d_ns.probing.segmentation import SegmentationConfig
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import track
from fit3d_ns.utils.selection import create_generator, select_evenly

TEMPERATURE = 0.02
COSINES_AT_ONCE = 2**26
"""Cosines between patches that are in memory at a time."""


@dataclass(frozen=True)
class RetrievalConfig(Limited):
    """Values of the retrieval probe."""

    short_side: int | None = None
    """Images are resized to this shorter side, pixels; None: as the segmentation and depth probes do."""
    num_neighbours: Annotated[int, Limits(at_least=1)] = 30
    """Patches of the memory that each patch asks."""
    memory_patches: Annotated[int, Limits(at_least=1)] = 1_024_000
    """Most patches in the memory (published: up to ten times as many)."""
    memory_views: Annotated[int | None, Limits(at_least=1)] = None
    """Views of each scene in the memory, evenly spread; all its other views ask it, whichever set they are of."""

    def configure(self, labels: str) -> SegmentationConfig | DepthConfig:
        """The probe of these labels, for images that are seen as they are and whole: no window is smaller."""
        if labels == "depth":
            return DepthConfig(short_side=self.short_side, is_flip_averaged=False)
        return SegmentationConfig(self.short_side, crop_side=2**16)


class PatchMemory(nn.Module):
    """Labelled patches, asked as heads are: features to a map [batch, classes, h, w], or of depths [batch, h, w]."""

    def __init__(self, assembler: Assembler, keys: Tensor, values: Tensor, num_neighbours: int) -> None:
        super().__init__()
        self.assembler, self.keys, self.values = assembler, keys, values
        self.num_neighbours = min(num_neighbours, len(keys))

    def forward(self, features: FrozenFeatures) -> Float[Tensor, "batch *classes h w"]:
        # (b, c, h, w) -> (b, h, w, c) -> (b*h*w, c)
        tokens = self.assembler(features).permute(0, 2, 3, 1)
        found = []
        for queries in F.normalize(tokens.flatten(0, 2), dim=1).split(max(COSINES_AT_ONCE // len(self.keys), 1)):
            cosines, nearest = (queries @ self.keys.T).topk(self.num_neighbours, dim=1)
            weights = (cosines / TEMPERATURE).softmax(dim=1)
            found.append(torch.einsum("qk,qk...->q...", weights, self.values[nearest]))
        # (b*h*w, *classes) -> (b, h, w, *classes) -> (b, *classes, h, w)
        values = torch.cat(found).unflatten(0, tokens.shape[:3])
        return values.permute(0, 3, 1, 2) if values.ndim == 4 else values


def split_views(sets: Sequence[LabelledSet], num_views: int) -> tuple[LabelledSet, LabelledSet]:
    """`num_views` posed views of each scene, evenly spread, and the others; ValueError where no other is left."""
    frames = {frame.key: frame for found in sets for frame in found.frames if frame.camera_to_world is not None}
    worlds: dict[Any, list[LabelledFrame]] = {}
    for frame in sorted(frames.values(), key=lambda frame: frame.files):
        worlds.setdefault(frame.world, []).append(frame)
    memory = [frame for world in worlds.values() for frame in select_evenly(world, num_views)]
    asked = [frame for key, frame in frames.items() if key not in {kept.key for kept in memory}]
    if not asked:
        raise ValueError(f"No scene of {sets[0].name} has more than {num_views} views with known poses.")
    return replace(sets[0], frames=memory), replace(sets[1], frames=asked)


def measure_by_angle(probe: MapProbe, memory: PatchMemory) -> dict[str, dict[str, Any]]:
    """Metrics of the test views by the angle to the nearest view of their scene in the memory; no empty bins."""
    own: dict[Any, list[Any]] = {}
    for frame in probe.sets.train.frames:
        own.setdefault(frame.world, []).append(frame.camera_to_world)
    tests: list[Any] = probe.sets.test.frames
    angles = [min(float(measure_rotation(pose, at.camera_to_world)) for pose in own[at.world]) for at in tests]
    edges, by_angle = ConsistencyConfig.angle_edges, {}
    for low, high in pairwise(edges):
        # The last bin includes its upper edge.
        near = [at for at, angle in zip(tests, angles, strict=True) if low <= angle < high + (high == edges[-1])]
        if near:
            by_angle[f"{low:g}-{high:g}"] = probe.evaluate(memory, replace(probe.sets.test, frames=near))
    return by_angle


def measure_retrieval(probe: MapProbe, config: RetrievalConfig, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The probe's metrics for each seed, its head a memory of its training set; all the same where nothing is drawn."""
    per_seed: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        memory, is_drawn = _create_memory(probe, config, seed)
        per_seed[seed] = probe.evaluate(memory, probe.sets.test)
        if config.memory_views:
            per_seed[seed]["by_angle"] = measure_by_angle(probe, memory)
        if not is_drawn:
            return dict.fromkeys(seeds, per_seed[seed])
    return per_seed


@torch.no_grad()
def _create_memory(probe: MapProbe, config: RetrievalConfig, seed: int) -> tuple[PatchMemory, bool]:
    """The memory of a probe's training set, and whether patches were left out of it; ValueError without any."""
    patch, train = probe.backbones.description.patch_size, probe.sets.train
    inputs: Any = replace(probe.inputs, targets_per_token=patch)  # type: ignore[type-var]
    assembler = Assembler(probe.assembly, probe.backbones.embed_dim, "none")
    pictures = [(frame, key) for frame in train.frames for key in inputs.list_keys(frame)]
    quota, is_drawn = max(config.memory_patches // len(pictures), 1), False
    keys, values = [], []
    for number, (frame, key) in enumerate(track(pictures, f"Memory of {train.name}")):
        ((features, target),) = probe.memory.fetch([key], [frame], inputs)
        # (1, c, h, w) -> (h*w, c)
        tokens = assembler(features.to(probe.accelerator.device))[0].flatten(1).T
        # (h*patch, w*patch) -> (h*w, patch*patch)
        pixels = F.unfold(target[None, None].float(), patch, stride=patch)[0].T
        if probe.task == "segmentation":
            counted = pixels != IGNORE_INDEX
            sums = torch.stack([(pixels == index).sum(dim=1) for index in range(train.num_classes)], dim=1)
        else:
            counted = (pixels > train.depth.min_depth) & (pixels < train.depth.max_depth)
            sums = torch.where(counted, pixels, 0.0).sum(dim=1)
        known = counted.any(dim=1).nonzero()[:, 0]
        is_drawn |= len(known) > quota
        known = known[torch.randperm(len(known), generator=create_generator(seed, "memory", number))[:quota]]
        keys.append(F.normalize(tokens[known.to(tokens.device)], dim=1))
        values.append((sums[known].movedim(0, -1) / counted.sum(dim=1)[known]).movedim(-1, 0))
    if not any(map(len, keys)):
        raise ValueError(f"No pixel of {train.name} has a label that counts; check its maps.")
    return PatchMemory(assembler, torch.cat(keys), torch.cat(values).to(keys[0]), config.num_neighbours), is_drawn
