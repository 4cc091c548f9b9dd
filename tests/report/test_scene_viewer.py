import io
import math
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.cli.view import ViewCommand, main, view
from fit3d_ns.features import create_extractor
from fit3d_ns.report.scene_viewer import SceneViewer, open_server
from fit3d_ns.report.splat_colours import ViewerConfig
from fit3d_ns.scene import load_scene, save_scene
from tests.features.test_text_tower import CLIP, write_model
from tests.report.figure_scenes import BACKBONE, HEIGHT, WIDTH, write_finetuned, write_photographs, write_scene
from tests.report.test_splat_colours import decode, fit_pca

viser = pytest.importorskip("viser")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def scene_path(tmp_path: Path) -> Path:
    """A scene file beside its photographs, which it may therefore read."""
    path = write_scene(tmp_path / "scene.safetensors", write_photographs(tmp_path / "photographs", count=3))
    scene = load_scene(path)
    varied = replace(
        scene.gaussians, opacity_logits=torch.linspace(-3.0, 4.0, 40).half(), blend_weight=torch.arange(1.0, 41.0)
    )
    save_scene(replace(scene, gaussians=varied, pca=fit_pca(decode(scene), 3), file=None), path)
    return path


@pytest.fixture
def server() -> Iterator[Any]:
    opened = open_server("127.0.0.1", 18080)
    yield opened
    opened.stop()


def read_messages(server: Any, *kinds: str) -> list[Any]:
    """What a browser that connects now is sent, in this order."""
    waiting = dict(server._websock_server._broadcast_buffer.message_from_id)
    return [message for _, message in sorted(waiting.items()) if type(message).__name__ in kinds]


def read_splats(server: Any) -> tuple[np.ndarray, np.ndarray]:
    """Places and 8-bit RGBA of the splats that are shown."""
    shown: dict[str, np.ndarray] = {}
    for message in read_messages(server, "GaussianSplatsMessage", "RemoveSceneNodeMessage"):
        shown.pop(message.name, None)
        if hasattr(message, "buffer"):
            shown[message.name] = np.ascontiguousarray(message.buffer)
    assert len(shown) == 1
    buffer = shown.popitem()[1]
    return buffer[:, :3].copy().view(np.float32), buffer[:, 7:8].copy().view(np.uint8)


def count_splats(server: Any) -> int:
    """Splats that are shown; 0 while they change."""
    with suppress(AssertionError):
        return len(read_splats(server)[0])
    return 0


def find_difference(server: Any, expected: torch.Tensor) -> float:
    """Largest difference between the colours that are shown and others; large while they change."""
    with suppress(AssertionError):
        return float(np.abs(read_splats(server)[1][:, :3] / 255.0 - expected.numpy()).max())
    return 1.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_viewer__sends_places_colours_and_opacities(scene_path: Path, server: Any) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    viewer.show(server)
    gaussians = viewer.splats.scene.gaussians
    # viser sends what belongs together from a thread.
    wait_until(lambda: count_splats(server) == 40)
    places, rgba = read_splats(server)
    np.testing.assert_array_equal(places, gaussians.means.numpy())
    np.testing.assert_allclose(rgba[:, 3] / 255.0, gaussians.opacity_logits.float().sigmoid(), atol=0.01)
    np.testing.assert_allclose(rgba[:, :3] / 255.0, viewer.splats.colour("features", 8, viewer.cosines), atol=0.01)
    for colours in ("photograph", "clusters", "similarity", "variance"):
        viewer._choice.value = colours
        # The menu's handler runs in a thread of viser's.
        expected = viewer.splats.colour(colours, 8, viewer.cosines)
        wait_until(lambda expected=expected: find_difference(server, expected) < 0.01)
    num_opaque = int((gaussians.opacity_logits.float().sigmoid() >= 0.5).sum())
    assert num_opaque < 40
    viewer._opacity.value = 50
    wait_until(lambda: count_splats(server) == num_opaque)
    assert read_splats(server)[1][:, 3].min() >= 127
    viewer._opacity.value = 0
    viewer._share.value = 50
    wait_until(lambda: count_splats(server) == 20)
    # The fixture's last splats make up most of its views.
    np.testing.assert_array_equal(read_splats(server)[0], gaussians.means[20:].numpy())
    # Old colours do not pile up for browsers that come later.
    assert len(read_messages(server, "GaussianSplatsMessage")) <= 2


