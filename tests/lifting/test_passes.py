import signal
from dataclasses import replace

import pytest
import torch

from fit3d_ns.lifting.config import LiftConfig
from fit3d_ns.lifting.passes import LiftState, ViewPasses, load_state
from fit3d_ns.lifting.solver import solve_features

CONFIG = LiftConfig(
    feature_dim=3,
    max_passes=4,
    samples_per_patch=2,
    steps_per_true_residual=2,
    seconds_per_checkpoint=0.0,
    polish_steps=1,
)


class Interrupt(Exception):
    pass


def interrupt_after(num_calls):
    calls = []

    def progress(name, done, total):
        calls.append(name)
        if len(calls) > num_calls:
            raise Interrupt

    return progress


def count_calls(gaussians, views):
    calls = []
    solve_features(gaussians, views, CONFIG, progress=lambda name, done, total: calls.append(name))
    return len(calls)


def test_solve_features__resumed_equals_uninterrupted(gaussians, views, tmp_path):
    expected = solve_features(gaussians, views, CONFIG)
    state_path = tmp_path / "lift.state"
    # One pass reports five times (its start and four views). Interrupted in turn: the basis, the weighted sum, the
    # solver's second step, its true residual, right after a pass's last view, the decoder.
    for num_calls in (2, 8, 18, 22, 25, 33):
        with pytest.raises(Interrupt):
            solve_features(gaussians, views, CONFIG, state_path=state_path, progress=interrupt_after(num_calls))
        resumed = solve_features(gaussians, views, CONFIG, state_path=state_path)
        assert torch.equal(resumed.features, expected.features), num_calls
        assert torch.equal(resumed.decoder.weight, expected.decoder.weight)
        assert torch.equal(resumed.feature_variance, expected.feature_variance)
        assert resumed.residuals == expected.residuals and resumed.num_passes == expected.num_passes
        assert not state_path.exists()


def test_solve_features__resume_does_only_what_is_left(gaussians, views, tmp_path):
    state_path = tmp_path / "lift.state"
    total = count_calls(gaussians, views)
    with pytest.raises(Interrupt):
        solve_features(gaussians, views, CONFIG, state_path=state_path, progress=interrupt_after(total - 3))
    calls = []
    solve_features(gaussians, views, CONFIG, state_path=state_path, progress=lambda *call: calls.append(call))
    assert {name for name, _, _ in calls} == {"decoder"} and calls[0][1] > 0


def test_solve_features__refuses_the_state_of_another_lift(gaussians, views, tmp_path):
    state_path = tmp_path / "lift.state"

    def begin():
        state_path.unlink(missing_ok=True)
        with pytest.raises(Interrupt):
            solve_features(
                gaussians, views, CONFIG, backbone="small", state_path=state_path, progress=interrupt_after(7)
            )

    begin()
    kept = state_path.read_bytes()
    with pytest.raises(ValueError, match=r"another backbone \(small, not base\)"):
        solve_features(gaussians, views, CONFIG, backbone="base", state_path=state_path)
    with pytest.raises(ValueError, match="another setting"):
        solve_features(gaussians, views, replace(CONFIG, regularization=0.5), backbone="small", state_path=state_path)
    with pytest.raises(ValueError, match="another geometry"):
        moved = replace(gaussians, means=gaussians.means + 0.1)
        solve_features(moved, views, CONFIG, backbone="small", state_path=state_path)
    with pytest.raises(ValueError, match="another set of views"):
        solve_features(gaussians, views[:3], CONFIG, backbone="small", state_path=state_path)
    assert state_path.read_bytes() == kept


def test_solve_features__names_a_file_that_is_no_state(gaussians, views, tmp_path):
    state_path = tmp_path / "lift.state"
    state_path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the state of a lift; delete it"):
        solve_features(gaussians, views, CONFIG, state_path=state_path)


def test_solve_features__ctrl_c_in_the_middle_of_a_view_saves_after_it(gaussians, views, tmp_path):
    """The timer is far away: only the signal writes, and what it writes goes on to the same bits."""
    config = replace(CONFIG, seconds_per_checkpoint=1e6)
    expected = solve_features(gaussians, views, config)
    state_path = tmp_path / "lift.state"
    handler = signal.getsignal(signal.SIGINT)
    masked = views[2]

    def load_mask():
        # In the weighted sum (the basis reads masks too), before this view is in any sum.
        if reached:
            signal.raise_signal(signal.SIGINT)
        return masked.load_mask()

    reached: list[str] = []

    def progress(name, done, total):
        if name == "weighted sum":
            reached.append(name)

    interrupted = [*views[:2], replace(masked, load_mask=load_mask), views[3]]
    with pytest.raises(KeyboardInterrupt):
        solve_features(gaussians, interrupted, config, state_path=state_path, progress=progress)
    assert signal.getsignal(signal.SIGINT) is handler
    calls = []
    resumed = solve_features(
        gaussians, views, config, state_path=state_path, progress=lambda name, done, total: calls.append((name, done))
    )
    assert calls[0] == ("weighted sum", 3)
    assert torch.equal(resumed.features, expected.features) and resumed.residuals == expected.residuals


def test_view_passes__a_signal_while_the_last_views_state_is_written_is_not_lost(tmp_path, monkeypatch):
    """Writing gigabytes takes seconds, in which a scheduler's SIGTERM comes but once."""
    state_path, added, written = tmp_path / "lift.state", [], []
    save = LiftState.save

    def save_under_signal(state, path):
        written.append(state.next_view)
        if len(written) == 2:
            signal.raise_signal(signal.SIGTERM)
        save(state, path)

    monkeypatch.setattr(LiftState, "save", save_under_signal)

    def run(name, state):
        passes = ViewPasses(state, 2, state_path=state_path, seconds_per_checkpoint=0.0)
        passes.run(name, {name: torch.zeros(1)}, lambda index: added.append((name, index)))

    with pytest.raises(KeyboardInterrupt):
        run("one", LiftState({}))
    resumed = load_state(state_path, {}, torch.device("cpu"))
    run("one", resumed)
    run("two", resumed)
    assert added == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
