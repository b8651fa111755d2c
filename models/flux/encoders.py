"""FLUX.1's frozen networks as encoders whose outputs are cached.

The VAE always runs in fp32: in bf16 the latents, which are the targets of training, would be off.  The text encoders run in the
config's ``dtype``, as inference programs run them.
"""

import torch

from models.common.clip import ClipTextEncoder
from models.common.kl_encoders import KlReferenceEncoder, KlVaeEncoder
from models.common.t5 import T5TextEncoder
from models.flux.files import FluxFiles
from utils.data.encoders import ConditionEncoder

T5_TOKENS = {"flux1-dev": 512, "flux1-schnell": 256, "flux1-kontext": 512}
"""Length to which T5's text is padded, and at which it is cut (diffusers' FluxPipeline; schnell was distilled with 256)."""


def flux_encoders(files: FluxFiles, dtype: torch.dtype) -> list[ConditionEncoder]:
    """For Kontext ``references``, then ``latents``, ``pooled`` and ``text``; unloaded."""
    # First, so that a data set without control pictures is refused before anything that takes long.
    editing = [KlReferenceEncoder(files.vae, torch.float32)] if files.variant == "flux1-kontext" else []
    return [
        *editing,
        KlVaeEncoder(files.vae, torch.float32),
        ClipTextEncoder(files.text_encoder, files.tokenizer, dtype),
        T5TextEncoder(files.text_encoder_2, files.tokenizer_2, dtype, T5_TOKENS[files.variant]),
    ]
