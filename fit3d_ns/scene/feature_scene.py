"""`FeatureScene`: a lifted scene that renders colour, depth and backbone features from any camera.

Cameras are in the scene's frame (the training frame).
Nothing here needs nerfstudio or the ViT. Rendering takes no gradients: a scene is a teacher.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import DepthView
from fit3d_ns.analysis.pca import PcaBasis
from fit3d_ns.features import BackboneDescription
from fit3d_ns.geometry.cameras import Camera
from fit3d_ns.rasterization import RasterizeMode, rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder, TokenReadingRule, create_token_reader
from fit3d_ns.scene.gaussians import ActivatedGaussians, Gaussians
from fit3d_ns.scene.photograph_roots import check_root
from fit3d_ns.scene.posed_capture import PosedCapture, View
from fit3d_ns.utils.tensor_files import TensorFile

MIN_DEPTH_ALPHA = 0.5
"""Rendered depth counts where at least this much opacity stands behind it."""


@dataclass(frozen=True)
class FeatureScene:
    """Feature Gaussians, their decoder, and the captured views they came from."""

    gaussians: Gaussians
    decoder: FeatureDecoder
    posed_capture: PosedCapture
    """The captured views as recorded; `capture` finds their photographs."""
    backbone: BackboneDescription
    """What the features are features of."""
    pca: PcaBasis | None = None
    """Basis of the decoded features with fixed colours, if one was fitted."""
    token_reading: TokenReadingRule = "bilinear"
    """How the lift read the map at tokens; the default of every reading."""
    rasterize_mode: RasterizeMode = "classic"
    """Mode the Gaussians were trained in; rendering in another one changes their size."""
    eps2d: float = 0.3
    """Blur of projected Gaussians in squared pixels, as trained."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Numbers of the run that made the scene, plain JSON values."""
    lifted_views: tuple[str, ...] | None = None
    """Names of the captured views whose tokens the features came from; None where that was not recorded."""
    file: TensorFile | None = field(default=None, repr=False, compare=False)
    """The scene file it was loaded from; None for a scene that was made here."""

    def __post_init__(self) -> None:
        if self.decoder.feature_dim != self.gaussians.feature_dim:
            raise ValueError(
                f"The decoder takes {self.decoder.feature_dim} channels, the Gaussians carry "
                f"{self.gaussians.feature_dim}; lift and decode with the same dimension."
            )
        if self.decoder.embed_dim != self.backbone.embed_dim:
            raise ValueError(
                f"The decoder gives {self.decoder.embed_dim} channels, {self.backbone.backbone} has "
                f"{self.backbone.embed_dim}; the decoder belongs to another backbone."
            )
        if self.pca is not None and self.pca.mean.shape[0] != self.decoder.embed_dim:
            raise ValueError(f"The PCA basis is {self.pca.mean.shape[0]} wide, the features {self.decoder.embed_dim}.")
        unknown = [name for name in self.lifted_views or () if name not in self.posed_capture.name_to_view]
        if unknown:
            raise ValueError(f"The capture has no view {unknown[0]}, from which the features are said to be lifted.")

    @property
    def scene_id(self) -> str:
        return self.posed_capture.scene_id

    @property
    def source(self) -> Path | None:
        return None if self.file is None else self.file.path

    @property
    def num_bytes(self) -> int:
        """Bytes that the scene holds on its device when it is ready to render: stored and activated tensors."""
        stored = self.gaussians.bytes_per_gaussian * self.gaussians.num_gaussians
        activated = 4 * (12 + self.gaussians.feature_dim) * self.gaussians.num_gaussians
        return int(stored + activated + 4 * self.decoder.weight.numel())

    @cached_property
    def activated(self) -> ActivatedGaussians:
        """The Gaussians as the rasterizer takes them; made at the first rendering and kept while the scene lives."""
        self.check()
        return self.gaussians.activate(self.rasterize_mode, self.eps2d)

    @cached_property
    def features_and_one(self) -> Float[Tensor, "num_gaussians dim_and_one"]:
        """Features, and a last channel of ones, which blends to the accumulated opacity; kept like `activated`."""
        self.check()
        return F.pad(self.gaussians.features.float(), (0, 1), value=1.0)

    def check(self) -> None:
        """Reads the scene's file whole, once; everything that renders or moves the scene calls this first.

        ValueError where it is damaged, or a number in it is not finite.
        """
        if self.file is not None:
            self.file.check()

    def to(self, device: torch.device | str) -> "FeatureScene":
        self.check()
        pca = None if self.pca is None else self.pca.to(device)
        return replace(self, gaussians=self.gaussians.to(device), decoder=self.decoder.copy_to(device), pca=pca)

    @torch.no_grad()
    def render_rgb(
        self, camera_to_world: Float[Tensor, "3 4"], K: Float[Tensor, "3 3"], width: int, height: int
    ) -> Float[Tensor, "height width 3"]:
        """Colour in [0, 1] before a black background; without stored SH it does not depend on the direction."""
        camera = Camera(camera_to_world, K, width, height)
        renders, _ = self.activated.render(self.gaussians.colours, camera, sh_degree=self.gaussians.sh_degree)
        return renders.clamp(0.0, 1.0)

    @torch.no_grad()
    def render_depth(self, camera: Camera) -> tuple[Float[Tensor, "height width"], Float[Tensor, "height width"]]:
        """Expected z-depth in units of the frame, 0 where nothing is, and accumulated opacity."""
        nothing = self.activated.means.new_zeros(len(self.activated), 1)
        depth, alphas = self.activated.render(nothing, camera, render_mode="ED")
        return torch.where(alphas > 0, depth[..., 0], 0.0), alphas

    def render_features(
        self,
        camera_to_world: Float[Tensor, "3 4"],
        K: Float[Tensor, "3 3"],
        width: int,
        height: int,
        size: tuple[int, int],
        token_reading: TokenReadingRule | None = None,
    ) -> Float[Tensor, "h w embed"]:
        """Backbone features at the token grid: what rendering at full size, decoding and resizing gives.

        Args:
            K: Intrinsics for a picture of `width` x `height` pixels, of which each token reads its part.
            size: Token grid (h, w).
            token_reading: How a token reads the picture; the lift's own rule by default.
        """
        camera = Camera(camera_to_world, K, width, height)
        return self.render_features_with_alpha(camera, size, token_reading)[0]

    @torch.no_grad()
    def render_features_with_alpha(
        self, camera: Camera, size: tuple[int, int], token_reading: TokenReadingRule | None = None
    ) -> tuple[Float[Tensor, "h w embed"], Float[Tensor, "h w"]]:
        """As `render_features`, with the accumulated opacity of each token, which is read by the same rule."""
        size = (int(size[0]), int(size[1]))
        rule = token_reading or self.token_reading
        reader = create_token_reader(camera.width, camera.height, size, rule, device=self.gaussians.means.device)
        blended = reader.blend(self.features_and_one, self.activated.project(camera))[0]
        low, alphas = blended[:, :-1], blended[:, -1]
        features = self.decoder.decode_pixels(low[None], alphas[None], reader)[0]
        return features, reader.read(alphas[:, None])[..., 0]

    @torch.no_grad()
    def render_features_low(
        self, camera: Camera
    ) -> tuple[Float[Tensor, "height width dim"], Float[Tensor, "height width"]]:
        """The blended features before the decoder at every pixel, and accumulated opacity."""
        blended = rasterize_features(self.features_and_one, self.activated.project(camera))[0]
        return blended[..., :-1], blended[..., -1]

    def render_coefficients(
        self, camera: Camera, components: Float[Tensor, "components embed"], mean: Float[Tensor, " embed"]
    ) -> tuple[Float[Tensor, "height width components"], Float[Tensor, "height width"]]:
        """Coefficients of the backbone features in a basis, at every pixel, and accumulated opacity.

        A few channels for pictures as sharp as the Gaussians are, without ever decoding all; empty pixels are zero.
        """
        low, alphas = self.render_features_low(camera)
        return self.decoder.project(components.to(low), mean.to(low))(low, alphas).detach(), alphas

    def capture(self, data_root: Path | None = None) -> PosedCapture:
        """The captured views with paths that exist; a capture that was moved since is `data_root`, or in a folder below
        it that is called as before.

        Without `data_root`, a scene file's own word counts only within its folder and within confirmed roots
        (`photograph_roots.py`). ValueError where none of the photographs is there, or nobody confirmed the folder that
        the file names.
        """
        recorded = self.posed_capture
        if data_root is None and self.source is not None:
            check_root(recorded.root, self.source)
        roots = [recorded.root]
        if data_root is not None:
            tails = [Path(*recorded.root.parts[-length:]) for length in range(1, len(recorded.root.parts))]
            roots = [data_root, *(data_root / tail for tail in tails), data_root / self.scene_id]
        for root in roots:
            # Single photographs that are gone are the caller's to skip or refuse.
            if not recorded.views or any((root / view.name).is_file() for view in recorded.views):
                return recorded if data_root is None else recorded.move(root)
        raise ValueError(
            f"The photographs of scene {self.scene_id} are not in {roots[0]} or a folder below it that is called "
            f"{recorded.root.name} (looked for {recorded.views[0].name}); say where they are now with --data-root."
        )


def create_depth_view(capture: PosedCapture, view: View, get_scene: Callable[[], FeatureScene] | None) -> DepthView:
    """Depth, camera and valid mask of a view, on the CPU, in the unit of the poses.

    The scene that `get_scene` gives renders depth where none is measured or its unit is not known. ValueError where
    there is neither measured depth nor a scene.
    """
    depth = capture.load_depth(view) if capture.metric_scale is not None else None
    if depth is not None and capture.metric_scale is not None:
        depth = depth * capture.metric_scale
    elif get_scene is not None:
        rendered, alphas = get_scene().render_depth(view.camera)
        depth = torch.where(alphas >= MIN_DEPTH_ALPHA, rendered, 0.0).cpu()
    else:
        problem = f"{capture.root} has no depth map for {view.name}"
        raise ValueError(f"{problem}; give a capture with depth (dslr/render_depth) or a scene file.")
    return DepthView(depth, view.K, view.camera_to_world, capture.load_valid_mask(view))
