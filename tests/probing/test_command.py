"""The command from folders to a record, with an untrained backbone on scenes of a few pixels."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from fit3d_ns.cli.command import EXIT_USER_ERROR, run_command
from fit3d_ns.cli.probe import ProbeCommand, create_request, probe
from fit3d_ns.features import create_extractor, create_token_model
from fit3d_ns.features.adapters import add_adapter
from fit3d_ns.finetuning.backbone_folder import save_finetuned
from fit3d_ns.probing.frozen_features import (
    Assembly,
    BackboneConfig,
    create_frozen_backbones,
    describe_backbones,
    list_parts,
)
from fit3d_ns.probing.probe_runs import resolve_scene_split
from fit3d_ns.probing.result_records import ResultFile, compute_settings_key, summarise_seeds
from fit3d_ns.utils.results import load_result
from tests.finetuning.finetuning_scene import save_new_scene
from tests.probing.probe_scenes import BACKBONE, create_finetuned, create_scene

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rooms")
    for index in range(2):
        create_scene(root / f"room_{index}", seed=index)
    create_finetuned(root / "finetuned")
    return root


def run(rooms: Path, output: Path, task: str, *flags: str) -> dict[str, Any]:
    arguments = [task, "--output-path", str(output), "--test", str(rooms / "room_1"), "--backbone", BACKBONE]
    if task in ("depth", "segmentation"):
        arguments += ["--train", str(rooms / "room_0"), "--num-iterations", "6", "--batch-size", "4", "--device", "cpu"]
    run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=[*arguments, *flags])
    return json.loads(output.read_text())


@pytest.mark.parametrize("assembly", get_args(Assembly))
def test_probe__depth_record(rooms: Path, tmp_path: Path, assembly: Assembly) -> None:
    flags = ("--assembly", assembly, "--finetuned", str(rooms / "finetuned"), "--seeds", "0", "1")
    record = run(rooms, tmp_path / "r.json", "depth", *flags)
    assert record["kind"] == "probe/depth" and record["is_random"]
    metrics = record["metrics"]
    for name in ("rmse", "abs_rel", "d1", "d2", "d3", "log10", "silog", "sq_rel"):
        values = [metrics["per_seed"][seed][name] for seed in ("0", "1")]
        assert metrics[name] == pytest.approx(np.mean(values))
        assert metrics["spread"][name] == pytest.approx(np.std(values, ddof=1))
        assert np.isfinite(metrics["pooled"][name])
    settings = record["settings"]
    assert settings["seeds"] == [0, 1] and settings["assembly"] == assembly
    assert settings["train"]["num_frames"] == 5 and len(settings["train"]["data_hash"]) == 16
    assert set(settings["training"]) == {"0", "1"} and "torch" in record["versions"]
    # Depth reads tokens before the final norm, of the backbones that the assembly names and of no other.
    assert {part: item["norm"] for part, item in settings["backbones"].items()} == dict.fromkeys(
        list_parts(assembly), False
    )
    assert ("finetuning" in settings) == ("finetuned" in settings["backbones"])
    if "finetuned" in settings["backbones"]:
        assert settings["finetuning"]["hours"] == 2.0 and settings["finetuning"]["scenes"] == ["a"]
    assert str(rooms) not in json.dumps(settings), "no path of this machine"


def test_probe__values_of_the_paper(rooms: Path, tmp_path: Path) -> None:
    record = run(rooms, tmp_path / "r.json", "depth", "--paper", "--num-iterations", "1", "--batch-size", "2")
    config = record["settings"]["config"]
    assert config["num_iterations"] == 1 and config["learning_rate"] == 1e-4
    run_settings = record["settings"]["run"]
    assert run_settings["cache"] == "never" and run_settings["selection"] == "test"
    assert 38_400 // run_settings["num_evaluations"] == 6400
    assert record["settings"]["chosen"]["features_cached"] is False
    assert record["settings"]["patch_fit"] == "pad-stretch"
    assert record["settings"]["backbones"]["original"]["normalization"] == "imagenet"


def test_probe__dpt_head(rooms: Path, tmp_path: Path) -> None:
    flags = ("--head", "dpt", "--num-iterations", "2", "--gradient-loss-weight", "0.5", "--assembly", "concat")
    record = run(rooms, tmp_path / "r.json", "depth", *flags, "--finetuned", str(rooms / "finetuned"))
    assert record["settings"]["config"]["head"] == "dpt" and 0.0 < record["metrics"]["rmse"] < 20.0


@pytest.mark.parametrize("assembly", get_args(Assembly))
def test_probe__segmentation_record(rooms: Path, tmp_path: Path, assembly: Assembly) -> None:
    flags = ("--assembly", assembly, "--finetuned", str(rooms / "finetuned"))
    record = run(rooms, tmp_path / "r.json", "segmentation", *flags)
    metrics, parts = record["metrics"], record["settings"]["backbones"]
    assert {part: item["norm"] for part, item in parts.items()} == dict.fromkeys(list_parts(assembly), True)
    assert 0.0 <= metrics["miou"] <= metrics["aacc"] <= 1.0 and 0.0 <= metrics["macc"] <= 1.0
    assert set(metrics["iou_by_class"]) == {"left", "right"} and "spread" not in metrics


def test_probe__finished_seeds_are_not_run_again(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.json"
    first = run(rooms, output, "segmentation", "--seeds", "3")
    capsys.readouterr()
    both = run(rooms, output, "segmentation", "--seeds", "3", "4")
    assert "already holds seeds 3 of these settings; running 4" in capsys.readouterr().err
    assert both["metrics"]["per_seed"]["3"] == first["metrics"]["per_seed"]["3"]
    assert both["settings"]["training"]["3"] == first["settings"]["training"]["3"]

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing may be built")

    monkeypatch.setattr("fit3d_ns.probing.probe_runs.create_frozen_backbones", refuse)
    again = run(rooms, output, "segmentation", "--seeds", "4", "3")
    assert "nothing is left to run" in capsys.readouterr().err and again == both


def test_probe__predictions_are_pictures_of_the_first_seed(rooms: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for task in ("segmentation", "depth"):
        record = run(rooms, tmp_path / f"{task}.json", task, "--predictions", str(folder / task))
        listing = json.loads((folder / task / "predictions.json").read_text())
        assert len(listing["frames"]) == 5 and listing["task"] == task
        assert listing["is_random"] and listing["backbones"][0]["backbone"] == BACKBONE
        truth = [np.array(Image.open(folder / task / f"{index:03d}_truth.png")) for index in range(5)]
        predicted = [np.array(Image.open(folder / task / f"{index:03d}_prediction.png")) for index in range(5)]
        if task == "segmentation":
            right = np.mean([(a == b).mean() for a, b in zip(truth, predicted, strict=True)])
            assert record["metrics"]["aacc"] == pytest.approx(right)
        else:
            assert all((depth == 2000).all() for depth in truth)
            errors = [np.sqrt(np.mean((depth / 1000.0 - 2.0) ** 2)) for depth in predicted]
            assert record["metrics"]["rmse"] == pytest.approx(np.mean(errors), abs=1e-3)  # millimetres on disk
        assert Image.open(folder / task / "004_image.png").size == (48, 32)


def test_probe__training_on_test_frames_is_said(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("images", "depths"):
        (tmp_path / "plain" / name).mkdir(parents=True)
    Image.new("RGB", (48, 32), (90, 80, 70)).save(tmp_path / "plain/images/a.png")
    Image.new("RGB", (48, 32), (10, 80, 70)).save(tmp_path / "plain/images/b.png")
    for name in "ab":
        Image.fromarray(np.full((32, 48), 1500, dtype=np.uint16)).save(tmp_path / f"plain/depths/{name}.png")
    plain = str(tmp_path / "plain")
    (tmp_path / "alias").symlink_to(plain)
    arguments = [
        "depth",
        "--train",
        plain,
        "--test",
        str(tmp_path / "alias"),
        "--backbone",
        BACKBONE,
        "--num-iterations",
        "2",
    ]
    arguments += ["--batch-size", "2", "--device", "cpu", "--output-path", str(tmp_path / "r.json")]
    run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=arguments)
    assert "2 of 2 test frames are trained on as well" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["depth", "segmentation", "retrieval", "consistency"])
def test_probe__scenes_that_taught_the_backbone_are_said(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    shutil.copytree(rooms / "finetuned", tmp_path / "vit")
    report = json.loads((tmp_path / "vit/report.json").read_text())
    report["scenes"] = [f"scenes/room_{index}.safetensors" for index in range(3)]
    (tmp_path / "vit/report.json").write_text(json.dumps(report))
    train = ("--train", str(rooms / "room_0"), "--finetuned", str(tmp_path / "vit"), "--device", "cpu")
    run(rooms, tmp_path / "r.json", task, *train, "--assembly", "finetuned")
    assert "fine-tuned backbone was trained on views of room_1: the metrics flatter" in capsys.readouterr().err
    run(rooms, tmp_path / "o.json", task, *train, "--assembly", "original")
    assert "flatter" not in capsys.readouterr().err


def test_probe__other_settings_put_the_old_record_aside(rooms: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    first = run(rooms, output, "segmentation")
    second = run(rooms, output, "segmentation", "--short-side", "32")
    assert first["settings"]["key"] != second["settings"]["key"]
    aside = tmp_path / f"r.{first['settings']['key']}.json"
    assert json.loads(aside.read_text()) == first


def test_probe__another_depth_unit_is_another_record(tmp_path: Path) -> None:
    """No pixel is read for the hash of the data, so the unit itself has to tell the records apart."""
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for kind in ("images", "depths"):
        (data / kind).mkdir(parents=True)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(data / f"images/{index}.png")
        Image.fromarray(rng.integers(1000, 4000, (32, 48)).astype(np.uint16)).save(data / f"depths/{index}.png")
    output = tmp_path / "r.json"
    arguments = ["depth", "--train", data, "--test", data, "--output-path", output, "--backbone", BACKBONE]
    arguments += ["--num-iterations", "2", "--batch-size", "2", "--device", "cpu"]
    records = []
    for flags in ((), ("--depth-scale", "1000"), ("--depth-scale", "500")):
        args = [str(item) for item in (*arguments, *flags)]
        run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=args)
        records.append(json.loads(output.read_text()))
    assert records[0] == records[1], "the default, written out"
    assert records[2]["settings"]["depth_scale"] == 500.0
    assert records[2]["settings"]["key"] != records[0]["settings"]["key"]
    assert records[2]["metrics"]["rmse"] != records[0]["metrics"]["rmse"], "measured again"


def test_record__of_several_processes_at_once_loses_no_seed(tmp_path: Path) -> None:
    """Each has looked at the record before the others wrote it."""
    path = tmp_path / "r.json"
    files = [ResultFile(path, "probe/depth", {"lr": 1}, True) for _ in range(6)]
    assert all(file.load_seeds() == {} for file in files)

    def save(seed: int) -> None:
        files[seed].save({seed: {"rmse": float(seed)}}, {"training": {str(seed): {"seconds": 1.0}}})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(save, range(6)))
    record = load_result(path)
    assert record.settings["seeds"] == list(range(6)) and record.metrics["rmse"] == 2.5
    assert set(record.settings["training"]) == {str(seed) for seed in range(6)}
    other = ResultFile(path, "probe/depth", {"lr": 2}, True)
    other.save({0: {"rmse": 9.0}}, {})
    assert load_result(path.with_name(f"r.{files[0].key}.json")) == record, "put aside, not overwritten"


@pytest.mark.parametrize(("name", "value"), [("is_random", "no"), ("metrics", []), ("schema_version", "1")])
def test_record__with_damaged_entries_is_named(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"kind": "probe/depth", "metrics": {}, name: value}))
    with pytest.raises(ValueError, match=f"r.json is damaged: `{name}` is"):
        load_result(path)


def test_probe__another_scene_of_the_same_size_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As training again with as many Gaussians writes it."""
    scenes = [save_new_scene(tmp_path / str(seed), "room", seed=seed) for seed in (1, 2)]
    size = max(scene.stat().st_size for scene in scenes)
    output = tmp_path / "r.json"
    records = []
    for scene in scenes:
        # Room in the header is safetensors' own means to align what follows.
        content = scene.read_bytes()
        length = int.from_bytes(content[:8], "little")
        room = size - len(content)
        scene.write_bytes(
            (length + room).to_bytes(8, "little") + content[8 : 8 + length] + b" " * room + content[8 + length :]
        )
        arguments = ["consistency", "--output-path", str(output), "--test", str(scene), "--device", "cpu"]
        run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=[*arguments, "--backbone", BACKBONE])
        records.append(json.loads(output.read_text()))
    assert "held metrics of other settings" in capsys.readouterr().err
    assert records[0]["metrics"] != records[1]["metrics"]


