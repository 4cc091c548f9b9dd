"""`fit3d-bench` on miniature rooms: what it measures, that it goes on, and that its records are fit3d-probe's."""

from pathlib import Path
from typing import Any

import pytest

from fit3d_ns.cli import bench, probe
from fit3d_ns.cli.bench import main
from fit3d_ns.probing.probe_runs import ProbeRequest
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.utils.files import read_json
from tests.probing.probe_scenes import BACKBONE, create_finetuned, create_scene


def test_bench__backbones_of_one_shape_share_a_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ProbeRequest] = []
    monkeypatch.setattr(bench, "forecast_seconds", lambda request: asked.append(request) or 5.0)
    command = bench.BenchCommand((BACKBONE,), (str(tmp_path),), tmp_path / "bench")
    known: dict[Any, float] = {}
    for name, number in ((BACKBONE, 1), (BACKBONE, 1), ("random:toy_rooms_vit", 2)):
        plan = bench._plan(command, known, read_models([name])[0], str(tmp_path), "correspondence")
        assert [seconds for _, seconds in plan] == [5.0, 5.0] and len(asked) == number


def test_bench__every_measure_that_the_data_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rooms = [create_scene(tmp_path / name, seed, num_frames=3) for seed, name in enumerate("ab")]
    finetuned = create_finetuned(tmp_path / "vit")
    words = ["--backbones", BACKBONE, finetuned, "--data", f"{rooms[0]}:{rooms[1]}", finetuned, "--output-dir"]
    words += [tmp_path / "bench", "--measures", "retrieval", "--seeds", 2, "--max-frames", 3, "--device", "cpu"]
    arguments = [str(word) for word in words]
    main(arguments)
    shown = capsys.readouterr()
    assert f"No retrieval on {finetuned}" in shown.err and "[4/4]" in shown.err and " hours." in shown.err
    table = read_json(tmp_path / "bench" / "tables.json")["tables"][0]
    features = ["original", "fine-tuned alone (vit)", "original + fine-tuned, concatenated (vit)", "original twice"]
    assert [row[1]["text"] for row in table["rows"]] == features and len(table["header"]) == 4
    assert all(row[index]["spread"] is not None for row in table["rows"] for index in (2, 3))
    assert "Retrieval on b, trained on a: mIoU" in shown.out and (tmp_path / "bench" / "bars.png").is_file()
    # The same features twice: the same neighbours.
    values = [row[2]["value"] for row in table["rows"]]
    assert values[0] == pytest.approx(values[3], rel=1e-4) and values[0] != pytest.approx(values[1], rel=1e-4)
    # Nothing is measured again, also not by fit3d-probe.
    record = next((tmp_path / "bench" / "records").glob("retrieval-a+b-*-concat.json"))
    before = {path: path.stat().st_mtime_ns for path in record.parent.iterdir()}
    main(arguments)
    assert "missing ones take about 0.00 hours" in capsys.readouterr().err
    line = f"retrieval --train {rooms[0]} --test {rooms[1]} --backbone {BACKBONE} --assembly concat --seeds 0 1"
    probe.main([*line.split(), "--finetuned", str(finetuned), "--device", "cpu", "--output-path", str(record)])
    assert "nothing is left to run" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in record.parent.iterdir()}
    with pytest.raises(SystemExit):
        main(["--backbones", BACKBONE, "--data", str(rooms[0]), "--measures", "normals", "--output-dir", str(tmp_path)])
    assert "No normals on" in (error := capsys.readouterr().err) and "None of the measures" in error
