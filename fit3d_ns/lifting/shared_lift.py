"""`lift_together`: many scenes on one token basis, read by one decoder, with one set of picture colours.

Three rounds over the scenes, one scene in memory at a time: tokens are summed up into the basis they share; each scene
is lifted on it and leaves its decoder statistics next to its file; the decoder of all statistics together replaces the
scenes' own. An interrupted command does the first round again, whose tokens are cached by then, and no finished lift.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis, fit_pca
from fit3d_ns.lifting.decoder_fit import DecoderStatistics, add_view_tokens, fit_decoder, fit_token_basis
from fit3d_ns.lifting.lift_scene import (
    LIFT_HASH,
    LiftSetup,
    compute_lift_hash,
    find_finished,
    lift_scene,
    measure_held_out,
)
from fit3d_ns.lifting.sources import LiftSource
from fit3d_ns.lifting.views import MAX_PICTURE_TOKENS, choose_views, load_views, sample_tokens
from fit3d_ns.scene import FeatureScene, load_scene, save_scene
from fit3d_ns.utils.files import hash_bytes, remove
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors


@dataclass(frozen=True)
class LiftTask:
    """One of the scenes that are lifted together."""

    read: Callable[[], LiftSource]
    """Reads its Gaussians and views; called once a round."""
    output_path: Path
    """Where the scene file goes."""

    @property
    def state_path(self) -> Path:
        """What an interrupted lift of this scene goes on from."""
        return self.output_path.with_name(self.output_path.name + ".lift-state")

    @property
    def sums_path(self) -> Path:
        """Its decoder statistics, until the shared decoder is fitted."""
        return self.output_path.with_name(self.output_path.name + ".decoder-sums")


def lift_together(
    tasks: Sequence[LiftTask],
    setup: LiftSetup,
    *,
    overwrite: bool = False,
    on_scene: Callable[[FeatureScene, Path], None] = lambda scene, path: None,
) -> None:
    """Lifts scenes on a basis and with a decoder that they share, writes their files and hands each to `on_scene`.

    ValueError for no scene, and as in `lift_scene` and `save_scene`.
    """
    own = [compute_lift_hash(task.read(), setup) for task in tasks]
    # Each depends on all.
    hashes = [hash_bytes(text.encode(), *(other.encode() for other in own)) for text in own]
    finished = [] if overwrite else list(map(find_finished, (task.output_path for task in tasks), hashes))
    whole = [scene for scene in finished if scene is not None]
    if len(whole) == len(tasks) > 0:
        for task, scene in zip(tasks, whole, strict=True):
            on_scene(scene, task.output_path)
            remove(task.sums_path)
        return
    notice(f"Tokens of {len(tasks)} scenes, for the basis they share")
    basis, pca = fit_shared_space(tasks, setup)
    statistics = []
    for number, (task, lift_hash) in enumerate(zip(tasks, own, strict=True), start=1):
        notice(f"[{number}/{len(tasks)}] {task.output_path.name}")
        statistics.append(_lift(task, setup, basis, pca, lift_hash))
    decoder = fit_decoder(statistics, basis, setup.config.decoder_ridge).requires_grad_(False).cpu()
    for task, lift_hash in zip(tasks, hashes, strict=True):
        scene = replace(load_scene(task.output_path), decoder=decoder)
        _, held_out = choose_views(scene.posed_capture, setup.options.views)
        views = load_views(scene.posed_capture, held_out, setup.cache, setup.options, setup.device)
        measured = measure_held_out(scene, views, basis.mean, setup.device)
        # The baseline's metrics stay those of the scene's own mean token.
        metrics = {name: value for name, value in measured.items() if not name.endswith("_mean_token")}
        metrics |= {"num_scenes_sharing_decoder": len(tasks), LIFT_HASH: lift_hash}
        scene = replace(scene, metrics={**scene.metrics, **metrics})
        save_scene(scene, task.output_path, include_sh=setup.include_sh)
        on_scene(scene, task.output_path)
    for task in tasks:
        remove(task.sums_path)


def fit_shared_space(tasks: Sequence[LiftTask], setup: LiftSetup) -> tuple[PcaBasis, PcaBasis]:
    """The basis of the tokens of all scenes, every view counting alike, and picture colours for all of them."""
    if not tasks:
        raise ValueError("There is no scene to lift.")
    options, config, device = setup.options, setup.config, torch.device(setup.device)
    sums: PcaAccumulator | None = None
    samples = []
    for task in tasks:
        capture = task.read().capture
        views = load_views(capture, choose_views(capture, options.views)[0], setup.cache, options, device)
        for view in views:
            tokens = view.read_tokens(device)
            sums = sums or PcaAccumulator(tokens.shape[-1], device)
            add_view_tokens(sums, tokens, view.read_mask(device))
        samples.append(sample_tokens(views, MAX_PICTURE_TOKENS // len(tasks)))
    assert sums is not None
    basis = fit_token_basis(sums, config.feature_dim, centred=config.decoder_bias)
    rows = torch.cat(samples)
    return basis, fit_pca(rows, min(3, rows.shape[1]))


def _lift(task: LiftTask, setup: LiftSetup, basis: PcaBasis, pca: PcaBasis, lift_hash: str) -> DecoderStatistics:
    """Lifts one scene and writes it with the decoder of its own, unless that has been done."""
    numbers = (part.cpu().contiguous().numpy().tobytes() for part in (basis.mean, basis.components))
    identity = hash_bytes(lift_hash.encode(), *numbers)
    found = _read_sums(task, identity, setup.device)
    if found is not None:
        notice(f"{task.output_path.name} is lifted already.")
        return found
    scene, result = lift_scene(task.read(), setup, state_path=task.state_path, basis=basis, pca=pca)
    save_scene(scene, task.output_path, include_sh=setup.include_sh)
    sums = result.decoder_statistics
    tensors = {"regressors": sums.regressors, "products": sums.products}
    save_tensors(task.sums_path, tensors, _describe(identity, scene))
    return sums


def _read_sums(task: LiftTask, identity: str, device: str) -> DecoderStatistics | None:
    """Statistics of the same lift, whose features its file still holds; else None."""
    if not task.sums_path.is_file() or not task.output_path.is_file():
        return None
    try:
        file, scene = open_tensors(task.sums_path, known=("identity", "features")), load_scene(task.output_path)
        if file.metadata != _describe(identity, scene):
            return None
        for found in (file, scene):
            found.check()
        return DecoderStatistics(*(file.tensors[name].to(device) for name in ("regressors", "products")))
    except (KeyError, ValueError):
        # Either file is damaged; both are made again.
        return None


def _describe(identity: str, scene: FeatureScene) -> dict[str, str]:
    """What statistics belong to: a lift, and the features it found; another command may have replaced its file."""
    return {"identity": identity, "features": hash_bytes(scene.gaussians.features.contiguous().numpy().tobytes())}
