"""Wan 2.1 (Alibaba): text to video and image to video.

Releases: Wan2.1-T2V-1.3B, T2V-14B, I2V-14B-480P and -720P, as diffusers folders, as original release folders, or as ComfyUI's
single files.  Inputs: clips of 4k + 1 frames at 16 frames a second, or pictures; captions; for image to video the first frame.
Quirks: text is padded with zeros to 512 tokens after the encoder, never before; with the CLIP branch the attention takes exactly
the last 512 context tokens as text; the model wants the timestep times 1000, in fp32.
"""

from models.wan.family import Family

__all__ = ["Family"]
