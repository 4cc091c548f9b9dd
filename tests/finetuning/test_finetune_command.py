"""`fit3d-finetune` from its arguments to its folder, and every way in which a user can go wrong."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fit3d_ns.cli import command as command_module
from fit3d_ns.cli import finetune as module
from fit3d_ns.cli import lift
from fit3d_ns.features import create_token_model
from fit3d_ns.finetuning.backbone_folder import load_finetuned
from fit3d_ns.finetuning.config import PAPER, FinetuneConfig
from fit3d_ns.report.result_files import read_results
from fit3d_ns.scene import load_scene, save_scene
from fit3d_ns.training import processes as accelerator_module
from fit3d_ns.training.checkpoints import CheckpointFolder
from fit3d_ns.utils.files import lock_folder
from tests.children import get_context
from tests.finetuning.finetuning_scene import BACKBONE, average_lifted_views, create_scene, save_new_scene
from tests.lift_capture import write_capture, write_gaussians

NUM_KILLS = int(os.environ.get("FIT3D_TEST_KILLS", "3"))
"""Ten make a thorough run."""

SMALL = ["--max-steps", "6", "--max-validation-views", "3", "--steps-per-checkpoint", "4", "--device", "cpu"]


def parse(monkeypatch, *arguments):
    parsed = []
    monkeypatch.setattr(module, "run_finetune", parsed.append)
    module.main(["--ckpts", "a.safetensors", "--output-dir", "out", *arguments])
    return parsed[0]


def run(capsys, *arguments):
    """Exit code (0 without one) and what was printed to standard error."""
    try:
        module.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    return code, capsys.readouterr().err


def test_paper__sets_every_value_of_the_public_code(monkeypatch):
    config = parse(monkeypatch, "--paper").config
    assert config == PAPER
    optimization = config.optimization
    # FACTS, stage 2.
    assert (optimization.learning_rate, optimization.weight_decay, optimization.clip_norm) == (1e-5, 1e-4, 0.1)
    assert (optimization.batch_size, optimization.accumulation_steps, optimization.epochs) == (2, 1, 1.0)
    assert (optimization.schedule, optimization.warmup_fraction, optimization.ema_decay) == ("step", 0.0, 0.0)
    assert (optimization.precision, optimization.max_steps) == ("fp32", None)
    assert (config.sampling.sampling, config.sampling.images_per_visit, config.sampling.seed) == ("epoch", 0, 42)
    assert config.augmentation.flip_probability == 0.5 and not config.augmentation.moves_cameras
    assert config.targets.token_reading == "bilinear" and not config.targets.weight_by_opacity
    assert not config.targets.average_views
    assert config.trainable.train == "all" and config.run.splits == ("train", "val", "test")
    assert not config.anchors.needs_original and config.anchors.l2_sp == 0.0


@pytest.mark.parametrize("arguments", [("--paper", "--learning-rate", "3e-5"), ("--learning-rate", "3e-5", "--paper")])
def test_paper__explicit_flags_win_wherever_they_stand(monkeypatch, arguments):
    config = parse(monkeypatch, *arguments).config
    assert config.optimization.learning_rate == 3e-5
    assert not config.targets.weight_by_opacity and config.sampling.images_per_visit == 0


def test_flags__are_the_fields_of_the_configuration(monkeypatch):
    assert parse(monkeypatch).config == FinetuneConfig()
    command = parse(
        monkeypatch, "--val-ckpts", "b", "c", "--wise-ft", "0.5", "--train", "last-blocks", "--jitter", "0.1"
    )
    assert command.val_ckpts == ("b", "c") and command.config.anchors.wise_ft == (0.5,)
    assert command.config.trainable.train == "last-blocks" and command.config.augmentation.jitter == 0.1


def test_command__trains_and_writes_the_folder(tmp_path, capsys):
    training = [save_new_scene(tmp_path, f"room{index}", seed=index, num_frames=8) for index in range(2)]
    held_out = save_new_scene(tmp_path, "other", seed=9)
    out = tmp_path / "out"
    arguments = ["--ckpts", *training, "--val-ckpts", held_out, "--output-dir", out, *SMALL]
    code, said = run(capsys, *arguments, "--learning-rate", "1e-3", "--wise-ft", "0", "0.5", "--format", "fit3d")
    assert re.search(r"Scenes take up to [\d.e-]+ GB of memory in each process", said)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 6 and report["seconds"] > 0 and report["is_random"]
    assert min(report["loss_first"], report["loss_last"]) > 0 and len(report["losses"]) == 6
    for name in ("original", "finetuned"):
        figures = report["consistency"][name]
        assert {"mean_cosine", "centred_cosine", "recall_10px", "effective_rank", "by_angle"} <= figures.keys()
        assert figures["by_angle"]["0-15"]["num_points"] > 0
        assert report["validation"][name]["feature_l1"] > 0
    assert "1 validation scenes" in report["consistency"]["views"]
    assert report["validation"]["finetuned"]["feature_l1"] < report["validation"]["original"]["feature_l1"] * 1.2
    assert (out / "comparison.png").stat().st_size > 0 and any((out / "tensorboard").rglob("events*"))
    assert not (out / "targets").exists()
    card = (out / "README.md").read_text()
    assert "random" in card and "room0, room1" in card and str(tmp_path) not in card

    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.rand(1, 3, 48, 24)
    with torch.no_grad():
        assert torch.equal(model.forward_features(images), load_finetuned(out).forward_features(images))
    original = create_token_model(BACKBONE).model.state_dict()
    finetuned = load_file(out / "model.safetensors")
    assert any(not torch.equal(value, original[name]) for name, value in finetuned.items())
    none, half = (load_file(out / f"wise-ft-{share}" / "model.safetensors") for share in ("0", "0.5"))
    for name, value in original.items():
        assert torch.equal(none[name], value)
        torch.testing.assert_close(half[name], 0.5 * (value + finetuned[name]), rtol=1e-5, atol=1e-7)

    # The same command again has nothing left to train; with more steps it goes on.
    code, errors = run(capsys, *arguments, "--learning-rate", "1e-3", "--data-licence", "cc-by-nc-4.0")
    assert code == 0 and "Resuming from step 6 of 6" in errors
    assert (
        "Training captures: unknown." in card and "Training captures: cc-by-nc-4.0." in (out / "README.md").read_text()
    )
    again = json.loads((out / "report.json").read_text())
    assert again["losses"] == report["losses"]
    assert all(torch.equal(value, finetuned[name]) for name, value in load_file(out / "model.safetensors").items())
    code, errors = run(capsys, *arguments, "--learning-rate", "1e-3", "--batch-size", "3")
    assert code == 1 and "optimization.batch_size 2 against 3" in errors


def test_command__what_one_scene_taught_holds_in_another(tmp_path, capsys):
    """With the toy of the package: tokens come closer to what was lifted, and points look more alike between views."""
    scenes, out = [], tmp_path / "out"
    for seed in (5, 6):
        raw = write_capture(tmp_path / f"ring_{seed}", seed=seed)
        scenes.append(tmp_path / f"{seed}.safetensors")
        source = ["--ply", write_gaussians(tmp_path / f"{seed}.ply", raw), "--data", tmp_path / f"ring_{seed}"]
        options = ["--backbone", "toy_rooms_vit", "--feature-cache", tmp_path / "cache", "--feature-dim", 16]
        words = [*source, *options, "--max-passes", 4, "--device", "cpu", "--output-path", scenes[-1]]
        lift.main([str(word) for word in words])
    steps = ["--max-steps", 20, "--learning-rate", 3e-5, "--device", "cpu", "--max-validation-views", 12]
    code, _ = run(capsys, "--ckpts", scenes[0], "--val-ckpts", scenes[1], "--output-dir", out, *steps)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert not report["is_random"] and report["loss_last"] < 0.9 * report["loss_first"]
    before, after = (report["validation"][name]["feature_cosine"] for name in ("original", "finetuned"))
    assert after > before + 0.05
    before, after = (report["consistency"][name]["centred_cosine"] for name in ("original", "finetuned"))
    assert after > before + 0.005


def test_report__sets_original_against_finetuned_by_angle(tmp_path, capsys):
    """The fields that scripts read, and the original's distance to the same targets as computed by hand."""
    scene, out = save_new_scene(tmp_path, num_frames=8, num_test=3), tmp_path / "out"
    code, errors = run(
        capsys, "--ckpts", scene, "--output-dir", out, *SMALL, "--steps-per-validation", "2", "--learning-rate", "1e-3"
    )
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert {"loss_first", "loss_last", "steps", "seconds", "consistency"} <= report.keys()
    for name in ("original", "finetuned"):
        figures = report["consistency"][name]
        assert list(figures["by_angle"]) == ["0-15", "15-30", "30-60", "60-180"]
        for part in (figures, *figures["by_angle"].values()):
            assert {"mean_cosine", "centred_cosine", "l1", "recall_5px", "recall_10px", "recall_20px"} <= part.keys()
        # These cameras all look the same way; an empty bin holds null, which every JSON reader takes.
        assert figures["by_angle"]["0-15"]["num_points"] == figures["num_points"] > 0
        assert figures["by_angle"]["60-180"]["mean_cosine"] is None
        # No more than the width of a token.
        assert 1.0 < figures["effective_rank"] <= 16.0
    # Targets are rendered from averaged features; their arithmetic has tests of its own.
    opened, model = average_lifted_views(load_scene(scene)), create_token_model(BACKBONE).eval()
    total = weight = 0.0
    for view in opened.posed_capture.select("test"):
        image = opened.posed_capture.load_image(view).permute(2, 0, 1)[None].float() / 255.0
        tokens = model(image).maps[0].detach()
        features, alphas = opened.render_features_with_alpha(view.camera, tuple(tokens.shape[:2]))
        mask = opened.posed_capture.load_valid_mask(view).float()[None, None]
        shares = torch.nn.functional.interpolate(mask, size=tokens.shape[:2], mode="bilinear")[0, 0] * alphas
        total += float(((tokens - features).abs().mean(dim=-1) * shares).sum())
        weight += float(shares.sum())
    original = report["validation"]["original"]["feature_l1"]
    # Targets are kept in half precision.
    assert original == pytest.approx(total / weight, rel=2e-3)
    assert report["validation"]["finetuned"]["feature_l1"] != original
    # Between the steps: twice, and what is said there names the original's figure.
    lines = [line for line in errors.splitlines() if line.startswith("Step ")]
    assert [line.split(",")[0] for line in lines] == ["Step 2", "Step 4"]
    assert all(f"feature L1 {original:.3f} → " in line for line in lines)
    table = (out / "README.md").read_text()
    assert f"| all | {report['consistency']['original']['centred_cosine']:.3f} → " in table
    assert "Effective rank of the tokens" in table and "| optimization.learning_rate | 0.001 |" in table
    assert "torch " in table and "room" in table and "6 steps of 2 images" in table


