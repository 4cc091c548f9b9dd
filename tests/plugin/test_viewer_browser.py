"""`ns-viewer` on a finished run, in a real headless Chromium: feature pictures arrive, and so do our buttons."""

import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"),
]

SECONDS_TO_START = 240
SECONDS_TO_RENDER = 90


@pytest.fixture
def viewer_port(make_config: Callable[..., Any], train: Callable[..., Any]) -> Iterator[int]:
    config = make_config("viewer", 40)
    train(config)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Path(sys.executable).with_name("ns-viewer")
    process = subprocess.Popen(
        [command, "--load-config", config.get_base_dir() / "config.yml", "--viewer.websocket-port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and process.poll() is None and not is_open(port):
            time.sleep(0.5)
        assert is_open(port), "ns-viewer did not come up"
        yield port
    finally:
        process.kill()
        process.wait()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_viewer__shows_feature_pictures_and_buttons(viewer_port: int, tmp_path: Path) -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
        "--window-size=1400,1000", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        driver.get(f"http://127.0.0.1:{viewer_port}")

        def read(script: str) -> list[str]:
            # In one go inside the page: the interface replaces its elements while it fills up.
            return driver.execute_script(
                f"return [...document.querySelectorAll({script})].map(e => e.value || e.innerText)"
            )

        def click_output_select() -> bool:
            return driver.execute_script(
                "const e = [...document.querySelectorAll('input')].find(e => e.value === 'rgb');"
                "if (e) e.click(); return Boolean(e);"
            )

        def read_canvas() -> np.ndarray:
            picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
            return np.asarray(picture).astype(int)[60:, :1000]

        wait_until(lambda: "Fit feature colours to this view" in read("'button'"))
        wait_until(lambda: read_canvas().std() > 5)
        colour_picture = read_canvas()
        wait_until(click_output_select)
        wait_until(lambda: {"rgb", "features_pca", "features_pca_original"} <= set(read("'[role=option]'")))
        driver.execute_script(
            "[...document.querySelectorAll('[role=option]')].find(e => e.innerText === 'features_pca').click();"
        )
        # Another output is another background already: black instead of the viewer's blue grey.
        wait_until(lambda: (np.abs(read_canvas() - colour_picture).max(axis=-1) > 20).mean() > 0.2)
    finally:
        driver.quit()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_RENDER
    while not condition():
        assert time.monotonic() < deadline, "the viewer did not show it in time"
        time.sleep(0.5)
