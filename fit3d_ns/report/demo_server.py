"""How the demo page is served: to this machine alone, by its own names, and with bounds on what browsers send.

Gradio's usage statistics, share links and web fonts are off, and the page forbids the browser to load from elsewhere.
"""

import ipaddress
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fit3d_ns.utils.files import make_temporary_folder

CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
"""The browser fetches nothing from another host; inline parts are how Gradio builds its page."""
MAX_BYTES = 20_000_000
"""Largest uploaded file; a photograph of 50 million pixels has about 15 million bytes."""
MAX_PIXELS = 50_000_000
"""Largest uploaded picture: a small file may hold very many pixels, and they are decoded at once."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What browsers show; Pillow's other decoders stay out of reach."""
_BYTES_AROUND_FILE = 100_000


def check_gradio() -> None:
    """Raises ValueError with what to do where Gradio is not installed."""
    # Read while Gradio is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The demo page needs Gradio, which is not installed ({error}); "
            "run `pip install '.[demo]'` in the clone (or `uv pip install '.[demo]'`)."
        ) from error


@contextmanager
def keep_uploads_private() -> Iterator[Path]:
    """A folder for uploads that only this user may enter, for pages made in the block; it goes when the block ends.

    What a killed page left goes too.
    """
    before = os.environ.get("GRADIO_TEMP_DIR", "")
    with make_temporary_folder(Path(before or tempfile.gettempdir()), "fit3d-demo") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield folder
        finally:
            # gradio takes an empty one for none.
            os.environ["GRADIO_TEMP_DIR"] = before


def read_upload(upload: Any) -> np.ndarray | None:
    """Pixels [height, width, 3] of what a browser sent (Gradio's `ImageData`), upright; None where it sent nothing.

    gradio.Error, whose sentence the page shows, if it is not one picture of a bounded size, which its header tells.
    """
    import gradio as gr

    if upload is None:
        return None
    # Pictures inside the request itself (`upload.url`) are never sent by the page.
    path = Path(upload.path or os.devnull)
    name = upload.orig_name or path.name
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            problem = _find_problem(picture)
            if problem is None:
                return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError:
        is_empty = path.is_file() and path.stat().st_size == 0
        problem = "is empty" if is_empty else "is not an image in PNG, JPEG, WebP, BMP or GIF format"
    except Image.DecompressionBombError:
        problem = f"has more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        problem = f"is truncated or damaged ({type(error).__name__})"
    raise gr.Error(f"{name} {problem}.", print_exception=False)


@contextmanager
def serve(page: Any, host: str, port: int | None) -> Iterator[str]:
    """Serves a page (`gradio.Blocks`) while the block runs, and gives its address.

    Without a `port`, at the first free one from 7860 on; OSError if the given one is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        show_error=True,
        max_file_size=MAX_BYTES,
        # Named fonts of the system instead of web fonts.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"middleware": [Middleware(_Guard, host=host)]},
    )
    try:
        yield address
    finally:
        page.close(verbose=False)


def is_own_name(header: str, host: str) -> bool:
    """Whether a request's Host header names this server, which is bound to `host`.

    A page elsewhere that points its own name at this machine (DNS rebinding) is told apart by that name. Bound to every
    address (0.0.0.0), the server is also known by each of them and by the machine's name.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", "127.0.0.1", "::1", host.lower()):
        return True
    if host not in ("0.0.0.0", "::"):
        return False
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name.split(".")[0] == os.uname().nodename.split(".")[0].lower()


def _find_problem(picture: Image.Image) -> str | None:
    """Why an opened picture, which is not decoded yet, is not taken."""
    # Phones put a second picture beside the photograph (MPO), which is left alone.
    num_frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if picture.width * picture.height > MAX_PIXELS:
        return f"has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS // 10**6} million; make it smaller"
    if num_frames > 1:
        return f"is animated ({num_frames} pictures); give a single one"
    if picture.mode.startswith(("I", "F")):
        return "has more than 8 bits a channel; convert it to 8"
    return None


@dataclass
class _Guard:
    """ASGI middleware: refuses other names and long requests, and sends `CONTENT_POLICY` with every answer."""

    app: Any
    host: str

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", CONTENT_POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        answer = self.app
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            length = headers.get(b"content-length", "0")
            is_bounded = b"transfer-encoding" not in headers and length.isdigit()
            if not is_own_name(headers.get(b"host", ""), self.host):
                answer = PlainTextResponse("fit3d-demo answers only to the address it printed.", 421)
            elif not is_bounded or int(length) > MAX_BYTES + _BYTES_AROUND_FILE:
                answer = PlainTextResponse(f"Files of at most {MAX_BYTES // 10**6} MB are taken.", 413)
        await answer(scope, receive, send_with_policy)
