"""Viewer controls of the feature pictures: fit the colours to what is on screen, or go back to the whole scene's."""

from typing import Any

from nerfstudio.viewer.viewer_elements import ViewerButton

from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.plugin.feature_branch import FeatureBranch


class FeatureViewerControls:
    """Two buttons under "Custom Elements"; colours change only when one is pressed, never from frame to frame."""

    def __init__(self, branch: FeatureBranch) -> None:
        self.fit_button = ViewerButton("Fit feature colours to this view", cb_hook=self._fit)
        self.reset_button = ViewerButton("Feature colours of the scene", cb_hook=self._reset)
        self._branch = branch
        self._scene_basis: PcaBasis | None = None

    def _fit(self, button: Any) -> None:
        branch = self._branch
        current = branch.picture_basis
        if current is None:
            return
        if self._scene_basis is None:
            self._scene_basis = current
        fitted = branch.fit_basis_to_last_picture()
        if fitted is not None:
            branch.set_picture_basis(fitted)

    def _reset(self, button: Any) -> None:
        if self._scene_basis is not None:
            self._branch.set_picture_basis(self._scene_basis)
