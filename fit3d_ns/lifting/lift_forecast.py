"""`forecast_lift`: how long a lift will take and how much memory, from one view that is really lifted, and counts."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fit3d_ns.features import FeatureCache, compute_feature_key, create_extractor
from fit3d_ns.lifting.blending import prepare_view
from fit3d_ns.lifting.config import LiftConfig, LiftSceneConfig
from fit3d_ns.lifting.lift_scene import measure_lift_memory_mb
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.sources import LiftSource
from fit3d_ns.lifting.views import choose_views, load_views
from fit3d_ns.scene import View

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LiftForecast:
    """Predicted costs; other work on the machine changes the seconds."""

    num_gaussians: int
    """Gaussians that get features."""
    num_views: int
    """Views that are lifted."""
    num_held_out: int
    """Views that are measured on afterwards."""
    token_seconds: float
    """Reading all photographs, and the backbone where the sampled view's tokens are not cached yet."""
    is_cached: bool
    """Whether the sampled view's tokens were cached; the forecast takes all other views to be like it."""
    solve_seconds: float
    """All passes of the solve, at most."""
    evaluation_seconds: float
    """Held-out views."""
    memory_mb: float
    """Peak memory in 1e6 bytes."""
    file_mb: float
    """Size of the scene file in 1e6 bytes."""

    @property
    def seconds(self) -> float:
        """Everything together."""
        return self.token_seconds + self.solve_seconds + self.evaluation_seconds


def forecast_lift(
    source: LiftSource,
    cache: FeatureCache,
    config: LiftConfig,
    options: LiftSceneConfig | None = None,
    device: torch.device | str = "cpu",
    include_sh: bool = False,
) -> LiftForecast:
    """Lifts the middle view alone, twice (kernels are compiled and files are read in the first), and counts.

    The view's tokens stay in the cache. `include_sh` is that of `save_scene`.

    Raises:
        ValueError: What `lift_scene` refuses.
    """
    options = options or LiftSceneConfig()
    chosen = choose_views(source.capture, options.views)
    sample = chosen.lifted[len(chosen.lifted) // 2]
    read_seconds, key = _time(lambda: compute_feature_key(source.capture.load_image(sample)))
    is_cached = cache.contains(key)
    load_views(source.capture, [sample], cache, options, device)
    # The first pass of a backbone also reads its weights: the second is timed, on tokens that are thrown away.
    backbone_seconds = 0.0 if is_cached else _time_backbone(source, sample, cache, device)
    views = load_views(source.capture, [sample], cache, options, device)
    gaussians = source.activate(device)
    one_pass = replace(config, max_passes=min(config.max_passes, 1), polish_steps=min(config.polish_steps, 1))
    solve_features(gaussians, views, one_pass)
    passes = _PassTimes()
    result = solve_features(gaussians, views, one_pass, progress=passes)
    # What the conjugate gradients keep between passes, and make again where it does not fit.
    prepare_seconds, prepared = _time(lambda: prepare_view(gaussians, views[0], config.samples_per_patch))
    num_views, num_held_out = len(chosen.lifted), len(chosen.held_out)
    # Views whose projections are not kept are projected again in each pass after the first that projects them. A
    # sampled solve's decoder pass projects whole views in any case, and so did the measured one.
    num_kept = min(int(config.cache_memory_mb * 1e6 / max(prepared.num_bytes, 1)), num_views)
    num_passes = config.max_passes + int("sampled weighted sum" not in passes.names)
    solve_seconds = (
        num_views * sum(map(passes.total, ("basis", "weighted sum", "sampled weighted sum")))
        + config.decoder_share * num_views * passes.total("decoder")
        + num_views * config.max_passes * passes.total("solve")
        + (num_views - num_kept) * num_passes * prepare_seconds
        + config.polish_steps * result.seconds["polish"]
    )
    kept_mb = (num_kept - 1) * prepared.num_bytes / 1e6
    num_gaussians = source.gaussians.num_gaussians
    stored = source.gaussians if include_sh else replace(source.gaussians, sh_rest=None)
    bytes_per_gaussian = stored.bytes_per_gaussian + 2 * config.feature_dim
    decoder_bytes = 4 * 9 * config.feature_dim * cache.description.embed_dim
    return LiftForecast(
        num_gaussians=num_gaussians,
        num_views=num_views,
        num_held_out=num_held_out,
        token_seconds=(num_views + num_held_out) * (read_seconds + backbone_seconds),
        is_cached=is_cached,
        solve_seconds=solve_seconds,
        evaluation_seconds=num_held_out * (prepare_seconds + passes.total("decoder")),
        memory_mb=measure_lift_memory_mb(device) + max(kept_mb, 0.0),
        file_mb=(num_gaussians * bytes_per_gaussian + decoder_bytes) / 1e6,
    )


class _PassTimes:
    """Seconds of each pass's one view: what surrounds the passes does not grow with the views."""

    def __init__(self) -> None:
        self._starts: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == 0:
            self._starts[name] = now
        else:
            self._seconds[name] = now - self._starts[name]

    @property
    def names(self) -> set[str]:
        """Of the passes that were made."""
        return set(self._starts)

    def total(self, name: str) -> float:
        """Seconds of the passes whose names begin so."""
        return sum((seconds for key, seconds in self._seconds.items() if key.startswith(name)), 0.0)


def _time_backbone(source: LiftSource, sample: View, cache: FeatureCache, device: torch.device | str) -> float:
    extractor = create_extractor(cache.description, device=device)
    # (h, w, 3) -> (1, 3, h, w)
    image = source.capture.load_image(sample).permute(2, 0, 1)[None].float().to(device) / 255.0
    seconds, _ = _time(lambda: extractor(image))
    return seconds


def _time(function: Callable[[], _Result]) -> tuple[float, _Result]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
