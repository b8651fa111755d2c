"""Weights on the disk: names, reading, checkpoints that resume a run, exports for other programs."""
