"""`fit3d-view`: a lifted scene in the browser, its features in colours, without nerfstudio and without a card."""

from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Annotated

import tyro

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.report.scene_viewer import SceneViewer, open_server
from fit3d_ns.report.splat_colours import ViewerConfig
from fit3d_ns.scene import load_scene
from fit3d_ns.utils.device import DeviceChoice, choose_device


@dataclass(frozen=True)
class ViewCommand:
    """Which scene is shown, and where."""

    scene: tyro.conf.Positional[Path]
    """A scene file of fit3d-lift or fit3d-export."""
    viewer: ViewerConfig = ViewerConfig()
    output_path: Annotated[Path | None, Heading("output")] = None
    """Write a picture (.png, from the middle camera) or a turntable (.mp4) instead of serving the page."""
    host: Annotated[str, Heading("page")] = "127.0.0.1"
    """Address to serve on. 0.0.0.0 lets everybody on your network look and click."""
    port: int = 8080
    """Port to serve on; the next free one if it is taken."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where backbones run and pictures are drawn; `auto` takes CUDA where there is one. The page needs none."""


def view(command: ViewCommand) -> None:
    output = command.output_path
    if output is not None and output.suffix not in (".png", ".mp4"):
        raise ValueError(f"--output-path {output} is neither a picture (.png) nor a turntable (.mp4).")
    scene = load_scene(command.scene, choose_device(command.device).type)
    viewer = SceneViewer(scene, command.viewer)
    if output is not None:
        viewer.save(output)
        print(f"Wrote {output}.")
        return
    server = open_server(command.host, command.port)
    viewer.show(server)
    print(f"Page: http://{command.host}:{server.get_port()} (Ctrl-C ends it)", flush=True)
    Event().wait()


main = create_main("fit3d-view", ViewCommand, view)
