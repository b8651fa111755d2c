"""FLUX.1 (Black Forest Labs): text to picture, and editing of pictures.

Releases: FLUX.1-dev (and models of its shape, such as Krea-dev), FLUX.1-schnell and FLUX.1-Kontext-dev, as diffusers folders, as
BFL's single files, or as ComfyUI's files.  Inputs: pictures and captions; for Kontext one or more reference pictures for each.
Quirks: T5 reads padding, without a mask; dev and Kontext read a guidance value, and training gives 1; nothing in the weights tells
Kontext from dev; the model multiplies the timestep by 1000 itself.
"""

from models.flux.family import Family

__all__ = ["Family"]
