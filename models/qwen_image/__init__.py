"""Qwen-Image (Alibaba): text to picture, and editing of one or several pictures.

Releases: Qwen-Image, Qwen-Image-Edit, Qwen-Image-Edit-2509 (Edit-Plus, several pictures) and Qwen-Image-Edit-2511 (``zero_cond_t``:
the tokens of the pictures to edit are modulated with time 0), as diffusers folders, which is how they are published, or as
ComfyUI's single files.  Inputs: pictures and captions; for editing one or more control pictures.  Quirks: the text has its own
length for each caption and is padded in the transformer, with a mask; the text encoder sees the control pictures too; the weights
of Qwen-Image, Edit and Edit-Plus have the same names and shapes, so ``[model] variant`` says which it is where no file does.
"""

from models.qwen_image.family import Family

__all__ = ["Family"]