def test_probe__same_seed_same_figures(rooms: Path, tmp_path: Path) -> None:
    for cache in ("always", "never"):
        records = [
            run(rooms, tmp_path / f"{cache}{index}.json", "depth", "--cache", cache, "--seeds", "7") for index in (0, 1)
        ]
        assert records[0]["metrics"] == records[1]["metrics"]


@pytest.mark.parametrize("assembly", ["original", "finetuned", "concat", "duplicate", "add"])
@pytest.mark.parametrize("task", ["consistency", "correspondence"])
def test_probe__multiview_of_a_capture(rooms: Path, tmp_path: Path, task: str, assembly: str) -> None:
    flags = ("--assembly", assembly, "--finetuned", str(rooms / "finetuned"), "--seeds", "0", "1")
    metrics = run(rooms, tmp_path / "r.json", task, *flags)["metrics"]
    # Distances and bins for pairs of rooms; this capture is in metres.
    recalls = [name for name in metrics if "recall_" in name]
    assert recalls == [f"recall_{limit}" for limit in ("5px", "10px", "20px", "1cm", "2cm", "5cm")]
    assert list(metrics["by_angle"]) == ["0-15", "15-30", "30-60", "60-180"]
    assert 0.0 <= metrics["recall_5px"] <= metrics["recall_10px"] <= metrics["recall_20px"] <= 1.0
    # The camera moves without turning.
    assert metrics["by_angle"]["0-15"]["num_matches"] == metrics["num_matches"] > 0
    assert metrics["by_angle"]["30-60"]["num_matches"] == 0
    assert ("centred_cosine" in metrics) == (task == "consistency")
    assert metrics["per_seed"]["0"]["per_scene"]["room_1"]["num_matches"] > 0


