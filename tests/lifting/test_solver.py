import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from fit3d_ns.lifting import blending
from fit3d_ns.lifting.blending import prepare_views
from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.feature_error import FeatureLoss, FeatureLossConfig
from fit3d_ns.lifting.solver import solve_features
from fit3d_ns.rasterization import backproject_features
from tests.lifting.lifting_scene import (
    EMBED_DIM,
    GRID,
    HEIGHT,
    WIDTH,
    compute_dense_blending,
    create_gaussians,
    create_views,
)

EXACT = LiftConfig(feature_dim=3, max_passes=40, tolerance=1e-5, steps_per_true_residual=20)


def cell_of(pixel: int, length: int, cells: int) -> int:
    return int((pixel + 0.5) * cells / length)


def spread_by_loop(tokens: np.ndarray, rule: str) -> np.ndarray:
    spread = np.zeros((HEIGHT, WIDTH, tokens.shape[-1]))
    for row in range(HEIGHT):
        for column in range(WIDTH):
            if rule != "bilinear":
                spread[row, column] = tokens[cell_of(row, HEIGHT, GRID[0]), cell_of(column, WIDTH, GRID[1])]
                continue
            y = max((row + 0.5) * GRID[0] / HEIGHT - 0.5, 0.0)
            x = max((column + 0.5) * GRID[1] / WIDTH - 0.5, 0.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, GRID[0] - 1), min(left + 1, GRID[1] - 1)
            upper = tokens[top, left] * (1 - x + left) + tokens[top, right] * (x - left)
            lower = tokens[bottom, left] * (1 - x + left) + tokens[bottom, right] * (x - left)
            spread[row, column] = upper * (1 - y + top) + lower * (y - top)
    return spread


def average_cells_by_loop(maps: np.ndarray, weights: np.ndarray) -> np.ndarray:
    averaged = np.zeros_like(maps)
    cells = np.array(
        [[cell_of(r, HEIGHT, GRID[0]) * 100 + cell_of(c, WIDTH, GRID[1]) for c in range(WIDTH)] for r in range(HEIGHT)]
    )
    for cell in np.unique(cells):
        inside = cells == cell
        total = weights[inside].sum()
        if total > 0:
            averaged[inside] = (maps[inside] * weights[inside][:, None]).sum(axis=0) / total
    return averaged


def sum_densely(gaussians, views, basis, rule="nearest") -> tuple[np.ndarray, np.ndarray]:
    """Numerator [N, D] and denominator [N] of the weighted sum."""
    numerator, denominator = 0.0, 0.0
    for view in views:
        blending, alphas = (tensor.numpy() for tensor in compute_dense_blending(gaussians, view))
        weights = view.load_mask().numpy() * alphas
        target = spread_by_loop(((view.load_tokens() - basis.mean) @ basis.components.T).double().numpy(), rule)
        numerator = numerator + np.einsum("hwn,hw,hwd->nd", blending, weights, target)
        denominator = denominator + np.einsum("hwn,hw->n", blending, weights)
    return numerator, denominator


@pytest.mark.parametrize("rule", ["bilinear", "nearest", "area"])
def test_solve_features__equals_dense_least_squares(gaussians, views, rule):
    config = replace(EXACT, token_to_pixel=rule, within_patch_weight=0.2, regularization=0.02)
    result = solve_features(gaussians, views, config)

    rows, targets = [], []
    numerator, denominator = sum_densely(gaussians, views, result.basis, rule)
    for view in views:
        blending, alphas = (tensor.numpy() for tensor in compute_dense_blending(gaussians, view))
        weights = view.load_mask().numpy() * alphas
        coordinates = (view.load_tokens() - result.basis.mean) @ result.basis.components.T
        target = spread_by_loop(coordinates.double().numpy(), rule)
        operators = [(blending, 1.0)]
        if rule == "area":
            operators = [(average_cells_by_loop(blending, weights), 0.8), (blending, 0.2)]
        for operator, share in operators:
            root = np.sqrt(share * weights)[..., None]
            rows.append((operator * root).reshape(-1, len(gaussians)))
            targets.append((target * root).reshape(-1, 3))
    penalty = 0.02 * denominator[denominator > 0].mean()
    weighted_sum = numerator / denominator[:, None]
    rows.append(np.sqrt(penalty) * np.eye(len(gaussians)))
    targets.append(np.sqrt(penalty) * weighted_sum)
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]

    # Conjugate gradients in float32 stop at a relative residual of 1e-5.
    np.testing.assert_allclose(result.features, expected, rtol=1e-3, atol=1e-3)


