"""Wan 2.1 and 2.2 (Alibaba): text to video, image to video, first and last frame to video.

Releases: Wan2.1-T2V-1.3B, T2V-14B, I2V-14B-480P and -720P, FLF2V-14B-720P; Wan2.2-T2V-A14B, I2V-A14B (one of their two transformers
or both in a run) and TI2V-5B; as diffusers folders, as original release folders, or as ComfyUI's files.  Inputs: clips of 4k + 1
frames at 16 frames a second (TI2V-5B: 24), or pictures; captions; for image to video the first frame, or the first and the last.
Quirks: text is padded with zeros to 512 tokens after the encoder, never before; with the CLIP branch the attention takes exactly
the last 512 context tokens as text; the model wants the timestep times 1000, in fp32.  Wan 2.2 A14B differs from 2.1 by its
timesteps, and by having no CLIP branch; TI2V-5B has a VAE of its own, and a first frame is given as clean latents with time 0.
"""

from models.wan.family import Family

__all__ = ["Family"]
