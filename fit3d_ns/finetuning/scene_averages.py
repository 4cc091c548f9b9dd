"""`SceneAverages`: the features of scenes, averaged over their lifted views once, and kept for when a scene returns.

A scene's averaged features are as large as those of its file (128 MB for a million Gaussians of 64 channels), so 230
scenes do not fit beside everything else: they stay in memory within a budget, and beyond it on disk if there is a
folder; where neither has room they are computed again. Kept or computed they are the same half-precision numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fit3d_ns.finetuning.lifted_views import MAX_AVERAGED_VIEWS, average_lifted_views, name_average
from fit3d_ns.finetuning.scene_fingerprint import compute_fingerprint
from fit3d_ns.scene import FeatureScene
from fit3d_ns.utils.files import hash_bytes
from fit3d_ns.utils.tensor_store import TensorStore


class SceneAverages:
    """Averaged features of the scenes of one bank."""

    def __init__(
        self,
        scenes: Sequence[FeatureScene],
        store: TensorStore,
        data_root: Path | None = None,
        max_views: int | None = MAX_AVERAGED_VIEWS,
    ):
        """Args:
        scenes: The scenes as opened; nothing of their Gaussians is read here.
        store: Where averaged features are kept.
        data_root: Where captures and their masks lie now, if they were moved.
        max_views: Views of each scene that are averaged over, at most; None for all.
        """
        self.scenes = scenes
        self.store = store
        self.num_averaged = 0
        self._data_root = data_root
        self._max_views = max_views
        self._names: dict[int, str] = {}

    def apply(self, index: int, scene: FeatureScene) -> FeatureScene:
        """The scene with averaged features.

        Args:
            index: Which of the scenes.
            scene: The same, ready to render on any device, with the features of its file.

        Raises:
            ValueError: The capture is not there, a mask is damaged, or the disk is full.
        """
        name = self.compute_name(index)
        kept = self.store.load(name)
        if kept is not None:
            features = kept["features"].to(scene.gaussians.features.device)
            return replace(scene, gaussians=scene.gaussians.with_features(features))
        averaged = average_lifted_views(scene, self._data_root, self._max_views)
        self.num_averaged += 1
        self.store.save(name, {"features": averaged.gaussians.features.cpu()})
        return averaged

    def compute_name(self, index: int) -> str:
        """Hashes everything that the averaged features of a scene depend on.

        Raises:
            ValueError: The capture is not there.
        """
        if index not in self._names:
            scene = self.scenes[index]
            self._names[index] = hash_bytes(
                compute_fingerprint(scene).encode(), name_average(scene, self._data_root, self._max_views).encode()
            )
        return self._names[index]
