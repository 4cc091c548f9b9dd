"""Arrays that kernels need for a moment, kept from one call to the next: fresh memory costs a page fault every 4 KB.

The C library gives blocks of over 32 MB back to the system when they are freed; in a lift onto 140,000 Gaussians, half
of the time went into getting them again.
"""

import threading

import numpy as np

LARGEST_KEPT_BYTES = 256_000_000
"""Larger arrays are made anew each time; a thread keeps at most this much under each name."""

_kept = threading.local()


def take_zeros(name: str, size: int) -> np.ndarray:
    """Zeros, float32 [size], valid until this thread asks for the same name again."""
    if 4 * size > LARGEST_KEPT_BYTES:
        return np.zeros(size, np.float32)
    known: np.ndarray | None = getattr(_kept, name, None)
    if known is None or known.size < size:
        # A little more than was asked for: views of one scene differ in size.
        known = np.zeros(min(size + size // 4, LARGEST_KEPT_BYTES // 4), np.float32)
        setattr(_kept, name, known)
        return known[:size]
    array = known[:size]
    array.fill(0.0)
    return array
