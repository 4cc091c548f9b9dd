"""`FeatureSplatfactoModel`: splatfacto with one feature vector per Gaussian, on every rasterization backend.

Colour moves the geometry, features never do: `rasterize_features` blends them through the same projection, detached.
"""

from collections import UserDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.models.base_model import Model
from nerfstudio.models.splatfacto import RGB2SH, SplatfactoModel, num_sh_bases, random_quat_tensor
from nerfstudio.utils.colors import get_color
from pytorch_msssim import SSIM
from torch import Tensor
from torch.nn import Parameter, functional

from fit3d_ns.geometry.cameras import create_K, viewmats_from_camera_to_worlds
from fit3d_ns.plugin.feature_branch import FeatureBranch
from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.plugin.strategies import create_strategy
from fit3d_ns.rasterization import rasterization
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.utils.progress import notice

VISER_BACKGROUND = (0.1490, 0.1647, 0.2157)
"""Colour behind the splats in the viewer when training uses random backgrounds, as in splatfacto."""
INITIAL_OPACITY = 0.1
"""splatfacto's opacity of a seed point."""
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
"""Name under which torch's hub cache keeps torchvision's AlexNet, which LPIPS needs."""


class LazyOutputs(UserDict[str, Any]):
    """Outputs of which some are functions, called when they are first read, because a viewer shows one of all."""

    def __getitem__(self, name: str) -> Any:
        if callable(self.data[name]):
            self.data[name] = self.data[name]()
        return self.data[name]


