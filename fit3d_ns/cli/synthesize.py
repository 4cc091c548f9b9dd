"""`fit3d-synthesize`: makes small furnished rooms in ScanNet++'s layout, to try everything on."""

from fit3d_ns.cli.command import create_main
from fit3d_ns.synthetic.synthesize import METRICS_NAME, SynthesisConfig, synthesize_scenes


def synthesize(config: SynthesisConfig) -> None:
    written = synthesize_scenes(config)
    for scene in written["scenes"]:
        print(
            f"{config.output_dir / scene['name']}: {scene['train_frames']} train and {scene['test_frames']} test "
            f"frames, {scene['points']} points, {scene['seconds']:.1f} s"
        )
    print(f"Metrics: {config.output_dir / METRICS_NAME}")


main = create_main("fit3d-synthesize", SynthesisConfig, synthesize)
