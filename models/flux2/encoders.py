"""FLUX.2's frozen networks as encoders whose outputs are cached.

The text encoder runs in the config's ``dtype``, as it is released in bf16.  The VAE always runs in fp32, with the statistics of its
batch norm: its latents are the targets of training, and the text is what inference sees.

Items are encoded one after the other, so that what is cached does not depend on what else was in the call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.common.latent_encoders import FrozenEncoder, LatentEncoder
from models.common.networks import OpenedNetwork, open_network
from models.flux2.chat import CHATS, TOKENS, WHOLE, ChatTokenizer
from models.flux2.files import Flux2Files
from models.flux2.networks import NETWORKS
from models.flux2.sizes import HIDDEN_STATES
from utils.data.encoders import ConditionEncoder, EncodeItem, TokenLength


def flux2_encoders(files: Flux2Files, dtype: torch.dtype) -> list[ConditionEncoder]:
    """The encoders of both variants, unloaded."""
    vae = open_network(NETWORKS["vae"], files.vae)
    return [
        Flux2VaeEncoder(vae, torch.float32),
        Flux2ReferenceEncoder(vae, torch.float32),
        Flux2TextEncoder(open_network(NETWORKS["text_encoder"], files.text_encoder), files.tokenizer, dtype),
    ]


class Flux2VaeEncoder(LatentEncoder):
    """A picture to ``latents`` [128, 1, H / 16, W / 16], fp32, normalised.

    They are the mode of the VAE's distribution, 2 x 2 neighbours as channels in the order (channel, row, column), normalised with
    the running statistics of the VAE's batch norm, as diffusers' Flux2Pipeline encodes its reference pictures.
    """

    name = "vae"
    reads = "pixels"

    def __init__(self, opened: OpenedNetwork, dtype: torch.dtype):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config = {name: value for name, value in opened.on_meta().config.items() if not name.startswith("_")}

    def settings(self) -> dict[str, Any]:
        return {"config": self.config}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"latents": self._latents(item.pixels)[:, None]} for item in items]

    def _latents(self, pixels: Tensor) -> Tensor:
        """[3, 1, H, W] to [128, H / 16, W / 16] on the CPU."""
        latents = self.network.encode(pixels[:, 0][None].to(self.device, self.dtype)).latent_dist.mode()[0]
        channels, height, width = latents.shape
        patches = latents.view(channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3)
        mean, deviation = self._statistics()
        return ((patches.reshape(4 * channels, height // 2, width // 2) - mean) / deviation).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        patches = latents[:, 0].to(self.device, self.dtype) * deviation + mean
        channels, height, width = patches.shape
        restored = patches.view(channels // 4, 2, 2, height, width).permute(0, 3, 1, 4, 2)
        restored = restored.reshape(1, channels // 4, 2 * height, 2 * width)
        return self.network.decode(restored).sample[0][:, None].float().cpu()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the patches, each [128, 1, 1]."""
        norm = self.network.bn
        mean, variance = (value.view(-1, 1, 1) for value in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + self.config["batch_norm_eps"])


class Flux2ReferenceEncoder(Flux2VaeEncoder):
    """The control pictures of an item to ``references`` [n, 128, H / 16, W / 16]; n is 0 for an item without."""

    name = "references"
    reads = "controls"

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"references": self._references(item.controls)} for item in items]

    def _references(self, controls: tuple[Tensor, ...]) -> Tensor:
        if not controls:
            return torch.zeros(0, self.network.bn.num_features, 1, 1)
        return torch.stack([self._latents(picture) for picture in controls])


class Flux2TextEncoder(FrozenEncoder):
    """Caption to ``text`` [512, joint_attention_dim]: some hidden states of the language model side by side.

    Padding included: the transformer reads all 512 positions.
    """

    name = "text"
    reads = "caption"

    def __init__(self, opened: OpenedNetwork, tokenizer: ChatTokenizer, dtype: torch.dtype):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config, self.tokenizer = opened.config, tokenizer
        self._loaded: PreTrainedTokenizerBase | None = None

    def settings(self) -> dict[str, Any]:
        return {"config": self.config, "tokenizer": self.tokenizer.identity(), "tokens": TOKENS}

    def load(self, device: torch.device) -> None:
        self._loaded = self.tokenizer.load(self.config["vocab_size"])
        super().load(device)

    def unload(self) -> None:
        self._loaded = None
        super().unload()

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"text": self._states(item.caption)} for item in items]

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        tokenizer, chat = self.tokenizer.load(self.config["vocab_size"]), CHATS[self.config["kind"]]
        return [TokenLength(chat(tokenizer, caption, WHOLE).ids.shape[1], TOKENS) for caption in captions]

    def _states(self, caption: str) -> Tensor:
        kind = self.config["kind"]
        tokens = CHATS[kind](self._loaded, caption)
        output = self.network(
            input_ids=tokens.ids.to(self.device),
            attention_mask=tokens.mask.to(self.device),
            output_hidden_states=True,
            use_cache=False,
        )
        return torch.cat([output.hidden_states[index][0] for index in HIDDEN_STATES[kind]], dim=-1).cpu()