def test_viewer__shows_cameras_with_their_photographs(scene_path: Path, server: Any) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    viewer.show(server)
    frusta = read_messages(server, "CameraFrustumMessage")
    assert len(frusta) == 3 and all(frustum.image_binary for frustum in frusta)
    assert frusta[0].fov == pytest.approx(2.0 * np.arctan(0.5 * HEIGHT / 50.0))
    assert frusta[0].aspect == pytest.approx(WIDTH / HEIGHT)
    # The fixture's cameras have OpenGL's identity; with OpenCV's axes that is half a turn about x.
    turns = {message.name: message.wxyz for message in read_messages(server, "SetOrientationMessage")}
    np.testing.assert_allclose(np.abs(turns[frusta[0].name]), [0.0, 1.0, 0.0, 0.0], atol=1e-6)


def test_viewer__click_picks_the_splat_under_the_mouse(scene_path: Path, server: Any) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    viewer.show(server)
    target = viewer.splats.scene.gaussians.means[39]
    origin = target + torch.tensor([0.0, 0.0, 0.5])
    event = SimpleNamespace(ray_origin=tuple(origin.tolist()), ray_direction=(0.0, 0.0, -1.0))
    along, expected = viewer.splats.pick(origin, torch.tensor([0.0, 0.0, -1.0]))
    viewer._take_click(event)
    assert along < math.inf
    assert viewer._choice.value == "similarity" and torch.equal(
        viewer.marker, viewer.splats.scene.gaussians.means[expected]
    )
    # The menu's own handler, in another thread of viser's.
    wait_until(lambda: len(read_messages(server, "RemoveSceneNodeMessage")) == 1)
    assert viewer.colours == "similarity"
    _, rgba = read_splats(server)
    assert rgba[expected, :3].tolist() == [255, 0, 0]
    place = pytest.approx(viewer.marker.tolist())
    moves = partial(read_messages, server, "SetPositionMessage")
    wait_until(lambda: [move.position for move in moves() if move.name == "/picked"][-1] == place)


def test_viewer__a_click_on_a_photograph_asks_for_its_token(scene_path: Path, server: Any) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    viewer.show(server)
    view, frustum = next(iter(viewer._frusta.values()))
    for other, hidden in viewer._frusta.values():
        hidden.visible = other is view
    # Through the pixel (50, 10), which no splat of the fixture is behind: they stand in the left half.
    ray = view.camera_to_world[:, :3] @ torch.tensor([(50 - 32) / 50.0, -(10 - 24) / 50.0, -1.0])
    origin = view.camera_to_world[:, 3]
    _, found, point = viewer._find_pixel(origin, ray)
    assert found is view and point == pytest.approx((50.0, 10.0), abs=1e-3)
    # From another place too the ray is followed to the plane of the photograph, which viser draws at one volume.
    y = HEIGHT / 2 / 50.0
    depth = 0.05 * viewer.reach / (y * y * WIDTH / HEIGHT / 3) ** (1 / 3)
    place = origin + depth * ray
    aside = place + torch.tensor([0.03, 0.02, 0.5])
    viewer._is_picking = True
    viewer._visit(view, None)
    viewer._take_click(SimpleNamespace(ray_origin=tuple(aside.tolist()), ray_direction=tuple((place - aside).tolist())))
    torch.testing.assert_close(viewer.marker, place, rtol=0, atol=1e-5)
    image = torch.from_numpy(np.asarray(Image.open(view.frame.image_path))).permute(2, 0, 1)[None] / 255.0
    token = create_extractor(BACKBONE)(image).maps[0, 0, 3]
    torch.testing.assert_close(viewer.cosines, viewer.splats.compare_with_token(token))
    assert viewer._choice.value == "similarity" and not viewer._is_picking
    frustum.visible = False
    assert viewer._find_pixel(aside, place - aside) is None


