"""`fit3d-synthesize`: makes small furnished rooms in ScanNet++'s layout, to try everything on."""

from collections.abc import Sequence

from fit3d_ns.cli.command import run_command
from fit3d_ns.synthetic.synthesize import METRICS_NAME, SynthesisConfig, synthesize_scenes


def main(args: Sequence[str] | None = None) -> None:
    run_command(
        SynthesisConfig,
        synthesize,
        prog="fit3d-synthesize",
        description="Makes procedural indoor scenes with exact colour, depth, labels, masks and points.",
        examples=("--output-dir rooms", "--output-dir rooms --num-scenes 4 --width 320 --height 240 --seed 1"),
        args=args,
    )


def synthesize(config: SynthesisConfig) -> None:
    written = synthesize_scenes(config)
    for scene in written["scenes"]:
        print(
            f"{config.output_dir / scene['name']}: {scene['train_frames']} train and {scene['test_frames']} test "
            f"frames, {scene['points']} points, {scene['seconds']:.1f} s"
        )
    print(f"Metrics: {config.output_dir / METRICS_NAME}")


if __name__ == "__main__":
    main()
