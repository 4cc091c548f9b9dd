"""From nothing to a fine-tuned backbone and one page about it; `quickstart.sh` installs and then runs this.

Every step is a command of the package with the arguments that are printed, run in this process: starting each anew
would take most of the time of small scenes. Only `ns-train` is a process of its own.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from story_page import Comparison, Story, describe_comparisons, draw_corner, summarise, write_story

from fit3d_ns.cli import export, finetune, lift, probe, synthesize
from fit3d_ns.features import create_extractor, describe_backbone
from fit3d_ns.report.compared_backbones import read_models
from fit3d_ns.scene import load_scene
from fit3d_ns.utils.errors import explain
from fit3d_ns.utils.progress import create_progress, notice

TOY = "toy_rooms_vit"
TOKENS_WIDE, TOKENS_HIGH = 40, 30
"""Rooms are photographed so large that the backbone sees a grid of so many tokens."""
STEP_LINE = re.compile(r"^(\d+) \([\d.]+%\)")
"""How nerfstudio's log says which step it is at."""
NUM_ROOMS = 3
"""The last one is in no training."""
LEARNING_RATE, GEOMETRY_WEIGHT = 1e-4, 1.5
"""Of stage II: a few steps should show, in depth as well."""
CELL_PIXELS = 3
"""Size of the smallest Gaussians: their pictures should be sharp."""
LIFT_PASSES = 4
"""Of the solve: four say in pictures what sixteen say."""
DEPTH_PROBE = ("--num-iterations", 300, "--batch-size", 4)
Main = Callable[[Sequence[str]], None]


