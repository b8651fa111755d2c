"""Wan's frozen networks as encoders whose outputs are cached.

All run in the config's ``dtype`` as plain modules of that dtype, never under autocast: fp32 is exact, bf16 is what the text encoder
is released in and what inference programs use.  In fp16 the last projection of each of UMT5's blocks stays in fp32, where
transformers keeps it too, because its output overflows.

Items are encoded one after the other, so that what is cached does not depend on what else was in the call.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from models.common.latent_encoders import ChannelScale, FrozenEncoder, LatentEncoder
from models.common.networks import OpenedNetwork, open_network
from models.common.text_encoders import Tokenize, TokenizerFile, clean_caption
from models.wan.files import WanFiles
from models.wan.networks import NETWORKS
from models.wan.variants import Condition
from utils.data.encoders import ConditionEncoder, EncodeItem, TokenLength

MAX_TOKENS = 512
KNOWN_FRAMES: dict[Condition | None, tuple[Literal["first", "last"], ...]] = {
    None: (),
    "first": ("first",),
    "first and last": ("first", "last"),
}
"""The frames of a clip that are shown; a sample may have a picture in place of its clip's own."""
PLACES = {"first": 0, "last": -1}


def wan_encoders(files: WanFiles, dtype: torch.dtype, condition: Condition | None) -> list[ConditionEncoder]:
    """The encoders of a variant, unloaded.  ``condition``: the frames that the model is shown, for image to video."""
    encoders: list[ConditionEncoder] = [
        # Always fp32, as the release runs it: in bf16 the latents, which are the targets of training, are off by up to 2 %.
        WanVaeEncoder(open_network(NETWORKS["vae"], files.vae), torch.float32, condition),
        WanTextEncoder(open_network(NETWORKS["text_encoder"], files.text_encoder), files.tokenizer, dtype),
    ]
    if files.image_encoder:
        assert condition is not None
        processor = json.loads(files.image_processor.read_text()) if files.image_processor else {}
        opened = open_network(NETWORKS["image_encoder"], files.image_encoder)
        encoders.append(WanImageEncoder(opened, processor, dtype, condition))
    return encoders


def shown_frame(item: EncodeItem, name: Literal["first", "last"]) -> Tensor:
    """[3, H, W]: the picture that is given for this frame, or the clip's own."""
    given = item.known_frames.get(name)
    return item.pixels[:, PLACES[name]] if given is None else given[:, 0]


class WanVaeEncoder(LatentEncoder):
    """Pixels to ``latents`` [C, f, h, w], fp32, normalised; for image to video also ``condition`` of the same shape.

    F = 4 k + 1 frames give f = k + 1.  The VAE of Wan 2.1 has C = 16 and divides height and width by 8, that of Wan 2.2 has C = 48
    and divides by 16.  The latents are the mode of the VAE's distribution.  The condition is the encoding of a clip whose first
    frame, or first and last frame, is the real one, or the given picture, and whose others are grey (0 in [-1, 1]).
    """

    name = "vae"
    reads = "pixels"

    def __init__(self, opened: OpenedNetwork, dtype: torch.dtype, condition: Condition | None):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.condition, self.known_frames = condition, KNOWN_FRAMES[condition]
        self.config = dict(opened.on_meta().config)
        self.scale = ChannelScale(self.config["latents_mean"], self.config["latents_std"])

    def settings(self) -> dict[str, Any]:
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return {"config": config, "condition": self.condition}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [self._encode_item(item) for item in items]

    def _encode_item(self, item: EncodeItem) -> dict[str, Tensor]:
        pixels = item.pixels
        assert (pixels.shape[1] - 1) % 4 == 0, f"{pixels.shape[1]} frames are not 4 k + 1"
        fields = {"latents": self._latents(pixels)}
        if self.condition:
            known = torch.zeros_like(pixels)
            for name in self.known_frames:
                known[:, PLACES[name]] = shown_frame(item, name)
            fields["condition"] = self._latents(known)
        return fields

    def _latents(self, pixels: Tensor) -> Tensor:
        latents = self.network.encode(pixels[None].to(self.device, self.dtype)).latent_dist.mode()[0]
        return self.scale.normalise(latents).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        restored = self.scale.restore(latents.to(self.device))
        return self.network.decode(restored[None].to(self.dtype)).sample[0].float().cpu()


class WanTextEncoder(FrozenEncoder):
    """Caption to ``text`` [L, 4096]: UMT5's last hidden state of its L <= 512 tokens, the end token among them.

    Not padded: the model wants zeros after the prompt, not encoded padding, and ``prepare_inputs`` puts them there.
    """

    name = "text"
    reads = "caption"

    def __init__(self, opened: OpenedNetwork, tokenizer: TokenizerFile, dtype: torch.dtype):
        super().__init__(opened.source, opened.on_meta, dtype, keep_fp32=("wo",) if dtype is torch.float16 else ())
        self.config, self.tokenizer = opened.config, tokenizer
        self._tokenize: Tokenize | None = None

    def settings(self) -> dict[str, Any]:
        tokenizer = hashlib.blake2b(self.tokenizer.read(), digest_size=16).hexdigest()
        return {"config": self.config, "tokenizer": tokenizer, "max_tokens": MAX_TOKENS}

    def load(self, device: torch.device) -> None:
        self._tokenize = self.tokenizer.load_for(self.config["vocab_size"], MAX_TOKENS)
        super().load(device)

    def unload(self) -> None:
        self._tokenize = None
        super().unload()

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"text": self._states(item.caption)} for item in items]

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        return self.tokenizer.lengths(map(clean_caption, captions), self.config["vocab_size"], MAX_TOKENS)

    def _states(self, caption: str) -> Tensor:
        ids = torch.tensor([self._tokenize(clean_caption(caption))], device=self.device)
        return self.network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].cpu()


class WanImageEncoder(FrozenEncoder):
    """The first frame to ``clip`` [257, 1280]: the last but one hidden state of CLIP's vision tower, class token first.

    First and last frame give [514, 1280], one after the other.  Pictures are prepared as diffusers' WanImageToVideoPipeline does
    it, with the model's image processor or CLIP's usual one: shorter side to 224 (bicubic), centre, CLIP's mean and deviation.
    """

    name = "clip"
    reads = "pixels"

    def __init__(self, opened: OpenedNetwork, processor: dict[str, Any], dtype: torch.dtype, condition: Condition):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config, self.condition, self.known_frames = opened.config, condition, KNOWN_FRAMES[condition]
        self.max_frames = 1 if condition == "first" else None
        self.processor = CLIPImageProcessorPil.from_dict(processor)

    def settings(self) -> dict[str, Any]:
        return {"config": self.config, "processor": json.loads(self.processor.to_json_string()), "condition": self.condition}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"clip": torch.cat([self._states(shown_frame(item, name)) for name in self.known_frames])} for item in items]

    def _states(self, frame: Tensor) -> Tensor:
        levels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
        pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        return self.network(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][0].cpu()
