"""`finetune`: stage II from scene files to a folder with a fine-tuned backbone and its figures.

OUTPUT / config.json, model.safetensors, README.md    the backbone (see `backbone_folder.py`)
         report.json                                  figures
         comparison.png                               PCA pictures, original beside fine-tuned
         wise-ft-0.5/ ...                             mixtures of weights, if asked for
         checkpoints/, tensorboard/                   of the training
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.features import BackboneDescription, TokenModel, create_token_model
from fit3d_ns.finetuning.anchors import copy_original, interpolate_weights
from fit3d_ns.finetuning.backbone_folder import find_licence, save_finetuned
from fit3d_ns.finetuning.comparison import save_comparison
from fit3d_ns.finetuning.config import FinetuneConfig
from fit3d_ns.finetuning.lifted_views import find_lifted
from fit3d_ns.finetuning.model_card import write_card
from fit3d_ns.finetuning.scene_bank import SceneBank, check_backbones
from fit3d_ns.finetuning.targets import TARGET_FOLDER, TargetRenderer, create_averages, create_cache
from fit3d_ns.finetuning.token_module import compute_outputs
from fit3d_ns.finetuning.trainable import merge_trained
from fit3d_ns.finetuning.trainer import FinetuneTrainer
from fit3d_ns.finetuning.training_views import TrainingViews
from fit3d_ns.finetuning.validation import ComputeTokens, Validation, ValidationFigures, format_consistency
from fit3d_ns.scene.scene_costs import read_scene_costs
from fit3d_ns.training.accelerator import create_accelerator, track_run
from fit3d_ns.training.processes import Processes
from fit3d_ns.utils.device import DeviceChoice
from fit3d_ns.utils.files import write_json
from fit3d_ns.utils.progress import measure_peak_memory_mb, notice
from fit3d_ns.utils.results import collect_versions
from fit3d_ns.utils.seeds import seed_everything

REPORT_NAME = "report.json"
COMPARISON_NAME = "comparison.png"
_ALL_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class FinetuneInputs:
    """What a run is given."""

    scenes: Sequence[Path]
    """Scene files that are trained on."""
    validation_scenes: Sequence[Path] = ()
    """Scene files that are not."""
    backbone: str | None = None
    """Name of the backbone; None takes the first scene's."""
    weights: Path | None = None
    """File with its weights; None for timm's download, the folder's own, or random ones if the name says so."""


def finetune(
    inputs: FinetuneInputs,
    config: FinetuneConfig,
    output_folder: Path,
    device: DeviceChoice = "auto",
    accelerator: Accelerator | None = None,
) -> dict[str, Any]:
    """Fine-tunes a backbone on lifted scenes and writes the folder.

    Args:
        device: `auto` is CUDA where there is one.
        accelerator: One that exists already; made here by default.

    Returns:
        The content of `report.json`; the same on every process, but only the main one has measured and written.

    Raises:
        ValueError: Anything a user can mend: scenes, backbone, photographs, settings, disk space.
        Interrupted: A signal came; a checkpoint was written.
    """
    output_folder = Path(output_folder)
    run = config.run
    accelerator = accelerator or create_accelerator(device, config.optimization.precision, run.trackers, output_folder)
    processes = Processes(accelerator)
    seed_everything(config.sampling.seed)
    bank = SceneBank([*inputs.scenes, *inputs.validation_scenes], accelerator.device, run.scene_memory_gb)
    bank.averages = create_averages(config.targets, bank, output_folder, run.data_root)
    # With the first scene's preprocessing; the others are checked against it.
    description = bank.on_disk[0].backbone.with_weights(inputs.weights, inputs.backbone)
    check_backbones(bank, description)
    views = _find_views(bank, inputs, config)
    token_model = create_token_model(description).to(accelerator.device)
    original = copy_original(token_model)
    cache = create_cache(
        config.targets, accelerator.device, output_folder, is_of_use=not config.augmentation.moves_cameras
    )
    targets = TargetRenderer(bank, views, config.targets, cache, original)
    validation, validated = _create_validation(bank, inputs, config, targets, description)
    identity = {
        "backbone": description.to_metadata(),
        "scenes": [bank.compute_fingerprint(index) for index in range(len(inputs.scenes))],
        # With a photograph less, every later draw would be another one.
        "views": views.fingerprint,
    }
    figures: dict[str, ValidationFigures] = {}

    def measure_original() -> None:
        if description.is_random:
            notice("The backbone has random weights: the result is for tests, its features mean nothing.")
        notice(f"Measuring the original backbone on {validated}")
        figures["original"] = validation.evaluate(_as_function(original))

    def validate(model: TokenModel, step: int) -> None:
        found = validation.evaluate(_as_function(model))
        accelerator.log(_collect_curves(found, figures["original"]), step=step)
        notice(f"Step {step}, on {validated}: {_compare_in_words(found, figures['original'])}")

    def finish(trained: TokenModel, report: dict[str, Any]) -> None:
        figures["finetuned"] = validation.evaluate(_as_function(trained))
        accelerator.log(_collect_curves(figures["finetuned"], figures["original"]), step=report["steps"])
        report |= _compare(figures["original"], figures["finetuned"], validated)
        save_comparison(validation, _as_function(original), _as_function(trained), output_folder / COMPARISON_NAME)
        _save(output_folder, original, trained, report, config, description, bank, len(inputs.scenes))
        write_json(output_folder / REPORT_NAME, report)
        notice(format_consistency(report["consistency"]["original"], report["consistency"]["finetuned"]))
        if config.targets.cache_folder is None:
            shutil.rmtree(output_folder / TARGET_FOLDER, ignore_errors=True)

    trainer = FinetuneTrainer(
        token_model, bank, views, targets, config, accelerator, output_folder, identity, validate, original=original
    )
    # Before anything is measured: what does not start should not take an hour to say so.
    with track_run(processes, run.trackers, output_folder, json.dumps(config.reported), trainer.step + 1):
        processes.run_on_main(measure_original)
        trainer.run()
        trainer.use_averages()
        trained = merge_trained(trainer.bare.token_model, config.trainable)
        report = _summarise(trainer, validation, bank, inputs, description, config)
        processes.run_on_main(lambda: finish(trained, report))
    return report