class FeatureSplatfactoModel(SplatfactoModel):
    """Splatfacto's parameters plus `features` [N, D]; a feature branch renders, decodes and compares them."""

    config: FeatureSplatfactoModelConfig
    feature_branch: FeatureBranch

    def populate_modules(self) -> None:
        """Builds parameters, strategy, metrics and the feature branch.

        splatfacto's own version needs CUDA and downloads LPIPS weights, so nothing of it is called.
        """
        # Two seconds of import that commands of other methods need not pay.
        from torchmetrics.image import PeakSignalNoiseRatio

        Model.populate_modules(self)
        # A collider clips rays; a splatting model has none.
        self.collider = None
        self.gauss_params = torch.nn.ParameterDict(self._create_gaussians())
        self.feature_branch = FeatureBranch(self.config, self.kwargs["metadata"])
        self.camera_optimizer = self.config.camera_optimizer.setup(num_cameras=self.num_train_data, device="cpu")
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = SSIM(data_range=1.0, size_average=True, channel=3)
        self.step = 0
        self.crop_box = None
        is_random = self.config.background_color == "random"
        self.background_color = torch.tensor(VISER_BACKGROUND) if is_random else get_color(self.config.background_color)
        if self.config.use_bilateral_grid:
            from nerfstudio.model_components.lib_bilagrid import BilateralGrid

            grid_x, grid_y, grid_w = self.config.grid_shape
            self.bil_grids = BilateralGrid(num=self.num_train_data, grid_X=grid_x, grid_Y=grid_y, grid_W=grid_w)
        self.strategy = create_strategy(self.config, self.num_train_data)
        self.strategy_state = self.strategy.initialize_state()

    @property
    def features(self) -> Float[Tensor, "num_gaussians dim"]:
        """Feature vector of each Gaussian."""
        return self.gauss_params["features"]

    def get_lift_gaussians(self) -> ActivatedGaussians:
        """The Gaussians as they are now, activated and detached."""
        return ActivatedGaussians(
            means=self.means.detach(),
            quats=self.quats.detach(),
            scales=torch.exp(self.scales.detach()),
            opacities=torch.sigmoid(self.opacities.detach()).squeeze(-1),
            rasterize_mode=self.config.rasterize_mode,
        )

    def get_gaussian_param_groups(self) -> dict[str, list[Parameter]]:
        """splatfacto's groups and `features`, so that the strategies carry the features along."""
        return {name: [parameter] for name, parameter in self.gauss_params.items()}

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """All groups, with `decoder` for the convolution."""
        return super().get_param_groups() | {"decoder": list(self.feature_branch.decoder.parameters())}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Loads a checkpoint of any number of Gaussians.

        ValueError where keys are missing, because the checkpoint is of another method. (A RuntimeError would make
        nerfstudio try again without being strict, and go on with random features.)
        """
        stored_decoder = state.get("feature_branch.decoder.weight")
        if stored_decoder is not None and stored_decoder.shape[0] != self.feature_branch.embed_dim:
            # Without its weights file the backbone is unknown here, but the checkpoint knows its width.
            self.feature_branch.resize(stored_decoder.shape[0])
            self.feature_branch.to(self.device)
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(
                f"The checkpoint has no {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}; it was not made "
                "by fit3d-features. Lift a splatfacto run with `fit3d-lift --load-config`."
            )
        num_gaussians = state["gauss_params.means"].shape[0]
        for name, parameter in list(self.gauss_params.items()):
            shape = (num_gaussians, *parameter.shape[1:])
            stored = state[f"gauss_params.{name}"]
            if tuple(stored.shape) != shape:
                problem = f"The checkpoint's {name} are {tuple(stored.shape)}, the config asks for {shape}"
                raise ValueError(f"{problem}; use the config.yml next to the checkpoint.")
            self.gauss_params[name] = Parameter(torch.zeros(shape, device=parameter.device))
        return Model.load_state_dict(self, state, strict=strict, **kwargs)

    def get_outputs(self, camera: Cameras) -> Mapping[str, Any]:  # type: ignore[override]
        """Renders `rgb` [H, W, 3], `depth` [H, W, 1] (None in training unless asked for), `accumulation` [H, W, 1] and
        `background`; outside training also `features_pca` and `features_pca_original`, both [H, W, 3].

        There is never an output with feature channels: the viewer would ship it to the browser.
        """
        assert isinstance(camera, Cameras), "a splatting model renders cameras"
        if self.training:
            assert camera.shape[0] == 1, "one camera at a time"
            camera_to_worlds = self.camera_optimizer.apply_to_camera(camera)
        else:
            camera_to_worlds = camera.camera_to_worlds
        parameters: dict[str, Tensor] = dict(self.gauss_params.items())
        if self.crop_box is not None and not self.training:
            inside = self.crop_box.within(self.means).squeeze(-1)
            parameters = {name: value[inside] for name, value in parameters.items()}
        factor = self._get_downscale_factor()
        camera.rescale_output_resolution(1 / factor)
        numbers = (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height)
        # One transfer, not six: on a GPU each of them waits for everything before it.
        *intrinsics, width, height = torch.cat(numbers, dim=-1)[0].tolist()
        width, height = int(width), int(height)
        camera.rescale_output_resolution(factor)
        self.last_size = (height, width)
        wants_depth = self.config.output_depth_during_training or self.config.depth_loss_weight > 0 or not self.training
        colors, sh_degree = self._get_colors(parameters)
        render, alpha, info = rasterization(
            means=parameters["means"],
            quats=parameters["quats"],
            scales=torch.exp(parameters["scales"]),
            opacities=torch.sigmoid(parameters["opacities"]).squeeze(-1),
            colors=colors,
            viewmats=viewmats_from_camera_to_worlds(camera_to_worlds.to(self.device)),
            Ks=create_K(*intrinsics)[None].to(self.device),
            width=width,
            height=height,
            render_mode="RGB+ED" if wants_depth else "RGB",
            sh_degree=sh_degree,
            absgrad=self.config.strategy == "default" and self.config.use_absgrad,
            rasterize_mode=self.config.rasterize_mode,
        )
        self.info = info
        if self.training:
            if self.config.strategy == "default":
                parts = self.gauss_params, self.optimizers, self.strategy_state
                self.strategy.step_pre_backward(*parts, self.step, info)
            self.last_alpha = alpha[0, ..., 0].detach()
        background = self._get_background_color()
        rgb = torch.clamp(render[0, ..., :3] + (1 - alpha[0]) * background, 0.0, 1.0)
        if self.config.use_bilateral_grid and self.training and "cam_idx" in (camera.metadata or {}):
            rgb = self._apply_bilateral_grid(rgb[None], camera.metadata["cam_idx"], height, width)[0]
        outputs: dict[str, Any] = {"rgb": rgb, "depth": None, "accumulation": alpha[0], "background": background}
        if wants_depth:
            depth = render[0, ..., 3:4]
            outputs["depth"] = torch.where(alpha[0] > 0, depth, depth.detach().max()) if depth.numel() else depth
        if not self.training:
            outputs["background"] = background.expand(height, width, 3)
            branch, features = self.feature_branch, parameters["features"]
            return LazyOutputs(
                outputs,
                features_pca=lambda: branch.render_picture(features, info, alpha[0]),
                features_pca_original=lambda: branch.draw_tokens(camera, height, width),
            )
        return outputs

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        """Colour loss as splatfacto's, the feature loss where it is on at this step, and the depth loss where asked."""
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        if self.training and "depth" in batch:
            loss = compute_depth_loss(outputs["depth"][..., 0], outputs["accumulation"][..., 0], batch["depth"])
            losses["depth_loss"] = self.config.depth_loss_weight * loss
        if self.training and self.config.strategy == "mcmc":
            # The MCMC paper's regularisers, section 3: fewer and smaller Gaussians.
            opacities, scales = torch.sigmoid(self.opacities), torch.exp(self.scales)
            losses["opacity_regularization"] = self.config.mcmc_opacity_regularization * opacities.mean()
            losses["scale_regularization"] = self.config.mcmc_scale_regularization * scales.mean()
        if self.training and self.feature_branch.is_joint:
            loss = self.feature_branch.compute_loss(self.features, self.info, self.last_alpha, batch)
            losses["feature_loss"] = self.config.feature_loss_weight * loss
        return losses

    def get_image_metrics_and_images(
        self, outputs: Mapping[str, Any], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Metrics of the last render: `psnr ssim feature_l1 feature_cosine`, and `lpips` where it is at hand.

        Feature metrics are means over held-out tokens that are covered (alpha > 0.5) and valid (mask > 0.5), at the
        token grid, against the backbone's own tokens.
        """
        truth = self.composite_with_background(self.get_gt_img(batch["image"]), outputs["background"])
        prediction = outputs["rgb"]
        # [H, W, C] -> [1, C, H, W]
        truth_nchw, prediction_nchw = truth.permute(2, 0, 1)[None], prediction.permute(2, 0, 1)[None]
        metrics = {
            "psnr": float(self.psnr(truth_nchw, prediction_nchw)),
            "ssim": float(self.ssim(truth_nchw, prediction_nchw)),
        }
        if self._lpips is not None:
            metrics["lpips"] = float(self._lpips(truth_nchw.clamp(0, 1), prediction_nchw.clamp(0, 1)))
        if "patch_tokens" in batch:
            metrics |= self.feature_branch.compute_metrics(self.features, self.info, batch)
        pictures = {"img": torch.cat([truth, prediction], dim=1)}
        if "features_pca" in outputs:
            pictures["features_pca"] = torch.cat([outputs["features_pca_original"], outputs["features_pca"]], dim=1)
        return metrics, pictures

    def _create_gaussians(self) -> dict[str, Parameter]:
        """Raw parameters at the seed points, or at random positions where there are none."""
        has_points = self.seed_points is not None and not self.config.random_init and len(self.seed_points[0]) > 0
        if has_points:
            means = self.seed_points[0].float().clone()
        else:
            means = (torch.rand(self.config.num_random, 3) - 0.5) * self.config.random_scale
        num_gaussians = len(means)
        sh_coefficients = torch.zeros(num_gaussians, num_sh_bases(self.config.sh_degree), 3)
        if has_points and len(self.seed_points[1]) == num_gaussians:
            seed_colors = self.seed_points[1].float() / 255
            is_sh = self.config.sh_degree > 0
            sh_coefficients[:, 0] = RGB2SH(seed_colors) if is_sh else torch.logit(seed_colors, eps=1e-6)
        else:
            sh_coefficients[:, 0] = torch.rand(num_gaussians, 3)
        num_neighbours = min(3, num_gaussians - 1)
        distances = self.k_nearest_sklearn(means, num_neighbours)[0] if num_neighbours > 0 else [[1.0]]
        spacing = torch.as_tensor(distances).mean(dim=-1, keepdim=True).clamp(min=1e-7)
        raw = {
            "means": means,
            "scales": torch.log(spacing.repeat(1, 3)),
            "quats": random_quat_tensor(num_gaussians),
            "features_dc": sh_coefficients[:, 0].contiguous(),
            "features_rest": sh_coefficients[:, 1:].contiguous(),
            "opacities": torch.logit(torch.full((num_gaussians, 1), INITIAL_OPACITY)),
            "features": FeatureBranch.create_features(self.config, num_gaussians),
        }
        return {name: Parameter(value) for name, value in raw.items()}

    def _get_colors(self, parameters: dict[str, Tensor]) -> tuple[Tensor, int | None]:
        if self.config.sh_degree == 0:
            return torch.sigmoid(parameters["features_dc"]), None
        assert self.config.sh_degree_interval is not None
        degree = min(self.step // self.config.sh_degree_interval, self.config.sh_degree)
        return torch.cat([parameters["features_dc"][:, None], parameters["features_rest"]], dim=1), degree

    @cached_property
    def _lpips(self) -> Any:
        """LPIPS (AlexNet), or None where it is off or its weights are not at hand. A cached property is not registered
        as a submodule, so nothing of it is saved."""
        if self.config.lpips == "off":
            return None
        if not (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE).is_file():
            notice(f"LPIPS is left out: torch's hub cache has no {ALEXNET_FILE} (torchvision's AlexNet).")
            return None
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(normalize=True).to(self.device)


def compute_depth_loss(
    rendered: Float[Tensor, "height width"],
    alpha: Float[Tensor, "height width"],
    measured: Float[Tensor, "rows columns"],
) -> Float[Tensor, ""]:
    """Mean of |rendered - measured| / measured over pixels that are measured (above 0) and covered (alpha above 0.5).

    Of a larger map, the measurement nearest to each rendered pixel's centre is taken. 0 where no pixel counts.
    """
    fitted = functional.interpolate(measured[None, None].to(rendered), rendered.shape, mode="nearest-exact")[0, 0]
    counts = (fitted > 0) & (alpha > 0.5)
    return ((rendered - fitted).abs() / fitted.clamp(min=1e-6) * counts).sum() / counts.sum().clamp(min=1)
