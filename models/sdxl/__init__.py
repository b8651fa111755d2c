"""Stable Diffusion XL (Stability AI): text to image with a UNet.

Releases: stable-diffusion-xl-base-1.0 and the many models made from it, as one checkpoint file with all networks, as diffusers
folders, or as ComfyUI's single files.  Inputs: pictures and captions.  Quirks: it predicts the noise, or the velocity in models
that say so (``v_pred``, ``ztsnr``); it is told the size and the crop of the picture; its VAE works in fp32 alone; text encoder 2
pads with token 0, and both give their last but one layer.
"""

from models.sdxl.family import Family

__all__ = ["Family"]
