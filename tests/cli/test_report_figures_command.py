import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from fit3d_ns.cli.demo import DemoCommand, demo
from fit3d_ns.cli.report_figures import main_features, main_predictions

BACKBONE = "random:test_vit"


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / f"photos/{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.linear_gradient("L").resize((64, 48)).rotate(90 * index).convert("RGB").save(path)
    return [str(path) for path in paths]


def test_features__photographs_and_a_folder_make_a_figure_and_a_video(
    photographs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "figure.png"
    folder = str(tmp_path / "photos")
    main_features([*photographs, folder, "--models", BACKBONE, "--output-path", str(output), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"Figure: {output}" in printed and f"Video: {output.with_name('figure-photos.mp4')}" in printed
    assert "test_vit (random weights), original: temporal consistency" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "figure-photos.json", "figure-photos.mp4", "figure.json", "figure.png",
    ]  # fmt: skip
    assert len(json.loads(output.with_suffix(".json").read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", BACKBONE, "--output-path", "a.png"], "No pictures to draw"),
        (["a.png", "--models", BACKBONE, "--output-path", "a.pdf"], "must end in .png"),
        (["absent.png", "--models", BACKBONE, "--output-path", "a.png"], "absent.png is missing"),
        (["a.png", "--models", "vit_tny", "--output-path", "a.png"], "did you mean"),
        (["a.png", "--models", BACKBONE, "--output-path", "a.png", "--longest-side", "0"], "--longest-side 0"),
    ],
)
def test_features__what_is_wrong_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main_features(arguments)
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_predictions__folder_without_predictions_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main_predictions([str(tmp_path), "--output-path", str(tmp_path / "figure.png")])
    assert caught.value.code == 1
    assert "run fit3d-probe --predictions" in capsys.readouterr().err


def test_demo__needs_gradio_and_one_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="needs Gradio, which is not installed"):
        demo(DemoCommand(backbone=BACKBONE))
    monkeypatch.setattr("fit3d_ns.cli.demo.check_gradio", lambda: None)
    with pytest.raises(ValueError, match="compares one architecture"):
        demo(DemoCommand(backbone=BACKBONE, finetuned=("random:vit_tiny_patch16_224",), device="cpu"))
    with pytest.raises(ValueError, match="must lie in 2 to 20"):
        demo(DemoCommand(backbone=BACKBONE, num_clusters=1))
