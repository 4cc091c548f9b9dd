"""Which views of a scene file were lifted, and averaging its features over them."""

from pathlib import Path

from fit3d_ns.features import compute_patch_grid
from fit3d_ns.finetuning.training_views import locate_capture
from fit3d_ns.lifting.view_average import SAMPLES_PER_PATCH, average_over_views
from fit3d_ns.scene import FeatureScene, PosedCapture, View
from fit3d_ns.utils.files import hash_bytes, hash_file
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.selection import select_evenly

MAX_AVERAGED_VIEWS = 64
"""Views that are averaged over, evenly spread; more cost time and change little."""


def find_lifted(scene: FeatureScene) -> list[View]:
    """The views that a scene was lifted from, as its file says.

    Files of earlier versions do not name them: then its training views, or as many of them as the lift's figures
    count, chosen as those versions chose.
    """
    if scene.lifted_views is not None:
        return [scene.posed_capture.name_to_view[name] for name in scene.lifted_views]
    train = scene.posed_capture.select("train")
    number = scene.metrics.get("num_train_views")
    return select_evenly(train, number if isinstance(number, int) else None)


def find_averaged(scene: FeatureScene, capture: PosedCapture, max_views: int | None) -> list[View]:
    """The lifted views over which features are averaged, with the paths of `capture`.

    Views whose mask is gone stay out: nobody knows which of their pixels may be used.

    Args:
        capture: The scene's capture where its masks are now.
        max_views: At most so many, evenly spread; None for all.
    """
    return select_evenly(_find_usable(scene, capture), max_views)


def average_lifted_views(
    scene: FeatureScene, data_root: Path | None = None, max_views: int | None = MAX_AVERAGED_VIEWS
) -> FeatureScene:
    """The scene with its features averaged over the lifted views, see `lifting/view_average.py`.

    Args:
        scene: A scene that is ready to render.
        data_root: Where the capture with its masks lies now, if it was moved.
        max_views: At most so many of the views; None for all, so that any of them can be left out of the average.

    Raises:
        ValueError: The capture is not there, or a mask is damaged.
    """
    capture, patch_size = locate_capture(scene, data_root), scene.backbone.patch_size
    num_lifted, num_usable = len(find_lifted(scene)), len(_find_usable(scene, capture))
    if num_usable < num_lifted:
        notice(
            f"Features of scene {scene.scene_id} are averaged over {num_usable} of its {num_lifted} lifted views only: "
            "the masks of the others are gone."
        )
    return average_over_views(
        scene,
        find_averaged(scene, capture, max_views),
        lambda view: compute_patch_grid(view.height, view.width, patch_size),
        capture.load_valid_mask,
    )


def name_average(scene: FeatureScene, data_root: Path | None = None, max_views: int | None = MAX_AVERAGED_VIEWS) -> str:
    """Hashes the cameras and masks over which `average_lifted_views` averages; the scene itself has another name.

    Raises:
        ValueError: The capture is not there.
    """
    parts: list[object] = [SAMPLES_PER_PATCH, scene.backbone.patch_size]
    for view in find_averaged(scene, locate_capture(scene, data_root), max_views):
        mask = None if view.frame.mask_path is None else hash_file(view.frame.mask_path)
        parts += [view.name, view.width, view.height, view.K.tolist(), view.camera_to_world.tolist(), view.lens, mask]
    return hash_bytes(*(repr(part).encode() for part in parts))


def _find_usable(scene: FeatureScene, capture: PosedCapture) -> list[View]:
    lifted = [capture.name_to_view[view.name] for view in find_lifted(scene)]
    return [view for view in lifted if view.frame.mask_path is None or view.frame.mask_path.is_file()]