def _find_views(bank: SceneBank, inputs: FinetuneInputs, config: FinetuneConfig) -> TrainingViews:
    splits: list[tuple[Split, ...]] = [config.run.splits] * len(inputs.scenes)
    splits += [()] * len(inputs.validation_scenes)
    return TrainingViews(bank.on_disk, splits, data_root=config.run.data_root, is_strict=config.run.strict)


def _create_validation(
    bank: SceneBank,
    inputs: FinetuneInputs,
    config: FinetuneConfig,
    targets: TargetRenderer,
    description: BackboneDescription,
) -> tuple[Validation, str]:
    """Views that are not trained on, as far as there are any, and what to call them."""
    num_trained, num_validated = len(inputs.scenes), len(inputs.validation_scenes)
    held_out: tuple[Split, ...] = tuple(split for split in _ALL_SPLITS if split not in config.run.splits)
    if num_validated:
        splits: list[tuple[Split, ...]] = [()] * num_trained + [_ALL_SPLITS] * num_validated
        kind = f"{num_validated} validation scenes"
    elif any(scene.posed_capture.select(*held_out) for scene in bank.on_disk if held_out):
        splits, kind = [held_out] * num_trained, f"held-out views of the {num_trained} training scenes"
    else:
        splits, kind = [config.run.splits] * num_trained, f"the views of the {num_trained} training scenes themselves"
    views = TrainingViews(bank.on_disk, splits, data_root=config.run.data_root, is_strict=config.run.strict)
    # Leaving a view out is a way to train; figures are against what the scene shows.
    renderer = TargetRenderer(bank, views, replace(config.targets, leave_one_out=False), targets.cache)
    validation = Validation(bank, views, renderer, description.patch_size, config.run.max_validation_views)
    return validation, f"{validation.num_views} views: {kind}"


def _as_function(token_model: TokenModel) -> ComputeTokens:
    return lambda images: compute_outputs(token_model, images).patch_tokens


def _collect_curves(figures: ValidationFigures, original: ValidationFigures) -> dict[str, float]:
    curves = {
        "validation/feature_l1": figures.feature_l1,
        "validation/feature_cosine": figures.feature_cosine,
        "validation/original_feature_l1": original.feature_l1,
        "validation/original_feature_cosine": original.feature_cosine,
    }
    for key in ("mean_cosine", "centred_cosine", "recall_10px", "effective_rank"):
        curves[f"consistency/{key}"] = figures.consistency[key]
    return {key: value for key, value in curves.items() if math.isfinite(value)}


