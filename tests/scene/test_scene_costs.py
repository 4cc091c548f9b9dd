"""Hours of stage I from numbers typed here."""

import pytest

from fit3d_ns.scene.scene_costs import compute_stage1_hours, find_geometry_seconds


def test_stage1_hours__of_a_run_leave_out_what_only_measures_or_shows() -> None:
    seconds = {"setup": 100.0, "colour": 3000.0, "solve": 500.0, "evaluation": 777.0, "viewer": 5.0}
    assert compute_stage1_hours({"seconds": seconds}) == pytest.approx(1.0)


def test_stage1_hours__of_a_lift_count_the_run_it_stands_on() -> None:
    run = {"seconds": {"setup": 100.0, "colour": 3000.0, "solve": 400.0, "features": 50.0}}
    lift = {"seconds": {"tokens": 200.0, "conjugate_gradients": 300.0, "photographs": 9.0}}
    metrics = {**lift, "training_seconds": find_geometry_seconds(run)}
    # The run's own solve is not what this scene's features come from.
    assert metrics["training_seconds"] == {"setup": 100.0, "colour": 3000.0}
    assert compute_stage1_hours(metrics) == pytest.approx(1.0)
    # A scene lifted from this one stands on the same run.
    assert find_geometry_seconds(metrics) == metrics["training_seconds"]


def test_stage1_hours__unknown_without_the_training_of_the_geometry() -> None:
    assert compute_stage1_hours({"seconds": {"tokens": 200.0}, "training_seconds": {}}) is None
    assert compute_stage1_hours({}) is None and find_geometry_seconds({"seconds": None}) == {}
