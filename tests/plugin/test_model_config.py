"""Open step counts become fractions of the run; given ones stay."""

from typing import Any

import pytest

from fit3d_ns.plugin.method import fit3d_features, fit3d_features_paper
from fit3d_ns.plugin.model_config import FeatureSplatfactoModelConfig


def resolve(steps: int, **given: Any) -> FeatureSplatfactoModelConfig:
    options = FeatureSplatfactoModelConfig(**given)
    options.resolve_steps(steps)
    return options


def test_resolve__at_30000_steps_gives_splatfactos_defaults() -> None:
    from nerfstudio.models.splatfacto import SplatfactoModelConfig

    options, host = resolve(30_000), SplatfactoModelConfig()
    for name in ("warmup_length", "refine_every", "resolution_schedule", "reset_alpha_every", "sh_degree_interval",
                 "stop_screen_size_at", "stop_split_at"):  # fmt: skip
        assert getattr(options, name) == getattr(host, name), name


def test_resolve__scales_every_phase_of_a_short_run() -> None:
    options = resolve(1_000)
    assert options.stop_split_at == 500
    assert 2 * options.resolution_schedule < 1_000, "the last resolution is never reached"
    assert 3 * options.sh_degree_interval < 1_000, "the last degree is never reached"
    assert options.warmup_length < options.stop_split_at
    # No reset that the run could not recover from.
    assert options.reset_alpha_every * options.refine_every > 1_000


def test_resolve__keeps_what_the_user_gave() -> None:
    options = resolve(1_000, stop_split_at=77, refine_every=5)
    assert (options.stop_split_at, options.refine_every) == (77, 5)


@pytest.mark.parametrize("steps", [0, -1])
def test_resolve__refuses_a_run_without_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="max-num-iterations"):
        resolve(steps)


def test_paper_method__has_the_values_of_the_public_code() -> None:
    """Learning rates, loss, initial values and background as in the authors' repository."""
    config = fit3d_features_paper.config
    model, datamanager = config.pipeline.model, config.pipeline.datamanager
    assert (model.feature_dim, model.feature_loss_weight, model.feature_init) == (64, 1.0, "zeros")
    assert (model.feature_schedule, model.feature_grid_multiple) == ("joint", 0)
    assert (model.decoder_bias, model.accumulation_weighting) == (False, False)
    assert (model.ssim_lambda, model.sh_degree, model.background_color) == (0.2, 3, "black")
    assert datamanager.normalization == "imagenet" and datamanager.dataparser.eval_mode == "all"
    for group in ("features", "decoder"):
        optimizer = config.optimizers[group]["optimizer"]
        assert (optimizer.lr, optimizer.eps) == (6.25e-5, 1e-15)
        assert config.optimizers[group]["scheduler"] is None
    assert fit3d_features.config.pipeline.model.feature_schedule == "solve"
