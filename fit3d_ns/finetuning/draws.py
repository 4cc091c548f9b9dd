"""Which image a step takes, how it is varied, and the sample it becomes.

Draws are functions of seed and position, so a run has no state but its step.

A *draw* is one image of one scene in one epoch. Its augmentation keeps image and target aligned: cropping and scaling
change the camera, for which the scene is rendered. The flip comes last and is applied to image, mask and rendered
target alike, as in the public code: the target is the mirror image of an unflipped rendering. Colour jitter is applied
to the image only; the scene was captured at one exposure.

Pixels come from `PosedCapture.load_image`, as in the lift: resized and undistorted by the same code. Loading is all
that worker threads do; rendering belongs to the main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.data.frames import Split
from fit3d_ns.features import compute_patch_grid
from fit3d_ns.geometry.cameras import Camera, crop_Ks, resize_Ks
from fit3d_ns.scene import FeatureScene, PosedCapture, TokenReadingRule, View, read_at_tokens
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.limits import Limited, Limits
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import EpochSequence, create_generator, derive_seed


@dataclass(frozen=True)
class SamplingConfig(Limited):
    """In which order images are drawn."""

    sampling: Literal["epoch", "uniform", "scenes"] = "epoch"
    """`epoch`: every image once an epoch (public code); `uniform`: each draw is any image, independently (paper,
    Algorithm 1); `scenes`: any scene, then any image of it, so that long scenes do not dominate."""
    images_per_visit: Annotated[int, Limits(at_least=0)] = 16
    """About this many images of a scene are drawn before it may leave; 0 draws without grouping (public code)."""
    scenes_at_once: Annotated[int, Limits(at_least=1)] = 4
    """Images of this many such groups are mixed, so that a batch sees several scenes; 1 and above."""
    seed: Annotated[int, Limits(at_least=0)] = 42
    """Seed of order, augmentation and everything else that is random; 0 and above."""


@dataclass(frozen=True)
class AugmentationConfig(Limited):
    """How images are varied; only the flip is the paper's."""

    flip_probability: Annotated[float, Limits(at_least=0, at_most=1)] = 0.5
    """Chance of mirroring image, mask and target left to right (public code: 0.5), 0 to 1."""
    min_crop: Annotated[float, Limits(above=0, at_most=1)] = 1.0
    """Smallest side of a random crop as a fraction of the image's side, above 0; 1 does not crop."""
    min_scale: Annotated[float, Limits(above=0)] = 1.0
    """Smallest factor by which the (cropped) image is resized, above 0."""
    max_scale: Annotated[float, Limits(at_most=16)] = 1.0
    """Largest such factor, up to 16; both 1 keep the size."""
    jitter: Annotated[float, Limits(at_least=0, below=1)] = 0.0
    """Brightness, contrast and saturation change by up to this fraction, the hue by a tenth of it; 0 to below 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale is {self.min_scale} and max_scale {self.max_scale}; exchange them.")

    @property
    def moves_cameras(self) -> bool:
        """True if targets differ from draw to draw and keeping them is of no use."""
        return self.min_crop < 1.0 or self.min_scale != 1.0 or self.max_scale != 1.0


@dataclass(frozen=True)
class Draw:
    """One image in one epoch, by the indices of its scene and of its view among the scene's; seeds the augmentation."""

    epoch: int
    scene: int
    view: int
    repeat: int | None = None
    """Where an image may be drawn again in the same epoch, the draw's number in it: what tells the repeats apart."""


class DrawSequence:
    """The endless sequence of draws; any position may be asked for. Some scene has a view."""

    def __init__(self, views_per_scene: Sequence[int], config: SamplingConfig):
        self.num_images = sum(views_per_scene)
        self._has_repeats = config.sampling != "epoch"
        self._rows: EpochSequence[list[int]] = EpochSequence(
            self.num_images, lambda epoch: create_order(views_per_scene, config, epoch).tolist()
        )

    def __getitem__(self, position: int) -> Draw:
        epoch, index, (scene, view) = self._rows[position]
        return Draw(epoch, scene, view, index if self._has_repeats else None)