def test_command__without_validation_scenes_takes_held_out_views(tmp_path, capsys):
    out = tmp_path / "out"
    scene = save_new_scene(tmp_path, num_test=3, num_frames=7)
    code, _ = run(capsys, "--ckpts", scene, "--output-dir", out, *SMALL, "--paper", "--splits", "train")
    report = json.loads((out / "report.json").read_text())
    assert code == 0 and report["consistency"]["views"] == "3 views: held-out views of the 1 training scenes"
    assert report["num_images"] == 4 and report["settings"]["targets"]["weight_by_opacity"] is False
    code, errors = run(capsys, "--ckpts", scene, "--output-dir", tmp_path / "all", *SMALL, "--paper")
    assert json.loads((tmp_path / "all" / "report.json").read_text())["num_images"] == 7


def test_command__a_nerfstudio_run_is_exported_on_the_fly(tmp_path, capsys, monkeypatch):
    scene = create_scene(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "nerfstudio_models").mkdir()
    (tmp_path / "run" / "config.yml").touch()
    monkeypatch.setattr(module, "_load_run", lambda config, trust_config: scene)
    code, errors = run(capsys, "--ckpts", tmp_path / "run", "--output-dir", tmp_path / "out", *SMALL)
    assert code == 0 and "Exporting" in errors
    (exported,) = (tmp_path / "out" / "exported_scenes").iterdir()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scenes"] == [str(exported)]


