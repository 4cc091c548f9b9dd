"""`Material`: the colours of a solid of the synthetic rooms; and noise that is the same on every machine."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Colour = tuple[float, float, float]
_Values = Float[np.ndarray, " points"]


@dataclass(frozen=True)
class Material:
    """Colours of one solid."""

    pattern: str
    """Name of a pattern, one of `synthetic_textures.PATTERNS`."""
    colours: tuple[Colour, Colour, Colour]
    """Main, second and accent colour, in [0, 1]."""
    scale: float = 0.2
    """Length of a repeat in metres."""
    seed: int = 0
    """Tells apart solids of the same pattern."""
    grain: float = 0.18
    """Share by which noise of 3 to 30 cm darkens and brightens the colour, in [0, 1]."""
    emission: float = 0.0
    """Brightness of a surface that gives light; 0 = lit by the room."""


def value_noise(points: Float[np.ndarray, "points 3"], seed: int) -> _Values:
    """Smooth noise in [0, 1] with one independent value for each corner of the integer lattice."""
    base = np.floor(points)
    weights = points - base
    weights = weights * weights * (3.0 - 2.0 * weights)
    corner = base.astype(np.int64)
    noise = np.zeros(len(points), dtype=np.float32)
    for dx in (0, 1):
        wx = weights[:, 0] if dx else 1.0 - weights[:, 0]
        for dy in (0, 1):
            wxy = wx * (weights[:, 1] if dy else 1.0 - weights[:, 1])
            for dz in (0, 1):
                weight = wxy * (weights[:, 2] if dz else 1.0 - weights[:, 2])
                noise += weight * hash_lattice(corner[:, 0] + dx, corner[:, 1] + dy, corner[:, 2] + dz, seed)
    return noise


def hash_lattice(
    x: Int[np.ndarray, " points"], y: Int[np.ndarray, " points"], z: Int[np.ndarray, " points"], seed: int
) -> _Values:
    """Independent values in [0, 1) of integer positions, the same on every machine."""
    mixed = x.astype(np.uint32) * np.uint32(0x8DA6B343)
    mixed ^= y.astype(np.uint32) * np.uint32(0xD8163841)
    mixed ^= z.astype(np.uint32) * np.uint32(0xCB1AB31F)
    mixed ^= np.uint32(seed * 0x9E3779B1 % 2**32)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    mixed *= np.uint32(0x297A2D39)
    mixed ^= mixed >> np.uint32(15)
    return (mixed >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)
