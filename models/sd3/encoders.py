"""SD3's frozen networks as encoders whose outputs are cached.

The text encoders run in the config's ``dtype``, as plain modules of that dtype.  CLIP's captions are cut to 77 tokens, T5's to
``t5_max_tokens``; both are padded and not masked, as diffusers' StableDiffusion3Pipeline does it.
"""

import torch
from torch import Tensor

from models.common.clip import ClipText, ClipTextEncoder
from models.common.kl_encoders import KlVaeEncoder
from models.common.t5 import T5TextEncoder
from models.sd3.files import Sd3Files
from utils.data.encoders import ConditionEncoder


class _HiddenClipEncoder(ClipTextEncoder):
    """A caption to ``<name>`` [77, width], the last but one hidden state, and ``<name>_pooled`` [width]."""

    def fields(self, text: ClipText) -> dict[str, Tensor]:
        return {self.name: text.hidden[-2].cpu(), f"{self.name}_pooled": text.pooled.cpu()}


class ClipLEncoder(_HiddenClipEncoder):
    name = "clip_l"


class ClipGEncoder(_HiddenClipEncoder):
    name = "clip_g"


def sd3_encoders(files: Sd3Files, dtype: torch.dtype, t5_max_tokens: int) -> list[ConditionEncoder]:
    """The VAE (``latents``), the two CLIPs, and T5 (``text``) if the model is used with it; unloaded."""
    encoders: list[ConditionEncoder] = [
        # Always fp32: its latents are the targets of training.
        KlVaeEncoder(files.vae, torch.float32),
        ClipLEncoder(files.clip_l, files.clip_tokenizer, dtype, pad="end"),
        ClipGEncoder(files.clip_g, files.clip_tokenizer, dtype, pad="zero"),
    ]
    if files.t5 is not None and files.t5_tokenizer is not None:
        encoders.append(T5TextEncoder(files.t5, files.t5_tokenizer, dtype, t5_max_tokens))
    return encoders
