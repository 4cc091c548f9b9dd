"""Which image comes next: an endless, seeded sequence of draws that depends on nothing but the seed and the epoch.

A *draw* is one image of one scene in one epoch. Draws of all epochs form one sequence; step k of the optimizer takes
draws [k G, (k + 1) G), where G counts the images of all processes and accumulated batches. So a run that resumes needs
no more than its number of steps, and two processes see what one with twice the batch sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from fit3d_ns.training.epochs import EpochSequence
from fit3d_ns.utils.seeds import derive_seed

SamplingRule = Literal["epoch", "uniform", "scenes"]


@dataclass(frozen=True)
class SamplingConfig:
    """In which order images are drawn."""

    sampling: SamplingRule = "epoch"
    """`epoch`: every image once an epoch (public code); `uniform`: each draw is any image, independently (paper,
    Algorithm 1); `scenes`: any scene, then any image of it, so that long scenes do not dominate."""
    images_per_visit: int = 16
    """A scene on the device serves about this many images before it may leave, 1 and above; 0 draws without grouping
    (public code)."""
    scenes_at_once: int = 4
    """Images of this many visits are mixed, so that a batch sees several scenes; 1 and above."""
    seed: int = 42
    """Of order, augmentation and everything else that is random; 0 and above."""

    def __post_init__(self) -> None:
        if self.images_per_visit < 0 or self.scenes_at_once < 1 or self.seed < 0:
            raise ValueError(
                f"images_per_visit {self.images_per_visit} must be 0 or above, scenes_at_once {self.scenes_at_once} "
                f"1 or above, seed {self.seed} 0 or above."
            )


@dataclass(frozen=True)
class Draw:
    """One image in one epoch; names the random numbers of its augmentation."""

    epoch: int
    """Counted from 0."""
    scene: int
    """Index of the scene."""
    view: int
    """Index into the scene's training views."""
    repeat: int | None = None
    """Where an image may be drawn again in the same epoch, the draw's number in it: what tells the repeats apart."""


class DrawSequence:
    """The endless sequence of draws; indexable in any order, so it has no state worth saving."""

    def __init__(self, views_per_scene: Sequence[int], config: SamplingConfig):
        """Args:
        views_per_scene: Number of training views of each scene.

        Raises:
            ValueError: There is no view at all.
        """
        self.views_per_scene = list(views_per_scene)
        self.config = config
        if self.num_images < 1:
            raise ValueError("The scenes have no training views; check their splits.")
        self._rows: EpochSequence[np.ndarray] = EpochSequence(
            self.num_images, lambda epoch: create_order(self.views_per_scene, config, epoch)
        )

    @property
    def num_images(self) -> int:
        """Draws of one epoch."""
        return sum(self.views_per_scene)

    def __getitem__(self, position: int) -> Draw:
        place = self._rows[position]
        scene, view = place.item.tolist()
        return Draw(place.epoch, scene, view, None if self.config.sampling == "epoch" else place.index)


def create_order(views_per_scene: Sequence[int], config: SamplingConfig, epoch: int) -> Int[np.ndarray, "draws 2"]:
    """(scene, view) of every draw of one epoch; as many draws as there are images."""
    generator = np.random.default_rng(derive_seed(config.seed, "order", epoch))
    draws = _draw(views_per_scene, config.sampling, generator)
    if config.images_per_visit == 0:
        return generator.permutation(draws)
    visits: list[np.ndarray] = []
    for scene in range(len(views_per_scene)):
        own = generator.permutation(draws[draws[:, 0] == scene])
        if len(own):
            visits += np.array_split(own, -(-len(own) // config.images_per_visit))
    shuffled = [visits[index] for index in generator.permutation(len(visits))]
    mixed = [
        generator.permutation(np.concatenate(shuffled[start : start + config.scenes_at_once]))
        for start in range(0, len(shuffled), config.scenes_at_once)
    ]
    return np.concatenate(mixed)


def _draw(
    views_per_scene: Sequence[int], rule: SamplingRule, generator: np.random.Generator
) -> Int[np.ndarray, "draws 2"]:
    counts = np.asarray(views_per_scene)
    every = np.stack(
        [np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])], axis=1
    )
    if rule == "epoch":
        return every
    if rule == "uniform":
        return every[generator.integers(len(every), size=len(every))]
    scenes = generator.choice(np.flatnonzero(counts), size=len(every))
    return np.stack([scenes, generator.integers(counts[scenes])], axis=1)
