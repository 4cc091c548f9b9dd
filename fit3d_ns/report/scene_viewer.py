"""`SceneViewer`: a lifted scene in the browser, which draws the splats itself: viser sends them at each change.

viser runs a page's texts as code, and scenes come from strangers: no name is in them unless it has lost code's signs.
"""

import asyncio
import io
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.pictures import Picture, compose_panel, save_picture, to_pixels
from fit3d_ns.analysis.similarity import compute_similarity
from fit3d_ns.features import FeatureExtractor, create_extractor
from fit3d_ns.features.text_tower import load_text_tower
from fit3d_ns.geometry.cameras import Camera, create_K
from fit3d_ns.lifting.blending import average_over_views
from fit3d_ns.rasterization.projection import rotations_from_quats
from fit3d_ns.report.feature_figure import write_video
from fit3d_ns.report.splat_colours import ColouredSplats, Colours, SplatColours, ViewerConfig, find_heaviest
from fit3d_ns.report.token_columns import MAX_AVERAGED_VIEWS, extract_tokens, resize
from fit3d_ns.scene import FeatureScene, View
from fit3d_ns.utils.progress import notice, track
from fit3d_ns.utils.selection import select_evenly
from fit3d_ns.utils.stopping import ignore_other_processes

ORIGINAL, LIFTED = "original", "lifted"
_MAX_CAMERAS, _THUMBNAIL, _FRUSTUM, _NUM_FRAMES, _FPS = 40, 160, 0.05, 96, 24.0
Pose = Float[Tensor, "3 4"]
_OPENCV_AXES = torch.tensor([1.0, -1.0, -1.0])
"""OpenGL's cameras look along -z with y up, viser's along z with y down."""


def open_server(host: str, port: int) -> Any:
    """A viser server at the first free port from `port` on; ValueError where viser is not installed."""
    try:
        import viser
    except ModuleNotFoundError as error:
        raise ValueError("fit3d-view needs viser, which comes with nerfstudio: `pip install viser`.") from error
    if protocols := sys.modules.get("websockets.legacy.protocol"):
        protocols.WebSocketCommonProtocol._drain_helper = _wait_for_browser
    with ignore_other_processes():
        return viser.ViserServer(host=host, port=port, verbose=False)


async def _wait_for_browser(protocol: Any) -> None:
    """Instead of websockets' own, which drops a slow browser where two of viser's senders wait for it."""
    while protocol._paused and not protocol.connection_lost_waiter.done():
        await asyncio.sleep(0.01)


