"""Stable Diffusion 3 (Stability AI): text to image.

Releases: SD3 Medium, SD3.5 Large (and Large Turbo, which has its shapes), SD3.5 Medium; as diffusers folders, as all-in-one
checkpoints, or as ComfyUI's split files.  Inputs: pictures with captions.
Quirks: three text encoders side by side (CLIP-L, CLIP-G, T5), of which T5 may be left out and each may be dropped at random; SD3.5
Medium has a second attention in its first blocks; the last block reads the text and does not write it; the model wants the timestep
times 1000; positions are a fixed table that is cropped, so pictures have a largest size.
"""

from models.sd3.family import Family

__all__ = ["Family"]
