import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fit3d_ns.cli import figures
from fit3d_ns.cli.report import main
from tests.report.report_records import write_probe

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
    main(["features", *photographs, folder, "--models", BACKBONE, "--output-path", str(output), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"Figure: {output}" in printed and f"Video: {output.with_name('figure-photos.mp4')}" in printed
    assert "test_vit (random weights), original: temporal consistency" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "figure-photos.json", "figure-photos.mp4", "figure.json", "figure.png",
    ]  # fmt: skip
    assert len(json.loads(output.with_suffix(".json").read_text())["rows"]) == 2


def test_features__never_write_over_what_they_read(
    photographs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(photographs[0]).parent)
    before = Path(photographs[0]).read_bytes()
    with pytest.raises(SystemExit):
        main(["features", *photographs, "--models", BACKBONE, "--output-path", Path(photographs[0]).name])
    assert "would be lost" in capsys.readouterr().err and Path(photographs[0]).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", BACKBONE, "--output-path", "a.png"], "No pictures to draw"),
        (["a.png", "--models", BACKBONE, "--output-path", "a.pdf"], "must end in .png"),
        (["absent.png", "--models", BACKBONE, "--output-path", "a.png"], "absent.png is missing"),
        (["a.png", "--models", "vit_tny", "--output-path", "a.png"], "did you mean"),
        (["a.png", "--models", BACKBONE, "--output-path", "a.png", "--longest-side", "0"], "longest_side is 0"),
    ],
)
def test_features__what_is_wrong_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["features", *arguments])
    assert caught.value.code == 1
    assert message in capsys.readouterr().err


def test_predictions__folder_without_predictions_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["predictions", str(tmp_path), "--output-path", str(tmp_path / "figure.png")])
    assert caught.value.code == 1
    assert "run fit3d-probe --predictions" in capsys.readouterr().err


def test_report__writes_four_files_and_shows_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_probe(tmp_path / "a.json", {0: {"miou": 0.5}})
    main([str(path), "--output-dir", str(tmp_path / "out"), "--title", "Ours"])
    written = sorted(item.name for item in (tmp_path / "out").iterdir())
    assert written == ["tables.html", "tables.json", "tables.md", "tables.tex"]
    printed = capsys.readouterr().out
    assert printed.startswith("# Ours") and "50.00" in printed and "tables.html" in printed


@pytest.mark.parametrize("word", ["features", "predictions"])
def test_report__first_words_lead_to_the_figures(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    called: list[object] = []
    monkeypatch.setattr(figures, f"draw_{word}", called.append)
    main([word, "a.png", "--output-path", "b.png", *(("--models", "features") if word == "features" else ())])
    assert len(called) == 1 and word in type(called[0]).__name__.lower()


def test_report__help_names_the_picture_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "fit3d-report features" in text and "fit3d-report predictions" in text


def test_report__tables_do_not_wait_for_torch() -> None:
    code = "import sys, fit3d_ns.cli.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