def test_prepare_view__samples_at_block_centres(gaussians, views):
    for view in views:
        # Moved half a pixel, the even pixels of the whole picture lie where the centres of its 2x2 blocks were.
        shifted = view.camera.K.clone()
        shifted[:2, 2] -= 0.5
        moved = replace(view, camera=view.camera._replace(K=shifted))
        expected = compute_dense_blending(gaussians, moved)[1].float()[::2, ::2]
        sampled = prepare_views(gaussians, [view], samples_per_patch=2)
        # Lists of Gaussians per tile end at 3 sigma, and tiles lie elsewhere: up to 0.011 of an opaque Gaussian.
        torch.testing.assert_close(sampled.alphas, expected, rtol=0.0, atol=0.015)
        blocks = view.load_mask().float().reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean(dim=(1, 3))
        torch.testing.assert_close(sampled.mask, blocks)


def test_solve_features__few_samples_fit_like_all_pixels(gaussians, views):
    config = replace(EXACT, regularization=0.01)
    whole = solve_features(gaussians, views, config)

    def compute_error(features: np.ndarray) -> float:
        total = 0.0
        for view in views:
            blending, alphas = (tensor.numpy() for tensor in compute_dense_blending(gaussians, view))
            weights = view.load_mask().numpy() * alphas
            coordinates = (view.load_tokens() - whole.basis.mean) @ whole.basis.components.T
            target = spread_by_loop(coordinates.double().numpy(), "area")
            averaged = average_cells_by_loop(blending @ features.astype(float), weights)
            total += float((weights[..., None] * (averaged - target) ** 2).sum())
        return total

    best, start = (
        compute_error(whole.features.numpy()),
        compute_error(solve_features(gaussians, views, replace(config, max_passes=0)).features.numpy()),
    )
    sampled = solve_features(gaussians, views, replace(config, samples_per_patch=2))
    assert sampled.num_passes == len(sampled.residuals) + 3
    assert not torch.equal(sampled.features, whole.features)
    # Four of sixteen pixels per patch: nearly all of what the solve gains over the weighted sum stays.
    assert compute_error(sampled.features.numpy()) - best < 0.05 * (start - best)


def test_solve_features__no_pass_gives_the_weighted_sum(gaussians, views):
    result = solve_features(gaussians, views, replace(EXACT, max_passes=0))
    numerator, denominator = sum_densely(gaussians, views, result.basis)
    np.testing.assert_allclose(result.features, numerator / denominator[:, None], rtol=1e-4, atol=1e-4)
    assert result.residuals == []


