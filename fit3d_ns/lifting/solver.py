"""`solve_features`: the closed-form lift of patch tokens onto fixed Gaussians.

With geometry fixed, blending is linear in the features, so the lift is least squares. Its phases, each one or a few
passes over the views: the token basis, the weighted sum, conjugate gradients, the decoder, and a polish if asked for.
Memory holds the Gaussians, about eight feature-sized vectors, one view, and as many projections as `cache_memory_mb`
allows, whatever the number of views.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis
from fit3d_ns.lifting.blending import ViewBlender, backproject_targets, compute_weights
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.conjugate_gradients import ConjugateGradients, compute_weighted_sum
from fit3d_ns.lifting.decoder_fit import DecoderStatistics, fit_decoder
from fit3d_ns.lifting.polish import polish_features
from fit3d_ns.lifting.reduction import select_share
from fit3d_ns.lifting.result import LiftResult
from fit3d_ns.lifting.sampled_camera import compute_stride
from fit3d_ns.lifting.state import LiftState, compute_identity, load_state
from fit3d_ns.lifting.token_basis import add_view_tokens, fit_token_basis
from fit3d_ns.lifting.view_passes import Progress, ViewPasses
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.rasterization import rasterize_features
from fit3d_ns.scene.feature_decoder import FeatureDecoder
from fit3d_ns.scene.gaussians import ActivatedGaussians
from fit3d_ns.scene.token_grid import create_token_reader
from fit3d_ns.utils.progress import PhaseTimer, notice
from fit3d_ns.utils.selection import select_evenly


def solve_features(
    gaussians: ActivatedGaussians,
    views: Sequence[LiftView],
    config: LiftConfig | None = None,
    *,
    basis: PcaBasis | None = None,
    initial: Float[Tensor, "num_gaussians dim"] | None = None,
    backbone: str = "",
    state_path: Path | None = None,
    progress: Progress | None = None,
    budget_seconds: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> LiftResult:
    """Lifts the tokens of `views` onto `gaussians`.

    Args:
        gaussians: Fixed geometry. Gaussians with NaN or infinite numbers are left out, with a notice of how many.
        views: Captured views with tokens of one backbone; the same list on every process of `group`.
        config: Settings; None for the defaults.
        basis: Space of the features, for example one that many scenes share; None fits one to these views' tokens.
        initial: Features on the given `basis` to start from; None starts from the weighted sum.
        backbone: Identity of the backbone and its weights, so that a state file of another one is refused.
        state_path: Where an interrupted lift is kept and found again; removed at the end. None keeps nothing.
        progress: Called with (pass, views done, views of this process).
        budget_seconds: No pass of the conjugate gradients begins that would end later than this many seconds after the
            call; the weighted sum and the decoder fit are always done.
        group: Processes among which the views are split; all hold the same Gaussians and get the same result.

    Raises:
        ValueError: No views; views without tokens or with tokens of different widths; a basis or start of another
            size; no view sees any Gaussian under its mask; a state file of another lift.
    """
    config = config or LiftConfig()
    deadline = None if budget_seconds is None else time.perf_counter() + budget_seconds
    device = gaussians.means.device
    grid, embed_dim = _check_sizes(gaussians, views, config, basis, initial, group)
    is_sampled = compute_stride(views[0].width, views[0].height, grid, config.samples_per_patch) > 1
    is_valid = gaussians.find_valid()
    if not bool(is_valid.all()):
        notice(f"Left out {int((~is_valid).sum())} of {len(gaussians)} Gaussians that have NaN or infinite numbers.")
        initial = None if initial is None else initial[is_valid]
    gaussians = gaussians.select(is_valid)
    state = LiftState({})
    if state_path is not None:
        identity = compute_identity(gaussians, list(views), config, backbone, basis, initial)
        identity["number of processes"] = str(1 if group is None else dist.get_world_size(group))
        state = load_state(state_path, identity, device)
    share = select_share(views, group)
    passes = ViewPasses(
        state,
        len(share),
        state_path=state_path,
        seconds_per_checkpoint=config.seconds_per_checkpoint,
        group=group,
        progress=progress,
    )
    # What a sampled solve keeps is used in every pass; what is kept of whole views serves the decoder and a polish.
    keeps_samples = is_sampled and config.max_passes > 0 and config.polish_steps == 0
    blender = ViewBlender(gaussians, share, config, memory_mb=0.0 if keeps_samples else config.cache_memory_mb)
    lift = _Lift(blender, passes, config, embed_dim, is_sampled)
    with torch.no_grad():
        result = lift.run(basis, initial, is_valid, deadline)
    if state_path is not None and (group is None or dist.get_rank(group) == 0):
        Path(state_path).unlink(missing_ok=True)
    return result


class _Lift:
    """The phases of one lift, in order; each leaves its sums in the passes' state."""

    def __init__(self, blender: ViewBlender, passes: ViewPasses, config: LiftConfig, embed_dim: int, is_sampled: bool):
        """Args: `is_sampled`: whether the solve looks at fewer pixels than the weighted sum and the decoder."""
        self.blender = blender
        self.is_sampled = is_sampled
        self.passes = passes
        self.config = config
        self.embed_dim = embed_dim
        self.timer = PhaseTimer()
        self.device = blender.gaussians.means.device
        self._tensors = passes.state.tensors

    def run(
        self,
        basis: PcaBasis | None,
        initial: Float[Tensor, "num_gaussians dim"] | None,
        is_valid: Bool[Tensor, " num_all"],
        deadline: float | None,
    ) -> LiftResult:
        tensors = self._tensors
        with self.timer.phase("basis"):
            basis = self._fit_basis() if basis is None else basis.to(self.device)
        with self.timer.phase("weighted_sum"):
            self._accumulate_weighted_sum(basis)
        features = compute_weighted_sum(tensors["numerator"], tensors["denominator"])
        with self.timer.phase("conjugate_gradients"):
            if self.config.max_passes > 0:
                features = self._solve(features, basis, initial, deadline)
        with self.timer.phase("decoder"):
            statistics = self._accumulate_decoder(features)
            decoder = fit_decoder(statistics, basis, self.config.decoder_ridge).requires_grad_(False)
        with self.timer.phase("polish"):
            if self.config.polish_steps > 0:
                features = polish_features(features, decoder, self.blender, self.config, self.passes.group)
        return self._assemble(features, decoder, basis, statistics, is_valid)

    def _fit_basis(self) -> PcaBasis:
        tensors, views = self._tensors, self.blender.views

        def sums() -> PcaAccumulator:
            return _create_accumulator(tensors["token_weight"], tensors["token_first"], tensors["token_second"])

        def add(index: int) -> None:
            tokens = views[index].read_tokens(self.device)
            self._check_width(tokens, index)
            add_view_tokens(sums(), tokens, views[index].read_mask(self.device))

        empty = PcaAccumulator(self.embed_dim, self.device)
        new = {
            "token_weight": empty.sum_weights,
            "token_first": empty.sum_features,
            "token_second": empty.sum_products,
        }
        self.passes.run("basis", new, add)
        return fit_token_basis(sums(), self.config.feature_dim, centred=self.config.decoder_bias)

    def _accumulate_weighted_sum(self, basis: PcaBasis) -> None:
        tensors = self._tensors
        zeros = self.blender.gaussians.means.new_zeros(len(self.blender.gaussians))
        memory = zeros.new_empty(len(zeros), self.config.feature_dim + 1)

        def add(index: int) -> None:
            view = self.blender.prepare(index)
            self._check_width(view.tokens, index)
            sums = backproject_targets(view, basis, self.config, memory.zero_())
            tensors["numerator"] += sums.numerator
            tensors["denominator"] += sums.denominator
            tensors["blend_weight"] += sums.blend_weight
            tensors["num_views"] += sums.blend_weight > 0
            # w |f|^2 of the view's own mean f = numerator / w.
            energy = torch.linalg.vector_norm(sums.numerator, dim=-1).square() / sums.denominator.clamp(min=1e-12)
            tensors["energy"] += torch.where(sums.denominator > 0, energy, 0.0)

        self.passes.run(
            "weighted sum",
            {
                "numerator": zeros.new_zeros(len(zeros), self.config.feature_dim),
                "denominator": zeros.clone(),
                "blend_weight": zeros.clone(),
                "num_views": zeros.to(torch.int32),
                "energy": zeros.clone(),
            },
            add,
        )
        if not bool((tensors["denominator"] > 0).any()):
            raise ValueError(
                f"None of the {len(self.blender.views)} views sees a Gaussian under its mask; "
                "check that cameras and Gaussians share one world, and the masks."
            )

    def _solve(
        self,
        weighted_sum: Float[Tensor, "num_gaussians dim"],
        basis: PcaBasis,
        initial: Float[Tensor, "num_gaussians dim"] | None,
        deadline: float | None,
    ) -> Float[Tensor, "num_gaussians dim"]:
        blender, sums = self.blender, ("numerator", "denominator")
        seconds = self.timer.seconds["weighted_sum"]
        if self.is_sampled:
            start = time.perf_counter()
            config = self.config
            blender = ViewBlender(
                blender.gaussians,
                blender.views,
                config,
                samples_per_patch=config.samples_per_patch,
                memory_mb=config.cache_memory_mb,
            )
            sums = ("sampled_numerator", "sampled_denominator")
            self._accumulate_right_side(blender, basis, sums)
            seconds = time.perf_counter() - start
        # A pass of the conjugate gradients blends and projects back: about two adjoint passes.
        solver = ConjugateGradients(blender, self.passes, self.config, weighted_sum, sums, deadline)
        solution = solver.solve(None if initial is None else initial.float(), seconds_per_pass=2.0 * seconds)
        # What no sample hits, the solve knows nothing of (and without a Tikhonov term leaves at zero).
        return torch.where(self._tensors[sums[1]][:, None] > 0, solution, weighted_sum)

    def _accumulate_right_side(self, blender: ViewBlender, basis: PcaBasis, names: tuple[str, str]) -> None:
        tensors, count = self._tensors, len(blender.gaussians)
        zeros = blender.gaussians.means.new_zeros(count)
        memory = zeros.new_empty(count, self.config.feature_dim + 1)

        def add(index: int) -> None:
            found = backproject_targets(blender.prepare(index), basis, self.config, memory.zero_())
            tensors[names[0]] += found.numerator
            tensors[names[1]] += found.denominator

        new = {names[0]: zeros.new_zeros(count, self.config.feature_dim), names[1]: zeros}
        self.passes.run("sampled weighted sum", new, add)

    def _accumulate_decoder(self, features: Float[Tensor, "num_gaussians dim"]) -> DecoderStatistics:
        tensors, blender = self._tensors, self.blender
        num_views = len(blender.views)
        chosen = set(select_evenly(range(num_views), math.ceil(self.config.decoder_share * num_views)))

        def add(index: int) -> None:
            if index not in chosen:
                return
            view = blender.prepare(index)
            height, width = view.alphas.shape
            reader = create_token_reader(width, height, view.grid, self.config.token_reading)
            features_low = rasterize_features(features, view.info, pixels=reader.pixels.to(self.device))[0]
            maps = torch.stack([view.alphas, compute_weights(view, self.config)], dim=-1)
            alphas, weights = reader.read(reader.gather(maps)).unbind(dim=-1)
            sums = DecoderStatistics(tensors["regressors"], tensors["products"])
            sums.add(reader.read_neighbourhoods(features_low), alphas, view.tokens, weights)

        empty = DecoderStatistics.create(
            self.config.feature_dim, self.embed_dim, bias=self.config.decoder_bias, device=self.device
        )
        self.passes.run("decoder", {"regressors": empty.regressors, "products": empty.products}, add)
        return DecoderStatistics(tensors["regressors"], tensors["products"])

    def _assemble(
        self,
        features: Float[Tensor, "num_gaussians dim"],
        decoder: FeatureDecoder,
        basis: PcaBasis,
        statistics: DecoderStatistics,
        is_valid: Bool[Tensor, " num_all"],
    ) -> LiftResult:
        tensors = self._tensors

        def scatter(values: Tensor) -> Tensor:
            if len(values) == len(is_valid):
                return values
            full = values.new_zeros(len(is_valid), *values.shape[1:])
            full[is_valid] = values
            return full

        mean_energy = compute_weighted_sum(tensors["numerator"], tensors["denominator"]).square().sum(dim=-1)
        energy = tensors["energy"] / tensors["denominator"].clamp(min=1e-12)
        variance = ((energy - mean_energy) / self.config.feature_dim).clamp(min=0.0)
        return LiftResult(
            features=scatter(features),
            decoder=decoder,
            basis=basis,
            config=self.config,
            numerator=scatter(tensors["numerator"]),
            denominator=scatter(tensors["denominator"]),
            blend_weight=scatter(tensors["blend_weight"]),
            num_views=scatter(tensors["num_views"]),
            feature_variance=scatter(torch.where(tensors["denominator"] > 0, variance, 0.0)),
            is_valid=is_valid,
            num_passes=sum(name != "basis" for name in self.passes.state.finished),
            residuals=list(self.passes.state.residuals),
            seconds=self.timer.seconds,
            decoder_statistics=statistics,
        )

    def _check_width(self, tokens: Float[Tensor, "h w embed"], index: int) -> None:
        if tokens.shape[-1] != self.embed_dim:
            raise ValueError(
                f"View {self.blender.views[index].name!r} has tokens of width {tokens.shape[-1]}, the first view "
                f"{self.embed_dim}; lift the tokens of one backbone at a time."
            )


