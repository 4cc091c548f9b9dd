import random

import numpy as np
import torch

from fit3d_ns.utils.seeds import capture_random_states, restore_random_states


def test_random_states__continue_all_three_generators_through_a_file(tmp_path):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002 - the legacy generator is what is tested.
    torch.manual_seed(3)
    torch.randn(3)
    torch.save(capture_random_states(), tmp_path / "states.pt")
    expected = (random.random(), np.random.rand(), torch.rand(1))  # noqa: NPY002
    restore_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002
