"""FLUX.2 (Black Forest Labs): text to image, and editing with reference pictures.

Releases: FLUX.2-dev (8 + 48 blocks, Mistral Small 3.2 as text encoder, told a guidance) and FLUX.2-klein 4B and 9B with their
base models (Qwen3, no guidance), as diffusers folders, as original release files, or as ComfyUI's files; sizes are read from the
weights.  Inputs: pictures, captions, and any number of control pictures of each, none too.  Quirks: no biases; all blocks share
three modulation modules; latents are normalised by the running statistics of the VAE's batch norm; the text is hidden states of
a language model, padded to 512 tokens on the tokenizer's own side and read without a mask; positions have four axes, and the
references are at 10, 20, … on the first.
"""

from models.flux2.family import Family

__all__ = ["Family"]
