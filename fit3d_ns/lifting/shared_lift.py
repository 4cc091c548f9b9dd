"""`lift_together`: many scenes on one token basis, read by one decoder, with one set of picture colours.

Three rounds over the scenes, one scene in memory at a time: the tokens of each are summed up, and all sums make the
basis they share; each scene is lifted on it and leaves its decoder statistics; the decoder of all statistics together
replaces the scenes' own. Sums, basis and decoder are files beside the scenes until all are finished. So rounds go on
after an interruption, and several processes may share out the scenes: whoever finds all parts there adds them up, in
the order of the scenes, to the same bits.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

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
from fit3d_ns.lifting.views import MAX_PICTURE_TOKENS, choose_views, sample_tokens
from fit3d_ns.scene import FeatureDecoder, FeatureScene, load_scene, save_scene
from fit3d_ns.utils.files import hash_bytes, remove
from fit3d_ns.utils.progress import notice
from fit3d_ns.utils.tensor_files import open_tensors, save_tensors

NUM_SHARED_ROUNDS = 3
"""How often each of the processes that share out the scenes has to be run, one after the other, at most."""
_OWN_HASH = "own_lift_hash"
"""Metric of a scene that shares a decoder: `LIFT_HASH` without what the other scenes come from."""
Tensors: TypeAlias = dict[str, Tensor]
Described: TypeAlias = dict[str, str]
AddUp: TypeAlias = Callable[[Iterable[Tensors]], Tensors]


@dataclass(frozen=True)
class LiftTask:
    """One of the scenes that are lifted together."""

    read: Callable[[], LiftSource]
    """Reads its Gaussians and views; called once a round."""
    output_path: Path
    """Where the scene file goes."""

    def get_path(self, kind: str) -> Path:
        """Beside the scene file: `lift-state`, of an interrupted lift, and what all wait for, its `token-sums` and
        `decoder-sums`."""
        return self.output_path.with_name(f"{self.output_path.name}.{kind}")


def lift_together(
    tasks: Sequence[LiftTask],
    setup: LiftSetup,
    mine: Sequence[LiftTask],
    work_on_each: Callable[[Sequence[Path], Callable[[int], None]], dict[str, str]],
    *,
    overwrite: bool = False,
    on_scene: Callable[[FeatureScene, Path], None] = lambda scene, path: None,
) -> tuple[dict[str, str], list[str]]:
    """Lifts scenes on a basis and with a decoder that they share, writes their files and hands each to `on_scene`.

    ValueError for no scene, and as in `lift_scene` and `save_scene`.

    Args:
        tasks: All scenes, in an order that is the same for all processes that share them out.
        mine: Those that are worked on here.
        work_on_each: Does one round's work on scenes by their index; says what was wrong with those that failed.

    Returns:
        What was wrong with scenes of `mine` that failed, and the files of other scenes that they wait for.
    """
    if not tasks:
        raise ValueError("There is no scene to lift.")
    lift, failed = _SharedLift(tasks, setup, overwrite), dict[str, str]()

    def run(title: str, work: Callable[[LiftTask], None]) -> None:
        left = [task for task in mine if task.output_path.stem not in failed]
        notice(f"{title}: {len(left)} of {len(tasks)} scenes")
        failed.update(work_on_each([task.output_path for task in left], lambda index: work(left[index])))

    # Where one turns out to come from something else than before, the others have to count their tokens again as well.
    is_finished, was_finished = lift.look(), None
    while is_finished != was_finished:
        failed.clear()
        run("Tokens", lift.count_tokens)
        is_finished, was_finished = lift.look(), is_finished
    if not is_finished:
        if missing := lift.find_basis():
            return failed, missing
        run("Features", lift.lift)
        if missing := lift.find_decoder():
            return failed, missing
        run("The shared decoder", lift.finish)
    for task in mine:
        if task.output_path.stem not in failed:
            on_scene(load_scene(task.output_path), task.output_path)
    lift.overwrite = False
    if not failed and lift.look():
        for path in (lift.basis_path, lift.decoder_path, *lift.parts):
            remove(path)
    return failed, []


class _SharedLift:
    """The rounds of scenes that are lifted together, and what they share."""

    def __init__(self, tasks: Sequence[LiftTask], setup: LiftSetup, overwrite: bool):
        self.tasks, self.setup, self.overwrite = list(tasks), setup, overwrite
        folder = tasks[0].output_path.parent
        self.basis_path, self.decoder_path = folder / "scenes.shared-basis", folder / "scenes.shared-decoder"
        self.parts = [task.get_path(kind) for task in tasks for kind in ("token-sums", "decoder-sums")]

    def look(self) -> bool:
        """Notes what each scene comes from, as its files say, and whether all are finished."""
        self.known = {task: _read_own_hash(task) for task in self.tasks}
        self.all_known = hash_bytes(*(str(own).encode() for own in self.known.values()))
        # The last is finished last, as a rule: most find that out at once.
        whole = (find_finished(task.output_path, self._mix(task)) for task in reversed(self.tasks))
        self.is_finished = not self.overwrite and None not in self.known.values() and None not in whole
        return self.is_finished

    def count_tokens(self, task: LiftTask) -> None:
        """Round 1, unless its sums are there or all scenes are finished."""
        setup, source = self.setup, task.read()
        # How many tokens are kept for pictures depends on how many scenes there are.
        own = hash_bytes(compute_lift_hash(source, setup).encode(), str(len(self.tasks)).encode())
        if self.is_finished and own == self.known[task]:
            return
        if _read(task.get_path("token-sums"), {"own": own}):
            return
        taught, device = choose_views(source.capture, setup.options.views)[0], torch.device(setup.device)
        views = setup.load_views(source.capture, taught)
        sums = PcaAccumulator(setup.backbone.embed_dim, device)
        for view in views:
            add_view_tokens(sums, view.read_tokens(device), view.read_mask(device))
        rows = sample_tokens(views, MAX_PICTURE_TOKENS // len(self.tasks))
        save_tensors(task.get_path("token-sums"), {**vars(sums), "rows": rows}, {"own": own})

    def find_basis(self) -> list[str]:
        """Adds up what round 1 found, unless a process has done that; names files that are missing for it."""
        parts = {task.get_path("token-sums"): {"own": str(own)} for task, own in self.known.items()}
        found = self._share(self.basis_path, {"identity": self.all_known}, parts, self._fit_basis)
        if found:
            self.basis, self.pca = _unpack_basis(found, "basis."), _unpack_basis(found, "pca.")
        return self.missing

    def lift(self, task: LiftTask) -> None:
        """Round 2: writes the scene with a decoder of its own, unless that has been done."""
        setup, path, state = self.setup, task.get_path("decoder-sums"), task.get_path("lift-state")
        with suppress(ValueError):  # What is damaged, or was replaced by another command, is made again.
            found = load_scene(task.output_path)
            found.check()
            if _read(path, self._describe_lift(task) | _describe_features(found)):
                notice(f"{task.output_path.name} is lifted already.")
                return
        scene, result = lift_scene(task.read(), setup, state_path=state, basis=self.basis, pca=self.pca)
        save_scene(scene, task.output_path, include_sh=setup.include_sh)
        save_tensors(path, vars(result.decoder_statistics), self._describe_lift(task) | _describe_features(scene))

    def find_decoder(self) -> list[str]:
        """As `find_basis`, of what round 2 found."""
        parts = {task.get_path("decoder-sums"): self._describe_lift(task) for task in self.tasks}
        found = self._share(self.decoder_path, self._describe_lift(), parts, self._fit_decoder)
        if found:
            self.decoder = FeatureDecoder.from_weights(**found).requires_grad_(False)
        return self.missing

    def finish(self, task: LiftTask) -> None:
        """Round 3: the shared decoder takes the place of the scene's own."""
        setup = self.setup
        if not self.overwrite and find_finished(task.output_path, self._mix(task)):
            return
        scene = replace(load_scene(task.output_path), decoder=self.decoder)
        _, held_out = choose_views(scene.posed_capture, setup.options.views)
        views = setup.load_views(scene.posed_capture, held_out)
        measured = measure_held_out(scene, views, self.basis.mean, setup.device)
        # The baseline's metrics stay those of the scene's own mean token.
        metrics = {name: value for name, value in measured.items() if not name.endswith("_mean_token")}
        metrics["num_scenes_sharing_decoder"] = len(self.tasks)
        metrics |= {LIFT_HASH: self._mix(task), _OWN_HASH: self.known[task]}
        save_scene(replace(scene, metrics={**scene.metrics, **metrics}), task.output_path, include_sh=setup.include_sh)

    def _share(self, path: Path, metadata: Described, parts: dict[Path, Described], add_up: AddUp) -> Tensors:
        """What a process has made of all parts, or is made now; nothing where some are missing."""
        self.missing: list[str] = []
        found = _read(path, metadata)
        for whole in () if found else (False, True):
            self.missing = self.missing or [part.name for part in parts if not _read(part, parts[part], whole)]
        if not found and not self.missing:
            save_tensors(path, add_up(_read(part, parts[part], whole=False) for part in parts), metadata)
            found = _read(path, metadata)
        return found

    def _fit_basis(self, parts: Iterable[Tensors]) -> Tensors:
        sums, rows, config = PcaAccumulator(self.setup.backbone.embed_dim), [], self.setup.config
        for part in parts:
            rows.append(part.pop("rows"))
            for name, tensor in part.items():
                getattr(sums, name).add_(tensor)
        basis = fit_token_basis(sums, config.feature_dim, centred=config.decoder_bias)
        tokens = torch.cat(rows)
        both = {"basis": basis, "pca": fit_pca(tokens, min(3, tokens.shape[1]))}
        named = ((f"{kind}.{name}", value) for kind, part in both.items() for name, value in vars(part).items())
        return {name: torch.as_tensor(value) for name, value in named}

    def _fit_decoder(self, parts: Iterable[Tensors]) -> Tensors:
        statistics = (DecoderStatistics(**part) for part in parts)
        return dict(fit_decoder(statistics, self.basis, self.setup.config.decoder_ridge).named_parameters())

    def _mix(self, task: LiftTask | None = None) -> str:
        """What a scene, or what they share, comes from."""
        return hash_bytes(str(self.known[task] if task else "all").encode(), self.all_known.encode())

    def _describe_lift(self, task: LiftTask | None = None) -> Described:
        numbers = (part.contiguous().numpy().tobytes() for part in (self.basis.mean, self.basis.components))
        return {"identity": hash_bytes(self._mix(task).encode(), *numbers)}


def _read_own_hash(task: LiftTask) -> str | None:
    with suppress(ValueError, KeyError):
        if task.get_path("token-sums").is_file():
            return open_tensors(task.get_path("token-sums")).metadata["own"]
        return str(load_scene(task.output_path).metrics[_OWN_HASH])
    return None


def _read(path: Path, metadata: Described, whole: bool = True) -> Tensors:
    """The tensors of a file that has this metadata among its own; nothing of others, or where `whole` is damaged."""
    with suppress(ValueError):
        file = open_tensors(path)
        if metadata.items() <= file.metadata.items():
            if whole:
                file.check()
            return dict(file.tensors)
    return {}


def _unpack_basis(tensors: Tensors, prefix: str) -> PcaBasis:
    found: dict[str, Any] = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return PcaBasis(**{**found, "total_variance": float(found["total_variance"])})


def _describe_features(scene: FeatureScene) -> Described:
    return {"features": hash_bytes(scene.gaussians.features.contiguous().numpy().tobytes())}
