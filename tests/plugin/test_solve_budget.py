"""Solving stays within its share of the colour steps; what it leaves out comes in the order of its worth."""

import pytest

from fit3d_ns.plugin.pipeline import (
    MIN_VIEWS,
    SolvePlan,
    estimate_solve_costs,
)


@pytest.mark.parametrize("steps", [300, 1_000, 2_000, 3_000, 30_000])
@pytest.mark.parametrize("views", [20, 56, 109, 400])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_plan__costs_at_most_its_share_of_the_colour_steps(steps: int, views: int, dim: int) -> None:
    costs = estimate_solve_costs(dim)
    plan = costs.plan(0.15 * steps / views, max_passes=16)
    # Spelt out: weighted sum and decoder over their views, one right-hand side and the passes.
    passes = costs.sampled_pass * (1 + plan.max_passes) if plan.max_passes else 0.0
    lifted = plan.view_share * views
    whole = lifted * (costs.weighted_sum + passes) + lifted * plan.decoder_share * costs.decoder
    assert whole <= 0.15 * steps * (1 + 1e-9) and costs.compute(plan) * views == pytest.approx(whole)
    assert 0 <= plan.max_passes <= 16 and 0 < plan.view_share <= 1


def test_plan__cuts_passes_first_then_the_decoder_then_views() -> None:
    costs = estimate_solve_costs(64)
    plans = [costs.plan(budget / 50, max_passes=16) for budget in range(400, 0, -1)]
    assert plans[0] == SolvePlan(16) and plans[-1].view_share < 0.1
    # Less money never buys more of the decoder's views or of all views.
    for richer, poorer in zip(plans, plans[1:], strict=False):
        assert poorer.decoder_share <= richer.decoder_share and poorer.view_share <= richer.view_share
        if poorer.view_share < 1:
            assert poorer.max_passes == 0 and poorer.decoder_share == 0.25
        elif poorer.decoder_share == richer.decoder_share:
            assert poorer.max_passes <= richer.max_passes
        else:
            # What the decoder gives up buys passes.
            assert poorer.max_passes > richer.max_passes


def test_plan__wants_no_more_passes_than_it_is_asked_for() -> None:
    costs = estimate_solve_costs(64)
    assert costs.plan(100.0, max_passes=4) == SolvePlan(4)
    assert costs.plan(100.0, max_passes=0) == SolvePlan(0)


def test_plan__views_are_never_too_few() -> None:
    assert SolvePlan(0, view_share=0.01).count_views(100) == MIN_VIEWS
    assert SolvePlan(0, view_share=0.01).count_views(5) == 5
    assert SolvePlan(0, view_share=0.5).count_views(100) == 50 and SolvePlan(3).count_views(100) == 100