class Quickstart:
    """Runs steps, says what they are and keeps what they took."""

    def __init__(self, arguments: argparse.Namespace):
        self.output: Path = arguments.output
        self.data: Path | None = arguments.data
        self.steps, self.finetune_steps = arguments.steps, arguments.finetune_steps
        self.stages: list[tuple[str, float, str]] = []
        self.num_stages = (2 if self.data else 3) + (2 if self.finetune_steps else 0)
        self.backbone, self.weights = choose_backbone(arguments.backbone, arguments.backbone_weights)
        self.flags = ["--backbone", self.backbone]
        if self.weights is not None:
            self.flags += ["--backbone-weights", str(self.weights)]
        self.model = self.backbone if self.weights is None else f"{self.backbone}={self.weights}"

    @contextmanager
    def stage(self, words: str) -> Iterator[None]:
        """Says what begins, and keeps how long it took and the first command line of it."""
        print(f"\n[{len(self.stages) + 1}/{self.num_stages}] {words}", flush=True)
        start, self.line = time.perf_counter(), ""
        yield
        self.stages.append((words, time.perf_counter() - start, self.line))

    def say(self, program: str, *arguments: object) -> None:
        """Shows the command that runs next as it can be copied."""
        line = quote(program, *map(shorten, arguments))
        self.line = self.line or line
        print(f"$ {line}", flush=True)

    def run(self, main: Main, program: str, *arguments: object) -> None:
        """Runs a command of ours in this process."""
        self.say(program, *arguments)
        main([str(argument) for argument in arguments])

    def train(self, scene: Path, run: Path) -> None:
        """Runs ns-train with its output in a log, and a bar of its steps on the terminal."""
        flags = [flag.replace("--", "--pipeline.datamanager.", 1) if flag[0] == "-" else flag for flag in self.flags]
        command = ["ns-train", "fit3d-features", "--data", scene, "--output-dir", run.parents[2], "--experiment-name",
                   run.parents[1].name, "--timestamp", run.name, "--vis", "tensorboard",
                   *flags]  # fmt: skip
        command += ["--max-num-iterations", self.steps] if self.steps else []
        log = self.output / "train.log"
        self.say(*command)
        print(f"(its output is in {shorten(log)})", flush=True)
        (run / "results.json").unlink(missing_ok=True)
        program = [str(Path(sys.executable).with_name("ns-train")), *map(str, command[1:])]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        assert process.stdout is not None
        total, step = self.steps or None, 0
        with log.open("w") as file, create_progress() as progress:
            bar = progress.add_task("Training splats", total=total, note="")
            for text in process.stdout:
                file.write(text)
                if total is None and (found := re.search(r"max_num_iterations=(\d+)", text)):
                    total = int(found[1])
                    progress.update(bar, total=total)
                # The log repeats its last lines.
                if (found := STEP_LINE.match(text)) and int(found[1]) > step:
                    step = int(found[1])
                    progress.update(bar, completed=step)
                    if progress.disable and total and step % max(total // 10, 1) == 0:
                        notice(f"Training splats: step {step} of {total}")
        if process.wait() or not (run / "results.json").is_file():
            last = log.read_text().strip().splitlines()[-1:] or ["no output"]
            raise ValueError(f"ns-train failed: {last[0]} (see {log})")

    def make_scenes(self) -> tuple[list[Path], list[Path]]:
        """The lifted scene files, and rooms that nothing is trained on, if they are synthetic."""
        features = f"features of {self.backbone}"
        if self.data is None:
            rooms, patch = self.output / "rooms", describe_backbone(self.backbone, self.weights).patch_size
            size = ["--width", TOKENS_WIDE * patch, "--height", TOKENS_HIGH * patch]
            with self.stage(f"Photographing {NUM_ROOMS} synthetic rooms, with exact depth"):
                self.run(synthesize.main, "fit3d-synthesize", "--output-dir", rooms, "--num-scenes", NUM_ROOMS, *size)
            *lifted, other = sorted(path for path in rooms.iterdir() if path.is_dir())
            with self.stage(
                f"Stage I: Gaussians from the depth of {len(lifted)} rooms, and the {features} lifted onto them"
            ):
                scenes = self.output / "scenes"
                self.run(lift.main, "fit3d-lift", "--surface", "depth", "--data", *lifted, "--output-path", scenes,
                         "--cell-pixels", CELL_PIXELS, "--max-passes", LIFT_PASSES, *self.flags)  # fmt: skip
            return [scenes / f"{room.name}.safetensors" for room in lifted], [other]
        name = lift.name_capture(self.data)
        run, path = (
            self.output / "runs" / name / "fit3d-features" / "latest",
            self.output / "scenes" / f"{name}.safetensors",
        )
        with self.stage(f"Stage I: splats of {name}, trained on its photographs, and the {features} lifted onto them"):
            self.train(self.data, run)
            self.run(export.main, "fit3d-export", "--load-config", run / "config.yml", "--output-path", path)
        return [path], []

    def teach(self, scenes: Sequence[Path]) -> Path:
        """Fine-tunes the backbone; returns its folder."""
        folder = self.output / "finetuned"
        with self.stage(f"Stage II: what was lifted teaches the backbone, {self.finetune_steps} steps"):
            steps = ["--max-steps", self.finetune_steps, "--learning-rate", LEARNING_RATE, "--resume", "never"]
            steps += ["--schedule", "cosine", "--geometry-weight", GEOMETRY_WEIGHT]
            self.run(finetune.main, "fit3d-finetune", "--ckpts", *scenes, "--output-dir", folder, *steps)
        return folder

    def measure(
        self, scenes: Sequence[Path], others: Sequence[Path], finetuned: Path
    ) -> tuple[list[Comparison], list[Path]]:
        """Compares original and fine-tuned; also returns the folders of predicted depth."""
        comparisons, predictions = [], []
        where, views = "in a room that was in no training", ["--max-views", "12", "--max-pairs", "40"]
        if not others:
            held_out = len(load_scene(scenes[0]).posed_capture.select("val", "test"))
            where = "between held-out views of the scene" if held_out > 1 else "between views it was TRAINED on"
            views += ["--splits", "val", "test"] if held_out > 1 else []
        tasks: list[tuple[str, list[object]]] = [("consistency", ["--test", *(others or scenes), *views])]
        if others:
            trained = [self.output / "rooms" / scene.stem for scene in scenes]
            tasks.append(("depth", ["--train", *trained, "--test", *others, *DEPTH_PROBE]))
        with self.stage("Stage III: did it help? The original and the fine-tuned backbone, measured alike"):
            for task, flags in tasks:
                records = []
                for assembly in ("original", "finetuned"):
                    records.append(self.output / "probes" / f"{task}-{assembly}.json")
                    more: list[object] = ["--assembly", assembly, "--output-path", records[-1]]
                    more += ["--finetuned", finetuned] if assembly == "finetuned" else []
                    if task == "depth":
                        predictions.append(self.output / "predictions" / assembly)
                        more += ["--predictions", predictions[-1]]
                    self.run(probe.main, "fit3d-probe", task, *flags, *self.flags, *more)
                measures = ("depth",) if task == "depth" else ("recall", "consistency")
                comparisons += [Comparison(measure, records[0], records[1], where) for measure in measures]
        return comparisons, predictions

    def list_next(self, scene: Path, finetuned: Path) -> list[tuple[str, str]]:
        """Commands for data of one's own."""
        data = self.data or Path("MY_SCENE")
        weights = [] if self.weights is None else ["--pipeline.datamanager.backbone-weights", self.weights]
        train = quote("ns-train", "fit3d-features", "--data", data, "--pipeline.datamanager.backbone", self.backbone,
                      *map(shorten, weights))  # fmt: skip
        return [
            (
                "A folder of photographs gets cameras and is a scene (skip it for ScanNet++, nerfstudio and COLMAP "
                "folders):",
                "fit3d-prepare photos MY_SCENE",
            ),
            ("Stage I, live in the viewer; it prints where its config.yml is:", train),
            (
                "Stages II and III with what you have lifted:",
                quote("fit3d-finetune", "--ckpts", f"outputs/{data.name}", "--output-dir", "my_vit")
                + "\n"
                + quote(
                    "fit3d-report",
                    "features",
                    "MY_PHOTO.jpg",
                    "--models",
                    self.model,
                    "my_vit",
                    "--output-path",
                    "my_features.png",
                ),  # fmt: skip
            ),
            (
                "Walk through a scene that this quickstart lifted, coloured by its features:",
                quote("fit3d-view", shorten(scene), "--finetuned", shorten(finetuned)),
            ),
            (
                "Look at what this quickstart made: drop a picture of your own, click a point:",
                quote("fit3d-demo", *map(shorten, self.flags), "--finetuned", shorten(finetuned)),
            ),
        ]


def choose_backbone(name: str | None, weights: Path | None) -> tuple[str, Path | None]:
    """What was asked for; else DINOv2-small where its weights can be had, else the toy of the package."""
    if name is not None or weights is not None:
        return name or "dinov2_small", weights
    print("Looking for DINOv2-small's weights (88 MB, downloaded once) ...", flush=True)
    try:
        create_extractor("dinov2_small")
    except ValueError:
        print(
            "They are not on this machine and cannot be downloaded here (--backbone NAME --backbone-weights FILE takes "
            f"them from a file). Going on with {TOY}, a small network that comes with fit3d_ns and has seen synthetic "
            "rooms only: good for this tour, too small for real use."
        )
        return TOY, None
    return "dinov2_small", None


def quote(*arguments: object) -> str:
    """A command line to copy and paste."""
    return shlex.join(map(str, arguments))


def shorten(argument: object) -> str:
    """A path below the current folder without that folder."""
    text = str(argument)
    return os.path.relpath(text) if text.startswith(f"{Path.cwd()}{os.sep}") else text


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description="From a clone to a fine-tuned backbone.")
    parser.add_argument("--data", type=Path, help="your capture (ScanNet++, nerfstudio or COLMAP layout); by default "
                        "synthetic rooms")  # fmt: skip
    parser.add_argument("--backbone", help="name of a vision transformer; by default dinov2_small, or the toy that "
                        "comes with the package where nothing can be downloaded")  # fmt: skip
    parser.add_argument("--backbone-weights", type=Path, help="its weights from a file")
    parser.add_argument("--steps", type=int, help="steps of ns-train for --data; by default its own number")
    parser.add_argument("--finetune-steps", type=int, default=200, help="0 stops before stages II and III (200)")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder of all results (quickstart)")
    return parser.parse_args()


