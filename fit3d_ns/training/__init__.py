"""What every training here shares: the accelerator and its processes, the order of images, and checkpoints."""
