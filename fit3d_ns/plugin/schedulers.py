"""Optimizers and learning rates of our methods: nerfstudio's, faster on a CPU and as long as the run.

The config.yml of every run names the classes of this module.
"""

from dataclasses import dataclass
from typing import Any

from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecayScheduler, ExponentialDecaySchedulerConfig

ADAM_EPS = 1e-15
"""Adam's epsilon of 3D Gaussian splatting, which the paper's code also has for features and decoder."""


def create_optimizers(feature_lr: float, decoder_lr: float) -> dict[str, dict[str, Any]]:
    """One optimizer per parameter group, at splatfacto's rates but for features and decoder."""

    def decay(lr: float, **schedule: Any) -> dict[str, Any]:
        return constant(lr) | {"scheduler": RunLengthDecaySchedulerConfig(**schedule)}

    def constant(lr: float) -> dict[str, Any]:
        return {"optimizer": FusedAdamOptimizerConfig(lr=lr, eps=ADAM_EPS), "scheduler": None}

    return {
        "means": decay(1.6e-4, lr_final=1.6e-6),
        "features_dc": constant(0.0025),
        "features_rest": constant(0.0025 / 20),
        "opacities": constant(0.05),
        "scales": constant(0.005),
        "quats": constant(0.001),
        "features": constant(feature_lr),
        "decoder": constant(decoder_lr),
        "camera_opt": decay(1e-4, lr_final=5e-7, lr_pre_warmup=0.0, warmup_share=1 / 30),
        "bilateral_grid": decay(2e-3, lr_final=1e-4, lr_pre_warmup=0.0, warmup_share=1 / 30),
    }


@dataclass
class FusedAdamOptimizerConfig(AdamOptimizerConfig):
    """Adam in one pass over each parameter: four times as fast on a CPU, the same mathematics."""

    fused: bool = True
    """Use torch's fused kernel (CPU and CUDA)."""


@dataclass
class RunLengthDecaySchedulerConfig(ExponentialDecaySchedulerConfig):
    """nerfstudio's exponential decay whose length is the run's unless one is given (`FeatureTrainerConfig.resolve`)."""

    max_steps: int | None = None  # type: ignore[assignment]
    """Steps after which the final rate is reached; the whole run by default."""
    warmup_share: float = 0.0
    """Share of `max_steps` over which the rate first rises, in [0, 1)."""

    def resolve(self, max_num_iterations: int) -> None:
        """Fills what is a share of the run's length."""
        self.max_steps = self.max_steps or max_num_iterations
        if self.warmup_share > 0:
            self.warmup_steps = round(self.warmup_share * self.max_steps)


RunLengthDecayScheduler = ExponentialDecayScheduler
"""Its name in the config.yml of older versions."""
