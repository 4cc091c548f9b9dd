"""The methods `ns-train` lists: `fit3d-features`, and `fit3d-features-paper` with the values of the public code.

Every `ns-*` command of every method imports this module, so it imports no kernels and no timm.
"""

import sys
import warnings

import torch
from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.plugins.registry import discover_methods
from nerfstudio.plugins.types import MethodSpecification
from packaging.specifiers import SpecifierSet

from fit3d_ns.plugin.datamanager import FeatureDatamanagerConfig
from fit3d_ns.plugin.dataparser import FeatureDataParserConfig
from fit3d_ns.plugin.model import FeatureSplatfactoModel
from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig
from fit3d_ns.plugin.pipeline import FeaturePipelineConfig
from fit3d_ns.plugin.schedulers import create_optimizers
from fit3d_ns.plugin.trainer import FeatureTrainerConfig
from fit3d_ns.rasterization import kernels
from fit3d_ns.scene.posed_capture import MAX_SIDE

HAS_CUDA = torch.cuda.is_available()
"""Asked once: decides the default device and the default length of a run."""
PAPER_ITERATIONS = 30_000
"""Length of a run in the public code, and with `fit3d-features-paper` on any machine."""
MAX_NUM_ITERATIONS = PAPER_ITERATIONS if HAS_CUDA else 3_000
"""Two CPU cores give a first result in minutes; docs/results.md has the quality of both lengths."""
DENSIFY_THRESHOLD = 0.0008 if HAS_CUDA else 0.002
"""splatfacto's; short runs have the same held-out metrics with 2.5 times fewer Gaussians (docs/results.md)."""
PAPER_FEATURE_LR = 0.0025 / 40
"""Learning rate of features and decoder in the paper's code."""
SUPPORTED = {"nerfstudio": ">=1.1.5,<1.2", "gsplat": kernels.SUPPORTED, "timm": ">=1.0.26,<2"}
"""The versions of each package that the plugin is tried with."""


def check_versions(supported: dict[str, str]) -> None:
    """Warns of each package that is too old or too new; a wrong guess must not stop `ns-train`."""
    for package, versions in supported.items():
        installed = kernels.find_version(package)
        if installed is None or installed not in SpecifierSet(versions):
            found = "which is not installed" if installed is None else f"found {installed}; expect differences"
            said = f"fit3d_ns is tried with {package}{versions}, {found}; see the README's install section."
            warnings.warn(said, stacklevel=2)


def is_listed_by_ns_train() -> bool:
    """True if nerfstudio finds every method of ours."""
    return {"fit3d-features", "fit3d-features-paper"} <= set(discover_methods()[0])


def _create_config(
    method_name: str,
    datamanager: FeatureDatamanagerConfig,
    model: FeatureSplatfactoModelConfig,
    feature_lr: float,
    decoder_lr: float,
    max_num_iterations: int = MAX_NUM_ITERATIONS,
) -> FeatureTrainerConfig:
    model._target = FeatureSplatfactoModel
    # ScanNet++'s 1752x1168 are halved.
    datamanager.cache_images_type, datamanager.max_image_side = "uint8", MAX_SIDE
    return FeatureTrainerConfig(
        method_name=method_name,
        max_num_iterations=max_num_iterations,
        steps_per_eval_batch=0,
        steps_per_eval_all_images=0,
        machine=MachineConfig(device_type="cuda" if HAS_CUDA else "cpu"),
        mixed_precision=False,
        pipeline=FeaturePipelineConfig(datamanager=datamanager, model=model),
        optimizers=create_optimizers(feature_lr, decoder_lr),
        # A file would be flooded by a table that is drawn again, with the terminal's codes, at every tenth step.
        logging=LoggingConfig(local_writer=LocalWriterConfig(enable=True, max_log_size=10 * sys.stdout.isatty())),
        # nerfstudio's default, 0.0.0.0, lets everybody on the network look and click.
        viewer=ViewerConfig(websocket_host="127.0.0.1", num_rays_per_chunk=1 << 15),
        vis="viewer+tensorboard",
    )


check_versions(SUPPORTED)

fit3d_features = MethodSpecification(
    config=_create_config(
        "fit3d-features",
        FeatureDatamanagerConfig(dataparser=FeatureDataParserConfig()),
        FeatureSplatfactoModelConfig(densify_grad_thresh=DENSIFY_THRESHOLD),
        feature_lr=0.0025,
        decoder_lr=1e-3,
    ),
    description="Gaussian splats that carry 2D features (FiT3D stage I): features by least squares, minutes per scene.",
)

fit3d_features_paper = MethodSpecification(
    config=_create_config(
        "fit3d-features-paper",
        # The public code trains on test frames too, leaves poses as they are and centres principal points.
        FeatureDatamanagerConfig(
            dataparser=FeatureDataParserConfig(eval_mode="all", center_principal_point=True),
            normalization="imagenet",
        ),
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
            # Inria's: a Gaussian may be a tenth of the scene, screen size counts for nothing, resets do not pause.
            cull_scale_thresh=0.1,
            stop_screen_size_at=0,
            pause_after_reset=False,
        ),
        feature_lr=PAPER_FEATURE_LR,
        decoder_lr=PAPER_FEATURE_LR,
        max_num_iterations=PAPER_ITERATIONS,
    ),
    description="FiT3D stage I as its authors published it: features by gradient descent along with the colours.",
)
