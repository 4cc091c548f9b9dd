"""What the demo answers, to whom, and what it refuses: over HTTP, as a browser would ask, without a browser."""

import http.client
import io
import json
import signal
import stat
import struct
import subprocess
import sys
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.demo_page import ImageAnalyser, create_page
from fit3d_ns.report.demo_server import MAX_BYTES, is_own_name, keep_uploads_private, serve
from tests.report.figure_scenes import BACKBONE


class Page:
    """A served page, asked as its own scripts ask it."""

    def __init__(self, address: str, uploads: Path) -> None:
        self.address, self.uploads = urlsplit(address), uploads

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(str(self.address.hostname), self.address.port or 80, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def upload(self, content: bytes, name: str) -> tuple[int, bytes]:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        body = head + content + b"\r\n--x--\r\n"
        return self.ask("POST", "/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})

    def show(self, picture: dict[str, Any]) -> dict[str, Any]:
        """What the page is told after an upload: `success`, and `output` with the maps or the error."""
        session = uuid.uuid4().hex
        request = {"data": [picture, 4.0, 128.0], "fn_index": 0, "session_hash": session}
        status, answer = self.ask(
            "POST", "/gradio_api/queue/join", json.dumps(request), **{"Content-Type": "application/json"}
        )
        assert status == 200, answer
        _, stream = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[5:]) for line in stream.decode().splitlines() if line.startswith("data:")]
        return next(message for message in messages if message["msg"] == "process_completed")

    def show_upload(self, content: bytes, name: str) -> dict[str, Any]:
        status, answer = self.upload(content, name)
        assert status == 200, answer
        return self.show(describe(json.loads(answer)[0], name))


def describe(path: str, name: str) -> dict[str, Any]:
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    analyser = ImageAnalyser(read_models([BACKBONE])[0])
    with keep_uploads_private() as uploads:
        blocks = create_page(analyser)
        with serve(blocks, "127.0.0.1", None) as address:
            yield Page(address, uploads)
    assert not uploads.exists()


def encode(format_name: str, num_frames: int = 1, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> bytes:
    numbers = np.random.default_rng(0)
    frames = [
        Image.fromarray(numbers.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
        for _ in range(num_frames)
    ]
    file = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if num_frames > 1 else {}
    frames[0].save(file, format_name, **more)
    return file.getvalue()


def encode_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_demo__shows_maps_of_a_picture(page: Page, format_name: str) -> None:
    told = page.show_upload(encode(format_name), f"photo.{format_name.lower()}")
    assert told["success"], told
    # The state, the clicked patch, then a PCA and a map of clusters; no similarity yet.
    assert [item is not None for item in told["output"]["data"][1:]] == [False, True, True, False]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty.png is empty."),
        ("notes.png", b"no picture at all", "is not an image in PNG, JPEG, WebP, BMP or GIF format."),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image in PNG"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image in PNG"),
        ("moving.gif", encode("GIF", 3), "is animated (3 pictures); give a single one."),
        ("moving.webp", encode("WEBP", 3), "is animated (3 pictures)"),
        ("moving.png", encode("PNG", 3), "is animated (3 pictures)"),
        ("bits.png", encode_header(12000, 12000), "has 12000x12000 pixels, more than 50 million; make it smaller."),
        ("bomb.png", encode_header(30000, 30000), "has more than 50 million pixels"),
        ("line.png", encode_header(2**31 - 1, 1), "has more than 50 million pixels"),
        ("thin.png", encode("PNG", size=(40000, 1)), "is smaller than one patch"),
        ("cut.jpg", encode("JPEG")[:200], "is truncated or damaged"),
        ("deep.png", encode("PNG", mode="I"), "has more than 8 bits a channel"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_demo__says_on_the_page_why_it_refuses_a_file(page: Page, name: str, content: bytes, reason: str) -> None:
    told = page.show_upload(content, name)
    assert not told["success"] and reason in told["output"]["error"], told
    assert str(page.uploads) not in told["output"]["error"]


def test_demo__takes_pictures_from_uploads_only(page: Page, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode("PNG"))
    assert not page.show(describe(str(secret), "secret.png"))["success"]
    inline = {"url": "data:image/png;base64,iVBORw0KGgo=", "meta": {"_type": "gradio.FileData"}}
    assert not page.show(inline)["success"]


def test_demo__refuses_long_files_and_requests(page: Page) -> None:
    # The page's own script refuses longer files before they are sent.
    assert json.loads(page.ask("GET", "/config")[1])["max_file_size"] == MAX_BYTES
    status, answer = page.upload(b"0" * (MAX_BYTES + 200_000), "long.png")
    assert status == 413 and b"at most 20 MB" in answer
    status, _ = page.upload(b"0" * (MAX_BYTES + 1000), "long.png")
    assert status == 413
    pieces = (b"0" * 1000 for _ in range(3))
    assert page.ask("POST", "/gradio_api/queue/join", pieces)[0] == 413


def test_demo__answers_its_own_names_only(page: Page) -> None:
    port = page.address.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST"):
        assert page.ask("GET", "/", Host=host)[0] == 200, host
    for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "192.168.0.7", "", "["):
        for path in ("/", "/config", "/gradio_api/queue/data?session_hash=x"):
            # Some of them are no Host header at all, which the server itself refuses.
            assert page.ask("GET", path, Host=host)[0] in (400, 421), (host, path)


def test_is_own_name__bound_to_every_address_is_known_by_all_of_them() -> None:
    assert is_own_name("192.168.0.7:7860", "0.0.0.0") and is_own_name("[fe80::1]:7860", "::")
    assert not is_own_name("evil.example", "0.0.0.0")
    assert is_own_name("desk.home:80", "desk.home") and not is_own_name("desk.home", "127.0.0.1")


def test_demo__keeps_uploads_where_only_their_owner_may_look(page: Page) -> None:
    status, answer = page.upload(encode("PNG"), "photo.png")
    assert status == 200 and Path(json.loads(answer)[0]).is_relative_to(page.uploads)
    assert stat.S_IMODE(page.uploads.stat().st_mode) == 0o700


def test_keep_uploads_private__stays_below_the_folder_that_gradio_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(given))
    with pytest.raises(KeyboardInterrupt), keep_uploads_private() as folder:
        (folder / "upload").mkdir()
        raise KeyboardInterrupt
    assert list(given.iterdir()) == []


def test_keep_uploads_private__sweeps_what_a_killed_page_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    killed = (
        "import os; from fit3d_ns.report.demo_server import keep_uploads_private as keep\n"
        "with keep() as folder: (folder / 'photo.png').write_bytes(b'1'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed], timeout=120).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "photo.png").is_file()
    with keep_uploads_private() as folder, keep_uploads_private() as another:
        assert sorted(tmp_path.iterdir()) == [folder] and another.parent == folder
    assert not list(tmp_path.iterdir())
