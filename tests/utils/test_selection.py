"""Random states, the endless sequence, its division among processes, and loading ahead."""

import random
import threading
import time
from itertools import count, islice

import numpy as np
import pytest
import torch

from fit3d_ns.utils.selection import (
    EpochSequence,
    capture_random_states,
    draw_some,
    list_positions,
    load_ahead,
    restore_random_states,
)


def test_sequence__is_the_same_in_whatever_order_it_is_asked_for():
    made = []

    def create_order(epoch):
        made.append(epoch)
        return [f"{epoch}{letter}" for letter in "abc"]

    sequence = EpochSequence(3, create_order)
    assert [sequence[position][-1] for position in range(7)] == ["0a", "0b", "0c", "1a", "1b", "1c", "2a"]
    assert made == [0, 1, 2]
    # Loading ahead looks into the next epoch while this one is not over.
    assert sequence[5] == (1, 2, "1c") and made == [0, 1, 2]
    assert sequence[0] == (0, 0, "0a")


@pytest.mark.parametrize(("num_processes", "batch_size", "num_batches"), [(1, 4, 1), (2, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_positions__of_all_processes_are_those_of_one(num_processes, batch_size, num_batches):
    per_step = num_processes * batch_size * num_batches
    for step in range(3):
        shares = [
            list_positions(step, batch_size, process, num_processes, num_batches) for process in range(num_processes)
        ]
        # Batch by batch, each process its own stretch.
        taken = [
            position
            for batch in range(num_batches)
            for share in shares
            for position in share[batch * batch_size : (batch + 1) * batch_size]
        ]
        assert taken == list(range(step * per_step, (step + 1) * per_step))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_load_ahead__keeps_the_order_and_raises_in_turn(num_workers):
    def load(item):
        # Later items are ready sooner.
        time.sleep(0.002 * (5 - item % 5))
        if item == 7:
            raise ValueError("7 is broken")
        return item, threading.current_thread() is threading.main_thread()

    loaded = load_ahead(count(), load, num_workers, depth=2)
    assert list(islice(loaded, 7)) == [(item, num_workers == 0) for item in range(7)]
    with pytest.raises(ValueError, match="7 is broken"):
        next(loaded)


def test_load_ahead__loads_no_more_than_its_depth_ahead():
    started = []
    loaded = load_ahead(count(), started.append, 2, depth=3)
    next(loaded)
    loaded.close()
    assert len(started) <= 4


def test_random_states__continue_all_three_generators_through_a_file(tmp_path):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002 - the legacy generator is what is tested.
    torch.manual_seed(3)
    torch.randn(3)
    torch.save(capture_random_states(), tmp_path / "states.pt")
    expected = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


def test_random_states__of_older_checkpoints_hold_torchs_alone():
    torch.manual_seed(3)
    states = {"cpu": torch.get_rng_state()}
    expected = torch.rand(4)
    restore_random_states(states)
    assert torch.equal(torch.rand(4), expected)


def test_draw_some__is_seeded_and_bounded():
    drawn = draw_some(10, 4, 0, "points", 1, 2)
    assert len(drawn) == 4 and torch.equal(drawn, draw_some(10, 4, 0, "points", 1, 2))
    assert len(set(drawn.tolist())) == 4 and set(drawn.tolist()) < set(range(10))
    assert draw_some(10, 10, 0).tolist() == draw_some(10, None, 0).tolist() == list(range(10))
