"""Planning of the ablations' cells, and what is skipped, gone on with or left out; commands are fake."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ablations
import pytest
from ablation_cells import Cell, Plan, ProbeData, find_missing
from ablation_tables import TABLES, choose_tables
from ablations import CommonFlags, PaperFlags, SmallFlags, run_cells, run_paper, run_small, run_tables

from fit3d_ns.utils.files import write_json


def make_scene(folder: Path, *parts: str) -> Path:
    for part in parts:
        (folder / "dslr" / part).mkdir(parents=True)
    write_json(folder / "dslr" / "train_test_lists.json", {"train": [f"{folder.name}.JPG"], "test": []})
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    scenes = tuple(make_scene(tmp_path / "data" / name) for name in ("a", "b"))
    depth = ProbeData("depth:scenes", scenes, (tmp_path / "data" / "c",))
    return Plan(tmp_path / "out", scenes, (depth,), "vit_tiny", finetune_steps=10)


def pretend(cell: Cell) -> None:
    """What the command would leave."""
    cell.result.parent.mkdir(parents=True, exist_ok=True)
    metrics = {"per_seed": {str(seed): {"rmse": 1.0} for seed in cell.seeds}}
    cell.result.write_text(json.dumps({"kind": "probe/depth", "metrics": metrics}))


class Runner:
    """Runs nothing, notes everything, fails where told to."""

    def __init__(self, fails: str = "nothing") -> None:
        self.fails = fails
        self.names: list[str] = []

    def __call__(self, cell: Cell, log: Path) -> bool:
        self.names.append(cell.name)
        if self.fails in cell.name:
            return False
        pretend(cell)
        return True

    def count(self, kind: str) -> int:
        return sum(name.startswith(f"{kind}/") for name in self.names)


def run(plan: Plan, runner: Runner, *names: str) -> list[str]:
    """Runs the tables; names of the cells that ran."""
    tables = choose_tables(names)
    cells = {name: plan.create_cells(table) for name, table in tables.items()}
    before = len(runner.names)
    run_tables(tables, cells, plan.output, CommonFlags(), len(plan.scenes), execute=runner)
    return runner.names[before:]


def test_feature_dimensions__one_colour_run_per_scene_one_lift_per_dimension(plan: Plan) -> None:
    runner = Runner()
    run(plan, runner, "5")
    # Two scenes; 32, 64 and 128 features each.
    assert (runner.count("colour"), runner.count("scene"), runner.count("finetune"), runner.count("probe")) == (
        2,
        6,
        3,
        3,
    )
    assert runner.names[-1] == "report"


def test_cells__what_they_need_comes_first(plan: Plan) -> None:
    ordered = find_missing(plan.create_cells(TABLES["5"]))
    places = {cell.name: place for place, cell in enumerate(ordered)}
    assert all(places[needed.name] < places[cell.name] for cell in ordered for needed in cell.needs)


def test_cells__finished_ones_are_never_run_again(plan: Plan) -> None:
    runner = Runner()
    run(plan, runner, "5")
    assert run(plan, runner, "5") == ["report"]
    # Tables share cells: the one of 64 features and one epoch is there; two and three epochs need no lift.
    second = run(plan, runner, "8")
    assert sorted(name.split("/")[0] for name in second) == ["finetune", "finetune", "probe", "probe", "report"]


def test_cells__what_only_finished_cells_need_may_be_deleted(plan: Plan) -> None:
    runner = Runner()
    run(plan, runner, "5")
    for path in [*plan.output.glob("colour/**/*.json"), *plan.output.glob("scenes/**/*.safetensors")]:
        path.unlink()
    assert run(plan, runner, "5") == ["report"]
    # Another number of epochs learns from the scenes of 64 features again.
    names = run(plan, runner, "8")
    assert sum(name.startswith("scene/") for name in names) == sum(name.startswith("colour/") for name in names) == 2


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"seeds": (0, 1)}, {"probe"}),
        ({"probe_iterations": 5}, {"probe"}),
        ({"finetune_steps": 20}, {"probe", "finetune"}),
        ({"backbone": "vit_small"}, {"probe", "finetune", "scene"}),
        ({"colour_steps": 100}, {"probe", "finetune", "scene", "colour"}),
    ],
)
def test_cells__other_settings_run_what_depends_on_them(plan: Plan, changes: dict, kinds: set[str]) -> None:
    runner = Runner()
    run(plan, runner, "5")
    names = run(replace(plan, **changes), runner, "5")
    assert {name.split("/")[0] for name in names} == kinds | {"report"}


def test_cells__weights_count_by_content_not_by_place(plan: Plan, tmp_path: Path) -> None:
    for name, content in (("one", b"1"), ("copy", b"1"), ("other", b"2")):
        (tmp_path / name).write_bytes(content)
    runner = Runner()
    run(replace(plan, weights={"vit_tiny": tmp_path / "one"}), runner, "13")
    assert run(replace(plan, weights={"vit_tiny": tmp_path / "copy"}), runner, "13") == ["report"]
    assert len(run(replace(plan, weights={"vit_tiny": tmp_path / "other"}), runner, "13")) > 1


def test_cells__a_moved_output_folder_is_still_finished(plan: Plan, tmp_path: Path) -> None:
    runner = Runner()
    run(plan, runner, "5")
    plan.output.rename(tmp_path / "moved")
    assert run(replace(plan, output=tmp_path / "moved"), runner, "5") == ["report"]


def test_cells__captures_count_by_content_not_by_place(plan: Plan, tmp_path: Path) -> None:
    def replan(folder: Path) -> Plan:
        scenes = tuple(folder / scene.name for scene in plan.scenes)
        return replace(plan, scenes=scenes, data=(ProbeData("depth:scenes", scenes, scenes[:1]),))

    runner = Runner()
    folder = plan.scenes[0].parent
    run(replan(folder), runner, "5")
    moved = folder.rename(tmp_path / "elsewhere")
    assert run(replan(moved), runner, "5") == ["report"]
    # The same names, other frames.
    write_json(moved / "a" / "dslr" / "train_test_lists.json", {"train": ["other.JPG"], "test": []})
    names = run(replan(moved), runner, "5")
    assert sum(name.startswith("colour/") for name in names) == 1 and sum("probe/" in name for name in names) == 3


def test_commands__say_what_the_variant_is(plan: Plan) -> None:
    adapter = [cell for cell in find_missing(plan.create_cells(TABLES["6"])) if "adapter" in cell.name]
    finetune, probe = adapter
    assert finetune.command[finetune.command.index("--train") + 1] == "adapter"
    assert finetune.command[finetune.command.index("--max-steps") + 1] == "10"
    assert probe.command[probe.command.index("--finetuned") + 1] == str(finetune.result.parent)
    original, duplicate, _ = plan.create_cells(TABLES["13"])
    assert "--finetuned" not in original.command and not duplicate.needs
    [three] = [
        cell
        for cell in find_missing(plan.create_cells(TABLES["8"]))
        if cell.name.startswith("finetune/vit_tiny-d64-e3")
    ]
    assert three.command[three.command.index("--max-steps") + 1] == "30"


def test_paper_values__train_features_beside_the_colours_for_each_dimension(plan: Plan) -> None:
    cells = find_missing(replace(plan, paper=True, finetune_steps=None).create_cells(TABLES["5"]))
    runs = [cell for cell in cells if cell.name.startswith("colour/")]
    assert len(runs) == 6 and all("fit3d-features-paper" in cell.command for cell in runs)
    dims = [cell.command[cell.command.index("--pipeline.model.feature-dim") + 1] for cell in runs]
    assert sorted(dims) == ["128", "128", "32", "32", "64", "64"]
    assert all("fit3d_ns.cli.export" in cell.command for cell in cells if cell.name.startswith("scene/"))
    assert all("--paper" in cell.command for cell in cells if cell.name.startswith(("finetune/", "probe/")))


def test_interrupted_colour_runs__go_on_from_their_checkpoints(plan: Plan) -> None:
    cell = find_missing(plan.create_cells(TABLES["5"]))[0]
    assert cell.checkpoints is not None and "--load-dir" not in cell.create_command()
    cell.checkpoints.mkdir(parents=True)
    (cell.checkpoints / "step-000000009.ckpt").touch()
    assert cell.create_command()[-2:] == ["--load-dir", str(cell.checkpoints)]


def test_failures__leave_out_what_needs_them_and_run_the_rest(plan: Plan) -> None:
    runner = Runner(fails="-d32-")
    with pytest.raises(ValueError, match="4 cells failed") as error:
        run(plan, runner, "5")
    # The first scene of 32 features fails, the second too; fine-tuning and probe on them are never tried.
    assert runner.count("scene") == 6 and runner.count("finetune") == 2 and runner.count("probe") == 2
    assert "logs" in str(error.value) and runner.names[-1] == "report"
    assert [name.split("/")[0] for name in run(plan, Runner(), "5")] == [
        "scene",
        "scene",
        "finetune",
        "probe",
        "report",
    ]


def test_run_cells__a_command_that_leaves_no_result_has_failed(tmp_path: Path) -> None:
    cell = Cell("probe/x", (sys.executable, "-c", "print('hello')"), tmp_path / "x.json")
    assert run_cells([cell], tmp_path / "logs", ablations.execute_cell) == ["probe/x"]
    assert (tmp_path / "logs" / "probe-x.log").read_text() == "hello\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_execute_cell__a_signal_waits_until_the_command_has_saved(tmp_path: Path, name: str) -> None:
    child = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(0.6)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(130)\n"
        f"signal.signal(signal.{name}, save)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    driver = (
        f"import sys; sys.path.insert(0, {str(Path(ablations.__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from ablations import execute_cell\n"
        "from ablation_cells import Cell\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"execute_cell(Cell('x', (sys.executable, '-c', {child!r}), folder / 'result'), folder / 'log')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", driver], start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    assert process.wait(timeout=60) != 0
    assert (tmp_path / "saved").exists()


def test_small__probes_what_the_scenes_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = make_scene(tmp_path / "a", "render_depth", "labels")
    test = make_scene(tmp_path / "b", "render_depth")
    flags = SmallFlags(output=tmp_path / "out", train=(train,), test=(test,), show=True, tables=("1", "4", "11", "12"))
    run_small(flags)
    printed = capsys.readouterr()
    assert "depth-scenes" in printed.out and "consistency-scenes" in printed.out and "segmentation" not in printed.out
    assert "Table 4 is left out: it needs --more-backbones" in printed.err
    assert "Table 11 is left out" in printed.err and "RANDOM weights" in printed.err
    assert "correspondence" not in printed.out
    assert not (tmp_path / "out").exists()
    run_small(replace(flags, tables=("correspondence",)))
    listed = capsys.readouterr().out
    assert listed.count("missing probe/correspondence-scenes") == 4 and "depth-scenes" not in listed
    run_small(replace(flags, tables=("9",), more_backbones=("vit_small_patch16_224",)))
    listed = capsys.readouterr().out
    assert "vit_small_patch16_224" in listed and "vit_tiny_patch16_224" in listed


def test_small__sentences(tmp_path: Path) -> None:
    scene = make_scene(tmp_path / "a")
    for flags, sentence in (
        (SmallFlags(train=(scene,)), "--test"),
        (SmallFlags(train=(scene,), test=(tmp_path / "b",)), "No such folder"),
        (SmallFlags(train=(scene,), test=(scene,)), "neither depth"),
        (SmallFlags(tables=("14",)), "No such table: 14"),
        (SmallFlags(train=(scene,), test=(scene,), more_backbones=("vit=nowhere",)), "No such weights file"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_small(replace(flags, output=tmp_path / "out"))


def make_scannetpp(root: Path) -> Path:
    for name in ("a", "b", "c"):
        make_scene(root / "data" / name)
    (root / "splits").mkdir()
    (root / "splits" / "nvs_sem_train.txt").write_text("a\nb\n")
    (root / "splits" / "nvs_sem_val.txt").write_text("c\n")
    return root


def test_paper__every_table_has_its_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = {name: tmp_path for name in ("nyu", "nyu_depth", "scannet", "ade20k", "voc", "kitti", "imagenet")}
    run_paper(PaperFlags(scannetpp=make_scannetpp(tmp_path / "pp"), show=True, output=tmp_path / "out", **roots))
    printed = capsys.readouterr()
    assert "left out" not in printed.err and "goes without" not in printed.err
    groups = {part.split(":")[0]: part.splitlines()[1:] for part in printed.out.split("Table ")[1:]}
    # Three sets, original and ours; four backbones, two tasks; ...
    counts = {
        "1": 6,
        "2": 6,
        "3": 6,
        "4": 16,
        "5": 3,
        "6": 3,
        "7": 3,
        "8": 3,
        "9": 12,
        "10": 12,
        "11": 2,
        "12": 2,
        "13": 6,
    }
    assert {name: sum("missing" in line for line in groups[name]) for name in counts} == counts


def test_paper__tables_without_their_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = PaperFlags(scannetpp=make_scannetpp(tmp_path / "pp"), show=True, output=tmp_path / "out", paper=True)
    run_paper(flags)
    printed = capsys.readouterr()
    assert "Table 5 goes without segmentation:nyu: give its root with --nyu." in printed.err.replace("\n", " ")
    assert "Table leave-one-out is left out" in printed.err
    with pytest.raises(ValueError, match="--scannetpp"):
        run_paper(PaperFlags(show=True))


def test_plan__a_mixture_is_probed_where_stage_two_writes_it(plan: Plan) -> None:
    probes = [cell for cell in plan.create_cells(TABLES["keeping"]) if "wise-ft" in cell.name]
    assert len(probes) == 1
    command, finetuning = probes[0].command, probes[0].needs[0].command
    folder = Path(finetuning[finetuning.index("--output-dir") + 1])
    share = finetuning[finetuning.index("--wise-ft") + 1]
    assert command[command.index("--finetuned") + 1] == str(folder / f"wise-ft-{share}")


def test_slurm__arrays_wait_for_what_they_need_and_run_the_same_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch; `scripts/test_slurm.sh` hands the real one a graph of jobs."""
    train, test = (make_scene(tmp_path / name, "render_depth", "labels") for name in ("a", "b"))
    flags = SmallFlags(output=tmp_path / "out", train=(train,), test=(test,), tables=("5", "8"), on="slurm")
    run_small(replace(flags, dry_run=True))
    printed = capsys.readouterr().out
    # One colour run, three dimensions, three epochs of which one is a dimension too, two probes with each.
    assert re.search(r"colour +1 +1 ", printed) and re.search(r"scene +3 +3 ", printed), printed
    assert re.search(r"finetune +5 +3 ", printed) and not (tmp_path / "out").exists(), printed
    scripts: list[Path] = []
    monkeypatch.setattr("ablation_jobs._sbatch", lambda script: scripts.append(script) or str(100 + len(scripts)))
    run_small(flags)
    numbers = {script.stem: str(101 + place) for place, script in enumerate(scripts)}
    text = {script.stem: script.read_text() for script in scripts}
    for name, script in text.items():
        after = re.findall(r"--dependency=(\w+):([\d:]+)", script)
        kinds = {other.split("-")[0] for other, number in numbers.items() if after and number in after[0][1].split(":")}
        needed = {"colour": set(), "scene": {"colour"}, "finetune": {"scene"}, "probe": {"finetune"}}
        assert kinds == needed.get(name.split("-")[0], {"colour", "scene", "finetune", "probe"})
        assert not after or after[0][0] == ("afterany" if name == "report" else "afterok")
    subprocess.run(["bash", "-n", *map(str, scripts[:1])], check=True)
    # A task runs its own cell and no other.
    first = (tmp_path / "out" / "jobs" / "colour-0.txt").read_text().strip()
    words = shlex.split(re.search(r"^(.*ablations.py.*) &$", text["colour-0"], re.MULTILINE).group(1))
    ran: list[str] = []
    monkeypatch.setattr(ablations, "execute_cell", lambda cell, log: ran.append(cell.name) or pretend(cell) or True)
    ablations.main([first if word == "$cell" else word for word in words[2:]])
    assert ran == [first]
