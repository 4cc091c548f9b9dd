"""`fit3d-demo`: a local page to look at features of any image: PCA, clusters, similarity to a clicked pixel."""

from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Annotated, Literal

from fit3d_ns.cli.command import Heading, create_main
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.report.demo_page import ImageAnalyser, create_page
from fit3d_ns.report.demo_server import check_gradio, keep_uploads_private, serve
from fit3d_ns.utils.device import DeviceChoice, choose_device
from fit3d_ns.utils.limits import Limited, Limits


@dataclass(frozen=True)
class DemoCommand(Limited):
    """Which backbones are shown, and where the page is served."""

    backbone: Annotated[str, Heading("backbone")] = "dinov2_small"
    """The original backbone: one of the paper's names, any timm id, or `random:NAME`."""
    backbone_weights: Path | None = None
    """File with the original's weights; timm's download by default."""
    finetuned: tuple[str, ...] = ()
    """Fine-tuned backbones to show next to it: folders that fit3d-finetune wrote, or weights files."""
    normalization: Literal["timm", "imagenet"] = "timm"
    """Whose mean and deviation normalise images."""
    num_clusters: Annotated[int, Heading("page"), Limits(at_least=2, at_most=20)] = 8
    """Clusters of k-means to start with, 2 to 20; the page has a slider."""
    longest_side: Annotated[int, Limits(at_least=112, at_most=1344)] = 640
    """Longer side in pixels that backbones see at first, 112 to 1344; the page has a slider."""
    host: str = "127.0.0.1"
    """Address to serve on. 0.0.0.0 lets everybody on your network use the page."""
    port: int | None = None
    """Port to serve on; by default the first free one from 7860 on."""
    device: Annotated[DeviceChoice, Heading("machine")] = "auto"
    """Where backbones run; `auto` takes CUDA where there is one."""


def demo(command: DemoCommand) -> None:
    check_gradio()
    device = choose_device(command.device).type
    weights = () if command.backbone_weights is None else (command.backbone_weights,)
    groups = read_models([command.backbone, *command.finetuned], weights, command.normalization)
    if len(groups) > 1:
        names = " and a ".join(group.description.architecture.split(".")[0] for group in groups)
        raise ValueError(f"Original and fine-tuned backbone are a {names}; the page compares one architecture.")
    analyser = ImageAnalyser(groups[0], device)
    with keep_uploads_private():
        page = create_page(analyser, command.num_clusters, command.longest_side)
        with serve(page, command.host, command.port) as address:
            print(f"Page: {address} (Ctrl-C ends it)", flush=True)
            Event().wait()


main = create_main("fit3d-demo", DemoCommand, demo)
