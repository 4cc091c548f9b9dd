"""Commands on a pretended card: no mix of devices, what the CPU gives, and how often the host waits for the card."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fit3d_ns.cli import finetune, lift, probe
from fit3d_ns.scene import load_scene
from tests.finetuning.finetuning_scene import save_new_scene
from tests.lift_capture import BACKBONE, write_capture, write_gaussians
from tests.pretended_cuda import Card, pretend_cuda
from tests.probing import probe_scenes

pytest.importorskip("gsplat")
from tests.gsplat_kernels import KernelCalls, replace_kernels


@pytest.fixture
def card() -> Iterator[tuple[Card, KernelCalls]]:
    with pretend_cuda() as card, replace_kernels() as calls:
        yield card, calls


REFUSED = {
    "two devices": lambda on_card, on_cpu: on_card + on_cpu,
    "a number of the CPU among tensors": lambda on_card, on_cpu: torch.stack([on_card[0], on_cpu[0]]),
    "values of the CPU": lambda on_card, on_cpu: on_card.index_put_((torch.tensor([0, 1, 2]),), on_cpu),
    "indices of the card": lambda on_card, on_cpu: on_cpu[on_card.long()],
    "numpy": lambda on_card, on_cpu: on_card.numpy(),
    "numpy unasked": lambda on_card, on_cpu: np.asarray(on_card),
    "a module of the CPU": lambda on_card, on_cpu: torch.nn.Linear(3, 1)(on_card),
    "a generator of the CPU": lambda on_card, on_cpu: torch.rand(3, device="cuda", generator=torch.Generator()),
    "a generator of the card": lambda on_card, on_cpu: torch.randperm(3, generator=torch.Generator("cuda")),
    "pinned memory": lambda on_card, on_cpu: on_card.pin_memory(),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_pretended_card__refuses_what_a_card_refuses(card, call):
    """So that the tests below can fail."""
    with pytest.raises((RuntimeError, TypeError), match="device|indices should|pin"):
        call(torch.ones(3, device="cuda"), torch.ones(3))


def test_pretended_card__computes_and_counts(card):
    values = torch.tensor([3.0, -1.0, 2.0]).cuda().requires_grad_()
    module = torch.nn.Linear(3, 2, device="cuda").to("cpu").to("cuda")
    result = torch.nn.functional.relu(values) * torch.tensor(2.0) + torch.arange(3, device="cuda")
    module(result).sum().backward()
    assert result.is_cuda and values.grad.device.type == module.weight.grad.device.type == "cuda"
    card[0].clear()
    assert result.tolist() == [6.0, 1.0, 6.0] and float(result[1]) == 1.0
    assert len(result[result > 2]) == 2 and result.cpu().is_cuda is False
    kinds = Counter(place.split(" @ ")[0] for place in card[0].waits.elements())
    assert kinds == {"tolist": 1, "item": 1, "boolean index": 1, "cpu": 1}
    assert card[0].uploads.total() == 0


def run(main: Callable[[list[str]], None], *words: Any) -> None:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        assert not stop.code


def watch(function: Callable[[], None], calls: KernelCalls, seen: list[Counter[str]]) -> Callable[[], None]:
    """The function, which also notes its calls of gsplat's kernels."""

    def run_watched() -> None:
        before = calls.counts.copy()
        function()
        seen.append(calls.counts - before)

    return run_watched