def create_order(views_per_scene: Sequence[int], config: SamplingConfig, epoch: int) -> Int[np.ndarray, "draws 2"]:
    """(scene, view) of every draw of one epoch; as many draws as there are images."""
    generator = np.random.default_rng(derive_seed(config.seed, "order", epoch))
    counts = np.asarray(views_per_scene)
    draws = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])], 1)
    if config.sampling == "uniform":
        draws = draws[generator.integers(len(draws), size=len(draws))]
    elif config.sampling == "scenes":
        scenes = generator.choice(np.flatnonzero(counts), size=len(draws))
        draws = np.stack([scenes, generator.integers(counts[scenes])], axis=1)
    if config.images_per_visit == 0:
        return generator.permutation(draws)
    visits: list[np.ndarray] = []
    for scene in range(len(counts)):
        own = generator.permutation(draws[draws[:, 0] == scene])
        if len(own):
            visits += np.array_split(own, -(-len(own) // config.images_per_visit))
    shuffled = [visits[index] for index in generator.permutation(len(visits))]
    mixed = [
        generator.permutation(np.concatenate(shuffled[start : start + config.scenes_at_once]))
        for start in range(0, len(shuffled), config.scenes_at_once)
    ]
    return np.concatenate(mixed)


@dataclass(frozen=True)
class ImageWindow:
    """The part of a view that is shown, in pixels of the view, and its size after resizing."""

    left: int
    top: int
    crop_width: int
    crop_height: int
    width: int
    height: int

    def apply_to_K(self, K: Float[Tensor, "3 3"]) -> Float[Tensor, "3 3"]:
        """Intrinsics of the camera that sees only the window."""
        cropped = crop_Ks(K, float(self.left), float(self.top))
        return resize_Ks(cropped, (self.crop_width, self.crop_height), (self.width, self.height))

    def apply_to_map(self, image: Float[Tensor, "channels H W"]) -> Float[Tensor, "channels h w"]:
        """Crops and resizes; enlarging is bilinear, shrinking antialiased as a camera of fewer pixels would be."""
        cropped = image[:, self.top : self.top + self.crop_height, self.left : self.left + self.crop_width]
        size = (self.height, self.width)
        if cropped.shape[1:] == size:
            return cropped
        return F.interpolate(cropped[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


@dataclass(frozen=True)
class Augmentation:
    """What is done to one draw."""

    window: ImageWindow
    flip: bool
    """Mirrored left to right at the end."""
    brightness: float = 1.0
    """Factor of all channels."""
    contrast: float = 1.0
    """Factor around the mean grey."""
    saturation: float = 1.0
    """Factor around each pixel's grey."""
    hue: float = 0.0
    """Turn of the colour circle, -0.5 to 0.5."""

    def apply_to_image(self, image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 h w"]:
        """Image in [0, 1] to the one the backbone sees."""
        image = self.window.apply_to_map(image)
        if (self.brightness, self.contrast, self.saturation, self.hue) != (1.0, 1.0, 1.0, 0.0):
            # Most runs need none of it, and importing it takes seconds.
            from torchvision.transforms.v2 import functional as vision

            image = vision.adjust_brightness(image, self.brightness)
            image = vision.adjust_contrast(image, self.contrast)
            image = vision.adjust_saturation(image, self.saturation)
            image = vision.adjust_hue(image, self.hue)
        return image.flip(-1) if self.flip else image

    def apply_to_tokens(self, tokens: Float[Tensor, "h w *channels"]) -> Float[Tensor, "h w *channels"]:
        """Tokens of the window (rendered features, weights) to those of the image that the backbone sees."""
        return tokens.flip(1) if self.flip else tokens


def draw_augmentation(
    config: AugmentationConfig, width: int, height: int, patch_size: int, seed: int, draw: Draw
) -> Augmentation:
    """The augmentation of one draw of a view of `width` times `height` pixels, a function of seed and draw.

    Resized images are never smaller than one patch.
    """
    repeat = [] if draw.repeat is None else [draw.repeat]
    generator = create_generator(seed, "augmentation", draw.epoch, draw.scene, draw.view, *repeat)
    side, place_x, place_y, scale, flip, *colours = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    fraction = config.min_crop + (1.0 - config.min_crop) * side
    crop_width = max(round(width * fraction), min(patch_size, width))
    crop_height = max(round(height * fraction), min(patch_size, height))
    factor = config.min_scale + (config.max_scale - config.min_scale) * scale
    window = ImageWindow(
        left=round((width - crop_width) * place_x),
        top=round((height - crop_height) * place_y),
        crop_width=crop_width,
        crop_height=crop_height,
        width=max(round(crop_width * factor), patch_size),
        height=max(round(crop_height * factor), patch_size),
    )
    brightness, contrast, saturation, hue = ((2.0 * value - 1.0) * config.jitter for value in colours)
    is_flipped = flip < config.flip_probability
    return Augmentation(window, is_flipped, 1.0 + brightness, 1.0 + contrast, 1.0 + saturation, 0.1 * hue)


@dataclass(frozen=True)
class Sample:
    """One draw, loaded: everything but its target."""

    draw: Draw
    scene_id: str
    view: View
    """Its camera, before augmentation."""
    augmentation: Augmentation
    image: Float[Tensor, "3 height width"]
    """What the backbone sees, RGB in [0, 1]."""
    mask: Float[Tensor, "h w"]
    """Share of valid pixels of each token, 0 to 1, before the flip."""

    @property
    def name(self) -> str:
        """Scene and photograph, for messages."""
        return f"{self.scene_id}/{self.view.name}"

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def camera(self) -> Camera:
        """That of what is shown, before the flip."""
        window = self.augmentation.window
        return Camera(self.view.camera_to_world, window.apply_to_K(self.view.K), window.width, window.height)


class TrainingViews:
    """The usable views of all scenes."""

    def __init__(
        self,
        scenes: Sequence[FeatureScene],
        splits: Sequence[Sequence[Split]],
        *,
        data_root: Path | None = None,
        is_strict: bool = False,
    ):
        """Finds the photographs; nothing of the scenes' Gaussians is read. ValueError where all of a scene are gone.

        Args:
            splits: Which views of each scene count; none at all leaves the scene out. Views the lift has not seen
                give novel-view targets.
            data_root: Where photographs lie now: the capture's own folder, or one that holds it.
            is_strict: Refuse a missing photograph instead of skipping its view.
        """
        self.captures: list[PosedCapture] = []
        self.views: list[list[View]] = []
        self.num_missing = 0
        for scene, own in zip(scenes, splits, strict=True):
            capture = scene.capture(data_root) if own else scene.posed_capture
            chosen = capture.select(*own) if own else []
            missing = [view for view in chosen if not view.frame.image_path.is_file()]
            if missing and is_strict:
                raise ValueError(
                    f"Photograph {missing[0].frame.image_path} of scene {capture.scene_id} is gone "
                    f"({len(missing)} of {len(chosen)} are); restore it, or leave out --strict to skip such views."
                )
            self.num_missing += len(missing)
            self.captures.append(capture)
            self.views.append([view for view in chosen if view.frame.image_path.is_file()])
        if self.num_missing:
            notice(f"Skipping {self.num_missing} views whose photographs are gone.")
        if not any(self.views):
            wanted = ", ".join(sorted({split for own in splits for split in own}))
            raise ValueError(f"The scenes have no views of split {wanted} with photographs; check --splits.")

    @property
    def views_per_scene(self) -> list[int]:
        return [len(views) for views in self.views]

    @property
    def views_hash(self) -> str:
        """Number and hash of the views drawn from, by scene and photograph, and after a dash of their files' sizes."""
        names = [f"{scene}/{view.name}" for scene, views in enumerate(self.views) for view in views]
        frames = [view.frame for views in self.views for view in views]
        files = [path for frame in frames for path in (frame.image_path, frame.mask_path) if path and path.is_file()]
        return f"{len(names)} images {hash_bytes(*names)}-{hash_bytes(*(str(path.stat().st_size) for path in files))}"

    def load_sample(
        self, draw: Draw, config: AugmentationConfig, patch_size: int, seed: int, rule: TokenReadingRule
    ) -> Sample:
        """Loads and augments one image; safe in threads. ValueError names one that is damaged or below one patch."""
        capture, view = self.captures[draw.scene], self.views[draw.scene][draw.view]
        augmentation = draw_augmentation(config, view.width, view.height, patch_size, seed, draw)
        window = augmentation.window
        # (h, w, 3) -> (3, h, w)
        image = capture.load_image(view).permute(2, 0, 1).float() / 255.0
        mask = window.apply_to_map(capture.load_valid_mask(view).float()[None])[0]
        patch_grid = compute_patch_grid(window.height, window.width, patch_size)
        return Sample(
            draw=draw,
            scene_id=capture.scene_id,
            view=view,
            augmentation=augmentation,
            image=augmentation.apply_to_image(image),
            mask=read_at_tokens(mask[..., None], patch_grid, rule)[..., 0],
        )
