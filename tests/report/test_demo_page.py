"""The demo page: its pictures, and the page itself in a real headless Chromium that may load from nowhere else."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.demo_page import ImageAnalyser, create_page, find_share
from fit3d_ns.report.demo_server import check_gradio
from fit3d_ns.report.token_colours import fit_cluster_colours, fit_pca_colours
from tests.report.figure_scenes import BACKBONE, write_finetuned, write_photographs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS_TO_START = 240
SECONDS_TO_SHOW = 120


@pytest.fixture(scope="module")
def analyser(tmp_path_factory: pytest.TempPathFactory) -> ImageAnalyser:
    folder = write_finetuned(tmp_path_factory.mktemp("backbones") / "tuned")
    return ImageAnalyser(read_models([BACKBONE, str(folder)])[0])


def create_pixels() -> torch.Tensor:
    return torch.randint(0, 256, (48, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_analyser__maps_of_every_backbone_have_the_pictures_size(analyser: ImageAnalyser) -> None:
    assert analyser.labels == ["original: random:test_vit (random weights)", "fine-tuned: tuned (random weights)"]
    analysed = analyser.analyse(create_pixels(), longest_side=128)
    colours = fit_pca_colours(analysed.columns), fit_cluster_colours(analysed.columns, 4)
    for pictures in (*map(analysed.paint, colours), analysed.draw_similarity((0.5, 0.5))):
        assert [picture.shape for picture in pictures] == [(96, 128, 3)] * 2


def test_analyser__clicked_token_is_most_like_itself(analyser: ImageAnalyser) -> None:
    analysed = analyser.analyse(create_pixels())
    # A grid of 3 x 4: this is the last row and the second column.
    for picture in analysed.draw_similarity((0.3, 0.99)):
        patch = picture[32:48, 16:32]
        assert torch.allclose(patch, torch.tensor([1.0, 0.0, 0.0]).expand_as(patch), atol=1e-4)
    marked = analysed.draw_point((0.3, 0.99))
    assert torch.equal(marked[32:48, 16:32], analysed.image.image[32:48, 16:32])
    assert marked[40, 14].tolist() == pytest.approx([1.0, 0.1, 0.1])


def test_analyser__clicks_on_the_edge_belong_to_the_last_token(analyser: ImageAnalyser) -> None:
    analysed = analyser.analyse(create_pixels())
    for inside, beyond in (((0.999, 0.999), (1.0, 1.0)), ((0.0, 0.0), (-0.1, 0.0))):
        pairs = zip(analysed.draw_similarity(inside), analysed.draw_similarity(beyond), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)
    # Gradio counts pixels of the picture that was clicked, whatever its size.
    assert find_share((9, 4), torch.zeros(10, 20, 3)) == pytest.approx((0.475, 0.45))


def test_check_gradio__says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[demo\]'"):
        check_gradio()


def test_create_page__keeps_no_statistics_and_no_public_endpoints(analyser: ImageAnalyser) -> None:
    page = create_page(analyser)
    assert page.analytics_enabled is False
    assert all(event.api_visibility == "private" for event in page.fns.values())


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    folder = write_finetuned(tmp_path / "tuned")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "fit3d_ns.cli.demo", "--backbone", BACKBONE, "--finetuned", str(folder),
            "--device", "cpu", "--port", str(port),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "GRADIO_TEMP_DIR": str(tmp_path / "uploads")},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and process.poll() is None and not is_open(port):
            time.sleep(0.5)
        assert is_open(port), "fit3d-demo did not come up"
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_demo__serves_its_page_and_ends_on_ctrl_c(demo: tuple[subprocess.Popen[str], str]) -> None:
    """What needs no browser: machines without one hold the command to this much."""
    process, address = demo
    with urllib.request.urlopen(address, timeout=60) as answer:
        page = answer.read().decode()
    assert answer.status == 200 and all(name in page for name in ("pca-0", "kmeans-1", "similarity-1"))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")
def test_demo__shows_maps_and_similarity_of_a_clicked_pixel(
    demo: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    process, address = demo
    photograph = write_photographs(tmp_path / "photos", 1)[0]
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--window-size=1400,1400", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.get(address)

        def find(selector: str) -> list[Any]:
            return driver.find_elements(By.CSS_SELECTOR, selector)

        def read_picture(selector: str) -> np.ndarray:
            driver.execute_script("arguments[0].scrollIntoView()", find(selector)[0])
            return np.asarray(Image.open(io.BytesIO(find(selector)[0].screenshot_as_png)).convert("RGB")).astype(int)

        wait_until(lambda: bool(find("#input input[type=file]")))
        find("#input input[type=file]")[0].send_keys(str(photograph))
        wait_until(lambda: all(find(f"#{kind}-{number} img") for kind in ("pca", "kmeans") for number in (0, 1)))
        assert read_picture("#pca-0 img").std() > 20
        assert not find("#similarity-0 img")
        picture = find("#pca-1 img")[0]
        driver.execute_script("arguments[0].scrollIntoView()", picture)
        # Off the middle, where patches meet.
        offset = 16
        webdriver.ActionChains(driver).move_to_element_with_offset(picture, offset, offset).click().perform()
        wait_until(lambda: all(find(f"#similarity-{number} img") for number in (0, 1)))
        for number in (0, 1):
            similarity = read_picture(f"#similarity-{number} img")
            height, width = similarity.shape[:2]
            # All maps are drawn alike, so the clicked token is at the same place, and like itself.
            clicked = similarity[height // 2 + offset, width // 2 + offset]
            assert clicked[0] > 250 and clicked[1:].max() < 5
            assert similarity[..., 1].max() > 200
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        requests = [item["params"] for item in messages if item["method"] == REQUEST]
        # The browser's own start page asks for what it likes, as `chrome:` and `chrome-untrusted:` documents.
        ours = [item["request"]["url"] for item in requests if not item["documentURL"].startswith("chrome")]
        assert ours and [url for url in ours if not url.startswith(("data:", "blob:", address))] == []
    finally:
        driver.quit()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


REQUEST = "Network.requestWillBeSent"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_SHOW
    while not condition():
        assert time.monotonic() < deadline, "the page did not show it in time"
        time.sleep(0.5)
