"""`solve_features`: the closed-form lift of patch tokens onto fixed Gaussians.

With geometry fixed, blending is linear in the features, so the lift is least squares. Its phases, each one or a few
passes over the views: the token basis, the weighted sum, conjugate gradients, the decoder, and a polish if asked for.
Memory holds the Gaussians, about eight feature-sized vectors, one view, and as many projections as `cache_memory_mb`
allows, whatever the number of views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fit3d_ns.analysis.pca import PcaAccumulator, PcaBasis
from fit3d_ns.lifting import blending
from fit3d_ns.lifting.blending import ViewBlender
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.conjugate_gradients import ConjugateGradients, Features, compute_weighted_sum
from fit3d_ns.lifting.decoder_fit import DecoderStatistics, add_view_tokens, fit_decoder, fit_token_basis
from fit3d_ns.lifting.feature_error import FeatureLoss, FeatureLossConfig
from fit3d_ns.lifting.passes import LiftState, Progress, ViewPasses, compute_identity, load_state
from fit3d_ns.lifting.views import LiftView
from fit3d_ns.scene import ActivatedGaussians, FeatureDecoder, create_token_reader
from fit3d_ns.utils.progress import PhaseTimer, notice
from fit3d_ns.utils.selection import create_generator, select_evenly

_SAMPLED_SUM = "sampled weighted sum"
LIFT_PRODUCTS = ("blend_weight", "num_views", "feature_variance")
"""What a lift finds of each Gaussian besides its features: fields of `LiftResult` and of `Gaussians`."""


@dataclass(frozen=True)
class LiftResult:
    """Features of all Gaussians that were given, in their order; invalid ones (NaN geometry) hold zeros."""

    features: Float[Tensor, "num_gaussians dim"]
    """Float32."""
    decoder: FeatureDecoder
    basis: PcaBasis
    """Space of the features; the decoder's start."""
    config: LiftConfig
    """Its `token_reading` belongs in the scene file."""
    blend_weight: Float[Tensor, " num_gaussians"]
    """Sum over views and all pixels, masked ones too, of the blend weight, in pixels. Where it is 0, leaving the
    Gaussian out changes no pixel of any lifted view."""
    num_views: Int[Tensor, " num_gaussians"]
    """In how many views the Gaussian has a blend weight above zero."""
    feature_variance: Float[Tensor, " num_gaussians"]
    """Variance over views of the views' own weighted means, weighted as they are, averaged over the dimensions;
    zero for Gaussians that one view taught, or none."""
    is_valid: Bool[Tensor, " num_gaussians"]
    """False where the geometry has NaN or infinite numbers; those took no part."""
    num_passes: int
    """Passes over the views that blended or projected back, all phases together."""
    residuals: list[float]
    """Relative residual after each pass of the conjugate gradients."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase; after a resume, those since then."""
    pass_seconds: dict[str, float]
    """The same of each pass over the views alone: what surrounds the passes does not grow with the views."""
    decoder_statistics: DecoderStatistics
    """What a decoder that several scenes share is fitted to."""

    @property
    def is_unseen(self) -> Bool[Tensor, " num_gaussians"]:
        """Gaussians that no lifted view ever weighted."""
        return self.blend_weight <= 0


def solve_features(
    gaussians: ActivatedGaussians,
    views: Sequence[LiftView],
    config: LiftConfig | None = None,
    *,
    basis: PcaBasis | None = None,
    backbone: str = "",
    state_path: Path | None = None,
    progress: Progress | None = None,
) -> LiftResult:
    """Lifts the tokens of `views`, all of one backbone, onto `gaussians`.

    Gaussians with NaN or infinite numbers are left out, with a notice of how many. ValueError: no Gaussian is left;
    more dimensions than the tokens have; no view sees any Gaussian under its mask; a state file of another lift.

    Args:
        basis: Space of the features, for example one that many scenes share; None fits one to these views' tokens.
        backbone: Identity of the backbone and its weights, so that a state file of another one is refused.
        state_path: Where an interrupted lift is kept and found again; removed at the end. None keeps nothing.
    """
    config = config or LiftConfig()
    height, width, embed_dim = views[0].read_tokens(gaussians.means.device).shape
    config.check_width(embed_dim, backbone or "the backbone")
    is_sampled = blending.compute_stride(views[0].camera, (height, width), config.samples_per_patch) > 1
    is_valid = gaussians.find_valid()
    if not bool(is_valid.any()):
        raise ValueError(f"None of the {len(gaussians)} Gaussians has finite numbers; there is nothing to lift onto.")
    if not bool(is_valid.all()):
        notice(f"Left out {int((~is_valid).sum())} of {len(gaussians)} Gaussians that have NaN or infinite numbers.")
    gaussians = gaussians.select(is_valid)
    state = LiftState({})
    if state_path is not None:
        identity = compute_identity(gaussians, list(views), config, backbone, basis)
        state = load_state(state_path, identity, gaussians.means.device)
    passes = ViewPasses(state, len(views), state_path, config.seconds_per_checkpoint, progress)
    # What a sampled solve keeps is used in every pass; what is kept of whole views serves the decoder and a polish.
    keeps_samples = is_sampled and config.max_passes > 0 and config.polish_steps == 0
    blender = ViewBlender(gaussians, views, config, memory_mb=0.0 if keeps_samples else None)
    with torch.no_grad():
        result = _Lift(blender, passes, embed_dim, is_sampled).run(basis, is_valid)
    if state_path is not None:
        Path(state_path).unlink(missing_ok=True)
    return result