def _compare_in_words(found: ValidationFigures, original: ValidationFigures) -> str:
    """The figures of a validation that runs between two steps, the original's beside them."""
    pairs = [("feature L1", original.feature_l1, found.feature_l1)]
    pairs += [("feature cosine", original.feature_cosine, found.feature_cosine)]
    for name, key in (("centred cosine", "centred_cosine"), ("recall within 10 px", "recall_10px")):
        pairs.append((f"{name} between views", original.consistency[key], found.consistency[key]))
    return ", ".join(f"{name} {before:.3f} → {after:.3f}" for name, before, after in pairs) + " (original → now)."


def _compare(original: ValidationFigures, finetuned: ValidationFigures, validated: str) -> dict[str, Any]:
    """The part of the report that sets fine-tuned against original."""
    both = {"original": original, "finetuned": finetuned}
    return {
        "consistency": {"views": validated, **{name: figures.consistency for name, figures in both.items()}},
        "validation": {
            name: {"feature_l1": figures.feature_l1, "feature_cosine": figures.feature_cosine}
            for name, figures in both.items()
        },
        "validation_per_scene": {name: figures.per_scene for name, figures in both.items()},
    }


def _summarise(
    trainer: FinetuneTrainer,
    validation: Validation,
    bank: SceneBank,
    inputs: FinetuneInputs,
    description: BackboneDescription,
    config: FinetuneConfig,
) -> dict[str, Any]:
    history, cache = trainer.history, trainer.targets.cache
    loss_first, loss_last = history.summarise()
    return {
        "kind": "finetune",
        "is_random": description.is_random,
        "loss_first": loss_first,
        "loss_last": loss_last,
        "steps": trainer.step,
        "seconds": history.seconds,
        "images_per_step": trainer.images_per_step,
        "images_per_second": trainer.step * trainer.images_per_step / max(history.seconds, 1e-9),
        "phase_seconds": trainer.timer.seconds,
        "num_images": trainer.sequence.num_images,
        "num_novel_images": _count_novel(trainer.views, bank),
        "num_missing_images": trainer.views.num_missing,
        "num_missing_validation_images": validation.views.num_missing,
        "num_processes": trainer.processes.number,
        "num_trained_parameters": trainer.num_parameters,
        "num_frozen_parameters": len(trainer.frozen),
        "num_targets_rendered": None if cache is None else cache.num_rendered,
        "num_scene_loads": bank.num_loads,
        "num_scenes_averaged": None if bank.averages is None else bank.averages.num_averaged,
        "peak_memory_mb": measure_peak_memory_mb(),
        "losses": thin_out(history.losses),
        "epochs": trainer.step * trainer.images_per_step / trainer.sequence.num_images,
        "scenes": [str(path) for path in inputs.scenes],
        "scene_costs": [
            asdict(read_scene_costs(scene, path)) for scene, path in zip(bank.on_disk, inputs.scenes, strict=False)
        ],
        "validation_scenes": [str(path) for path in inputs.validation_scenes],
        "backbone": description.to_metadata(),
        "settings": config.reported,
        "run_settings": config.to_metadata()["run"],
        "versions": collect_versions(),
    }


def _count_novel(views: TrainingViews, bank: SceneBank) -> int:
    """Images that are trained on and that their scene was lifted without."""
    lifted = [{view.name for view in find_lifted(scene)} for scene in bank.on_disk]
    return sum(view.name not in names for names, own in zip(lifted, views.views, strict=True) for view in own)


def thin_out(losses: Sequence[float], at_most: int = 500) -> list[float]:
    """A loss curve of at most so many points, each the mean of as many steps as the others (the last of fewer)."""
    width = max(-(-len(losses) // at_most), 1)
    pieces = [losses[start : start + width] for start in range(0, len(losses), width)]
    return [sum(piece) / len(piece) for piece in pieces]


def _save(
    output_folder: Path,
    original: TokenModel,
    trained: TokenModel,
    report: dict[str, Any],
    config: FinetuneConfig,
    description: BackboneDescription,
    bank: SceneBank,
    num_scenes: int,
) -> None:
    """Writes the backbone and, if asked for, its mixtures with the original."""
    licence = find_licence(original)
    names = [scene.scene_id for scene in bank.on_disk[:num_scenes]]
    weights: dict[str, Tensor] = trained.model.state_dict()
    is_fit3d = config.run.format == "fit3d"
    card = write_card(description, report, licence, names)
    save_finetuned(output_folder, trained, weights, card, add_fit3d=is_fit3d)
    for share in config.anchors.wise_ft:
        mixed = interpolate_weights(original.model.state_dict(), weights, share)
        card = write_card(description, report, licence, names, share)
        save_finetuned(output_folder / f"wise-ft-{share:g}", trained, mixed, card, add_fit3d=is_fit3d)
