"""The methods `ns-train` lists: `fit3d-features`, and `fit3d-features-paper` with the values of the public code.

Every `ns-*` command of every method imports this module, so it imports no kernels and no timm.
"""

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.plugins.types import MethodSpecification

from fit3d_ns.plugin.compatibility import check_versions
from fit3d_ns.plugin.datamanager import FeatureDatamanagerConfig
from fit3d_ns.plugin.dataparser import FeatureDataParserConfig
from fit3d_ns.plugin.model import FeatureSplatfactoModel
from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.plugin.pipeline import FeaturePipelineConfig
from fit3d_ns.plugin.schedulers import FusedAdamOptimizerConfig, RunLengthDecaySchedulerConfig
from fit3d_ns.plugin.trainer import FeatureTrainerConfig

HAS_CUDA = torch.cuda.is_available()
"""Asked once: decides the default device and the default length of a run."""

GPU_ITERATIONS = 30_000
CPU_ITERATIONS = 3_000
"""A first result on two cores in minutes; quality figures of both lengths stand in the README."""

GPU_DENSIFY_THRESHOLD = 0.0008
"""splatfacto's."""

CPU_DENSIFY_THRESHOLD = 0.002
"""Held-out PSNR and features of short runs are the same with 2.5 times fewer Gaussians; see the README."""

ADAM_EPS = 1e-15
"""Adam's epsilon of 3D Gaussian splatting, also of the paper's code for features and decoder (FACTS 2.2)."""

PAPER_FEATURE_LR = 0.0025 / 40
"""Learning rate of features and decoder in the paper's code."""


def _create_optimizers(feature_lr: float, decoder_lr: float) -> dict[str, dict[str, object]]:
    def constant(lr: float) -> dict[str, object]:
        return {"optimizer": FusedAdamOptimizerConfig(lr=lr, eps=ADAM_EPS), "scheduler": None}

    return {
        "means": {
            "optimizer": FusedAdamOptimizerConfig(lr=1.6e-4, eps=ADAM_EPS),
            "scheduler": RunLengthDecaySchedulerConfig(lr_final=1.6e-6),
        },
        "features_dc": constant(0.0025),
        "features_rest": constant(0.0025 / 20),
        "opacities": constant(0.05),
        "scales": constant(0.005),
        "quats": constant(0.001),
        "features": constant(feature_lr),
        "decoder": constant(decoder_lr),
        "camera_opt": {
            "optimizer": FusedAdamOptimizerConfig(lr=1e-4, eps=ADAM_EPS),
            "scheduler": RunLengthDecaySchedulerConfig(lr_final=5e-7, lr_pre_warmup=0.0, warmup_share=1 / 30),
        },
        "bilateral_grid": {
            "optimizer": FusedAdamOptimizerConfig(lr=2e-3, eps=ADAM_EPS),
            "scheduler": RunLengthDecaySchedulerConfig(lr_final=1e-4, lr_pre_warmup=0.0, warmup_share=1 / 30),
        },
    }


def _create_config(
    method_name: str,
    dataparser: FeatureDataParserConfig,
    datamanager: FeatureDatamanagerConfig,
    model: FeatureSplatfactoModelConfig,
    feature_lr: float,
    decoder_lr: float,
) -> FeatureTrainerConfig:
    datamanager.dataparser = dataparser
    model._target = FeatureSplatfactoModel
    return FeatureTrainerConfig(
        method_name=method_name,
        max_num_iterations=GPU_ITERATIONS if HAS_CUDA else CPU_ITERATIONS,
        steps_per_eval_batch=0,
        steps_per_eval_all_images=0,
        machine=MachineConfig(device_type="cuda" if HAS_CUDA else "cpu"),
        mixed_precision=False,
        pipeline=FeaturePipelineConfig(datamanager=datamanager, model=model),
        optimizers=_create_optimizers(feature_lr, decoder_lr),
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15, quit_on_train_completion=True),
        vis="viewer+tensorboard",
    )


check_versions()

fit3d_features = MethodSpecification(
    config=_create_config(
        "fit3d-features",
        FeatureDataParserConfig(),
        FeatureDatamanagerConfig(cache_images_type="uint8"),
        FeatureSplatfactoModelConfig(densify_grad_thresh=GPU_DENSIFY_THRESHOLD if HAS_CUDA else CPU_DENSIFY_THRESHOLD),
        feature_lr=0.0025,
        decoder_lr=1e-3,
    ),
    description="Gaussian splats that carry 2D features (FiT3D stage I): features by least squares, minutes per scene.",
)

fit3d_features_paper = MethodSpecification(
    config=_create_config(
        "fit3d-features-paper",
        # The public code trains on test frames too and leaves poses as they are.
        FeatureDataParserConfig(eval_mode="all"),
        FeatureDatamanagerConfig(cache_images_type="uint8", normalization="imagenet"),
        FeatureSplatfactoModelConfig(
            feature_schedule="joint",
            feature_grid_multiple=0,
            accumulation_weighting=False,
            decoder_bias=False,
            feature_init="zeros",
            background_color="black",
            num_downscales=0,
            use_absgrad=False,
            densify_grad_thresh=0.0002,
            cull_alpha_thresh=0.005,
        ),
        feature_lr=PAPER_FEATURE_LR,
        decoder_lr=PAPER_FEATURE_LR,
    ),
    description="FiT3D stage I as its authors published it: features by gradient descent beside the colours.",
)