def test_command__tells_in_one_sentence_what_is_wrong(tmp_path, capsys):
    scene = save_new_scene(tmp_path, "room")
    out = ["--output-dir", tmp_path / "out", *SMALL]

    def expect(message, *arguments):
        code, errors = run(capsys, *arguments, *out)
        assert code == 1 and "Traceback" not in errors
        assert message in " ".join(errors.split()), errors

    expect("matches nothing", "--ckpts", tmp_path / "nothing" / "*.safetensors")
    expect("to --ckpts and to --val-ckpts", "--ckpts", scene, "--val-ckpts", scene)
    other = create_token_model(BACKBONE).model.state_dict()
    torch.save({name: value + 1 for name, value in other.items()}, tmp_path / "other.pth")
    expect(
        "was lifted with random:finetuning_vit, fine-tuning was asked for finetuning_vit",
        *("--ckpts", scene, "--backbone", "finetuning_vit", "--backbone-weights", tmp_path / "other.pth"),
    )
    expect("--val-ckpts nowhere matches nothing", "--ckpts", scene, "--val-ckpts", "nowhere")
    expect("--precision fp16 needs CUDA", "--ckpts", scene, "--precision", "fp16")
    expect("--scene-memory-gb", "--ckpts", scene, "--scene-memory-gb", "1e-9")
    (tmp_path / "data" / "room" / "images" / "1.png").unlink()
    expect("images/1.png of scene room is gone", "--ckpts", scene, "--strict")
    (tmp_path / "data" / "room").rename(tmp_path / "data" / "moved")
    expect("--data-root", "--ckpts", scene)
    code, errors = run(capsys, "--ckpts", scene, "--data-root", tmp_path / "data" / "moved", *out)
    assert code == 0 and "Skipping 1 views" in errors, errors
    scene.write_bytes(scene.read_bytes()[:1000])
    expect("cut short", "--ckpts", scene)