class SceneViewer:
    """The splats, the capture's cameras, and the controls."""

    def __init__(self, scene: FeatureScene, config: ViewerConfig) -> None:
        """ValueError where the scene has nothing to show; what else cannot be shown, `problem` says in a sentence."""
        self._backbone, self._weights, self._missing = scene.backbone, config.backbone_weights, ""
        try:
            self.capture = scene.capture(config.data_root)
        except ValueError as error:
            self._missing = str(error)
            notice(f"Shown without photographs: {error}")
            self.capture = scene.posed_capture.move(Path(os.devnull))
        several, names = len(config.finetuned) > 1, enumerate(config.finetuned, 1)
        self.finetuned = {f"fine-tuned {number}" if several else "fine-tuned": name for number, name in names}
        device, text_model = scene.gaussians.means.device, config.text_model
        self.tower = load_text_tower(text_model, scene.backbone, device) if text_model else None
        kept, share = find_heaviest(scene.gaussians, config.max_splats)
        shown = replace(scene, gaussians=scene.gaussians.select(kept))
        counts = f"{shown.gaussians.num_gaussians:,} of {scene.gaussians.num_gaussians:,}"
        notice(f"Shown are {counts} splats, which make up {share:.1%} of the lifted views (--max-splats).")
        self.splats = splats = ColouredSplats(average_over_views(shown, self.capture, MAX_AVERAGED_VIEWS))
        self.means = splats.scene.gaussians.means
        self.middle = self.capture.views[len(self.capture.views) // 2]
        ups = torch.stack([view.camera_to_world[:, 1] for view in self.capture.views])
        self.up = F.normalize(ups.sum(dim=0), dim=0)
        position = self.middle.camera_to_world[:, 3]
        _, picked = splats.pick(position, -self.middle.camera_to_world[:, 2])
        self.marker = self.means[picked].cpu()
        self.reach = max(float((self.marker - position).norm()), 0.1)
        self.cosines = compute_similarity(splats.features, splats.features[picked])
        if config.text:
            self.find_text(config.text)
        self.threshold, self.share, self.num_clusters, self._photographed = 0.0, 1.0, 8, dict[str, Colours]()
        self.colours: str = "features"
        self.columns, self.problem = self.colour(), ""
        usual = "comparison" if self.finetuned else "features"
        self.colours = config.colours or ("similarity" if config.text else usual)
        self.recolour()
        if self.problem:
            notice(self.problem)
        self._lock, self._num_changes, self._is_odd, self._is_picking = threading.Lock(), 0, False, False
        self._frusta, self._shown = dict[str, tuple[View, Any]](), list[Any]()

    def recolour(self) -> None:
        """Takes the colours that are chosen; where they cannot be had, the last ones stay and `problem` says why."""
        try:
            self.columns, self.problem = self.colour(), ""
        except ValueError as error:
            self.problem = f"The {self.colours} colours cannot be shown: {error}"

    def colour(self) -> dict[str, Colours]:
        """The colours that are chosen, or those of each copy of a comparison; ValueError without its photographs."""
        of_photographs = (ORIGINAL, *self.finetuned)
        labels = (*of_photographs, LIFTED) if self.colours == "comparison" else (self.colours,)
        needed = [label for label in labels if label in of_photographs and label not in self._photographed]
        for label, extractor in [(label, self.load(label)) for label in needed]:
            self._photographed[label] = self.splats.colour_by_photographs(extractor, self.capture)
        own: Any = "features" if LIFTED in labels else self.colours
        others = {} if own in of_photographs else {labels[-1]: self.splats.colour(own, self.num_clusters, self.cosines)}
        return {label: self._photographed[label] for label in labels if label in of_photographs} | others

    @cache  # noqa: B019 - one viewer is a command.
    def load(self, label: str) -> FeatureExtractor:
        """The original or a fine-tuned backbone; ValueError where it is gone or another's, or photographs are."""
        if self._missing:
            raise ValueError(self._missing)
        name = self.finetuned.get(label) or self._backbone.with_weights(self._weights)
        extractor = create_extractor(name, device=self.means.device)
        own, other = (part.architecture.partition(".")[0] for part in (self._backbone, extractor.description))
        if own != other:
            raise ValueError(f"{name} is not fine-tuned from the scene's {self._backbone.label}.")
        return extractor

    def save(self, path: Path) -> None:
        """Writes a picture (.png) from the camera in the middle of the capture, or a turntable (.mp4)."""
        if self.problem:
            raise ValueError(self.problem)
        if path.suffix == ".png":
            save_picture(self.draw_columns(self.middle.camera_to_world, self.middle.width / self.middle.height), path)
        else:
            poses = track(create_flight(self.capture.views, _NUM_FRAMES), "Drawing the turntable")
            write_video((np.asarray(self.draw_columns(pose, 4 / 3)) for pose in poses), path, _FPS)

    def draw_columns(self, pose: Pose, aspect: float, angle: float = 0.0) -> Image.Image:
        """A picture in the chosen colours; of a comparison one for each copy, side by side."""
        width = 960 if len(self.columns) == 1 else 480
        pictures = [self.draw(pose, aspect, width, angle, rgb) for rgb in self.columns.values()]
        return compose_panel([pictures], list(self.columns)) if width < 960 else Image.fromarray(to_pixels(pictures[0]))

    def draw(self, pose: Pose, aspect: float, width: int = 960, angle: float = 0.0, rgb: Any = None) -> Picture:
        """A picture in [0, 1] before white, drawn here; `angle` is the vertical one in radians, 0 for a view's own."""
        height, kept = round(width / aspect), self.find_kept()
        focal = 0.5 * height / math.tan(0.5 * (angle or field_of_view(self.middle)))
        K, shown = create_K(focal, focal, 0.5 * width, 0.5 * height), self.splats.scene.activated.select(kept)
        rgb = next(iter(self.columns.values())) if rgb is None else rgb
        picture, alphas = shown.render(rgb[kept], Camera(pose, K, width, height))
        return picture + 1.0 - alphas[..., None]

    def show(self, server: Any) -> None:
        """Fills the page of a viser server."""
        from viser.transforms import SO3

        self.server, gui = server, server.gui
        server.scene.set_up_direction(self.up.numpy())
        choices = [*get_args(SplatColours), ORIGINAL, *self.finetuned]
        self._problem = gui.add_markdown("")
        self._choice = gui.add_dropdown("Colours", choices, initial_value=self.colours)
        clusters = gui.add_slider("Clusters", min=2, max=20, step=1, initial_value=self.num_clusters)
        self._share = gui.add_slider("Splats %", min=5, max=100, step=5, initial_value=100, hint="Fewer are faster.")
        self._opacity = gui.add_slider("Opacity from %", min=0, max=95, step=5, initial_value=0)
        cameras = self._cameras = server.scene.add_frame("/cameras", show_axes=False)
        has_cameras = gui.add_checkbox("Cameras", initial_value=True)
        pick = gui.add_button("Click a place", hint="A click on a splat or a photograph then shows what is similar.")
        if self.tower is not None:
            words, find = gui.add_text("Words", initial_value=""), gui.add_button("Find the words")
            find.on_click(lambda _: self._show_similarity(self.find_text(words.value)))
        picture, turntable = gui.add_button("Screenshot"), gui.add_button("Turntable", hint="Takes a minute or more.")
        gui.add_markdown(Path(__file__).with_name("viewer_help.md").read_text(encoding="utf-8"))

        def change(event: Any) -> None:
            self.colours, self.num_clusters = self._choice.value, clusters.value
            self.threshold, self.share = self._opacity.value / 100, self._share.value / 100
            num_copies = len(self.columns)
            self.send_splats()
            if len(self.columns) != num_copies and event.client is not None:
                self._fly(event.client, None if len(self.columns) > 1 else self.middle)

        for control in (self._choice, clusters, self._share, self._opacity):
            control.on_update(change)
        has_cameras.on_update(lambda _: setattr(cameras, "visible", has_cameras.value))
        pick.on_click(self._wait_for_click)
        picture.on_click(self._take_picture)
        turntable.on_click(self._take_turntable)
        server.on_client_connect(lambda client: self._fly(client, None if len(self.columns) > 1 else self.middle))
        for view in select_evenly(self.capture.views, _MAX_CAMERAS):
            has_photograph, axes = view.frame.image_path.is_file(), view.camera_to_world[:, :3] * _OPENCV_AXES
            image = resize(self.capture.load_image(view), _THUMBNAIL).numpy() if has_photograph else None
            pose = {"wxyz": SO3.from_matrix(axes.numpy()).wxyz, "position": view.camera_to_world[:, 3].numpy()}
            frustum = server.scene.add_camera_frustum(
                f"/cameras/{len(self._frusta)}", field_of_view(view), view.width / view.height, _FRUSTUM * self.reach,
                image=image, **pose,
            )  # fmt: skip
            self._frusta[view.name] = view, frustum
            frustum.on_click(partial(self._visit, view))
        self.send_splats()

    def send_splats(self) -> None:
        """Sends the splats in their colours, unless a later change waits already."""
        self._num_changes += 1
        change = self._num_changes
        with self._lock:
            if change != self._num_changes:
                return
            self.recolour()
            self._problem.content = re.sub(r"[^\w\s.,:;()/'-]", "", " ".join(self.problem.split()))
            api, count, kept = self.server.scene, len(self.columns), self.find_kept()
            # The name lost its underscore after viser 0.2.
            send = getattr(api, "add_gaussian_splats", None) or api._add_gaussian_splats
            copies = [self.means + self.find_offset(column) for column in range(count)]
            means, rgb = (torch.cat([part[kept] for part in parts]) for parts in (copies, self.columns.values()))
            covariances, opacities = self.splats.covariances[kept], self.splats.opacities[kept, None]
            sent = means, covariances.repeat(count, 1, 1), rgb, opacities.repeat(count, 1)
            last, self._shown, self._is_odd = self._shown, [], not self._is_odd
            with self.server.atomic():
                # viser's page keeps the colours of splats that are sent again by their name.
                self._shown.append(send(f"/splats/{int(self._is_odd)}", *(part.cpu().numpy() for part in sent)))
                for label, copy in zip(self.columns, copies if count > 1 else (), strict=False):
                    place = copy.median(dim=0).values.cpu() + self.reach * self.up
                    self._shown.append(api.add_label(f"/labels/{label}{self._is_odd}", label, position=place.numpy()))
                for node in last:
                    node.remove()
            ball = api.add_icosphere("/picked", 0.006 * self.reach, (0, 160, 60))
            ball.position, ball.visible = self.marker.numpy(), self.colours == "similarity"

    def find_kept(self) -> Bool[Tensor, " num_gaussians"]:
        """Which splats are drawn: those that make up most of the views, where they are opaque enough."""
        count = math.ceil(self.share * len(self.means))
        return find_heaviest(self.splats.scene.gaussians, count)[0] & (self.splats.opacities >= self.threshold)

    def find_offset(self, column: int) -> Float[Tensor, "3"]:
        """Where a copy is: the last, the lifted one, where the cameras are, the others to its left."""
        right = self.middle.camera_to_world[:, 0].to(self.means)
        low, high = torch.quantile(self.means @ right, self.means.new_tensor([0.01, 0.99]))
        return 1.1 * (high - low) * (column + 1 - len(self.columns)) * right

    def find(self, origin: Float[Tensor, "3"], direction: Float[Tensor, "3"]) -> bool:
        """Whether a ray meets a photograph or a splat; similarities are to what it meets first from now on."""
        starts = [origin - self.find_offset(column).cpu() for column in range(len(self.columns))]
        nearest, picked = min(self.splats.pick(start, direction) for start in starts)
        hit, features = self._find_pixel(origin, direction), self.splats.features
        if hit is not None and hit[0] < nearest:
            along, view, (x, y) = hit
            tokens = extract_tokens(self.load(ORIGINAL), resize(self.capture.load_image(view), None))
            row, column = int(y / view.height * tokens.shape[0]), int(x / view.width * tokens.shape[1])
            self.cosines = self.splats.compare_with_token(tokens[row, column])
            self.marker = origin + along * direction
        elif nearest < math.inf:
            self.marker, self.cosines = self.means[picked].cpu(), compute_similarity(features, features[picked])
        return hit is not None or nearest < math.inf

    def find_text(self, words: str) -> bool:
        """Similarities are to words from now on, and the marker is where they fit best; ValueError without a tower."""
        if self.tower is None:
            raise ValueError(f'--text "{words}" needs --text-model, the model that the backbone is a part of.')
        self.cosines = self.splats.compare_with_text(self.tower, words)
        self.marker = self.means[self.cosines.argmax()].cpu()
        return True

    def _find_pixel(self, origin: Tensor, direction: Tensor) -> tuple[float, View, tuple[float, float]] | None:
        """Of the frusta whose photograph a ray meets the first: how far along the ray, and the point in pixels."""
        found = []
        for view, frustum in self._frusta.values():
            # viser draws all frusta with one volume, whatever their angles.
            y = math.tan(0.5 * field_of_view(view))
            x = y * view.width / view.height
            depth = _FRUSTUM * self.reach * (x * y / 3.0) ** (-1 / 3)
            axes = view.camera_to_world[:, :3] * _OPENCV_AXES
            start, ray = axes.T @ (origin - view.camera_to_world[:, 3]), axes.T @ direction
            along = float((depth - start[2]) / ray[2])
            right, down = ((start + along * ray)[:2] / depth / torch.tensor([x, y])).tolist()
            is_shown = frustum.visible and self._cameras.visible and view.frame.image_path.is_file()
            if is_shown and along > 0 and max(abs(right), abs(down)) < 1:
                found.append((along, view, (0.5 * (right + 1) * view.width, 0.5 * (down + 1) * view.height)))
        return min(found, key=lambda hit: hit[0], default=None)

    def _visit(self, view: View, event: Any) -> None:
        if not self._is_picking:
            self._fly(event.client, view)

    def _fly(self, client: Any, view: View | None) -> None:
        """To a view, or to where all copies of a comparison are seen."""
        pose = self.middle.camera_to_world if view is None else view.camera_to_world
        position, forward = pose[:, 3], -pose[:, 2]
        target = position + self.reach * forward
        if view is None:
            first = self.find_offset(0).cpu()
            target = self.means.median(dim=0).values.cpu() + 0.3 * first
            position = target + first.norm() * (self.up - 0.6 * forward)
        with client.atomic():
            client.camera.up_direction, client.camera.position = self.up.double().numpy(), position.double().numpy()
            # What the mouse turns about.
            client.camera.look_at = target.double().numpy()
            client.camera.fov = field_of_view(view or self.middle)
        # Photographs so near would hide what the camera sees.
        for own, frustum in self._frusta.values():
            frustum.visible = bool((own.camera_to_world[:, 3] - position).norm() > 5 * _FRUSTUM * self.reach)

    def _wait_for_click(self, _: Any) -> None:
        """For one click only: while viser waits for clicks, the mouse does not turn the scene."""
        self._is_picking = True
        self.server.scene.on_pointer_event("click")(self._take_click)

    def _take_click(self, event: Any) -> None:
        self.server.scene.remove_pointer_callback()
        try:
            self._show_similarity(self.find(torch.tensor(event.ray_origin), torch.tensor(event.ray_direction)))
        finally:
            self._is_picking = False

    def _show_similarity(self, is_found: bool) -> None:
        # Another choice sends the splats itself.
        if is_found and self._choice.value == "similarity":
            self.send_splats()
        elif is_found:
            self._choice.value = "similarity"

    def _take_picture(self, event: Any) -> None:
        camera, content = event.client.camera, io.BytesIO()
        rotation = rotations_from_quats(torch.tensor(camera.wxyz)[None])[0] * _OPENCV_AXES
        pose = torch.cat([rotation, torch.tensor(camera.position)[:, None]], dim=1).float()
        self.draw_columns(pose, camera.aspect, camera.fov).save(content, format="PNG")
        event.client.send_file_download("view.png", content.getvalue())

    def _take_turntable(self, event: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.save(path := Path(folder) / "view.mp4")
            event.client.send_file_download(path.name, path.read_bytes())


def create_flight(views: Sequence[View], num_frames: int) -> list[Pose]:
    """Cameras (OpenGL) along the views in their order, as a mean over neighbours: without the shake of a hand."""
    poses = torch.stack([view.camera_to_world for view in views])
    steps = torch.linspace(0.0, len(views) - 1.0, num_frames)[:, None] - torch.arange(len(views))
    smooth = torch.tensordot(torch.softmax(-0.5 * (steps / (0.02 * len(views))) ** 2, dim=1), poses, dims=1)
    backwards = F.normalize(smooth[:, :, 2], dim=1)
    right = F.normalize(torch.linalg.cross(smooth[:, :, 1], backwards), dim=1)
    return list(torch.stack([right, torch.linalg.cross(backwards, right), backwards, smooth[:, :, 3]], dim=-1))


def field_of_view(view: View) -> float:
    """Vertical, in radians."""
    return 2.0 * math.atan2(0.5 * view.height, float(view.K[1, 1]))
