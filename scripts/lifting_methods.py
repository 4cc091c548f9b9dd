"""The five ways of lifting that the benchmark compares, at one geometry, and how each is measured."""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.lifting.blending import ViewBlender
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.feature_error import FeatureLoss, FeatureLossConfig, FeatureMetrics, evaluate_features
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene import ActivatedGaussians, FeatureDecoder, TokenReadingRule
from fit3d_ns.utils.progress import measure_peak_memory_mb
from fit3d_ns.utils.selection import create_generator

# Paper (FACTS 2.2 of the public code): constant rate of features and decoder over 30,000 steps, Adam eps 1e-15.
PAPER_RATE, PAPER_STEPS, PAPER_EPS = 6.25e-5, 30_000, 1e-15


@dataclass(frozen=True)
class Lifted:
    """What one method gave."""

    features: Tensor
    decoder: FeatureDecoder
    seconds: float
    """Feature passes and solves; backbone and disk excluded."""
    passes: float
    """Passes over all views."""
    peak_mb: float


class PeakMemory:
    """Largest memory during a `with` block, in 1e6 bytes: of the device on CUDA, else resident memory."""

    def __enter__(self) -> "PeakMemory":
        self.peak_mb = 0.0
        self._stop = threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.peak_mb = torch.cuda.max_memory_allocated() / 1e6

    def _sample(self) -> None:
        statm = Path("/proc/self/statm")
        while not self._stop.is_set():
            # Where the system does not tell, the peak since the process began stands in.
            resident = int(statm.read_text().split()[1]) * 4096 / 1e6 if statm.exists() else measure_peak_memory_mb()
            self.peak_mb = max(self.peak_mb, resident)
            self._stop.wait(0.02)


class JointTraining:
    """The paper's schedule: one feature step at each colour step, on the image-sized L1 loss, from zero features."""

    def __init__(
        self, num_gaussians: int, feature_dim: int, tokens: dict[str, Tensor], num_steps: int, rate: str, device: Any
    ):
        embed_dim = next(iter(tokens.values())).shape[-1]
        self.tokens = tokens
        self.features = torch.zeros(num_gaussians, feature_dim, device=device, requires_grad=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.decoder = FeatureDecoder(feature_dim, embed_dim).to(device)
        self.rate = PAPER_RATE * (PAPER_STEPS / num_steps if rate == "scaled" else 1.0)
        parameters = [self.features, *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=self.rate, eps=PAPER_EPS)
        self.seconds = 0.0
        self.num_steps = 0

    def on_step(self, step: int, view: Any, info: dict[str, Any], alphas: Tensor) -> None:
        tokens = self.tokens[view.name].float().to(self.features.device)
        start = time.perf_counter()
        config = FeatureLossConfig(multiple=0, token_to_pixel="bilinear", alpha_weighting=False)
        width, height, patch_grid = view.camera.width, view.camera.height, (tokens.shape[0], tokens.shape[1])
        loss = FeatureLoss(width, height, patch_grid, config, tokens.device)
        loss.compute(rasterize_features(self.features, info)[0], alphas, self.decoder, tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _wait(self.features.device)
        self.seconds += time.perf_counter() - start
        self.num_steps += 1

    def finish(self, num_views: int, peak_mb: float) -> Lifted:
        """What was learned; `peak_mb` is that of colour and features together."""
        self.decoder.requires_grad_(False)
        passes = self.num_steps / num_views
        return Lifted(self.features.detach(), self.decoder, self.seconds, passes, peak_mb)


def lift_by_gradient(
    gaussians: ActivatedGaussians, views: Sequence[LiftView], feature_dim: int, num_steps: int, learning_rate: float
) -> Lifted:
    """Adam on fixed geometry from zero features, on the cheap loss grid; the rate shrinks linearly to zero."""
    with PeakMemory() as memory, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LiftConfig(feature_dim=feature_dim)
        blender = ViewBlender(gaussians, views, config)
        embed_dim = views[0].read_tokens(gaussians.means.device).shape[-1]
        start = time.perf_counter()
        features = torch.zeros(len(gaussians), feature_dim, device=gaussians.means.device, requires_grad=True)
        decoder = FeatureDecoder(feature_dim, embed_dim, bias=True).to(features.device)
        optimizer = torch.optim.Adam([features, *decoder.parameters()], lr=learning_rate, eps=PAPER_EPS)
        generator = create_generator(0, "gradient")
        order: list[int] = []
        for step in range(num_steps):
            if not order:
                order = torch.randperm(len(views), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 - step / num_steps)
            view = blender.prepare(order.pop())
            height, width = view.alphas.shape
            loss = FeatureLoss(width, height, view.patch_grid, FeatureLossConfig(), features.device)
            loss.compute(loss.blend(features, view.info), view.alphas, decoder, view.tokens, view.mask).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(features.device)
        seconds = time.perf_counter() - start
    decoder.requires_grad_(False)
    return Lifted(features.detach(), decoder, seconds, num_steps / len(views), memory.peak_mb)


def lift_closed_form(gaussians: ActivatedGaussians, views: Sequence[LiftView], config: LiftConfig) -> Lifted:
    """`solve_features`, timed as a whole."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = solve_features(gaussians, views, config)
        _wait(gaussians.means.device)
        seconds = time.perf_counter() - start
    return Lifted(result.features, result.decoder, seconds, result.num_passes, memory.peak_mb)


def create_closed_form_configs(config: LiftConfig) -> dict[str, LiftConfig]:
    """`weighted_sum` and `cg` read with the PCA decoder; `default` is everything at its default."""
    plain = replace(config, decoder_ridge=inf, polish_steps=0)
    return {"weighted_sum": replace(plain, max_passes=0), "cg": plain, "default": config}


def measure(
    lifted: Lifted, gaussians: ActivatedGaussians, test_views: Sequence[LiftView], mean_token: Tensor
) -> dict[str, Any]:
    """Held-out figures and costs of one method; each is read by the rule that suits it better, both are kept."""
    readings: dict[str, FeatureMetrics] = {}
    rule: TokenReadingRule
    for rule in ("bilinear", "area"):
        readings[rule] = evaluate_features(
            gaussians, lifted.features, lifted.decoder, test_views, mean_token, token_reading=rule
        )
    best = min(readings, key=lambda name: readings[name].feature_l1)
    costs = {"feature_seconds": lifted.seconds, "passes": lifted.passes, "peak_mb": lifted.peak_mb}
    both = {
        name: {"feature_l1": item.feature_l1, "feature_cosine": item.feature_cosine} for name, item in readings.items()
    }
    return {**asdict(readings[best]), **costs, "token_reading": best, "readings": both}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
