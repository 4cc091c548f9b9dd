"""Geometry for the lifting benchmark: a short colour training of Gaussians that start at the capture's points.

No densification: the points are dense enough for a benchmark, and both sides of it share the result.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.geometry.cameras import viewmats_from_camera_to_worlds
from fit3d_ns.rasterization import rasterization
from fit3d_ns.scene import ActivatedGaussians, PosedCapture, View
from fit3d_ns.utils.selection import create_generator

# Learning rates of Gaussian splatting (Kerbl et al. 2023); positions are in units of the cameras' extent.
LEARNING_RATES = {"means": 1.6e-4, "colours": 2.5e-3, "opacity_logits": 0.05, "log_scales": 0.005, "quats": 0.001}

OnStep = Callable[[int, View, dict[str, Any], Tensor], None]


class ColourTraining:
    """Adam on L1 colour; `gaussians` is the geometry so far, `seconds` what colour alone took."""

    def __init__(self, capture: PosedCapture, device: torch.device, max_points: int | None = None, seed: int = 0):
        if capture.points is None:
            raise ValueError(f"{capture.root} has no seed points, which this benchmark starts from.")
        xyz, rgb = capture.points.xyz.float(), capture.points.rgb.float() / 255.0
        generator = create_generator(seed, "points")
        if max_points is not None and len(xyz) > max_points:
            chosen = torch.randperm(len(xyz), generator=generator)[:max_points]
            xyz, rgb = xyz[chosen], rgb[chosen]
        distances = NearestNeighbors(n_neighbors=4).fit(xyz.numpy()).kneighbors(xyz.numpy())[0][:, 1:]
        spacing = torch.from_numpy(distances).float().mean(dim=1).clamp(min=1e-5)
        raw = {
            "means": xyz,
            "colours": torch.logit(rgb.clamp(0.01, 0.99)),
            "opacity_logits": torch.zeros(len(xyz)),
            "log_scales": spacing.log()[:, None].repeat(1, 3),
            "quats": torch.nn.functional.normalize(torch.randn(len(xyz), 4, generator=generator), dim=-1),
        }
        self.capture = capture
        self.device = device
        self.views = capture.select("train")
        self.parameters = {name: value.to(device).requires_grad_(True) for name, value in raw.items()}
        centres = torch.stack([view.camera_to_world[:, 3] for view in self.views])
        extent = float((centres - centres.mean(dim=0)).norm(dim=1).max())
        rates = {**LEARNING_RATES, "means": LEARNING_RATES["means"] * extent}
        groups = [{"params": [value], "lr": rates[name], "name": name} for name, value in self.parameters.items()]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15)
        self.seconds = 0.0
        self._images: dict[str, Tensor] = {}
        self._order: list[int] = []
        self._generator = create_generator(seed, "views")

    @property
    def num_gaussians(self) -> int:
        """How many points became Gaussians."""
        return self.parameters["means"].shape[0]

    @property
    def gaussians(self) -> ActivatedGaussians:
        """The present geometry, activated and detached."""
        values = {name: value.detach() for name, value in self.parameters.items()}
        return ActivatedGaussians(
            means=values["means"].clone(),
            quats=values["quats"].clone(),
            scales=values["log_scales"].exp(),
            opacities=values["opacity_logits"].sigmoid(),
        )

    def run(self, num_steps: int, on_step: OnStep | None = None) -> None:
        """Trains; after each step's render, `on_step` gets the step, the view, the projection and alpha."""
        decay = (0.01) ** (1.0 / max(num_steps, 1))
        for step in range(num_steps):
            if not self._order:
                self._order = torch.randperm(len(self.views), generator=self._generator).tolist()
            view = self.views[self._order.pop()]
            target = self._load_image(view)
            start = time.perf_counter()
            image, alphas, info = self.render(view)
            (image - target).abs().mean().backward()
            self.seconds += time.perf_counter() - start
            if on_step is not None:
                on_step(step, view, info, alphas.detach())
            start = time.perf_counter()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.optimizer.param_groups[0]["lr"] *= decay
            self.seconds += time.perf_counter() - start

    def render(self, view: View) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Image [H, W, 3], alpha [H, W], and the projection."""
        values = self.parameters
        image, alphas, info = rasterization(
            values["means"],
            values["quats"],
            values["log_scales"].exp(),
            values["opacity_logits"].sigmoid(),
            values["colours"].sigmoid(),
            viewmats_from_camera_to_worlds(view.camera_to_world)[None].to(self.device),
            view.K[None].to(self.device),
            view.width,
            view.height,
        )
        return image[0], alphas[0, ..., 0], info

    @torch.no_grad()
    def compute_psnr(self, split: Split = "test") -> float:
        """Mean PSNR in dB over the views of a split."""
        errors = [
            (self.render(view)[0] - self._load_image(view)).square().mean() for view in self.capture.select(split)
        ]
        return float((-10.0 * torch.stack(errors).log10()).mean())

    def _load_image(self, view: View) -> Tensor:
        if view.name not in self._images:
            self._images[view.name] = self.capture.load_image(view)
        return self._images[view.name].to(self.device).float() / 255.0