def main() -> None:
    """Entry point."""
    arguments = parse()
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tour = Quickstart(arguments)
    scenes, others = tour.make_scenes()
    [backbones] = read_models([tour.model])
    picture = tour.output / "first_picture.png"
    with tour.stage("First picture: two views of one corner, and the lifted features in the same colours"):
        draw_corner(scenes[0], backbones, picture)
    print(f"First picture: {shorten(picture)}")
    if tour.finetune_steps == 0:
        return
    finetuned = tour.teach(scenes)
    comparisons, predictions = tour.measure(scenes, others, finetuned)
    is_random = describe_backbone(tour.backbone, tour.weights).is_random
    notes = ["A scene or two, one seed, a few minutes: a tour, no measurement. docs/results.md has several of each."]
    if tour.backbone == TOY:
        notes.append(f"{TOY} is a toy that has seen synthetic rooms only; use DINOv2 or another real network next.")
    if is_random:
        notes.insert(0, "RANDOM WEIGHTS: this shows that the tools work, and nothing about features.")
    story = Story(
        f"fit3d_ns: {tour.backbone} learns 3D from {'synthetic rooms' if tour.data is None else scenes[0].stem}",
        scenes[0], comparisons, predictions, tour.stages, tour.list_next(scenes[0], finetuned), notes,
    )  # fmt: skip
    [backbones] = read_models([tour.model, str(finetuned)])
    page = write_story(story, backbones, tour.output)
    print("\n" + "\n".join(["  " + line for line in describe_comparisons(comparisons)]))
    print(f"{summarise(comparisons)}\n\nThe page about it: {page}\nRun next (source .venv/bin/activate first):")
    for _, line in story.next_commands:
        print("  " + line.replace("\n", "\n  "))
    if is_random:
        print("The backbone had RANDOM weights: give --backbone-weights FILE, or run where downloads work.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get("FIT3D_DEBUG"):
            raise
        print(f"quickstart: error: {sentence}", file=sys.stderr)
        sys.exit(1)
