"""Stage III: what are the features worth? Linear probes, multi-view consistency and correspondence."""

from fit3d_ns.probing.classification.probe import ClassificationConfig
from fit3d_ns.probing.depth.probe import DepthConfig
from fit3d_ns.probing.frozen_features import Assembly, BackboneConfig
from fit3d_ns.probing.head_probe import RunConfig
from fit3d_ns.probing.multiview.probe import MultiviewConfig
from fit3d_ns.probing.probe_runs import ProbeRequest, run_probe
from fit3d_ns.probing.segmentation.probe import SegmentationConfig

__all__ = [
    "Assembly",
    "BackboneConfig",
    "ClassificationConfig",
    "DepthConfig",
    "MultiviewConfig",
    "ProbeRequest",
    "RunConfig",
    "SegmentationConfig",
    "run_probe",
]