def _create_accumulator(weight: Tensor, first: Tensor, second: Tensor) -> PcaAccumulator:
    """An accumulator on existing sums, which it adds to in place."""
    accumulator = PcaAccumulator(first.shape[0], first.device)
    accumulator.sum_weights, accumulator.sum_features, accumulator.sum_products = weight, first, second
    return accumulator


def _check_sizes(
    gaussians: ActivatedGaussians,
    views: Sequence[LiftView],
    config: LiftConfig,
    basis: PcaBasis | None,
    initial: Float[Tensor, "num_gaussians dim"] | None,
    group: dist.ProcessGroup | None,
) -> tuple[tuple[int, int], int]:
    """Checks what can be known before any pass; returns the first view's token grid and the tokens' width E."""
    num_processes = 1 if group is None else dist.get_world_size(group)
    if len(views) < num_processes:
        raise ValueError(f"{len(views)} views cannot be lifted by {num_processes} processes; each needs at least one.")
    if not bool(gaussians.find_valid().any()):
        raise ValueError(f"None of the {len(gaussians)} Gaussians has finite numbers; there is nothing to lift onto.")
    height, width, embed_dim = views[0].read_tokens(gaussians.means.device).shape
    if config.feature_dim > embed_dim:
        raise ValueError(
            f"feature_dim {config.feature_dim} exceeds the tokens' width {embed_dim}; choose at most that."
        )
    if basis is not None and basis.components.shape != (config.feature_dim, embed_dim):
        dim, width = basis.components.shape
        raise ValueError(
            f"The basis has {dim} dimensions for tokens of width {width}, this lift needs {config.feature_dim} for "
            f"width {embed_dim}; use a basis of the same backbone and feature_dim."
        )
    if initial is not None and basis is None:
        raise ValueError("Features to start from mean nothing without their basis; give `basis` with `initial`.")
    if initial is not None and initial.shape != (len(gaussians), config.feature_dim):
        raise ValueError(
            f"The features to start from have shape {tuple(initial.shape)}, "
            f"expected ({len(gaussians)}, {config.feature_dim})."
        )
    return (height, width), embed_dim
