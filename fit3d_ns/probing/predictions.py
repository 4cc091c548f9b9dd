"""What a trained head says about some test frames, as pictures on disk for comparisons (figures 5 to 7).

FOLDER/predictions.json      task, assembly, seed, backbones, class names or depth range, the frames
       000_image.png         the photograph
       000_truth.png         labels (8-bit indices, 255 = does not count) or depth (16-bit millimetres, 0 = none)
       000_prediction.png    the same for the prediction
"""

from pathlib import Path
from typing import Any

import torch

from fit3d_ns.data.images import save_depth, save_image, save_index_map
from fit3d_ns.probing.depth.probe import DepthProbe
from fit3d_ns.probing.protocol import SeedOutcome, spread_over
from fit3d_ns.probing.segmentation.probe import SegmentationProbe
from fit3d_ns.utils.files import write_json


def save_predictions(
    probe: SegmentationProbe | DepthProbe, outcome: SeedOutcome, folder: Path, num_frames: int = 8
) -> None:
    """Writes test frames, evenly spread, with truth and prediction; the list comes last.

    Args:
        probe: The probe that trained the head.
        outcome: One of its seeds, with its head.
        folder: Made if it is missing.
        num_frames: How many frames, at most.
    """
    assert outcome.head is not None
    folder.mkdir(parents=True, exist_ok=True)
    test = probe.sets.test
    units = choose_depth_units(test.depth.max_depth)
    names = []
    for number, frame in enumerate(spread_over(test.frames, num_frames)):
        prefix = folder / f"{number:03d}"
        if isinstance(probe, SegmentationProbe):
            assert frame.load_labels is not None
            labels = frame.load_labels()
            logits = probe.predict_logits(outcome.head, frame, (labels.shape[0], labels.shape[1]))
            image = frame.load_image()
            save_index_map(labels, Path(f"{prefix}_truth.png"))
            save_index_map(logits.argmax(dim=0).to("cpu", torch.uint8), Path(f"{prefix}_prediction.png"))
        else:
            depth = probe.pictures.load_depth(frame)
            image = torch.from_numpy(probe.pictures.load_image(frame).copy())
            predicted = probe.predict(outcome.head, frame, (depth.shape[0], depth.shape[1]))
            save_depth(depth, Path(f"{prefix}_truth.png"), units)
            save_depth(predicted.cpu(), Path(f"{prefix}_prediction.png"), units)
        save_image(image, Path(f"{prefix}_image.png"))
        names.append(frame.name)
    described = [extractor.description.to_metadata() for extractor in probe.backbones.extractors]
    content: dict[str, Any] = {
        "task": "segmentation" if isinstance(probe, SegmentationProbe) else "depth",
        "assembly": probe.assembly,
        "seed": outcome.seed,
        "backbones": described,
        "is_random": any(backbone["is_random"] for backbone in described),
        "class_names": list(test.class_names),
        "max_depth": test.depth.max_depth,
        "depth_units_per_metre": units,
        "frames": names,
    }
    write_json(folder / "predictions.json", content)


def choose_depth_units(max_depth: float) -> float:
    """Units per metre of 16-bit depth maps: millimetres, or KITTI's 1/256 m where depths reach beyond 65 m."""
    return 1000.0 if max_depth <= 65.0 else 256.0