class _Lift:
    """The phases of one lift, in order; each leaves its sums in the passes' state."""

    def __init__(self, blender: ViewBlender, passes: ViewPasses, embed_dim: int, is_sampled: bool):
        """With `is_sampled` the solve looks at fewer pixels than the weighted sum and the decoder."""
        self.blender, self.is_sampled, self.passes = blender, is_sampled, passes
        self.config = blender.config
        self.embed_dim = embed_dim
        self.timer = PhaseTimer()
        self.device = blender.gaussians.means.device
        self._tensors = passes.state.tensors

    def run(self, basis: PcaBasis | None, is_valid: Bool[Tensor, " num_all"]) -> LiftResult:
        tensors = self._tensors
        with self.timer.phase("basis"):
            basis = self._fit_basis() if basis is None else basis.to(self.device)
        with self.timer.phase("weighted_sum"):
            self._accumulate_weighted_sum(basis)
        features = compute_weighted_sum(tensors["numerator"], tensors["denominator"])
        with self.timer.phase("conjugate_gradients"):
            if self.config.max_passes > 0:
                features = self._solve(features, basis)
        with self.timer.phase("decoder"):
            statistics = self._accumulate_decoder(features)
            decoder = fit_decoder([statistics], basis, self.config.decoder_ridge).requires_grad_(False)
        with self.timer.phase("polish"):
            if self.config.polish_steps > 0:
                features = self._polish(features, decoder)

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
            blend_weight=scatter(tensors["blend_weight"]),
            num_views=scatter(tensors["num_views"]),
            feature_variance=scatter(torch.where(tensors["denominator"] > 0, variance, 0.0)),
            is_valid=is_valid,
            num_passes=sum(name != "basis" for name in self.passes.state.finished),
            residuals=list(self.passes.state.residuals),
            seconds=self.timer.seconds,
            pass_seconds=self.passes.timer.seconds,
            decoder_statistics=statistics,
        )

    def _fit_basis(self) -> PcaBasis:
        tensors, views = self._tensors, self.blender.views

        def sums() -> PcaAccumulator:
            """An accumulator on the state's sums, which it adds to in place."""
            accumulator = PcaAccumulator(self.embed_dim, self.device)
            accumulator.sum_weights, accumulator.sum_features = tensors["token_weight"], tensors["token_first"]
            accumulator.sum_products = tensors["token_second"]
            return accumulator

        def add(index: int) -> None:
            add_view_tokens(sums(), views[index].read_tokens(self.device), views[index].read_mask(self.device))

        empty = PcaAccumulator(self.embed_dim, self.device)
        new = {"token_weight": empty.sum_weights, "token_first": empty.sum_features, "token_second": empty.sum_products}
        self.passes.run("basis", new, add)
        return fit_token_basis(sums(), self.config.feature_dim, centred=self.config.decoder_bias)

    def _accumulate_weighted_sum(self, basis: PcaBasis) -> None:
        tensors = self._tensors
        zeros = self.blender.gaussians.means.new_zeros(len(self.blender.gaussians))
        memory = zeros.new_empty(len(zeros), self.config.feature_dim + 1)

        def add(index: int) -> None:
            found = blending.backproject_targets(self.blender.prepare(index), basis, self.config, memory.zero_())
            numerator, denominator, weight = found
            tensors["numerator"] += numerator
            tensors["denominator"] += denominator
            tensors["blend_weight"] += weight
            tensors["num_views"] += weight > 0
            # w |f|^2 of the view's own mean f = numerator / w.
            energy = torch.linalg.vector_norm(numerator, dim=-1).square() / denominator.clamp(min=1e-12)
            tensors["energy"] += torch.where(denominator > 0, energy, 0.0)

        new = {name: zeros.clone() for name in ("denominator", "blend_weight", "energy")}
        new["numerator"] = zeros.new_zeros(len(zeros), self.config.feature_dim)
        new["num_views"] = zeros.to(torch.int32)
        self.passes.run("weighted sum", new, add)
        if not bool((tensors["denominator"] > 0).any()):
            problem = f"None of the {len(self.blender.views)} views sees a Gaussian under its mask"
            raise ValueError(f"{problem}; check that cameras and Gaussians share one world, and the masks.")

    def _solve(self, weighted_sum: Features, basis: PcaBasis) -> Features:
        blender, sums, config = self.blender, ("numerator", "denominator"), self.config
        if self.is_sampled:
            views_per_call = self._choose_views_per_call()
            samples = {"samples_per_patch": config.samples_per_patch, "views_per_call": views_per_call}
            blender = ViewBlender(blender.gaussians, blender.views, config, **samples)
            sums = ("sampled_numerator", "sampled_denominator")
            memory = weighted_sum.new_empty(len(weighted_sum), config.feature_dim + 1)

            def add(index: int) -> None:
                found = blending.backproject_targets(blender.prepare(index), basis, config, memory.zero_())
                for name, part in zip(sums, found, strict=False):
                    self._tensors[name] += part

            new = {sums[0]: torch.zeros_like(weighted_sum), sums[1]: weighted_sum.new_zeros(len(weighted_sum))}
            self.passes.run(_SAMPLED_SUM, new, add, len(blender.groups))
            # The conjugate gradients need the room.
            del memory
        solution = ConjugateGradients(blender, self.passes, weighted_sum, sums).solve()
        # What no sample hits, the solve knows nothing of (and without a Tikhonov term leaves at zero).
        return torch.where(self._tensors[sums[1]][:, None] > 0, solution, weighted_sum)

    def _choose_views_per_call(self) -> int:
        """As the state says: its sums are of whole groups. States of earlier versions are of single views."""
        state, blender = self.passes.state, self.blender
        if "views_per_call" not in state.numbers:
            is_begun = state.current_pass == _SAMPLED_SUM or _SAMPLED_SUM in state.finished
            chosen = blending.choose_views_per_call(blender.gaussians, blender.views[0], self.config)
            state.numbers["views_per_call"] = 1 if is_begun else chosen
        return int(state.numbers["views_per_call"])

    def _accumulate_decoder(self, features: Features) -> DecoderStatistics:
        tensors, blender = self._tensors, self.blender
        num_views = len(blender.views)
        chosen = set(select_evenly(range(num_views), math.ceil(self.config.decoder_share * num_views)))

        def add(index: int) -> None:
            if index not in chosen:
                return
            view = blender.prepare(index)
            height, width = view.alphas.shape
            size = (width, height, view.patch_grid)
            reader = create_token_reader(*size, self.config.token_reading, device=self.device)
            features_low = reader.blend(features, view.info)[0]
            maps = torch.stack([view.alphas, blending.compute_weights(view, self.config)], dim=-1)
            alphas, weights = reader.read(reader.gather(maps)).unbind(dim=-1)
            sums = DecoderStatistics(tensors["regressors"], tensors["products"])
            sums.add(reader.read_neighbourhoods(features_low), alphas, view.tokens, weights)

        dim, bias = self.config.feature_dim, self.config.decoder_bias
        empty = DecoderStatistics.create(dim, self.embed_dim, bias=bias, device=self.device)
        self.passes.run("decoder", vars(empty), add)
        return DecoderStatistics(tensors["regressors"], tensors["products"])

    @torch.enable_grad()
    def _polish(self, features: Features, decoder: FeatureDecoder) -> Features:
        """Steps of Adam on the L1 loss at the tokens, one view each in shuffled rounds; `decoder` changes in place."""
        config, blender = self.config, self.blender
        features = features.clone().requires_grad_(True)
        decoder.requires_grad_(True)
        groups = [
            {"params": parameters, "lr": config.polish_learning_rate * float(scale.detach().square().mean().sqrt())}
            for parameters, scale in (([features], features), (list(decoder.parameters()), decoder.weight))
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / config.polish_steps)
        loss_config = FeatureLossConfig(
            multiple=1,
            token_to_pixel=config.token_to_pixel,
            token_reading=config.token_reading,
            alpha_weighting=config.accumulation_aware,
        )
        generator = create_generator(0, "polish")
        order: list[int] = []
        for _ in range(config.polish_steps):
            order = order or torch.randperm(len(blender.views), generator=generator).tolist()
            view = blender.prepare(order.pop())
            height, width = view.alphas.shape
            loss = FeatureLoss(width, height, view.patch_grid, loss_config, self.device)
            features_low = loss.blend(features, view.info)
            optimizer.zero_grad()
            loss.compute(features_low, view.alphas, decoder, view.tokens, view.mask).backward()
            optimizer.step()
            schedule.step()
        decoder.requires_grad_(False)
        return features.detach()
