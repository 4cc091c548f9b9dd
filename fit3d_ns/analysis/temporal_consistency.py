"""Temporal consistency: does a token stay the same while the thing it sees moves through the video?

Comparing tokens of consecutive frames at the same place measures how little the video moves. Here each token centre of
a frame is followed into the next one by dense optical flow (Farneback's, of the photographs alone, hence the same for
every backbone), and its token is compared with the next frame's token map, read bilinearly where the point went. Left
out are points that leave the picture, that flow forth and back does not bring home to within a pixel (occlusions), or
that look different where they went (cuts, where the flow is zero both ways).

Flow is blind where nothing has texture: there a point counts as resting. Bilinear reading costs a little agreement
between patches even for perfect tokens. Both hit all backbones alike, so compare metrics of one clip only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from fit3d_ns.analysis.correspondence import create_grid_points, sample_tokens
from fit3d_ns.utils.progress import track

MAX_ROUND_TRIP = 1.0
"""Largest distance in pixels between a point and where flow forth and back brings it."""
MAX_GREY_DIFFERENCE = 0.1
"""Largest difference of the blurred grey value at a point and where it went, of the range [0, 1]."""
_BLUR_WIDTH = 9
"""Side in pixels of the square over which grey values are averaged for that, odd."""
_FLOW_SETTINGS = (0.5, 5, 21, 3, 7, 1.5, 0)
"""Farneback's scale between levels, levels, window in pixels (about a patch), iterations, and its polynomials."""


@dataclass(frozen=True)
class TemporalMetrics:
    """Metrics of one backbone on one clip, pooled over all pairs of consecutive frames; NaN without points."""

    mean_cosine: float
    """Cosine of a token and the one it became, in [-1, 1]; it also rises when all tokens become alike."""
    centred_cosine: float
    """The same after the clip's mean token is subtracted: the number to compare; 0 for unrelated tokens."""
    num_points: int
    """Token centres that were followed."""
    followed_share: float
    """Their share of all token centres, in [0, 1]."""
    num_pairs: int
    """Pairs of consecutive frames."""


@torch.no_grad()
def compute_temporal_consistency(
    clips: Sequence[Sequence[Float[Tensor, "..."]]], images: Sequence[UInt8[Tensor, "height width 3"]]
) -> list[TemporalMetrics]:
    """Follows the tokens of several backbones through one clip, given as two or more images of one size.

    `clips` holds for each backbone its token maps [h, w, E] of all frames.
    """
    # Each backbone's mean token of the clip.
    means = [torch.stack([tokens.double().mean(dim=(0, 1)) for tokens in maps]).mean(dim=0).float() for maps in clips]
    grey = [cv2.cvtColor(image.cpu().numpy(), cv2.COLOR_RGB2GRAY) for image in images]
    agreements: list[list[Tensor]] = [[] for _ in clips]
    for index in track(range(len(images) - 1), "Following tokens by optical flow"):
        pair = grey[index : index + 2]
        flows = _compute_flow(*pair), _compute_flow(*pair[::-1])
        for maps, mean, rows in zip(clips, means, agreements, strict=True):
            rows.append(_compare(maps[index].float(), maps[index + 1].float(), mean, flows, pair))
    metrics = []
    for maps, rows in zip(clips, agreements, strict=True):
        followed = torch.cat(rows)
        total = sum(tokens.shape[0] * tokens.shape[1] for tokens in maps[:-1])
        cosine, centred = followed.mean(dim=0).tolist()
        metrics.append(TemporalMetrics(cosine, centred, len(followed), len(followed) / total, len(rows)))
    return metrics


def _compute_flow(grey: np.ndarray, next_grey: np.ndarray) -> Float[Tensor, "height width 2"]:
    flow = np.zeros((*grey.shape, 2), dtype=np.float32)
    return torch.from_numpy(np.asarray(cv2.calcOpticalFlowFarneback(grey, next_grey, flow, *_FLOW_SETTINGS)))


def _compare(
    tokens: Float[Tensor, "h w embed"],
    next_tokens: Float[Tensor, "h w embed"],
    mean: Float[Tensor, " embed"],
    flows: tuple[Float[Tensor, "height width 2"], Float[Tensor, "height width 2"]],
    grey: Sequence[np.ndarray],
) -> Float[Tensor, "points 2"]:
    """Cosine and centred cosine of each token that can be followed, by flow (x, y) in pixels forth and back."""
    height, width = grey[0].shape
    points = create_grid_points(width, height, (tokens.shape[0], tokens.shape[1]))
    targets = points + sample_tokens(flows[0], points, width, height)
    returned = targets + sample_tokens(flows[1], targets, width, height)
    blurred = [cv2.blur(image / np.float32(255.0), (_BLUR_WIDTH, _BLUR_WIDTH)) for image in grey]
    before, after = (
        sample_tokens(torch.from_numpy(image)[..., None], places, width, height)[:, 0]
        for image, places in zip(blurred, (points, targets), strict=True)
    )
    is_inside = ((targets >= 0) & (targets <= targets.new_tensor([width, height]))).all(dim=1)
    is_home = (returned - points).norm(dim=1) <= MAX_ROUND_TRIP
    is_followed = is_inside & is_home & ((before - after).abs() <= MAX_GREY_DIFFERENCE)
    # (h, w, e) -> (h*w, e), in the order of the points
    own = tokens.flatten(0, 1)[is_followed.to(tokens.device)]
    seen = sample_tokens(next_tokens, targets[is_followed], width, height)
    cosines = [F.cosine_similarity(own - shift, seen - shift, dim=1) for shift in (torch.zeros_like(mean), mean)]
    return torch.stack(cosines, dim=1).double().cpu()
