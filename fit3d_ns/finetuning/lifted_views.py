"""Which views of a scene file were lifted, and averaging its features over them."""

from fit3d_ns.features.preprocessing import compute_patch_grid
from fit3d_ns.lifting.lift_source import select_evenly
from fit3d_ns.lifting.view_average import average_over_views
from fit3d_ns.scene import FeatureScene, View

MAX_AVERAGED_VIEWS = 64
"""Views that are averaged over, evenly spread: a scene that returns to the device is averaged anew."""


def find_lifted(scene: FeatureScene) -> list[View]:
    """The views that a scene was lifted from, as its file says.

    Files of earlier versions do not name them: then its training views, or as many of them as the lift's figures
    count, chosen as those versions chose.
    """
    if scene.lifted_views is not None:
        return [scene.posed_capture.name_to_view[name] for name in scene.lifted_views]
    train = scene.posed_capture.select("train")
    number = scene.figures.get("num_train_views")
    return select_evenly(train, number if isinstance(number, int) else None)


def average_lifted_views(scene: FeatureScene, max_views: int | None = MAX_AVERAGED_VIEWS) -> FeatureScene:
    """The scene with its features averaged over the lifted views, see `lifting/view_average.py`.

    Args:
        scene: A scene that is ready to render.
        max_views: At most so many of them; None for all, so that any of them can be left out of the average.
    """
    patch_size = scene.backbone.patch_size
    views = select_evenly(find_lifted(scene), max_views)
    return average_over_views(scene, views, lambda view: compute_patch_grid(view.height, view.width, patch_size))