def test_probe__correspondence_as_probe3d_measures_it(rooms: Path, tmp_path: Path) -> None:
    plain = run(rooms, tmp_path / "r.json", "correspondence")
    flags = ("--ratio-matches", "30", "--angle-edges", "0", "30", "60", "90", "120")
    record = run(rooms, tmp_path / "s.json", "correspondence", *flags)
    metrics = record["metrics"]
    recalls = [name for name in metrics if name.startswith("ratio_recall_")]
    assert recalls == [
        f"ratio_recall_{limit}" for limit in ("5px", "10px", "20px", "40px", "80px", "1cm", "2cm", "5cm")
    ]
    assert list(metrics["by_angle"]) == ["0-30", "30-60", "60-90", "90-120"]
    # Ten pairs of five views.
    assert metrics["num_ratio_matches"] == metrics["by_angle"]["0-30"]["num_ratio_matches"] == 300
    assert metrics["by_angle"]["60-90"]["ratio_recall_20px"] is None
    # What was there before is the same, and so is the record of those who do not ask for it.
    assert all(metrics[name] == plain["metrics"][name] for name in plain["metrics"] if name.startswith("recall_"))
    assert record["settings"]["config"] == {
        **plain["settings"]["config"],
        "ratio_matches": 30,
        "angle_edges": [0, 30, 60, 90, 120],
    }


