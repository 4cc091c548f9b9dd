"""Training on the mini capture: isolation of the two branches, exact resume, strategies, figures."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fit3d_ns.plugin import feature_branch
from fit3d_ns.plugin.model import compute_depth_loss
from fit3d_ns.plugin.pipeline import EARLY_SOLVE, FeaturePipeline, SolvePlan, estimate_solve_costs

GEOMETRY = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[SolvePlan]:
    """Notes the plan of every solve."""
    noted: list[SolvePlan] = []
    solve = FeaturePipeline.solve_features

    def solve_and_note(pipeline: FeaturePipeline, plan: SolvePlan) -> None:
        noted.append(plan)
        solve(pipeline, plan)

    monkeypatch.setattr(FeaturePipeline, "solve_features", solve_and_note)
    return noted


@pytest.mark.parametrize("schedule", ["joint", "solve"])
def test_feature_loss__leaves_geometry_and_colour_bit_identical(
    make_config: Callable[..., Any], train: Callable[..., Any], schedule: str
) -> None:
    """Two runs of 100 steps, feature loss weight 1 and 0; the densification in between would amplify any leak."""
    options = {"feature_schedule": schedule, "refine_every": 20, "warmup_length": 10}
    with_features = train(make_config("with", 100, **options)).pipeline.model
    without = train(make_config("without", 100, feature_loss_weight=0.0, **options)).pipeline.model
    assert with_features.features.abs().sum() > 0
    assert without.features.abs().sum() == 0
    for name in GEOMETRY:
        assert torch.equal(with_features.gauss_params[name], without.gauss_params[name]), name


def test_compute_depth_loss__is_the_mean_relative_error_where_it_is_known():
    rendered = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    alpha = torch.tensor([[1.0, 1.0], [0.6, 0.4]])
    # Twice the size: of each square of four the nearest to the centre is read.
    measured = torch.tensor([[2.0, 0.0], [4.0, 4.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    loss = compute_depth_loss(rendered, alpha, measured)
    # |1 - 2| / 2 and |3 - 4| / 4; one pixel is not measured, one not covered.
    assert loss.item() == pytest.approx((0.5 + 0.25) / 2)
    loss.backward()
    assert rendered.grad.tolist() == [[-0.25, 0.0], [-0.125, 0.0]]
    assert compute_depth_loss(rendered, alpha, torch.zeros(4, 4)).item() == 0.0


def test_depth_loss__shapes_geometry_and_wants_depth_maps(
    make_config: Callable[..., Any], train: Callable[..., Any], mini_capture: Path, tmp_path: Path
) -> None:
    capture = shutil.copytree(mini_capture, tmp_path / "with_depth")
    content = json.loads((capture / "transforms.json").read_text())
    for frame in content["frames"]:
        frame["depth_file_path"] = frame["file_path"].replace("images", "depth")
    (capture / "transforms.json").write_text(json.dumps(content))
    errors = {}
    for weight in (0.0, 1.0):
        config = make_config(f"weight-{weight}", 60, depth_loss_weight=weight, feature_loss_weight=0.0)
        config.pipeline.datamanager.data = capture
        pipeline = train(config).pipeline.eval()
        dataset, found = pipeline.datamanager.eval_dataset, []
        for index, view in enumerate(dataset.capture.views):
            outputs = pipeline.model.get_outputs_for_camera(dataset.cameras[index : index + 1])
            measured = dataset.capture.load_depth(view) * dataset.capture.dataparser_scale
            found.append(float(compute_depth_loss(outputs["depth"][..., 0], outputs["accumulation"][..., 0], measured)))
        errors[weight] = sum(found) / len(found)
    assert errors[1.0] < 0.8 * errors[0.0], errors
    with pytest.raises(ValueError, match="No train frame of .* has a depth map"):
        train(make_config("none", 5, depth_loss_weight=1.0, feature_loss_weight=0.0))


def test_joint_schedule__moves_features_and_decoder(make_config: Callable[..., Any], train: Callable[..., Any]) -> None:
    config = make_config("joint", 12, feature_schedule="joint", feature_init="random")
    trainer = train(config)
    fresh = make_config("fresh", 12, feature_schedule="joint", feature_init="random").pipeline.model
    start = trainer.pipeline.model.feature_branch.create_features(fresh, 60)
    assert not torch.equal(trainer.pipeline.model.features[:60], start)
    assert trainer.optimizers.optimizers["decoder"].state_dict()["state"]


@pytest.mark.parametrize("options", [{}, {"feature_schedule": "joint"}, {"strategy": "mcmc", "mcmc_cap": 80}])
def test_resume__is_bitwise_the_uninterrupted_run(
    make_config: Callable[..., Any], train: Callable[..., Any], options: dict[str, Any]
) -> None:
    options = {"refine_every": 6, "warmup_length": 3, **options}
    whole = train(make_config("whole", 40, **options))
    config = make_config("parts", 40, **options)
    with pytest.raises(SystemExit) as stop:
        train(config, stop_after=23)
    assert stop.value.code == 130
    resumed_config = make_config("parts", 40, **options)
    resumed_config.load_dir = config.get_checkpoint_dir()
    resumed = train(resumed_config)
    assert resumed._start_step == 23
    for name, value in whole.pipeline.state_dict().items():
        assert torch.equal(value, resumed.pipeline.state_dict()[name]), name
    for name, optimizer in whole.optimizers.optimizers.items():
        state, other = optimizer.state_dict()["state"], resumed.optimizers.optimizers[name].state_dict()["state"]
        assert state.keys() == other.keys()
        for index, entries in state.items():
            for key, value in entries.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[index][key])), (name, key)


def test_resume__does_not_run_past_the_total(make_config: Callable[..., Any], train: Callable[..., Any]) -> None:
    config = make_config("first", 10)
    done = train(config)
    again = make_config("first", 10)
    again.load_dir = config.get_checkpoint_dir()
    resumed = train(again)
    assert resumed.step == 9
    assert torch.equal(done.pipeline.model.means, resumed.pipeline.model.means)


def test_resume__a_longer_run_solves_as_if_it_had_not_ended_before(
    make_config: Callable[..., Any], train: Callable[..., Any], plans: list[SolvePlan]
) -> None:
    """What the first end cost is not taken from the second: features would be worse after more steps."""
    config = make_config("parts", 60)
    train(config)
    longer = make_config("parts", 70)
    longer.load_dir = config.get_checkpoint_dir()
    resumed = train(longer)
    assert resumed._start_step == 60
    whole = train(make_config("whole", 70))
    assert len(plans) == 3 and plans[1] == plans[2] and plans[2].max_passes > 0
    assert resumed.pipeline.early_cost_spent == whole.pipeline.early_cost_spent


def test_mcmc_strategy__grows_to_its_cap_on_the_cpu_and_carries_features(
    make_config: Callable[..., Any], train: Callable[..., Any]
) -> None:
    config = make_config("mcmc", 60, strategy="mcmc", mcmc_cap=66, refine_every=5, warmup_length=5)
    model = train(config).pipeline.model
    assert model.num_points == 66
    assert model.features.shape == (66, 8)


def test_default_strategy__splits_carry_the_parents_features(make_config: Callable[..., Any]) -> None:
    config = make_config("split", 30)
    config.set_timestamp()
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    model = trainer.pipeline.model
    model.step_cb(trainer.optimizers, 0)
    with torch.no_grad():
        model.features.copy_(torch.arange(model.num_points * 8).reshape(-1, 8).float())
    from gsplat.strategy.ops import split

    mask = torch.zeros(model.num_points, dtype=torch.bool)
    mask[[3, 7]] = True
    parents = model.features[mask].detach().clone()
    split(params=model.gauss_params, optimizers=model.optimizers, state=model.strategy_state, mask=mask)
    assert torch.equal(model.features[-4:], parents.repeat(2, 1))
    assert trainer.optimizers.optimizers["features"].param_groups[0]["params"][0] is model.gauss_params["features"]


def test_run__writes_figures_that_say_random(make_config: Callable[..., Any], train: Callable[..., Any]) -> None:
    config = make_config("figures", 30)
    train(config)
    record = json.loads((config.get_base_dir() / "results.json").read_text())
    assert record["is_random"] is True
    metrics = record["metrics"]
    for name in ("psnr", "ssim", "feature_l1", "feature_cosine", "feature_l1_std", "num_gaussians", "peak_memory_mb"):
        assert metrics[name] is not None, name
    assert set(metrics["seconds"]) >= {"setup", "features", "colour", "solve", "evaluation", "saving"}


def test_outputs__have_the_same_keys_in_every_call_and_no_feature_channels(
    make_config: Callable[..., Any], train: Callable[..., Any], mini_capture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = train(make_config("outputs", 30))
    model, datamanager = trainer.pipeline.model, trainer.pipeline.datamanager
    model.eval()
    captured = datamanager.train_dataset.cameras[0:1]
    elsewhere = datamanager.train_dataset.cameras[0:1]
    elsewhere.camera_to_worlds = elsewhere.camera_to_worlds + torch.tensor([0.0, 0.0, 0.0, 0.3])
    # What nobody looks at is not rendered: a viewer that shows colours pays for colours.
    rendered = []
    rasterize = feature_branch.rasterize_features
    monkeypatch.setattr(feature_branch, "rasterize_features", lambda *args: rendered.append(1) or rasterize(*args))
    first, second = model.get_outputs_for_camera(captured), model.get_outputs_for_camera(elsewhere)
    assert first["rgb"].shape[-1] == 3 and not rendered
    assert dict(first)["features_pca"] is {**first}["features_pca"] is first["features_pca"] and len(rendered) == 1
    assert first.keys() == second.keys()
    assert all(value.shape[-1] in (1, 3) for value in first.values())
    assert first["features_pca_original"].abs().sum() > 0
    assert second["features_pca_original"].abs().sum() == 0
    # Pictures fade with opacity: no channel is brighter than the pixel is covered.
    assert bool((first["features_pca"] <= first["accumulation"] + 1e-5).all())
    assert float(first["accumulation"].min()) < 0.9


def test_run_with_feature_dim_zero__is_refused_before_anything_is_built(make_config: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="feature-dim is 0"):
        make_config(feature_dim=0).set_timestamp()


def test_cuda_without_a_device__is_refused(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config()
    config.machine.device_type = "cuda"
    with pytest.raises(ValueError, match="no CUDA device for"):
        config.set_timestamp()


def test_average__leaves_out_frames_without_a_figure_and_knows_the_spread_of_one() -> None:
    from fit3d_ns.plugin.pipeline import _average

    rows = [{"psnr": 20.0, "feature_l1": float("nan")}, {"psnr": 24.0, "feature_l1": 1.5}, {"psnr": 22.0, "lpips": 0.1}]
    averages = _average(rows, with_std=True)
    assert averages["psnr"] == 22.0 and averages["psnr_std"] == pytest.approx((8 / 3) ** 0.5)
    assert (averages["feature_l1"], averages["feature_l1_std"]) == (1.5, 0.0)
    assert _average([{"x": float("nan")}], with_std=True) == {}


def test_train__solves_again_at_an_interval_for_the_viewer(
    make_config: Callable[..., Any], train: Callable[..., Any], plans: list[SolvePlan]
) -> None:
    pipeline = train(make_config(steps=30, steps_per_solve=10)).pipeline
    # Three solves of two passes each (weighted sum, decoder); only the last counts, and that within its share.
    assert pipeline.passes_spent == 6 and pipeline.early_cost_spent == 0
    num_views, costs = len(pipeline.datamanager.train_dataset), estimate_solve_costs(8)
    budget = pipeline.model.config.solve_share * 30 / num_views
    assert plans == [EARLY_SOLVE, EARLY_SOLVE, costs.plan(budget, max_passes=16)]
    assert costs.compute(plans[-1]) <= budget * (1 + 1e-9)
    assert len(pipeline.lifted_views) == plans[-1].count_views(num_views) <= num_views
