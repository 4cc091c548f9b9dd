"""`finetune`: stage II from scene files to a folder with a fine-tuned backbone and its metrics.

OUTPUT / config.json, model.safetensors, README.md    the backbone (see `backbone_folder.py`)
         report.json                                  metrics
         comparison.png                               PCA pictures, original next to fine-tuned
         wise-ft-0.5/ ...                             mixtures of weights, if asked for
         checkpoints/, tensorboard/                   state and curves of the training
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from fit3d_ns.data.frames import Split
from fit3d_ns.features import BackboneDescription, TokenModel, create_token_model, describe_backbone
from fit3d_ns.features.adapters import merge_lora
from fit3d_ns.features.sources import WEIGHTS_NAME
from fit3d_ns.finetuning.backbone_folder import find_strictest, list_licences, save_finetuned, write_card
from fit3d_ns.finetuning.config import FinetuneConfig
from fit3d_ns.finetuning.draws import TrainingViews
from fit3d_ns.finetuning.optimization import copy_original, interpolate_weights
from fit3d_ns.finetuning.scene_bank import SceneBank, compute_scene_hash
from fit3d_ns.finetuning.targets import TARGET_FOLDER, TargetRenderer, create_averages, create_target_store
from fit3d_ns.finetuning.trainer import FinetuneTrainer
from fit3d_ns.finetuning.validation import Validation, format_consistency, read_tokens_of, save_comparison
from fit3d_ns.lifting.blending import find_lifted
from fit3d_ns.rasterization import prepare_rasterizer
from fit3d_ns.scene.scene_file import read_scene_costs
from fit3d_ns.training.processes import Processes, create_accelerator, track_run
from fit3d_ns.utils.device import DeviceChoice
from fit3d_ns.utils.files import hash_bytes, read_json, remove, write_json
from fit3d_ns.utils.progress import measure_peak_memory_mb, notice
from fit3d_ns.utils.results import check_report, collect_versions
from fit3d_ns.utils.selection import seed_everything

REPORT_NAME = "report.json"
MAX_REPORTED_LOSSES = 500
"""Points of the loss curve in the report; longer curves are averaged over as many steps each as it takes."""
_ALL_SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class FinetuneInputs:
    """The scene files that are trained on, those for validation, and the backbone."""

    scenes: Sequence[Path]
    validation_scenes: Sequence[Path] = ()
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
    """Fine-tunes a backbone on lifted scenes, writes the folder, and returns the content of `report.json`.

    Every process gets the report, but only the main one has measured and written. An accelerator that exists already is
    taken instead of a new one. ValueError for anything a user can correct: scenes, backbone, photographs, settings,
    disk space; Interrupted where a signal came, and a checkpoint was written.
    """
    output_folder, run = Path(output_folder), config.run
    accelerator = accelerator or create_accelerator(device, config.optimization.precision, run.trackers, output_folder)
    processes = Processes(accelerator)
    # The others wait for what the main process may have to compile.
    processes.run_on_main(lambda: prepare_rasterizer(accelerator.device))
    seed_everything(config.sampling.seed)
    bank = SceneBank([*inputs.scenes, *inputs.validation_scenes], accelerator.device, run.scene_memory_gb)
    bank.averages = create_averages(config.targets, bank, output_folder, run.data_root)
    scenes_gb = min(sum(scene.num_bytes for scene in bank.on_disk), bank.max_bytes) / 1e9
    processes.run_on_main(lambda: notice(f"Scenes take up to {scenes_gb:.2g} GB of memory in each process."))
    # With the first scene's preprocessing; the others are checked against it.
    description = bank.on_disk[0].backbone.with_weights(inputs.weights, inputs.backbone)
    bank.check_backbones(description)
    splits: list[tuple[Split, ...]] = [run.splits] * len(inputs.scenes) + [()] * len(inputs.validation_scenes)
    views = TrainingViews(bank.on_disk, splits, data_root=run.data_root, is_strict=run.strict)
    token_model = create_token_model(description).to(accelerator.device)
    original = copy_original(token_model)
    # Where cameras move, no target is asked for twice.
    keeps_targets = not config.augmentation.moves_cameras
    store = create_target_store(config.targets, accelerator.device, output_folder) if keeps_targets else None
    targets = TargetRenderer(bank, views, config.targets, store, original)
    validation = _create_validation(targets, inputs, config, description.patch_size)
    decisive_inputs = {
        "backbone": description.to_metadata(),
        "scenes": [compute_scene_hash(scene) for scene in bank.on_disk[: len(inputs.scenes)]],
        # With a photograph less, every later draw would be another one.
        "views": views.views_hash,
    }
    validate = validation.validate_step
    trainer = FinetuneTrainer(token_model, targets, config, processes, output_folder, decisive_inputs, validate)
    if description.is_random and processes.is_main:
        notice("The backbone has random weights: the result is for tests, its features mean nothing.")
    run_hash = _compute_run_hash(trainer, validation)
    # The main process decides; others may see its files late.
    finished = processes.gather(_find_finished(output_folder, run_hash) if run.resume != "never" else None)[0]
    if finished is not None:
        if processes.is_main:
            notice(f"{output_folder} holds the result of these settings already; --resume never starts over.")
            _remove_targets(trainer)
        return finished
    # Before anything is measured: what does not start should not take an hour to say so.
    with track_run(processes, run.trackers, output_folder, json.dumps(config.reported), trainer.step + 1):
        processes.run_on_main(lambda: validation.measure_original(original))
        trainer.run()
        trainer.backbone.swap_averages()
        model = trainer.bare.token_model
        trained = merge_lora(model) if config.trainable.train == "lora" else model
        report = {"run_hash": run_hash, **_summarise(trainer, validation, inputs, description)}
        processes.run_on_main(lambda: _finish(trainer, validation, original, trained, report))
    return report


def _compute_run_hash(trainer: FinetuneTrainer, validation: Validation) -> str:
    """Everything that decides the content of the output folder."""
    config, known = trainer.config, asdict(trainer.describe_progress())
    content = {
        **{name: value for name, value in known.items() if name not in ("step", "seconds")},
        "steps": trainer.num_steps,
        "mixtures": config.anchors.wise_ft,
        "format": config.run.format,
        **({"data_licence": config.run.data_licence} if config.run.data_licence else {}),
        "validation": [validation.targets.views.views_hash, config.run.max_validation_views],
    }
    return hash_bytes(json.dumps(content, sort_keys=True).encode())


def _find_finished(folder: Path, run_hash: str) -> dict[str, Any] | None:
    """The report in a folder, if it is of the same run and of the weights beside it."""
    with suppress(ValueError):
        report = read_json(folder / REPORT_NAME)
        if isinstance(report, dict) and report.get("run_hash") == run_hash:
            check_report(report, folder / REPORT_NAME)
            return report if (folder / WEIGHTS_NAME).is_file() else None
    return None


def _create_validation(
    targets: TargetRenderer, inputs: FinetuneInputs, config: FinetuneConfig, patch_size: int
) -> Validation:
    """Views that are not trained on, as far as there are any."""
    bank, run, num_trained, num_validated = targets.bank, config.run, len(inputs.scenes), len(inputs.validation_scenes)
    held_out: tuple[Split, ...] = tuple(split for split in _ALL_SPLITS if split not in run.splits)
    if num_validated:
        splits: list[tuple[Split, ...]] = [()] * num_trained + [_ALL_SPLITS] * num_validated
        kind = f"{num_validated} validation scenes"
    elif any(scene.posed_capture.select(*held_out) for scene in bank.on_disk if held_out):
        splits, kind = [held_out] * num_trained, f"held-out views of the {num_trained} training scenes"
    else:
        splits, kind = [run.splits] * num_trained, f"the views of the {num_trained} training scenes themselves"
    # Leaving a view out is a way to train; metrics are against what the scene shows.
    shown = replace(config.targets, leave_one_out=False)
    views = TrainingViews(bank.on_disk, splits, data_root=run.data_root, is_strict=run.strict)
    renderer = TargetRenderer(bank, views, shown, targets.store)
    return Validation(renderer, patch_size, run.max_validation_views, kind)


def _summarise(
    trainer: FinetuneTrainer, validation: Validation, inputs: FinetuneInputs, description: BackboneDescription
) -> dict[str, Any]:
    """The report without what is measured at the end."""
    config, targets, bank = trainer.config, trainer.targets, trainer.bank
    loss_first, loss_last = trainer.summarise_losses()
    num_shown = trainer.step * trainer.images_per_step
    lifted = [{view.name for view in find_lifted(scene)} for scene in bank.on_disk]
    shown = zip(lifted, trainer.views.views, strict=True)
    novel = [view for names, own in shown for view in own if view.name not in names]
    num_rendered = targets.num_rendered + validation.targets.num_rendered
    width = max(-(-len(trainer.losses) // MAX_REPORTED_LOSSES), 1)
    pieces = [trainer.losses[start : start + width] for start in range(0, len(trainer.losses), width)]
    return {
        "kind": "finetune",
        "is_random": description.is_random,
        "loss_first": loss_first,
        "loss_last": loss_last,
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "images_per_step": trainer.images_per_step,
        "images_per_second": num_shown / max(trainer.seconds, 1e-9),
        "phase_seconds": trainer.timer.seconds,
        "num_images": trainer.sequence.num_images,
        "num_novel_images": len(novel),
        "num_missing_images": trainer.views.num_missing,
        "num_photographs": len(trainer.photographs.paths),
        "num_missing_validation_images": validation.targets.views.num_missing,
        "num_processes": trainer.processes.number,
        "num_trained_parameters": sum(parameter.numel() for parameter in trainer.backbone.parameters),
        "num_frozen_parameters": len(trainer.backbone.frozen),
        "num_targets_rendered": None if targets.store is None else num_rendered,
        "num_scene_loads": bank.num_loads,
        "num_scenes_averaged": None if bank.averages is None else bank.averages.num_averaged,
        "peak_memory_mb": measure_peak_memory_mb(),
        # A curve that fits the report, each point the mean of as many steps as the others (the last of fewer).
        "losses": [sum(piece) / len(piece) for piece in pieces],
        "epochs": num_shown / trainer.sequence.num_images,
        "scenes": [str(path) for path in inputs.scenes],
        "scene_costs": [read_scene_costs(*pair) for pair in zip(bank.on_disk, inputs.scenes, strict=False)],
        "validation_scenes": [str(path) for path in inputs.validation_scenes],
        "backbone": description.to_metadata(),
        "settings": config.reported,
        "run_settings": config.to_metadata()["run"],
        "versions": collect_versions(),
    }


def _finish(
    trainer: FinetuneTrainer, validation: Validation, original: TokenModel, trained: TokenModel, report: dict[str, Any]
) -> None:
    """Measures the result, completes the report, and writes everything; in the main process."""
    folder, config = trainer.output_folder, trainer.config
    finetuned = validation.evaluate(read_tokens_of(trained))
    trainer.accelerator.log(validation.collect_curves(finetuned), step=report["steps"])
    report |= validation.compare(finetuned)
    save_comparison(validation, read_tokens_of(original), read_tokens_of(trained), folder / "comparison.png")
    captures = [scene.posed_capture for scene in trainer.bank.on_disk[: len(report["scenes"])]]
    names = [capture.scene_id for capture in captures]
    licences = list_licences(original, {capture.layout for capture in captures}, config.run.data_licence)
    licence, add_fit3d = find_strictest(licences), config.run.format == "fit3d"
    weights: dict[str, Tensor] = trained.model.state_dict()
    card = write_card(original.description, report, licences, names)
    save_finetuned(folder, trained, weights, card, licence, add_fit3d=add_fit3d)
    report["finetuned_weights_hash"] = describe_backbone(f"local-dir:{folder}").weights_hash
    for leftover in folder.glob("wise-ft-*"):  # Perhaps of other weights.
        remove(leftover)
    for share in config.anchors.wise_ft:
        mixed = interpolate_weights(original.model.state_dict(), weights, share)
        card = write_card(original.description, report, licences, names, share)
        save_finetuned(folder / f"wise-ft-{share:g}", trained, mixed, card, licence, add_fit3d=add_fit3d)
    write_json(folder / REPORT_NAME, report)
    notice(format_consistency(*(report["consistency"][name] for name in ("original", "finetuned"))), is_markdown=True)
    _remove_targets(trainer)


def _remove_targets(trainer: FinetuneTrainer) -> None:
    if trainer.config.targets.cache_folder is None:
        remove(trainer.output_folder / TARGET_FOLDER)