def count_waits(card: Card, runs: list[Callable[[], None]], steps: int) -> tuple[float, str]:
    """How often the host waits for the card in one step, and for what: the second run has `steps` more of them."""
    counts = []
    for function in runs:
        card.clear()
        function()
        counts.append(card.waits.copy())
    counts[1].subtract(counts[0])
    more = {place: number / steps for place, number in counts[1].most_common() if number > 0}
    return sum(more.values()), str(more)


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Arguments of two lifts."""
    found = []
    for seed in (5, 6):
        root = tmp_path_factory.mktemp("captures") / f"ring_{seed}"
        raw = write_capture(root, seed=seed)
        found.append(["--ply", write_gaussians(root / "cloud.ply", raw), "--data", root])
    return found


def test_lift__is_the_cpus_and_waits_once_a_pass(card, captures, tmp_path):
    options = ["--backbone", BACKBONE, "--feature-cache", tmp_path / "tokens", "--feature-dim", 4, "--views", 6]
    results = {}
    for device in ("cuda", "cpu"):
        path = tmp_path / f"{device}.safetensors"
        run(lift.main, *captures[0], *options, "--max-passes", 3, "--device", device, "--output-path", path)
        results[device] = json.loads(path.with_suffix(".json").read_text())["metrics"]
    for name in ("feature_cosine", "feature_l1"):
        assert results["cuda"][name] == pytest.approx(results["cpu"][name], rel=1e-4), name

    def lift_in(passes: int) -> Callable[[], None]:
        path = tmp_path / f"passes_{passes}.safetensors"
        return lambda: run(lift.main, *captures[0], *options, "--max-passes", passes, "--output-path", path)

    calls = []
    waits, places = count_waits(card[0], [watch(lift_in(passes), card[1], calls) for passes in (2, 4)], steps=2)
    # The views stay on the card, so a pass waits once, for how far it came.
    assert waits <= 1, places
    # Six small views are blended together, forwards and backwards once a pass.
    assert calls[1] - calls[0] == Counter(rasterize_to_pixels_fwd=2, rasterize_to_pixels_bwd=2)


def test_lift__of_two_scenes_together(card, captures, tmp_path):
    options = ["--backbone", BACKBONE, "--feature-cache", tmp_path / "tokens", "--feature-dim", 4, "--max-passes", 1]
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for words, path in zip(captures, paths, strict=True):
        run(lift.main, *words, *options, "--views", 4, "--output-path", path)
    run(lift.main, "--scene", *paths, *options, "--shared-decoder", "--output-path", tmp_path / "out")
    first, second = (load_scene(tmp_path / "out" / path.name).decoder.weight for path in paths)
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", [[], ["--train", "lora"]], ids=["all", "lora"])
def test_finetune__is_the_cpus_resumes_and_waits_little(card, tmp_path, options):
    scene = save_new_scene(tmp_path)
    losses = {}

    def finetune_in(steps: int, name: str, device: str = "cuda") -> Callable[[], None]:
        words = ["--ckpts", scene, "--max-steps", steps, "--max-validation-views", 1, "--device", device, *options]
        return lambda: run(finetune.main, *words, "--output-dir", tmp_path / name, "--steps-per-checkpoint", 100)

    for device in ("cuda", "cpu"):
        finetune_in(4, device, device)()
        # The same command goes on from its last step.
        finetune_in(6, device, device)()
        losses[device] = json.loads((tmp_path / device / "report.json").read_text())["losses"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert len(set(losses["cuda"])) == len(losses["cuda"]) == 6
    waits, places = count_waits(card[0], [finetune_in(4, "short"), finetune_in(8, "long")], steps=4)
    # Each of a step's two images for its tile lists, checked pixels and finite target; the step for weights and losses.
    assert waits <= 2 * 3 + 2, places


def test_probe__is_the_cpus_and_waits_little(card, tmp_path):
    for index in range(2):
        probe_scenes.create_scene(tmp_path / f"room_{index}", seed=index, num_frames=4)
    words = ["--train", tmp_path / "room_0", "--test", tmp_path / "room_1", "--backbone", probe_scenes.BACKBONE]

    def probe_in(iterations: int, device: str = "cuda") -> Callable[[], None]:
        path = tmp_path / f"{device}_{iterations}.json"
        numbers = ["--num-iterations", iterations, "--batch-size", 2, "--cache", "never"]
        return lambda: run(probe.main, "depth", *words, *numbers, "--output-path", path, "--device", device)

    waits, places = count_waits(card[0], [probe_in(3), probe_in(5)], steps=2)
    assert waits <= 7, places
    probe_in(5, "cpu")()
    metrics = [json.loads((tmp_path / f"{device}_5.json").read_text())["metrics"]["rmse"] for device in ("cuda", "cpu")]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3)
