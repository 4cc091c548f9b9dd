"""FiT3D for nerfstudio: lift 2D features into Gaussian splats, and fine-tune the 2D backbone on what they render."""

__version__ = "0.1.0"
