"""`SceneViewer`: a lifted scene in the browser, which draws the splats itself: viser sends them at each change.

A splat's own feature is what the decoder makes of a map that shows nothing else. Its taps then add up to a matrix M:
about the mean token the feature is M f + c, with the bias minus that mean as c. Where [M c] = Q R, the D + 1 numbers
R [f 1] have the same cosines and distances. Names of files and scenes stay out of the page: viser runs its texts as
code, and scenes come from strangers.
"""

import base64
import io
import math
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis import similarity
from fit3d_ns.analysis.pca import map_to_colours
from fit3d_ns.analysis.pictures import compose_panel, draw_pca, save_picture, to_pixels, upscale
from fit3d_ns.features import FeatureExtractor, create_extractor
from fit3d_ns.geometry.cameras import Camera, create_K
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.report.feature_figure import write_video
from fit3d_ns.report.token_columns import average_scene, resize
from fit3d_ns.scene import FeatureScene, View
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import select_evenly
from fit3d_ns.utils.stopping import ignore_other_processes

SplatColours = Literal["photograph", "features", "clusters", "similarity", "variance"]
_HELP = """Features: PCA in the colours that the scene fixes. Clusters: k-means of features. Similarity: cosine to the
splat at the green ball, red 1, white 0, blue -1. Variance: the redder, the more the lifted views disagree.
Click a camera to fly there and to see its features."""
_MAX_CAMERAS, _MAX_SAMPLE, _PANEL_WIDTH, _THUMBNAIL, _NUM_FRAMES, _FPS = 40, 20_000, 232, 160, 96, 24.0
_OPENCV_AXES = torch.tensor([1.0, -1.0, -1.0])
"""OpenGL's cameras look along -z with y up, viser's along z with y down."""


@dataclass(frozen=True)
class ViewerConfig:
    """What of a scene is shown."""

    colours: SplatColours = "features"
    """What splats are coloured by at first; the page has a menu. `features` is their PCA, `clusters` their k-means,
    `similarity` to a splat in the middle, `variance` how far the lifted views disagree."""
    max_splats: int = 300_000
    """Most splats to show, at least 1: those that make up most of the views; 32 bytes each per change of colours."""
    finetuned: tuple[str, ...] = ()
    """Fine-tuned backbones (folders of fit3d-finetune): a click on a camera shows the original's tokens, theirs and the
    lifted features below one another, in the colours of the scene."""
    backbone_weights: Path | None = None
    """File with the original's weights, if it is no longer where the scene says; for --finetuned."""
    data_root: Path | None = None
    """Where the photographs are now, if they were moved: a capture's folder or one above several."""


def select_splats(scene: FeatureScene, max_splats: int) -> tuple[FeatureScene, float]:
    """The scene with the splats that make up most of the lifted views (or most opacity), and the share that they do."""
    gaussians = scene.gaussians
    weight = gaussians.blend_weight.double()
    weight = weight if bool(weight.any()) else gaussians.opacity_logits.double().sigmoid()
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[weight.topk(min(max_splats, len(weight))).indices] = True
    share = float(weight[kept].sum() / weight.sum())
    return (scene if bool(kept.all()) else replace(scene, gaussians=gaussians.select(kept))), share


