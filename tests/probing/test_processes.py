"""Two processes over gloo equal one: gradients, normalisation statistics, figures."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fit3d_ns.probing.classification import ClassificationConfig, ClassificationProbe
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.depth import DepthConfig, DepthProbe
from fit3d_ns.probing.frozen_features import BackboneConfig, create_frozen_backbones
from fit3d_ns.probing.head_probe import ProbeSets, RunConfig
from fit3d_ns.training.processes import create_accelerator
from tests.children import run_processes
from tests.probing.probe_backbones import MeanColourBackbones
from tests.probing.probe_scenes import BACKBONE
from tests.probing.test_training import create_segmentation_probe, create_striped_frame


def train(num_processes: int, process: int, folder: str) -> None:
    """Trains as one of some processes; the first writes what came out."""
    os.environ.update(
        RANK=str(process),
        LOCAL_RANK=str(process),
        WORLD_SIZE=str(num_processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=Path(folder, "port").read_text(),
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    probe = create_segmentation_probe("always", MeanColourBackbones())
    outcome = probe.run_seed(0)
    frames = [create_striped_frame(index) for index in range(3)]
    odd = probe.evaluate(outcome.head, LabelledSet("odd", frames, ("red", "green")))  # type: ignore[arg-type]
    depth = create_depth_probe().run_seed(0)
    classification = create_classification_probe().run_seed(0)
    if process == 0:
        assert outcome.head is not None and depth.head is not None and classification.head is not None
        result = {
            "head": outcome.head.state_dict(),
            "metrics": outcome.metrics,
            "odd": odd,
            "loss": outcome.summarise_losses()[1],
        }
        result |= {"depth_head": depth.head.state_dict(), "depth": depth.metrics, "depth_scores": depth.scores}
        result |= {"class_head": classification.head.state_dict(), "classification": classification.metrics}
        result |= {"class_scores": classification.scores, "class_loss": classification.summarise_losses()[1]}
        torch.save(result, Path(folder) / f"{num_processes}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def create_depth_probe() -> DepthProbe:
    """Red patches are one metre away, green ones two, blue ones unknown; three frames to measure, so shares differ."""
    frames = []
    for index in range(7):
        frame = create_striped_frame(index)
        depth = torch.tensor([1.0, 2.0, 0.0])[frame.load_image().argmax(dim=-1)]
        frames.append(replace(frame, load_depth=lambda depth=depth: depth))
    sets = ProbeSets(
        LabelledSet("toy", frames[:4]), LabelledSet("toy", frames[4:]), LabelledSet("toy", frames[3:4] * 3)
    )
    config = DepthConfig(num_iterations=12, batch_size=4, learning_rate=0.1, gradient_loss_weight=0.5)
    return DepthProbe(
        config, RunConfig(num_evaluations=2), sets, MeanColourBackbones(), "original", create_accelerator("cpu")
    )


def create_classification_probe() -> ClassificationProbe:
    """Pictures of one colour each with noise, cropped anew for every draw; five to measure, so shares differ."""
    frames = []
    for index in range(15):
        image = torch.randint(0, 60, (40, 48, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        image[..., index % 3] += 120
        frames.append(LabelledFrame(str(index), lambda image=image: image, class_index=index % 3))
    names = ("red", "green", "blue")
    sets = ProbeSets(*(LabelledSet("toy", part, names) for part in (frames[:7], frames[7:12], frames[12:])))
    config = ClassificationConfig(num_iterations=12, batch_size=8, resize_side=40, crop_side=32)
    backbones = create_frozen_backbones(BackboneConfig("original", BACKBONE), norm=True)
    run = RunConfig(cache="never", num_evaluations=2, num_threads=1)
    return ClassificationProbe(config, run, sets, backbones, "original", create_accelerator("cpu"))


@pytest.mark.slow
def test_probe__two_processes_equal_one(tmp_path: Path) -> None:
    import socket

    results: list[dict[str, Any]] = []
    for number in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (tmp_path / "port").write_text(str(probe.getsockname()[1]))
        run_processes(partial(train, number), str(tmp_path), number)
        results.append(torch.load(tmp_path / f"{number}.pt", weights_only=True))
    one, two = results
    for name, tensor in one["head"].items():
        # Adam divides by tiny second moments at first, which magnifies the rounding of sums in another order.
        torch.testing.assert_close(two["head"][name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for name in ("miou", "macc", "aacc"):
        assert two["metrics"][name] == one["metrics"][name] and two["odd"][name] == one["odd"][name]
    for name, tensor in one["depth_head"].items():
        torch.testing.assert_close(two["depth_head"][name], tensor, rtol=1e-4, atol=2e-5, msg=name)  # as above
    for name in ("rmse", "abs_rel", "d1", "num_images"):
        assert two["depth"][name] == pytest.approx(one["depth"][name], rel=1e-4), name
    assert two["depth"]["pooled"]["rmse"] == pytest.approx(one["depth"]["pooled"]["rmse"], rel=1e-4)
    assert two["depth_scores"] == pytest.approx(one["depth_scores"], rel=1e-4) and set(one["depth_scores"]) == {6, 12}
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, tensor in one["class_head"].items():
        torch.testing.assert_close(two["class_head"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert two["classification"] == one["classification"] and one["classification"]["num_images"] == 5
    assert two["class_scores"] == one["class_scores"] and set(one["class_scores"]) == {6, 12}
    assert two["class_loss"] == pytest.approx(one["class_loss"], rel=1e-4)
