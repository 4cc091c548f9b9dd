"""FiT3D for nerfstudio: lift 2D features into Gaussian splats, and fine-tune the 2D backbone on what they render."""

import os

# By default, idle OpenMP threads spin and take the cores from whatever else runs. torch reads this when it is loaded,
# which for the fit3d commands is after this line.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.2.0"
