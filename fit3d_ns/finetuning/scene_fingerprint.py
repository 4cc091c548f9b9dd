"""`compute_fingerprint`: names a scene by its content, wherever its file lies, without reading all of it."""

from fit3d_ns.scene import FeatureScene
from fit3d_ns.utils.files import hash_bytes

_NUM_HASHED_BLOCKS, _HASHED_ROWS = 4, 256
"""Rows that name a scene: a few whole stretches, because single rows far apart would page in the whole file."""


def compute_fingerprint(scene: FeatureScene) -> str:
    """16 hexadecimal digits from the decoder, stretches of all the Gaussians' tensors, and which views were lifted.

    Every tensor counts: whatever a target is rendered or weighted from must change the name.

    Args:
        scene: On the CPU.
    """
    count = scene.gaussians.num_gaussians
    starts = sorted({count * block // _NUM_HASHED_BLOCKS for block in range(_NUM_HASHED_BLOCKS)})
    tensors = [value.detach() for value in scene.decoder.parameters()]
    for value in scene.gaussians.tensors().values():
        tensors += [value[start : start + _HASHED_ROWS] for start in starts]
    settings = f"{count} {scene.rasterize_mode} {scene.eps2d}"
    if scene.lifted_views is not None:
        settings += f" {' '.join(scene.lifted_views)}"
    return hash_bytes(settings.encode(), *(tensor.contiguous().numpy().tobytes() for tensor in tensors))