@pytest.mark.parametrize("task", ["segmentation", "depth", "consistency"])
@pytest.mark.parametrize("assembly", ["finetuned", "concat"])
def test_probe__adapters_are_probed_as_any_fine_tuned_backbone(
    rooms: Path, tmp_path: Path, task: str, assembly: str
) -> None:
    adapted = add_adapter(create_token_model(BACKBONE), window_size=2).eval()
    torch.nn.init.normal_(adapted.adapter.block.mlp.fc2.weight)
    save_finetuned(tmp_path / "adapted", adapted, adapted.model.state_dict(), "card", "mit")
    flags = ("--assembly", assembly, "--finetuned", str(tmp_path / "adapted"))
    record = run(rooms, tmp_path / "r.json", task, *flags)
    assert record["settings"]["backbones"]["finetuned"]["norm"], "the adapter stands behind the norm"
    name = {"segmentation": "miou", "depth": "rmse", "consistency": "centred_cosine"}[task]
    assert np.isfinite(record["metrics"][name])


def test_probe__classification_record(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for index in range(6):
                noise = generator.integers(0, 50, (40, 32, 3))
                Image.fromarray((noise + np.array(colour)).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    data = str(tmp_path / "pictures")
    output = tmp_path / "r.json"
    arguments = ["classification", "--train", data, "--test", data, "--output-path", str(output), "--device", "cpu"]
    arguments += ["--backbone", BACKBONE, "--num-iterations", "150", "--batch-size", "8"]
    run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=arguments)
    record = json.loads(output.read_text())
    metrics, chosen = record["metrics"], record["settings"]["training"]["0"]
    assert metrics["accuracy"] == 1.0 and metrics["accuracy_top5"] == 1.0 and metrics["num_images"] == 12
    assert chosen["class_token_blocks"] in (1, 4) and chosen["has_mean_token"] in (False, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("depth", "--assembly", "concat"), "Assembly concat needs a fine-tuned backbone"),
        (("depth", "--assembly", "concat", "--finetuned", "nowhere"), "No such fine-tuned backbone: nowhere"),
        (("depth", "--max-views", "3"), "--max-views means nothing to the depth probe"),
        (("segmentation", "--train", "nowhere"), "No such data folder: nowhere"),
        (("consistency", "--assembly", "linear", "--finetuned", "FINETUNED"), "trained with a head"),
        (("depth", "--class-token", "finetuned"), "only original runs"),
        (("depth", "--depth-scale", "500"), "in the layout scannetpp, which has its own; leave it out"),
        (("consistency", "--predictions", "p"), "--predictions means nothing to the consistency probe"),
        (("correspondence", "--predictions", "p"), "--predictions means nothing to the correspondence probe"),
        (("classification", "--predictions", "p"), "--predictions means nothing to the classification probe"),
        (("consistency", "--depth-scale", "500"), "--depth-scale means nothing to the consistency probe"),
    ],
)
def test_probe__errors_are_one_sentence(
    rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    given = [str(rooms / "finetuned") if flag == "FINETUNED" else flag for flag in flags]
    with pytest.raises(SystemExit) as raised:
        run(rooms, tmp_path / "r.json", given[0], *given[1:])
    assert raised.value.code == EXIT_USER_ERROR and message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_backbones__another_architecture_is_refused(tmp_path: Path) -> None:
    finetuned = create_finetuned(tmp_path / "other", "test_vit2")
    with pytest.raises(ValueError, match="fine-tuned backbone is a test_vit2, the original a test_vit"):
        describe_backbones(BackboneConfig("concat", BACKBONE, finetuned=finetuned), norm=True)


def test_backbones__weights_files_count_as_fine_tuned(rooms: Path) -> None:
    weights = rooms / "finetuned/model.safetensors"
    by_file = create_frozen_backbones(BackboneConfig("finetuned", "test_vit", finetuned=weights), norm=False)
    by_folder = create_frozen_backbones(
        BackboneConfig("finetuned", "test_vit", finetuned=rooms / "finetuned"), norm=False
    )
    assert by_file.description.weights_hash == by_folder.description.weights_hash
    assert not by_file.description.is_random


def test_backbones__parts_layers_and_class_tokens(rooms: Path) -> None:
    config = BackboneConfig("concat", BACKBONE, finetuned=rooms / "finetuned", patch_fit="resize")
    images = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    features = create_frozen_backbones(config, norm=False, num_layers=3)(images)
    assert features.maps.shape == (2, 2, 3, 2, 3, 64) and features.class_tokens.shape == (2, 2, 3, 64)
    original = create_extractor(BACKBONE, norm=False).extract_layers(images, [1, 3, 5])
    for layer in range(3):
        torch.testing.assert_close(features.maps[:, 0, layer], original[layer].maps)
        torch.testing.assert_close(features.class_tokens[:, 0, layer], original[layer].prefix_tokens[:, 0])
    assert not torch.allclose(features.maps[:, 0], features.maps[:, 1])


@pytest.mark.parametrize("norm", [True, False])
def test_backbones__adapters_stand_behind_the_final_norm_of_the_fine_tuned_part_only(
    tmp_path: Path, norm: bool
) -> None:
    adapted = add_adapter(create_token_model(BACKBONE), window_size=2).eval()
    torch.nn.init.normal_(adapted.adapter.block.mlp.fc2.weight)
    save_finetuned(tmp_path / "adapted", adapted, adapted.model.state_dict(), "card", "mit")
    config = BackboneConfig("concat", BACKBONE, finetuned=tmp_path / "adapted", patch_fit="resize")
    images = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    features = create_frozen_backbones(config, norm=norm)(images)
    with torch.no_grad():
        expected = adapted(images).maps
    torch.testing.assert_close(features.maps[:, 1, 0], expected)
    torch.testing.assert_close(features.maps[:, 0, 0], create_extractor(BACKBONE, norm=norm)(images).maps)


def test_create_request__explicit_flags_win_over_the_paper() -> None:
    command = ProbeCommand(
        "segmentation", Path("r"), (Path("b"),), (Path("a"),), paper=True, batch_size=3, cache="auto"
    )
    request = create_request(command)
    assert request.config.batch_size == 3 and request.config.num_iterations == 40_000  # type: ignore[union-attr]
    assert request.config.stride == 341 and request.config.loss_average == "all"  # type: ignore[union-attr]
    assert request.run.cache == "auto" and request.run.selection == "last"


def test_resolve_scene_split__a_scene_on_both_sides_is_divided(rooms: Path) -> None:
    first, second = rooms / "room_0", rooms / "room_1"
    assert resolve_scene_split(first, "train", [second]) is resolve_scene_split(second, "test", [first]) is None
    assert resolve_scene_split(first, "train", [rooms, first]) == "train"
    assert resolve_scene_split(rooms, "test", []) == resolve_scene_split(rooms, "test", [rooms]) == "test"


def test_records__key_and_summary() -> None:
    assert compute_settings_key("a", {"x": 1, "y": (2, 3)}) == compute_settings_key("a", {"y": [2, 3], "x": 1})
    assert compute_settings_key("a", {"x": 1}) != compute_settings_key("a", {"x": 2})
    assert compute_settings_key("a", {"x": 1}) != compute_settings_key("b", {"x": 1})
    summary = summarise_seeds({1: {"v": 1.0, "n": {"w": None}, "c": 4}, 0: {"v": 4.0, "n": {"w": 2.0}, "c": 4}})
    assert summary["v"] == 2.5 and summary["n"]["w"] == 2.0 and summary["c"] == 4
    assert summary["spread"]["v"] == pytest.approx(1.5 * 2**0.5) and summary["spread"]["n"]["w"] is None
    assert list(summary["per_seed"]) == ["0", "1"]


def test_probe__classes_without_a_label_do_not_count_and_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A binary set that was written as 0 and 255, where 255 means that a pixel does not count."""
    root = tmp_path / "binary"
    for split in ("train", "test"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        Image.new("RGB", (64, 48), (90, 80, 70)).save(root / f"images/{split}/a.png")
        labels = np.zeros((48, 64), np.uint8)
        labels[:, 32:] = 255
        Image.fromarray(labels).save(root / f"labels/{split}/a.png")
    (root / "classes.json").write_text('{"classes": ["background", "road"]}')
    arguments = ["segmentation", "--train", str(root), "--test", str(root), "--num-iterations", "3", "--device", "cpu"]
    arguments += ["--backbone", BACKBONE, "--assembly", "original", "--output-path", str(tmp_path / "r.json")]
    arguments += ["--selection", "last"]
    run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=arguments)
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert metrics["miou"] == metrics["iou_by_class"]["background"]
    assert "No label of binary is road: such classes do not count" in capsys.readouterr().err
