"""The bench's forecast: a clock that counts what runs do, instead of seconds."""

from dataclasses import replace
from pathlib import Path

import pytest

from fit3d_ns.probing import probe_runs
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.frozen_features import BackboneConfig
from fit3d_ns.probing.multiview import MultiviewConfig
from fit3d_ns.probing.probe_runs import ProbeRequest, forecast_seconds
from fit3d_ns.probing.segmentation import SegmentationConfig
from fit3d_ns.utils.results import ResultRecord


class Clock:
    """Loading takes 30 s once and 2 s a run, an image 0.5 s, an iteration 0.01 s, a pair 0.25 s."""

    def __init__(self, num_images: int) -> None:
        self.now, self.is_loaded, self.num_images = 0.0, False, num_images

    def run(self, request: ProbeRequest) -> ResultRecord:
        config = request.config
        self.now += 2.0 + 30.0 * (not self.is_loaded)
        self.is_loaded = True
        if isinstance(config, MultiviewConfig):
            self.now += 0.5 * config.max_views + 0.25 * config.max_pairs * len(request.seeds)
        else:
            assert isinstance(config, SegmentationConfig) and config.num_iterations
            self.now += 0.5 * min(2 * (request.max_frames or 10**9), self.num_images)
            self.now += 0.01 * config.num_iterations * len(request.seeds)
        return ResultRecord("probe", {}, {"test": {}})

    def perf_counter(self) -> float:
        return self.now


def test_forecast__work_grows_and_what_is_done_once_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    request = ProbeRequest("segmentation", BackboneConfig(), Path("r.json"), seeds=(0, 1, 2))
    many = [LabelledFrame(str(number), lambda: None) for number in range(50)]  # type: ignore[arg-type, return-value]
    labelled = LabelledSet("set", many, ("a", "b"))
    for config, num_images in ((SegmentationConfig(num_iterations=700), 100), (MultiviewConfig(max_pairs=60), 0)):
        clock = Clock(num_images)
        monkeypatch.setattr(probe_runs, "run_probe", clock.run)
        monkeypatch.setattr(probe_runs, "_read_sets", lambda *_: (labelled, labelled))
        monkeypatch.setattr(probe_runs.time, "perf_counter", clock.perf_counter)
        asked = replace(request, task="segmentation" if num_images else "correspondence", config=config)
        forecast, start = forecast_seconds(asked), clock.now
        clock.run(asked)
        assert forecast == pytest.approx(clock.now - start, rel=1e-6)