@pytest.mark.parametrize("paper", [(), ("--paper",)])
def test_command__on_slurm_submits_itself(tmp_path, capsys, monkeypatch, paper):
    scene = save_new_scene(tmp_path, "a room")
    words = ["--ckpts", str(scene), "--output-dir", str(tmp_path / "out"), "--max-steps", "7", *paper]
    slurm = ["--on", "slurm", "--nodes", "2", "--gpus", "4", "--partition", "big", "--time", "90"]
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code, errors = run(capsys, *words, *slurm)
    assert code == 1 and "--on slurm needs Slurm's sbatch" in errors
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$FIT3D_PYTHON" > "{tmp_path}/words"\necho "17;cluster"\n')
    sbatch.chmod(0o755)
    module.main([*words, *slurm])
    said = capsys.readouterr().out
    assert "Slurm's job 17" in said and str(tmp_path / "out" / "slurm-17.log") in said
    *submitted, python = (tmp_path / "words").read_text().splitlines()
    start = next(index for index, word in enumerate(submitted) if word.endswith(".sbatch"))
    options = {"--parsable", "--nodes=2", "--gpus-per-node=4", "--partition=big", "--time=90"}
    assert options | {f"--output={tmp_path}/out/slurm-%j.log"} == set(submitted[:start])
    assert Path(submitted[start]).is_file() and python == sys.executable
    # In the job the same training runs, there and then.
    received = []
    monkeypatch.setattr(module, "run_finetune", received.append)
    module.main(words)
    module.main(submitted[start + 1 :])
    assert received[0] == received[1]
    sbatch.write_text('#!/bin/sh\necho "sbatch: error: invalid partition specified: big" >&2\nexit 1\n')
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    code, errors = run(capsys, *words, *slurm)
    assert code == 1 and "invalid partition" in errors
    code, errors = run(capsys, *words, "--nodes", "2")
    assert code == 1 and "--on slurm" in errors


