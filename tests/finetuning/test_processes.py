"""Two processes equal one with twice the batch; all stop together, with the message of the one that failed."""

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fit3d_ns.finetuning.optimization import AnchorConfig, OptimizationConfig
from fit3d_ns.finetuning.trainer import Interrupted
from tests.children import get_context, run_processes
from tests.finetuning.finetuning_runs import RUN, collect_weights, configure, create_trainer, drop_key_biases
from tests.finetuning.finetuning_scene import create_lens, save_new_scene

ANCHORS = AnchorConfig(l2_sp=0.01, prefix_anchor=0.1, pre_norm=0.2)


def train(scenes, folder, batch_size, accumulation=1):
    """Ten steps; returns the first step's gradients and the weights."""
    optimization = OptimizationConfig(max_steps=10, batch_size=batch_size, accumulation_steps=accumulation)
    config = configure(run=replace(RUN, steps_per_checkpoint=5), optimization=optimization, anchors=ANCHORS)
    trainer = create_trainer(scenes, folder, config)
    gradients = {}
    clip = trainer.accelerator.clip_grad_norm_

    def capture(parameters, norm):
        if not gradients:
            gradients.update({name: value.grad.clone() for name, value in trainer.bare.named_parameters()})
        return clip(parameters, norm)

    trainer.accelerator.clip_grad_norm_ = capture
    trainer.run()
    return gradients, collect_weights(trainer), trainer.losses


def find_scenes(folder):
    return sorted((Path(folder) / "scenes").iterdir())


def run_as_one_of_two(rank, folder):
    """All that the tests below look at, in one pair of processes, because starting them takes longest."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    scenes = find_scenes(folder)
    for name, batch_size, accumulation in (("two", 2, 1), ("accumulated", 1, 2)):
        result = train(scenes, Path(folder) / name, batch_size, accumulation)
        torch.save(result, f"{folder}/{name}_{rank}.pt")
    fail_in_one(rank, scenes, Path(folder))
    signal_one(rank, scenes, Path(folder))
    dist.destroy_process_group()


def fail_in_one(rank, scenes, folder):
    config = configure(run=replace(RUN, num_workers=0), optimization=OptimizationConfig(max_steps=4))
    trainer = create_trainer(scenes, folder / "failing", config)

    def refuse(sample):
        raise ValueError(f"{sample.name} cannot be rendered")

    if rank == 1:
        trainer.targets.render = refuse
    try:
        trainer.run()
        message = "went on"
    except ValueError as error:
        message = str(error)
    Path(folder, f"message_{rank}").write_text(message)


def signal_one(rank, scenes, folder):
    trainer = create_trainer(scenes, folder / "stopped", configure(optimization=OptimizationConfig(max_steps=6)))
    run_step = trainer.train_step.run

    def interrupt(*arguments):
        if rank == 1 and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_step(*arguments)

    trainer.train_step.run = interrupt
    try:
        trainer.run()
    except Interrupted:
        Path(folder, f"stopped_{rank}").write_text(str(trainer.step))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    save_new_scene(folder, "small")
    save_new_scene(folder, "large", lens=create_lens(48, 40), seed=1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(server.getsockname()[1]))
    run_processes(run_as_one_of_two, str(folder), 2)
    return folder


def test_two_processes__equal_one_with_twice_the_batch(folder):
    gradients, weights, losses = train(find_scenes(folder), folder / "one", batch_size=4)
    total = torch.cat([value.flatten() for value in gradients.values()]).norm()
    for name in ("two_0", "two_1", "accumulated_0", "accumulated_1"):
        found_gradients, found_weights, found_losses = torch.load(folder / f"{name}.pt")
        assert found_losses == pytest.approx(losses, rel=1e-5)
        difference = torch.cat([(found_gradients[key] - gradients[key]).flatten() for key in gradients]).norm()
        assert float(difference / total) < 1e-5
        for key, value in weights.items():
            difference = drop_key_biases(key, found_weights[key] - value).abs().max()
            assert float(difference) < 1e-6, (name, key)


def test_two_processes__stop_with_the_message_of_the_one_that_failed(folder):
    first, second = ((folder / f"message_{rank}").read_text() for rank in range(2))
    assert "cannot be rendered" in second and first == f"Process 1 failed: {second}"


def run_and_die(rank, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text()
    config = configure(optimization=OptimizationConfig(max_steps=4))
    trainer = create_trainer(find_scenes(folder), Path(folder) / "dying", config)
    compute = trainer.train_step._compute_losses

    def die(*arguments):
        # After the exchange of totals, before that of gradients: the other one waits in its backward pass.
        if rank == 1 and trainer.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*arguments)

    trainer.train_step._compute_losses = die
    try:
        trainer.run()
    except ValueError as error:
        Path(folder, "last_words").write_text(str(error))


def test_two_processes__one_that_is_killed_stops_the_other_with_a_sentence(tmp_path):
    save_new_scene(tmp_path, "small")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
    processes = [get_context().Process(target=run_and_die, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert processes[1].exitcode == -signal.SIGKILL and processes[0].exitcode == 0
    assert (tmp_path / "last_words").read_text().startswith("Another process of this run died")


def test_two_processes__a_signal_to_one_stops_both_after_the_same_step(folder):
    steps = {(folder / f"stopped_{rank}").read_text() for rank in range(2)}
    assert len(steps) == 1
    (checkpoint,) = (folder / "stopped" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) == int(steps.pop())
    assert {path.name for path in checkpoint.iterdir()} == {"progress.json", "state.pt", "rng-0.pt", "rng-1.pt"}
    with pytest.raises(ValueError, match="num_processes 2 against 1"):
        create_trainer(find_scenes(folder), folder / "stopped", configure(optimization=OptimizationConfig(max_steps=6)))
