"""How the kernels of the CPU backend are compiled: one decorator for all of them."""

from numba import njit

compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})
"""No bounds checks, no interpreter lock, division by zero gives infinity; kept on disk after the first use.

Products and sums may be fused, but never reordered, so that results do not depend on how a loop was compiled.
"""