def test_command__without_nerfstudio_a_run_is_refused_with_a_way_out(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yml").touch()
    monkeypatch.setitem(sys.modules, "fit3d_ns.plugin.run_reader", None)
    code, errors = run(capsys, "--ckpts", tmp_path / "config.yml", "--output-dir", tmp_path / "out", *SMALL)
    assert code == 1 and "fit3d-export" in errors


def test_command__a_disk_too_full_for_the_last_checkpoint_keeps_the_weights(tmp_path, capsys, monkeypatch):
    scene = save_new_scene(tmp_path / "room", "room")
    save = CheckpointFolder.save

    def refuse_the_last(folder, progress, state, processes):
        if progress.step == 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder.get_path(6)))
        save(folder, progress, state, processes)

    monkeypatch.setattr(CheckpointFolder, "save", refuse_the_last)
    code, err = run(capsys, "--ckpts", scene, "--output-dir", tmp_path / "vit", *SMALL)
    assert code == 0 and "too full for the last checkpoint" in err
    assert (tmp_path / "vit" / "model.safetensors").is_file() and (tmp_path / "vit" / "report.json").is_file()


def test_command__interrupted_run_exits_130(tmp_path, capsys, monkeypatch):
    scene = save_new_scene(tmp_path)

    def interrupt(*arguments, **settings):
        raise module.Interrupted("stopped at step 3 of 6; the same command goes on")

    monkeypatch.setattr(module, "finetune", interrupt)
    code, errors = run(capsys, "--ckpts", scene, "--output-dir", tmp_path / "out", *SMALL)
    assert code == command_module.EXIT_INTERRUPTED and "stopped at step 3 of 6" in errors


def test_command__a_finished_folder_is_kept_and_one_of_other_weights_is_not_believed(tmp_path, capsys):
    scene, out = save_new_scene(tmp_path, num_frames=3), tmp_path / "out"
    arguments = ["--ckpts", scene, "--output-dir", out, *SMALL]
    assert run(capsys, *arguments)[0] == 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, errors = run(capsys, *arguments)
    assert code == 0 and "holds the result of these settings already" in errors
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert read_results([out])[1]
    with lock_folder(out):
        # A second descriptor is what another process would have.
        code, errors = run(capsys, *arguments)
        assert code == 1 and f"Another process works in {out}" in errors
    # As after a kill between the weights and the report of another run.
    weights = {name: value + 1 for name, value in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ValueError, match="describes other weights than those next to it"):
        read_results([out])
    code, errors = run(capsys, *arguments)
    assert code == 0 and "Resuming from step 6 of 6" in errors and read_results([out])[1]
    assert "already" not in run(capsys, *arguments, "--wise-ft", "0.5")[1] and (out / "wise-ft-0.5").is_dir()


def test_command__lora_is_merged_into_timms_own_weights(tmp_path, capsys):
    scene, out = save_new_scene(tmp_path), tmp_path / "out"
    arguments = ["--ckpts", scene, "--output-dir", out, *SMALL, "--train", "lora", "--learning-rate", "1e-2"]
    assert run(capsys, *arguments)[0] == 0
    original, merged = create_token_model(BACKBONE).model.state_dict(), load_file(out / "model.safetensors")
    assert merged.keys() == original.keys()
    changed = {name for name, value in merged.items() if not torch.equal(value, original[name])}
    assert changed == {f"blocks.{block}.attn.{name}.weight" for block in range(2) for name in ("qkv", "proj")}
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def test_command__refuses_a_tracker_that_is_not_installed(tmp_path, capsys, monkeypatch):
    scene = save_new_scene(tmp_path)
    monkeypatch.setattr(accelerator_module, "find_spec", lambda name: None)
    code, errors = run(capsys, "--ckpts", scene, "--output-dir", tmp_path / "out", *SMALL, "--trackers", "wandb")
    assert code == 1 and "--trackers wandb: it is not installed" in errors