def test_viewer__compares_copies_beside_one_another(
    scene_path: Path, server: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig(finetuned=(str(write_finetuned(tmp_path / "vit")),)))
    viewer.show(server)
    assert list(viewer.columns) == ["original", "fine-tuned", "lifted"]
    wait_until(lambda: count_splats(server) == 120)
    places, rgba = read_splats(server)
    first, second, third = np.split(places, 3)
    np.testing.assert_array_equal(third, viewer.means.numpy())
    extent = np.ptp(third[:, 0])
    for copy, steps in ((first, 2), (second, 1)):
        offset = third - copy
        assert np.ptp(offset, axis=0).max() < 1e-5 and offset[0, 0] > extent * steps and abs(offset[0, 1:]).max() < 1e-6
    np.testing.assert_allclose(rgba[:, :3] / 255.0, torch.cat(list(viewer.columns.values())), atol=0.01)
    assert len({colours.sum().item() for colours in viewer.columns.values()}) == 3
    copies = ["original", "fine-tuned", "lifted"]
    wait_until(lambda: [label.text for label in read_messages(server, "LabelMessage")] == copies)
    # The same of one backbone, from where one stands, and a picture of all.
    viewer._choice.value = "fine-tuned"
    wait_until(
        lambda: count_splats(server) == 40 and find_difference(server, viewer._photographed["fine-tuned"]) < 0.01
    )
    # Both photographs and the scene's own colours are shown at once in what is saved.
    viewer.colours = "comparison"
    viewer.columns = viewer.colour()
    viewer.save(tmp_path / "comparison.png")
    assert Image.open(tmp_path / "comparison.png").width == 3 * 480 + 4 * 6
    assert capfd.readouterr().err.count("Reading photographs: done") == 2


def test_viewer__finds_words_with_the_model_that_the_backbone_is_of(tmp_path: Path, server: Any) -> None:
    pytest.importorskip("transformers")
    scene_path = write_scene(tmp_path / "scene.safetensors", write_photographs(tmp_path / "photographs"), CLIP)
    scene = load_scene(scene_path)
    save_scene(replace(scene, pca=fit_pca(decode(scene), 3), file=None), scene_path)
    with pytest.raises(ValueError, match='--text "chair" needs --text-model'):
        SceneViewer(load_scene(scene_path), ViewerConfig(text="chair"))
    config = ViewerConfig(text="chair", text_model=str(write_model(tmp_path / "clip")))
    viewer = SceneViewer(load_scene(scene_path), config)
    viewer.show(server)
    assert viewer.colours == "similarity"
    chair = viewer.cosines
    torch.testing.assert_close(chair, viewer.splats.compare_with_text(viewer.tower, "chair"))
    assert torch.equal(viewer.marker, viewer.means[chair.argmax()])
    viewer._show_similarity(viewer.find_text("lamp"))
    assert not torch.equal(viewer.cosines, chair)
    wait_until(lambda: find_difference(server, viewer.splats.colour("similarity", 8, viewer.cosines)) < 0.01)


def test_viewer__a_click_on_a_camera_flies_there(scene_path: Path, server: Any) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    viewer.show(server)
    target = viewer.capture.views[2]
    for (other, frustum), share in zip([*viewer._frusta.values()][:2], (0.2, 0.3), strict=True):
        other.camera_to_world[:, 3] += torch.tensor([share * viewer.reach, 0.0, 0.0])
        assert frustum.visible
    camera = SimpleNamespace(up_direction=None, position=None, look_at=None, fov=None)
    client = SimpleNamespace(camera=camera, atomic=server.atomic)
    viewer._visit(target, SimpleNamespace(client=client))
    np.testing.assert_allclose(camera.position, target.camera_to_world[:, 3])
    forward = camera.look_at - camera.position
    np.testing.assert_allclose(forward / np.linalg.norm(forward), -target.camera_to_world[:, 2], atol=1e-6)
    # Its own photograph and near ones would hide what it sees.
    assert [frustum.visible for _, frustum in viewer._frusta.values()] == [False, True, False]


