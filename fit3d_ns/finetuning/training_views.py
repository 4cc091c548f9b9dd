"""`TrainingViews`: the photographs that scenes bring along, and how one of them becomes a training sample.

Pixels come from `PosedCapture.load_image`, as in the lift: resized and undistorted by the same code. Loading is all
that worker threads do; rendering belongs to the main thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.features import compute_patch_grid
from fit3d_ns.finetuning.draws import Augmentation, AugmentationConfig, Draw, draw_augmentation
from fit3d_ns.scene import FeatureScene, PosedCapture, TokenReadingRule, View, read_at_tokens
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.progress import notice


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
        """Rows and columns of tokens."""
        return self.mask.shape[0], self.mask.shape[1]

    @property
    def camera(self) -> tuple[Float[Tensor, "3 4"], Float[Tensor, "3 3"], int, int]:
        """`camera_to_world, K, width, height` of what is shown, before the flip."""
        window = self.augmentation.window
        return self.view.camera_to_world, window.apply_to_K(self.view.K), window.width, window.height


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
        """Finds the photographs; nothing of the scenes' Gaussians is read.

        Args:
            splits: Which views of each scene count; none at all leaves the scene out. Views the lift has not seen
                give novel-view targets.
            data_root: Where photographs lie now: the capture's own folder, or one that holds it.
            is_strict: Refuse a missing photograph instead of skipping its view.

        Raises:
            ValueError: All photographs of a scene are gone, one is and `is_strict`, or no view is left.
        """
        self.captures: list[PosedCapture] = []
        self.views: list[list[View]] = []
        self.num_missing = 0
        for scene, own in zip(scenes, splits, strict=True):
            capture = locate_capture(scene, data_root) if own else scene.posed_capture
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
        """Number of usable views of each scene."""
        return [len(views) for views in self.views]

    @property
    def views_hash(self) -> str:
        """Number and hash of the views that are drawn from, by scene and photograph."""
        names = [f"{scene}/{view.name}".encode() for scene, views in enumerate(self.views) for view in views]
        return f"{len(names)} images {hash_bytes(*names)}"

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


def locate_capture(scene: FeatureScene, data_root: Path | None) -> PosedCapture:
    """The scene's capture where its photographs are; ValueError where none is found.

    `data_root` is the capture's folder or one above it: the recorded path's tail is looked for below it.
    """
    if data_root is None:
        return scene.capture()
    recorded = scene.posed_capture
    tails = [Path(*recorded.root.parts[-length:]) for length in range(1, len(recorded.root.parts))]
    for root in [data_root, *(data_root / tail for tail in tails), data_root / scene.scene_id]:
        if any((root / view.name).is_file() for view in recorded.views):
            return scene.capture(root)
    first = recorded.views[0].name if recorded.views else ""
    raise ValueError(
        f"The photographs of scene {scene.scene_id} are not below --data-root {data_root} (looked for {first} there "
        f"and in its folder {recorded.root.name}); give the folder that holds them."
    )