def launch_two(folder, program, *arguments):
    """`torchrun` with two processes; exit code and everything they said."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run(
        [*command, str(folder / "program.py"), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return result.returncode, result.stdout + result.stderr


PROGRAM = "import finetuning_scene\nfrom fit3d_ns.cli.finetune import main\n"


@pytest.mark.slow
def test_command__two_processes_write_the_folder_and_end_well(tmp_path):
    scenes = [save_new_scene(tmp_path, f"room{index}", seed=index) for index in range(2)]
    out = tmp_path / "out"
    arguments = ["--ckpts", scenes[0], "--val-ckpts", scenes[1], "--output-dir", out, *SMALL]
    code, said = launch_two(tmp_path, PROGRAM + "main()\n", *arguments, "--steps-per-validation", "3")
    assert code == 0, said
    report = json.loads((out / "report.json").read_text())
    assert report["num_processes"] == 2 and report["images_per_step"] == 4 and report["steps"] == 6
    assert report["consistency"]["finetuned"]["num_points"] > 0
    assert said.count("Fine-tuned backbone:") == 1 and (out / "model.safetensors").is_file()


def live(arguments, log, environment):
    """One life of the command, in a child."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    module.main(arguments)


def start_life(arguments, log, environment):
    process = get_context().Process(target=live, args=([*map(str, arguments)], log, environment))
    process.start()
    return process


@pytest.mark.slow
def test_command__what_the_main_process_cannot_do_alone_stops_both_with_its_message(tmp_path):
    scenes = [save_new_scene(tmp_path, f"room{index}", seed=index) for index in range(2)]
    # Damaged, not gone: it is found out when the main process validates.
    for path in (tmp_path / "data" / "room1" / "images").glob("?.png"):
        path.write_bytes(b"broken")
    arguments = ["--ckpts", scenes[0], "--val-ckpts", scenes[1], "--output-dir", tmp_path / "out", *SMALL]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    processes = [
        start_life(arguments, tmp_path / "log.txt", {**world, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    for process in processes:
        process.join(600)
    said = (tmp_path / "log.txt").read_text()
    assert [process.exitcode for process in processes] == [1, 1] and "Process 0 failed: " in said
    assert said.count("room1/images/1.png") >= 2 and "ProcessGroup" not in said


@pytest.mark.slow
def test_command__killed_at_random_equals_the_uninterrupted_run(tmp_path):
    for index in range(2):
        save_scene(create_scene(tmp_path, f"room{index}", seed=index), tmp_path / "scenes" / f"{index}.safetensors")
    scenes = sorted((tmp_path / "scenes").iterdir())

    def start(out):
        arguments = ["--ckpts", *scenes, "--output-dir", out, "--max-steps", 30 * NUM_KILLS]
        arguments += ["--steps-per-checkpoint", 3, "--max-validation-views", 2, "--learning-rate", 1e-3]
        arguments += ["--device", "cpu", "--min-crop", 0.6]
        return start_life(arguments, tmp_path / "log.txt", {})

    def end_well(process):
        process.join(600)
        return process.exitcode == 0

    began = time.monotonic()
    assert end_well(start(tmp_path / "whole"))
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    start_seconds = time.monotonic() - began - report["seconds"]
    generator = np.random.default_rng(0)
    checkpoints = CheckpointFolder(tmp_path / "killed" / "checkpoints", keep=2)
    for kill in range(NUM_KILLS):
        process = start(tmp_path / "killed")
        # Each third one at any moment of starting, of measuring the original or of resuming; the others after a few
        # new checkpoints, of the ten that each life has to itself.
        deadline = float(generator.uniform(0.0, start_seconds)) if kill % 3 == 2 else 600.0
        wanted = max(checkpoints.find_steps(), default=0) + 3 * int(generator.integers(1, 6))
        until = time.monotonic() + deadline
        while process.is_alive() and time.monotonic() < until:
            if max(checkpoints.find_steps(), default=0) >= wanted:
                break
            time.sleep(0.002)
        time.sleep(float(generator.uniform(0.0, report["seconds"] / (10 * NUM_KILLS))))
        assert process.is_alive(), "the run ended before it was killed; see log.txt"
        process.kill()
        process.join()
    assert end_well(start(tmp_path / "killed"))
    resumed = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert resumed["losses"] == report["losses"]
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