def test_viewer__pages_hold_no_words_of_files(scene_path: Path, server: Any) -> None:
    """viser runs Markdown as code."""
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    evil = "{alert(1)}"
    object.__setattr__(viewer.splats.scene.posed_capture, "scene_id", evil)
    for index, own in enumerate(viewer.capture.views):
        object.__setattr__(own, "name", f"{evil}{index}")
    viewer.show(server)
    messages = server._websock_server._broadcast_buffer.message_from_id.values()
    assert evil not in str([vars(message) for message in messages])


def test_open_server__a_slow_browser_keeps_its_connection(server: Any) -> None:
    """viser sends what is for all and what is for one side by side; a browser that draws for long reads neither."""
    server.gui.add_markdown("x" * 30_000_000)
    clients: list[Any] = []
    server._websock_server.on_client_connect(clients.append)
    headers = "Host: viewer", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"
    request = "\r\n".join(("GET / HTTP/1.1", *headers, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""))
    with socket.create_connection(("127.0.0.1", server.get_port()), timeout=5) as browser:
        browser.sendall(request.encode())
        wait_until(lambda: bool(clients))
        for _ in range(2):
            time.sleep(0.5)
            clients[0].queue_message(viser._messages.SetCameraFovMessage(0.5))
        time.sleep(0.5)
        received = bytearray()
        with suppress(TimeoutError):
            while received.count(b"SetCameraFovMessage") < 2 and (part := browser.recv(1 << 20)):
                received += part
    assert len(received) > 30_000_000 and received.count(b"SetCameraFovMessage") == 2


def test_open_server__listens_to_this_machine_alone_and_says_what_is_missing(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.get_port()
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    # Another address of the same loopback: a server on 0.0.0.0 would answer.
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), timeout=5)
    assert ViewCommand(Path("a")).host == "127.0.0.1"
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ValueError, match="pip install viser"):
        open_server("127.0.0.1", 0)


@pytest.mark.parametrize("reason", ["backbone", "photographs", "folder"])
def test_viewer__page_says_why_copies_cannot_be_compared(
    scene_path: Path, server: Any, tmp_path: Path, reason: str
) -> None:
    """A backbone of the same width is no fine-tuned one either; and no path becomes code."""
    folder = tmp_path / "{alert(1)}<b>"
    if reason == "backbone":
        write_finetuned(folder, architecture="test_vit3")
    elif reason == "photographs":
        write_finetuned(folder)
        (tmp_path / "photographs").rename(tmp_path / "elsewhere")
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig(finetuned=(str(folder),)))
    viewer.show(server)
    expected = {
        "backbone": r"alert\(1\)b is not fine-tuned from the scene's test_vit",
        "photographs": "--data-root",
        "folder": r"alert\(1\)b",
    }[reason]
    told = viewer._problem.content
    assert re.search(f"^The comparison colours cannot be shown: .*{expected}", told) and not set("{}<>") & set(told)
    wait_until(lambda: count_splats(server) == 40)
    assert list(viewer.columns) == ["features"]
    with pytest.raises(ValueError, match="comparison colours cannot be shown"):
        viewer.save(tmp_path / "comparison.png")
    viewer._choice.value = "clusters"
    wait_until(lambda: viewer._problem.content == "")
    assert viewer.colours == "clusters"
    if reason == "photographs":
        viewer._choice.value = "original"
        wait_until(lambda: "original colours cannot" in viewer._problem.content)


