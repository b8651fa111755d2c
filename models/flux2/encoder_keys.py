"""Names of FLUX.2's frozen networks in files: the VAE, and the language model that reads the captions."""

from models.common.kl_vae import kl_vae_key_map
from utils.weights.keymap import KeyMap, Rename

STATISTICS = ("bn.running_mean", "bn.running_var")
BATCH_COUNT = "bn.num_batches_tracked"
"""A number that the VAE's batch norm keeps; nothing reads it, and files hold it or not."""

DECODER_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    "self_attn.q_norm",  # Qwen3 only
    "self_attn.k_norm",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
CHECKPOINT_PREFIXES = tuple(f"text_encoders.{name}.transformer.model." for name in ("mistral3_24b", "qwen3_4b", "qwen3_8b"))
"""Where the language model lies in an all-in-one checkpoint of ComfyUI."""
PREFIXES = (*CHECKPOINT_PREFIXES, "model.language_model.", "language_model.model.", "model.")
"""Besides: Mistral 3 in memory and in diffusers' folder; Qwen3 everywhere, and both in ComfyUI's files.

What lacks the prefix (vision tower, projector, output layer, ComfyUI's tokenizer) is not read.
"""


def vae_key_map() -> KeyMap:
    """diffusers' AutoencoderKLFlux2 and the release's ``ae.safetensors`` (black-forest-labs/flux2, ``autoencoder.py``)."""
    return kl_vae_key_map(quant_in_coders=True, extra=[Rename(name, name) for name in STATISTICS], ignored=(BATCH_COUNT,))


def decoder_key_map() -> KeyMap:
    """transformers' MistralModel and Qwen3Model; every file has their names, after one of several prefixes."""
    names = ["embed_tokens.weight", "norm.weight", *(f"layers.{{i}}.{name}.weight" for name in DECODER_LAYER)]
    return KeyMap([Rename(name, name) for name in names], prefixes=PREFIXES)
