"""`FinetuneConfig`: everything about a fine-tuning run but its scenes; `PAPER` holds the public code's values."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fit3d_ns.data.frames import Split
from fit3d_ns.finetuning.draws import AugmentationConfig, SamplingConfig
from fit3d_ns.finetuning.optimization import AnchorConfig, OptimizationConfig, TrainableConfig
from fit3d_ns.finetuning.targets import TargetConfig
from fit3d_ns.utils.limits import Limited, Limits


@dataclass(frozen=True)
class RunConfig(Limited):
    """How the run works, saves and reports; apart from `splits`, nothing here changes the weights that come out."""

    splits: tuple[Split, ...] = ("train",)
    """Views that are trained on. Those that the lift left out or passed over are taught as novel views."""
    data_root: Path | None = None
    """Where the photographs are now, if they were moved: a capture's folder or one above several."""
    strict: bool = False
    """Refuse scenes of which a photograph is gone, instead of skipping the view."""
    scene_memory_gb: Annotated[float | None, Limits(above=0)] = None
    """Memory for scenes on the device, 1e9 bytes; by default 8, or half of what a CUDA card has free."""
    num_workers: Annotated[int | None, Limits(at_least=0)] = None
    """Threads that load photographs ahead; 0 loads them in turn. By default 2, or up to 8 for a CUDA card."""
    steps_per_checkpoint: Annotated[int, Limits(at_least=1)] = 500
    """Optimizer steps between two checkpoints, 1 and above."""
    keep_checkpoints: Annotated[int, Limits(at_least=1)] = 2
    """Number of newest checkpoints that stay, 1 and above."""
    resume: Literal["auto", "never", "require"] = "auto"
    """Go on from the newest checkpoint: `auto` if there is one, `require` fails without one, `never` removes them."""
    steps_per_validation: Annotated[int, Limits(at_least=0)] = 1000
    """Optimizer steps between two validations, besides the one at the end; 0 validates at the end only."""
    max_validation_views: Annotated[int, Limits(at_least=1)] = 24
    """Views per scene that are validated, evenly spread."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where curves are logged: in files below the output folder (`tensorboard`), by wandb (`pip install wandb`; with
    WANDB_MODE=offline below the output folder only), by both, or, with none named, nowhere."""
    format: Literal["timm", "fit3d"] = "timm"
    """`fit3d` also writes the plain state dict, as FiT3D publishes it."""
    data_licence: str | None = None
    """Licence of the captures, as the hub spells it (`cc-by-4.0`) or by a name of its own; unknown by default, but for
    ScanNet++'s terms. The model card names the strictest of it and the original weights'."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits:
            raise ValueError("--splits names no split; give train, val or test.")


@dataclass(frozen=True)
class FinetuneConfig:
    """All choices of stage II."""

    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    anchors: AnchorConfig = field(default_factory=AnchorConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.trainable.train == "adapter" and (self.anchors.wise_ft or self.run.format == "fit3d"):
            raise ValueError("--wise-ft and --format fit3d write backbone weights, which --train adapter leaves alone.")
        if self.trainable.train == "adapter" and max(self.anchors.prefix_anchor, self.anchors.pre_norm) > 0:
            raise ValueError("--prefix-anchor and --pre-norm do nothing with --train adapter; drop one of them.")

    def to_metadata(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it continues, plain JSON values."""
        content = self.to_metadata()
        run = content.pop("run")
        for name in ("epochs", "min_steps", "max_steps", "tf32"):
            content["optimization"].pop(name)
        optimization = self.optimization
        if optimization.schedule == "step" and optimization.max_steps is None and (optimization.epochs or 2.0) <= 1.0:
            content["optimization"]["schedule"] = "constant"  # Which it is within one epoch, and was called.
        for name in ("wise_ft", "photographs"):  # What the folders hold is among the inputs.
            content["anchors"].pop(name)
        if not self.anchors.photographs:
            content["anchors"].pop("photograph_share")
        for name in ("cache", "cache_gb", "cache_folder", "average_gb"):
            content["targets"].pop(name)
        if not self.targets.geometry_weight:
            # Earlier versions have no such setting.
            content["targets"].pop("geometry_weight")
        return {**content, "splits": run["splits"]}

    @property
    def reported(self) -> dict[str, Any]:
        """The settings that report and model card name, plain JSON values: `decisive`, and the mixtures saved after."""
        content = self.decisive
        content["anchors"]["wise_ft"] = list(self.anchors.wise_ft)
        return content


PAPER = FinetuneConfig(
    sampling=SamplingConfig(images_per_visit=0, scenes_at_once=1),
    targets=TargetConfig(token_reading="bilinear", average_views=False, weight_by_opacity=False, cache="none"),
    optimization=OptimizationConfig(epochs=1.0, schedule="step", tf32=False),
    run=RunConfig(splits=("train", "val", "test")),
)
"""The public code's values, else the default: held-out frames are trained on too, images come from any scene."""