def test_viewer__a_click_on_a_copy_finds_the_splat_it_shows(scene_path: Path, server: Any, tmp_path: Path) -> None:
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig(finetuned=(str(write_finetuned(tmp_path / "vit")),)))
    viewer.show(server)
    down, found = torch.tensor([0.0, 0.0, -1.0]), []
    for column in range(3):
        assert viewer.find(viewer.means[39] + viewer.find_offset(column) + torch.tensor([0.0, 0.0, 0.5]), down)
        found.append((viewer.marker, viewer.cosines))
        viewer.marker, viewer.cosines = torch.zeros(3), torch.zeros(40)
    for marker, cosines in found:
        torch.testing.assert_close(marker, found[2][0])
        torch.testing.assert_close(cosines, found[2][1])
    # Between the copies is nothing.
    assert not viewer.find(viewer.find_offset(0) * 2 + torch.tensor([0.0, 0.0, 0.5]), down)


def test_view__writes_pictures_without_a_browser(
    scene_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    monkeypatch.setattr("fit3d_ns.report.scene_viewer._NUM_FRAMES", 4)
    main([str(scene_path), "--output-path", str(tmp_path / "view.png"), "--max-splats", "30", "--device", "cpu"])
    share = sum(range(11, 41)) / sum(range(1, 41))
    assert f"30 of 40 splats, which make up {share:.1%} of the lifted views" in capfd.readouterr().err.replace(
        "\n", " "
    )
    picture = np.asarray(Image.open(tmp_path / "view.png"))
    assert picture.shape == (720, 960, 3) and picture[:, 700:].min() == 255 and picture.min() < 200
    main([str(scene_path), "--output-path", str(tmp_path / "view.mp4"), "--colours", "clusters", "--device", "cpu"])
    clip = cv2.VideoCapture(str(tmp_path / "view.mp4"))
    assert clip.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    clip.release()


def test_view__says_what_it_cannot_show(scene_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="neither a picture"):
        view(ViewCommand(scene_path, output_path=Path("a.jpg")))
    with pytest.raises(ValueError, match="at least 1"):
        view(ViewCommand(scene_path, ViewerConfig(max_splats=0), device="cpu"))
    scene = load_scene(scene_path)
    save_scene(replace(scene, pca=None, file=None), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no PCA colours"):
        view(ViewCommand(tmp_path / "plain.safetensors", device="cpu"))
    empty = replace(scene, gaussians=scene.gaussians.select(torch.zeros(40, dtype=torch.bool)), file=None)
    save_scene(empty, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match="no Gaussians"):
        view(ViewCommand(tmp_path / "empty.safetensors", device="cpu"))
    (tmp_path / "photographs").rename(tmp_path / "elsewhere")
    capture = SceneViewer(scene, ViewerConfig()).capture
    assert len(capture.views) == 3 and not any(own.frame.image_path.is_file() for own in capture.views)
    assert re.search(r"Shown without photographs: .*--data-root", capfd.readouterr().err.replace("\n", " "))


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_viewer__browser_shows_the_splats_in_the_colours_that_are_chosen(
    scene_path: Path, server: Any, tmp_path: Path
) -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
        "--window-size=700,500", "--disable-background-networking", "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    viewer = SceneViewer(load_scene(scene_path), ViewerConfig())
    rgb = torch.tensor([1.0, 0.0, 0.0]).expand(40, 3)
    viewer.splats.colour = lambda *_: rgb
    viewer.show(server)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))

    def shows(red: bool) -> bool:
        """Whether the upper left, where the splats are, has enough of a colour and none of the other."""
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
        # Below are the axes, which have colours too.
        part = np.asarray(picture).astype(int)[: picture.height // 2, : picture.width // 2]
        redder = part[..., 0] - part[..., 2]
        wanted = redder if red else -redder
        return bool((wanted > 100).mean() > 0.02 and (wanted < -100).mean() < 0.001)

    try:
        driver.get(f"http://127.0.0.1:{server.get_port()}")
        viewer.server.scene.add_frame("/cameras", show_axes=False, visible=False)
        wait_until(lambda: shows(red=True))
        rgb = torch.tensor([0.0, 0.0, 1.0]).expand(40, 3)
        viewer.send_splats()
        wait_until(lambda: shows(red=False))
    finally:
        driver.quit()