class ColouredSplats:
    """Splats of a scene and what they can be coloured by."""

    def __init__(self, scene: FeatureScene) -> None:
        """ValueError for a scene without Gaussians, or without the PCA that fixes its mean token and its colours."""
        if scene.pca is None or not scene.gaussians.num_gaussians:
            raise ValueError(f"Scene {scene.scene_id} has no Gaussians or no PCA colours; lift or export it again.")
        self.scene, self.pca, self.opacities = scene, scene.pca, scene.activated.opacities
        _, quats, scales, _ = scene.activated.geometry
        # Flat splats keep a thickness that survives being squared.
        scales = torch.maximum(scales, 1e-3 * scales.amax(dim=1, keepdim=True)).double()
        self._rotations, self._scales = rotations_from_quats(quats.double()), scales[:, None, :]
        axes = self._rotations * self._scales
        self.covariances = axes @ axes.transpose(1, 2)
        weight, bias = scene.decoder.weight.detach(), scene.decoder.bias
        offset = -self.pca.mean if bias is None else bias.detach() - self.pca.mean
        Q, R = torch.linalg.qr(torch.cat([weight.sum(dim=(2, 3)), offset[:, None]], dim=1))
        self.features = scene.features_and_one @ R.T
        """[N, D + 1]; the module says what they are."""
        self._components = self.pca.components[:3] @ Q

    def colour(self, colours: SplatColours, num_clusters: int, picked: int) -> Float[Tensor, "num_gaussians 3"]:
        """A colour in [0, 1] for each splat; similarities are to the splat `picked`."""
        if colours == "photograph":
            return (0.5 + 0.5 / math.sqrt(math.pi) * self.scene.gaussians.sh_dc.float()).clamp(0.0, 1.0)
        if colours == "features":
            return map_to_colours(self.features @ self._components.T, self.pca)
        if colours == "clusters":
            sample = self.features[select_evenly(range(len(self.features)), _MAX_SAMPLE)]
            clusters = similarity.fit_kmeans(sample, min(num_clusters, len(sample)), centre=False)
            return similarity.map_clusters_to_colours(similarity.apply_kmeans(self.features, clusters), num_clusters)
        if colours == "similarity":
            cosines = similarity.compute_similarity(self.features, self.features[picked])
            return similarity.map_similarity_to_colours(cosines)
        variance = self.scene.gaussians.feature_variance.float()
        low, high = variance.sort().values[[int(share * (len(variance) - 1)) for share in (0.01, 0.99)]]
        return similarity.map_similarity_to_colours((variance - low) / (high - low).clamp(min=1e-12))

    def pick(self, origin: Float[Tensor, "3"], direction: Float[Tensor, "3"]) -> int | None:
        """The splat in which a ray has lost half of its light, or None where it never does."""
        # Where a splat is a unit sphere, the ray passes it most closely at `along`.
        to_sphere = (self._rotations / self._scales).transpose(1, 2)
        start = (to_sphere @ (origin.to(to_sphere) - self.scene.gaussians.means)[..., None])[..., 0]
        ray = to_sphere @ direction.to(to_sphere)
        along = -(start * ray).sum(dim=1) / ray.square().sum(dim=1)
        squared = (start + along[:, None] * ray).square().sum(dim=1)
        order = along.argsort()
        light = torch.cumprod(1.0 - (self.opacities * torch.exp(-0.5 * squared) * (along > 0))[order], dim=0)
        return int(order[(light <= 0.5).int().argmax()]) if bool(light[-1] <= 0.5) else None


def create_flight(views: Sequence[View], num_frames: int) -> list[Float[Tensor, "3 4"]]:
    """Cameras (OpenGL) along the views in their order, as a mean over neighbours: without the shake of a hand."""
    poses = torch.stack([view.camera_to_world for view in views])
    steps = torch.linspace(0.0, len(views) - 1.0, num_frames)[:, None] - torch.arange(len(views))
    smooth = torch.tensordot(torch.softmax(-0.5 * (steps / (0.02 * len(views))) ** 2, dim=1), poses, dims=1)
    backwards = F.normalize(smooth[:, :, 2], dim=1)
    right = F.normalize(torch.linalg.cross(smooth[:, :, 1], backwards), dim=1)
    return list(torch.stack([right, torch.linalg.cross(backwards, right), backwards, smooth[:, :, 3]], dim=-1))


def open_server(host: str, port: int) -> Any:
    """A viser server at the first free port from `port` on; ValueError where viser is not installed."""
    try:
        import viser
    except ModuleNotFoundError as error:
        raise ValueError("fit3d-view needs viser, which comes with nerfstudio: `pip install viser`.") from error
    with ignore_other_processes():
        return viser.ViserServer(host=host, port=port, verbose=False)