def test_solve_features__ignores_view_order(gaussians, views):
    forward = solve_features(gaussians, views, EXACT)
    backward = solve_features(gaussians, views[::-1], EXACT)
    torch.testing.assert_close(forward.features, backward.features, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(forward.num_views, backward.num_views)
    torch.testing.assert_close(forward.feature_variance, backward.feature_variance, rtol=1e-3, atol=1e-4)


def test_solve_features__does_not_depend_on_the_projection_cache(gaussians, views):
    kept = solve_features(gaussians, views, EXACT)
    made_again = solve_features(gaussians, views, replace(EXACT, cache_memory_mb=0.0))
    assert torch.equal(kept.features, made_again.features)


def test_solve_features__by_products_match_dense_sums(gaussians, views):
    result = solve_features(gaussians, views, EXACT)
    blend_weight, num_views, energy = np.zeros(len(gaussians)), np.zeros(len(gaussians), dtype=int), 0.0
    numerator, denominator = sum_densely(gaussians, views, result.basis)
    for view in views:
        blending, alphas = (tensor.numpy() for tensor in compute_dense_blending(gaussians, view))
        weights = view.load_mask().numpy() * alphas
        target = spread_by_loop(
            ((view.load_tokens() - result.basis.mean) @ result.basis.components.T).double().numpy(), "nearest"
        )
        own = np.einsum("hwn,hw->n", blending, weights)
        mean = np.einsum("hwn,hw,hwd->nd", blending, weights, target) / np.maximum(own, 1e-12)[:, None]
        energy = energy + own * ((mean - numerator / denominator[:, None]) ** 2).mean(axis=-1)
        blend_weight += blending.sum(axis=(0, 1))
        num_views += blending.sum(axis=(0, 1)) > 0
    np.testing.assert_allclose(result.blend_weight, blend_weight, rtol=1e-4)
    np.testing.assert_array_equal(result.num_views, num_views)
    np.testing.assert_allclose(result.feature_variance, energy / denominator, rtol=1e-3, atol=1e-5)


def test_solve_features__last_residual_is_a_true_one(gaussians, views):
    result = solve_features(gaussians, views, replace(EXACT, tolerance=1e-3, regularization=0.0))
    assert 1 < len(result.residuals) < 60 and result.residuals[-1] <= 1e-3
    # Passes count the weighted sum and the decoder beside those of the solver.
    assert result.num_passes == len(result.residuals) + 2


def test_solve_features__polish_lowers_the_l1_it_descends(gaussians, views):
    config = LiftConfig(feature_dim=3, max_passes=10, polish_learning_rate=0.05)
    loss = FeatureLoss(WIDTH, HEIGHT, GRID, FeatureLossConfig(multiple=1, token_reading="area"), torch.device("cpu"))
    losses = []
    for steps in (0, 60):
        result = solve_features(gaussians, views, replace(config, polish_steps=steps))
        total = 0.0
        for view in views:
            blending, alphas = (tensor.float() for tensor in compute_dense_blending(gaussians, view))
            mask = view.load_mask()
            value = loss.compute(blending @ result.features, alphas, result.decoder, view.load_tokens(), mask)
            total += value.item()
        losses.append(total)
    assert losses[1] < 0.99 * losses[0]


def test_solve_features__leaves_out_invalid_gaussians(gaussians, views):
    means = gaussians.means.clone()
    means[3, 1] = float("nan")
    clean = torch.arange(len(gaussians)) != 3
    result = solve_features(replace(gaussians, means=means), views, EXACT)
    expected = solve_features(gaussians.select(clean), views, EXACT)
    assert (~result.is_valid).nonzero().tolist() == [[3]]
    assert torch.equal(result.features[clean], expected.features)
    assert not result.features[3].any() and result.num_views[3] == 0


def test_solve_features__marks_unseen_gaussians_that_change_no_view(gaussians, views):
    means = gaussians.means.clone()
    means[2] = torch.tensor([0.0, 0.0, -5.0])
    moved = replace(gaussians, means=means)
    result = solve_features(moved, views, EXACT)
    assert result.is_unseen.tolist() == [index == 2 for index in range(len(gaussians))]
    for view in views:
        all_of_them = compute_dense_blending(moved, view)[0][..., ~result.is_unseen]
        assert torch.equal(all_of_them, compute_dense_blending(moved.select(~result.is_unseen), view)[0])


def test_solve_features__refuses_what_cannot_be_lifted(gaussians, views):
    with pytest.raises(ValueError, match=f"feature_dim 64 exceeds the width {EMBED_DIM} of the backbone's tokens"):
        solve_features(gaussians, views, LiftConfig(feature_dim=64))
    with pytest.raises(ValueError, match="None of the 10 Gaussians has finite numbers"):
        solve_features(replace(gaussians, opacities=gaussians.opacities * float("nan")), views, EXACT)
    with pytest.raises(ValueError, match="None of the 4 views sees a Gaussian"):
        behind = replace(gaussians, means=gaussians.means * torch.tensor([1.0, 1.0, -1.0]))
        solve_features(behind, views, EXACT)


def test_solve_features__antialiased_gaussians_blend_otherwise(views):
    small = create_gaussians()
    small = replace(small, scales=small.scales * 0.1)
    classic = solve_features(small, create_views(), EXACT)
    antialiased = solve_features(replace(small, rasterize_mode="antialiased"), views, EXACT)
    assert float(antialiased.blend_weight.sum()) < 0.9 * float(classic.blend_weight.sum())


@pytest.mark.parametrize(("settings", "expected"), [({}, 3), ({"max_passes": 0}, 1), ({"samples_per_patch": 0}, 1)])
def test_solve_features__projects_no_view_twice_in_a_pass(gaussians, views, monkeypatch, settings, expected):
    """A sampled solve projects for the weighted sum, for its samples and for the decoder; others project once."""
    calls = []

    def count(*arguments):
        calls.extend(view.name for view in arguments[1])
        return prepare_views(*arguments)

    monkeypatch.setattr(blending, "prepare_views", count)
    solve_features(gaussians, views, replace(EXACT, **{"samples_per_patch": 2, "max_passes": 3, **settings}))
    assert sorted(calls) == sorted(view.name for view in views for _ in range(expected))


@pytest.mark.parametrize("rule", ["area", "nearest"])
def test_solve_features__several_views_a_call_are_the_same(gaussians, monkeypatch, tmp_path, rule):
    """Groups of three and two; also where the lift is interrupted after a group and goes on."""
    views, config = create_views(5), replace(EXACT, samples_per_patch=2, token_to_pixel=rule)
    expected = solve_features(gaussians, views, config)
    monkeypatch.setattr("fit3d_ns.lifting.blending.choose_views_per_call", lambda *_: 3)

    def stop_in(name: str, done: int, _: int) -> None:
        if name == "solve 2" and 0 < done < 5:
            signal.raise_signal(signal.SIGINT)

    state = tmp_path / "lift.state"
    with pytest.raises(KeyboardInterrupt):
        solve_features(gaussians, views, config, state_path=state, progress=stop_in)
    # What was begun so goes on so, whatever would be chosen now.
    monkeypatch.setattr("fit3d_ns.lifting.blending.choose_views_per_call", lambda *_: 1)
    sizes = []
    prepare = blending.prepare_views
    monkeypatch.setattr(blending, "prepare_views", lambda *words: sizes.append(len(words[1])) or prepare(*words))
    found = solve_features(gaussians, views, config, state_path=state)
    assert {3, 2} <= set(sizes)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.decoder.weight, expected.decoder.weight, rtol=1e-3, atol=1e-3)


def test_solve_features__without_a_pull_gaussians_between_samples_keep_the_weighted_sum(views):
    many = create_gaussians(60)
    small, views = replace(many, scales=many.scales * 0.05), views[:1]
    result = solve_features(small, views, replace(EXACT, samples_per_patch=1, regularization=0.0))
    sampled = [prepare_views(small, [view], samples_per_patch=1) for view in views]
    hit = sum(backproject_features(view.alphas[None, ..., None], view.info)[1] for view in sampled) > 0
    weighted_sum = solve_features(small, views, replace(EXACT, max_passes=0)).features
    between = ~hit & weighted_sum.any(dim=1)
    assert int(between.sum()) > 10
    torch.testing.assert_close(result.features[between], weighted_sum[between])
