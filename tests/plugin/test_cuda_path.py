"""`ns-train` on a pretended card: no mix of devices, and how often the host waits for the card in one step."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fit3d_ns.plugin.trainer import FeatureTrainer
from tests.gsplat_kernels import replace_kernels
from tests.pretended_cuda import pretend_cuda

RUNS = {
    "default": ({}, 2),
    "mcmc": ({"strategy": "mcmc", "mcmc_cap": 80, "refine_every": 2, "warmup_length": 1}, 2),
    # nerfstudio's camera optimizer waits twice for its metrics; the tokens' pixels are checked.
    "joint": ({"feature_schedule": "joint", "rasterize_mode": "antialiased", "camera_optimizer.mode": "SO3xR3"}, 5),
}
"""Options, and the waits of one step: for the camera's numbers and for gsplat's tile lists."""


@pytest.mark.parametrize(("options", "most_waits"), RUNS.values(), ids=RUNS)
def test_training__runs_resumes_and_draws_on_a_card(
    make_config: Callable[..., Any],
    train: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    most_waits: int,
) -> None:
    steps: list[Counter[str]] = []
    iterate = FeatureTrainer.train_iteration

    def make(num_steps: int) -> Any:
        config = make_config("run", num_steps)
        config.machine.device_type = "cuda"
        for key, value in options.items():
            part, _, name = key.rpartition(".")
            setattr(getattr(config.pipeline.model, part) if part else config.pipeline.model, name, value)
        return config

    with pretend_cuda() as card, replace_kernels():

        def count_waits(trainer: FeatureTrainer, step: int) -> Any:
            card.clear()
            losses = iterate(trainer, step)
            steps.append(card.waits.copy())
            return losses

        monkeypatch.setattr(FeatureTrainer, "train_iteration", count_waits)
        config = make(5)
        train(config)
        longer = make(7)
        longer.load_dir = config.get_checkpoint_dir()
        trainer = train(longer)
        assert trainer._start_step == 5 and len(steps) == 7
        assert max(waits.total() for waits in steps) <= most_waits, steps

        # As the viewer does: every output, to bytes of the CPU.
        camera = trainer.pipeline.datamanager.eval_dataset.cameras[:1]
        outputs = trainer.pipeline.model.eval().get_outputs_for_camera(camera.to("cuda"))
        for name in ("rgb", "depth", "features_pca", "features_pca_original"):
            picture = (outputs[name].clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
            assert picture.shape[:2] == (48, 64), name
        assert outputs["rgb"].is_cuda and outputs["rgb"].isfinite().all()
