"""Whether the depth probe reads the class token, decided on the validation part of the training data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fit3d_ns.cli.command import EXIT_USER_ERROR, run_command
from fit3d_ns.cli.probe import ProbeCommand, create_request, probe
from fit3d_ns.probing.datasets.frames import LabelledFrame, LabelledSet
from fit3d_ns.probing.depth import PAPER_DEPTH, DepthConfig, DepthProbe
from fit3d_ns.probing.head_probe import ProbeSets, RunConfig
from fit3d_ns.training.processes import create_accelerator
from tests.probing.probe_backbones import FakeDescription, MeanColourBackbones
from tests.probing.probe_scenes import BACKBONE, create_scene

torch.set_num_threads(1)


def create_frame(index: int, is_reversed: bool) -> LabelledFrame:
    """Everything is 1 m away and 4 m times the share of red patches more; `is_reversed`: of green ones.

    The stand-in's class token is the mean colour, so it says that share, of which a patch token knows little.
    """
    share = 0.1 + 0.2 * (index % 5)
    generator = torch.Generator().manual_seed(index)
    is_red = torch.rand(24, generator=generator).argsort() < round(share * 24)
    kinds = (~is_red).long().reshape(4, 6).repeat_interleave(4, 0).repeat_interleave(4, 1)
    image = (torch.eye(3)[kinds] * 200).to(torch.uint8)
    depth = torch.full((16, 24), 1 + 4 * (1 - share if is_reversed else share))
    return LabelledFrame(str(index), load_image=lambda: image, load_depth=lambda: depth)


def create_probe(class_token: str, is_reversed: bool, run: RunConfig | None = None, **changes: Any) -> DepthProbe:
    train, validation, test = (
        LabelledSet("toy", [create_frame(index, kind) for index in numbers])
        for numbers, kind in ((range(10), False), (range(10, 15), is_reversed), (range(15, 18), not is_reversed))
    )
    config = DepthConfig(
        num_iterations=150, batch_size=4, class_token=class_token, **{"learning_rate": 0.05, **changes}
    )  # type: ignore[arg-type]
    run = run or RunConfig(num_evaluations=2)
    sets = ProbeSets(train, test, validation)
    return DepthProbe(config, run, sets, MeanColourBackbones(), "original", create_accelerator("cpu"))


@pytest.mark.parametrize(("is_reversed", "expected"), [(False, "auto"), (True, "none")])
def test_class_token__the_better_on_validation_data_is_kept(is_reversed: bool, expected: str) -> None:
    """The test data says the opposite of the validation data, so that a look at it would change the choice."""
    single = {source: create_probe(source, is_reversed).run_seed(3) for source in ("auto", "none")}
    validated = create_probe("validated", is_reversed).run_seed(3)
    scores = {source: max(outcome.scores.values()) for source, outcome in single.items()}
    assert max(scores, key=lambda source: scores[source]) == expected
    assert min(single, key=lambda source: single[source].metrics["abs_rel"]) != expected
    assert validated.choices == {"class_token": expected, "class_token_scores": scores}
    # What is kept is what the setting gives by itself, to the bit.
    assert validated.metrics == single[expected].metrics and validated.scores == single[expected].scores
    assert validated.iteration == single[expected].iteration
    assert validated.head is not None and single[expected].head is not None
    kept, alone = validated.head.state_dict(), single[expected].head.state_dict()
    assert kept.keys() == alone.keys() and all(torch.equal(kept[name], alone[name]) for name in kept)
    assert ("class_layer.weight" in kept) == (expected == "auto")


def test_class_token__features_are_computed_once_for_both_heads() -> None:
    probe = create_probe("validated", False)
    probe.run_seed(0)
    assert isinstance(probe.backbones, MeanColourBackbones)
    assert probe.backbones.num_images == 2 * (10 + 5 + 3), "each picture and its mirror image"


def test_class_token__each_head_has_the_rate_of_its_width() -> None:
    probe = create_probe("validated", False, learning_rate=None)
    rates = {}
    for source in ("auto", "none"):
        rates |= create_probe(source, False, learning_rate=None).learning_rates
    assert probe.describe()["learning_rate"] == rates and rates["none"] == pytest.approx(2 * rates["auto"])


def test_class_token__never_chosen_on_test_data() -> None:
    for selection in ("test", "last"):
        with pytest.raises(ValueError, match=f"never on the test data; with --selection {selection}"):
            create_probe("validated", False, RunConfig(selection=selection))  # type: ignore[arg-type]


def test_class_token__backbones_without_one_train_one_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeanColourBackbones, "description", FakeDescription(num_prefix_tokens=0))
    probe = create_probe("validated", False)
    outcome = probe.run_seed(0)
    assert tuple(probe.learning_rates) == ("none",) and outcome.choices["class_token"] == "none"


def test_class_token__the_record_says_what_was_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = create_scene(tmp_path / "room", seed=0)
    output = tmp_path / "r.json"
    arguments = ["depth", "--train", scene, "--test", scene, "--output-path", output, "--backbone", BACKBONE]
    arguments += ["--num-iterations", "2", "--batch-size", "2", "--device", "cpu", "--seeds", "0", "1"]
    arguments += ["--class-token", "validated"]
    run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=[str(item) for item in arguments])
    settings = json.loads(output.read_text())["settings"]
    assert settings["config"]["class_token"] == "validated"
    for seed in ("0", "1"):
        said = settings["training"][seed]
        assert set(said["class_token_scores"]) == {"auto", "none"}
        assert said["class_token_scores"][said["class_token"]] == max(said["class_token_scores"].values())
        assert f"Class token of seed {seed}: {said['class_token']} is kept" in capsys.readouterr().err or seed == "1"
    with pytest.raises(SystemExit) as raised:
        args = [str(item) for item in (*arguments, "--paper")]
        run_command(ProbeCommand, probe, prog="fit3d-probe", description="", args=args)
    assert raised.value.code == EXIT_USER_ERROR and "with --selection test" in capsys.readouterr().err


def test_class_token__the_papers_values_and_the_default_are_published_ones() -> None:
    for is_paper in (True, False):
        command = ProbeCommand("depth", Path("r"), (Path("b"),), (Path("a"),), paper=is_paper)
        config = create_request(command).config
        assert isinstance(config, DepthConfig) and config.class_token == "auto"
    assert PAPER_DEPTH.class_token == "auto"