class SceneViewer:
    """The splats, the capture's cameras, and the controls."""

    def __init__(self, scene: FeatureScene, config: ViewerConfig) -> None:
        """ValueError where a backbone cannot be loaded or is not the scene's, or the scene has nothing to show."""
        if config.max_splats < 1:
            raise ValueError(f"--max-splats {config.max_splats} must be at least 1.")
        try:
            capture = scene.capture(config.data_root)
        except ValueError as error:
            notice(f"Shown without photographs: {error}")
            capture = scene.posed_capture.move(Path(os.devnull))
        own: Any = [("original", scene.backbone.with_weights(config.backbone_weights))] if config.finetuned else []
        self.extractors: dict[str, FeatureExtractor] = {}
        for name, backbone in (*own, *((name, name) for name in config.finetuned)):
            extractor = self.extractors[name] = create_extractor(backbone, device=scene.gaussians.means.device)
            if extractor.embed_dim != scene.decoder.embed_dim:
                raise ValueError(f"{name} is not fine-tuned from the backbone of the scene, {scene.backbone.backbone}.")
        shown, share = select_splats(scene, config.max_splats)
        counts = f"{shown.gaussians.num_gaussians:,} of {scene.gaussians.num_gaussians:,}"
        notice(f"Shown are {counts} splats, which make up {share:.1%} of the lifted views (--max-splats).")
        self.splats = splats = ColouredSplats(average_scene(shown, capture))
        self.colours, self.threshold, self.num_clusters, self.capture = config.colours, 0.0, 8, capture
        self.middle = capture.views[len(capture.views) // 2]
        self.up = F.normalize(torch.stack([view.camera_to_world[:, 1] for view in capture.views]).sum(dim=0), dim=0)
        position = self.middle.camera_to_world[:, 3]
        self.picked = splats.pick(position, -self.middle.camera_to_world[:, 2]) or 0
        self.reach = max(float((splats.scene.gaussians.means[self.picked].cpu() - position).norm()), 0.1)
        self.rgb = splats.colour(self.colours, self.num_clusters, self.picked)
        self._lock, self._num_changes, self._is_odd = threading.Lock(), 0, False
        self._frusta: dict[str, Any] = {}
        self._shown: Any = None

    def save(self, path: Path) -> None:
        """Writes a picture (.png) from the camera in the middle of the capture, or a turntable (.mp4)."""
        if path.suffix == ".png":
            save_picture(self.draw(self.middle.camera_to_world, self.middle.width / self.middle.height), path)
        else:
            poses = track(create_flight(self.capture.views, _NUM_FRAMES), "Drawing the turntable")
            write_video((to_pixels(self.draw(pose, 4 / 3)) for pose in poses), path, _FPS)

    def draw(
        self, pose: Float[Tensor, "3 4"], aspect: float, width: int = 960, field_of_view: float | None = None
    ) -> Float[Tensor, "height width 3"]:
        """A picture in [0, 1] before white, drawn here; `pose` is OpenGL's, the field of view vertical, in radians."""
        height, kept = round(width / aspect), self.splats.opacities >= self.threshold
        focal = 0.5 * height / math.tan(0.5 * (field_of_view or _field_of_view(self.middle)))
        K, shown = create_K(focal, focal, 0.5 * width, 0.5 * height), self.splats.scene.activated.select(kept)
        picture, alphas = shown.render(self.rgb[kept], Camera(pose, K, width, height))
        return picture + 1.0 - alphas[..., None]

    def show(self, server: Any) -> None:
        """Fills the page of a viser server."""
        from viser.transforms import SO3

        self.server, gui = server, server.gui
        server.scene.set_up_direction(self.up.numpy())
        self._choice = gui.add_dropdown("Colours", get_args(SplatColours), initial_value=self.colours)
        clusters = gui.add_slider("Clusters", min=2, max=20, step=1, initial_value=self.num_clusters)
        self._opacity = gui.add_slider("Opacity from %", min=0, max=95, step=5, initial_value=0)
        cameras = server.scene.add_frame("/cameras", show_axes=False)
        has_cameras = gui.add_checkbox("Cameras", initial_value=True)
        pick = gui.add_button("Click a splat", hint="The next click in the scene shows what is similar.")
        picture, turntable = gui.add_button("Screenshot"), gui.add_button("Turntable", hint="Takes a minute or more.")
        self._comparison = gui.add_markdown(_HELP)

        def change(_: Any) -> None:
            self.colours, self.num_clusters = self._choice.value, clusters.value
            self.threshold = self._opacity.value / 100
            self.send_splats()

        for control in (self._choice, clusters, self._opacity):
            control.on_update(change)
        has_cameras.on_update(lambda _: setattr(cameras, "visible", has_cameras.value))
        # For one click only: while viser waits for clicks, the mouse does not turn the scene.
        pick.on_click(lambda _: server.scene.on_pointer_event("click")(self._take_click))
        picture.on_click(self._take_picture)
        turntable.on_click(self._take_turntable)
        server.on_client_connect(lambda client: self._fly(client, self.middle))
        for view in select_evenly(self.capture.views, _MAX_CAMERAS):
            has_photograph, axes = view.frame.image_path.is_file(), view.camera_to_world[:, :3] * _OPENCV_AXES
            image = resize(self.capture.load_image(view), _THUMBNAIL).numpy() if has_photograph else None
            pose = {"wxyz": SO3.from_matrix(axes.numpy()).wxyz, "position": view.camera_to_world[:, 3].numpy()}
            frustum = self._frusta[view.name] = server.scene.add_camera_frustum(
                f"/cameras/{len(self._frusta)}", _field_of_view(view), view.width / view.height, 0.05 * self.reach,
                image=image, **pose,
            )  # fmt: skip
            frustum.on_click(partial(self._visit, view))
        self.send_splats()

    def send_splats(self) -> None:
        """Sends the splats in their colours, unless a later change waits already."""
        self._num_changes += 1
        change = self._num_changes
        with self._lock:
            if change != self._num_changes:
                return
            self.rgb = self.splats.colour(self.colours, self.num_clusters, self.picked)
            api, means, opacities = self.server.scene, self.splats.scene.gaussians.means, self.splats.opacities
            # The name lost its underscore after viser 0.2.
            send = getattr(api, "add_gaussian_splats", None) or api._add_gaussian_splats
            parts = (means, self.splats.covariances, self.rgb, opacities[:, None])
            sent = [part[opacities >= self.threshold].cpu().numpy() for part in parts]
            # viser's page keeps the colours of splats that are sent again by their name.
            last, self._is_odd = self._shown, not self._is_odd
            with self.server.atomic():
                self._shown = send(f"/splats/{int(self._is_odd)}", *sent)
                if last is not None:
                    last.remove()
            ball = api.add_icosphere("/picked", 0.01 * self.reach, (0, 160, 60))
            ball.position, ball.visible = tuple(means[self.picked].tolist()), self.colours == "similarity"

    def compare(self, view: View) -> Image.Image:
        """Below one another the photograph, each extractor's tokens and the lifted features, in the scene's colours."""
        scene, pca = self.splats.scene, self.splats.pca
        size = round(_PANEL_WIDTH * view.height / view.width), _PANEL_WIDTH
        pictures = {}
        if view.frame.image_path.is_file():
            image = resize(self.capture.load_image(view), None).float() / 255.0
            pictures["photograph"] = upscale(image, size)
            for name, extractor in self.extractors.items():
                # (h, w, 3) -> (1, 3, h, w)
                tokens = extractor(image.permute(2, 0, 1)[None]).maps[0]
                pictures[name] = draw_pca(tokens, pca.to("cpu"), size)
        coefficients, alphas = scene.render_coefficients(view.camera, pca.components[:3], pca.mean)
        pictures["lifted"] = upscale(map_to_colours(coefficients, pca, alphas).cpu(), size)
        return compose_panel([[picture] for picture in pictures.values()], row_labels=list(pictures))

    def _visit(self, view: View, event: Any) -> None:
        self._fly(event.client, view)
        picture = io.BytesIO()
        self.compare(view).save(picture, format="PNG")
        self._comparison.content = f"![](data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()})"

    def _fly(self, client: Any, view: View) -> None:
        position, forward = view.camera_to_world[:, 3].double(), -view.camera_to_world[:, 2].double()
        with client.atomic():
            client.camera.up_direction, client.camera.position = self.up.double().numpy(), position.numpy()
            # What the mouse turns about.
            client.camera.look_at = (position + self.reach * forward).numpy()
            client.camera.fov = _field_of_view(view)
        # Its own photograph would hide what the camera sees.
        for name, frustum in self._frusta.items():
            frustum.visible = name != view.name

    def _take_click(self, event: Any) -> None:
        self.server.scene.remove_pointer_callback()
        picked = self.splats.pick(torch.tensor(event.ray_origin), torch.tensor(event.ray_direction))
        if picked is not None:
            self.picked = picked
            # Another choice sends the splats itself.
            if self._choice.value == "similarity":
                self.send_splats()
            self._choice.value = "similarity"

    def _take_picture(self, event: Any) -> None:
        camera, content = event.client.camera, io.BytesIO()
        rotation = rotations_from_quats(torch.tensor(camera.wxyz)[None])[0] * _OPENCV_AXES
        pose = torch.cat([rotation, torch.tensor(camera.position)[:, None]], dim=1).float()
        Image.fromarray(to_pixels(self.draw(pose, camera.aspect, field_of_view=camera.fov))).save(content, format="PNG")
        event.client.send_file_download("view.png", content.getvalue())

    def _take_turntable(self, event: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.save(path := Path(folder) / "view.mp4")
            event.client.send_file_download(path.name, path.read_bytes())


def _field_of_view(view: View) -> float:
    """Vertical, in radians."""
    return 2.0 * math.atan2(0.5 * view.height, float(view.K[1, 1]))
