"""Qwen-Image's frozen networks as encoders whose outputs are cached.

The VAE runs in fp32, the text encoder in the config's ``dtype``, both as plain modules, never under autocast.  Items are encoded
one after the other, so that what is cached does not depend on what else was in the call.

What the text encoder is given (the template, how many of its tokens are dropped, the size of the pictures it sees) is read from
diffusers' pipelines, which have it from the release.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from models.common.latent_encoders import ChannelScale, FrozenEncoder, LatentEncoder
from models.common.networks import OpenedNetwork, open_network
from models.common.text_encoders import Tokenize, TokenizerFile
from models.qwen_image.files import EDIT, EDIT_2511, EDIT_PLUS, IMAGE, QwenImageFiles
from models.qwen_image.networks import NETWORKS
from utils.data.encoders import ConditionEncoder, EncodeItem, TokenLength
from utils.errors import UserError

IMAGE_PAD = "<|image_pad|>"
NUMBERED_PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
"""What stands before the caption for each picture in Edit-Plus (diffusers' QwenImageEditPlusPipeline)."""
RELEASED_PROCESSOR = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}
"""What ``preprocessor_config.json`` of Qwen2.5-VL says and the class does not, for layouts without that file."""


@dataclass(frozen=True)
class Prompt:
    """How a variant puts a caption, and pictures, to the text encoder."""

    template: str
    """With ``{}`` for the caption."""
    drop: int
    """The states of so many tokens, the template up to the user's turn, are left out."""
    max_tokens: int
    """Template and caption are cut to this, before each picture becomes as many tokens as it needs."""
    numbered: bool = False
    """Whether each picture is announced before the caption; else the template has the place of the one picture."""
    area: int | None = None
    """Pixels that a control picture is scaled to before the text encoder sees it; None: it sees none."""

    def text(self, caption: str, controls: int = 0) -> str:
        """What the tokenizer reads of a caption with so many control pictures."""
        announced = "".join(NUMBERED_PICTURE.format(index + 1) for index in range(controls)) if self.numbered else ""
        return self.template.format(announced + caption)


def prompt_of(variant: str) -> Prompt:
    """Read from the pipeline of the variant."""
    pipeline_class, looks = PROMPTS[variant]
    parts = ["scheduler", "vae", "text_encoder", "tokenizer", "transformer", *(["processor"] if looks else [])]
    pipeline = pipeline_class(**dict.fromkeys(parts))
    drop = pipeline.prompt_template_encode_start_idx
    return Prompt(pipeline.prompt_template_encode, drop, pipeline.tokenizer_max_length + drop, **looks)


PROMPTS = {
    IMAGE: (QwenImagePipeline, {}),
    EDIT: (QwenImageEditPipeline, {"area": VAE_IMAGE_SIZE}),
    EDIT_PLUS: (QwenImageEditPlusPipeline, {"area": CONDITION_IMAGE_SIZE, "numbered": True}),
    EDIT_2511: (QwenImageEditPlusPipeline, {"area": CONDITION_IMAGE_SIZE, "numbered": True}),
}


def qwen_encoders(files: QwenImageFiles, dtype: torch.dtype) -> list[ConditionEncoder]:
    """The encoders of a variant, unloaded."""
    vae = open_network(NETWORKS["vae"], files.vae)
    text = open_network(NETWORKS["text_encoder"], files.text_encoder)
    prompt = prompt_of(files.variant)
    if prompt.area is None:
        return [QwenVaeEncoder(vae), QwenTextEncoder(text, files.tokenizer, dtype, prompt)]
    processor = json.loads(files.image_processor.read_text()) if files.image_processor else RELEASED_PROCESSOR
    return [
        QwenVaeEncoder(vae),
        QwenControlEncoder(vae, prompt),
        QwenEditTextEncoder(text, files.tokenizer, dtype, prompt, processor),
    ]


def controls_of(item: EncodeItem, prompt: Prompt) -> tuple[Tensor, ...]:
    """The control pictures.  UserError if there are none, or more than the variant takes."""
    if not item.controls:
        raise UserError(
            f"{item.key} has no control picture, and an editing model needs one: set control_path in its [[directory]], "
            'or train Qwen-Image itself (model.variant = "qwen-image")'
        )
    if len(item.controls) > 1 and not prompt.numbered:
        raise UserError(
            f"{item.key} has {len(item.controls)} control pictures, and {EDIT} takes one: name one folder in control_path, "
            f"or train {EDIT_PLUS} or {EDIT_2511}"
        )
    return item.controls


class QwenVaeEncoder(LatentEncoder):
    """A picture to ``latents`` [16, 1, H/8, W/8], fp32, normalised: the mode of the VAE's distribution.

    Always in fp32, whatever the config's dtype: in bf16 the latents, which are the targets of training, are off by up to 2 %.
    """

    name = "vae"
    reads = "pixels"

    def __init__(self, opened: OpenedNetwork):
        super().__init__(opened.source, opened.on_meta, torch.float32)
        self.config = dict(opened.on_meta().config)
        self.scale = ChannelScale(self.config["latents_mean"], self.config["latents_std"])

    def settings(self) -> dict[str, Any]:
        return {"config": {name: value for name, value in self.config.items() if not name.startswith("_")}}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"latents": self._latents(item.pixels)} for item in items]

    def _latents(self, pixels: Tensor) -> Tensor:
        latents = self.network.encode(pixels[None].to(self.device, self.dtype)).latent_dist.mode()[0]
        return self.scale.normalise(latents).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        restored = self.scale.restore(latents.to(self.device))
        return self.network.decode(restored[None].to(self.dtype)).sample[0].float().cpu()


class QwenControlEncoder(QwenVaeEncoder):
    """The control pictures of a sample to ``references`` [n, 16, 1, H/8, W/8], as the latents of the target."""

    name = "control_vae"
    reads = "controls"

    def __init__(self, opened: OpenedNetwork, prompt: Prompt):
        super().__init__(opened)
        self.prompt = prompt

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [
            {"references": torch.stack([self._latents(control) for control in controls_of(item, self.prompt)])} for item in items
        ]


class QwenTextEncoder(FrozenEncoder):
    """Caption to ``text`` [T, 3584]: the last hidden states of Qwen2.5-VL for the caption and what the template puts after it."""

    name = "text"
    reads = "caption"

    def __init__(self, opened: OpenedNetwork, tokenizer: TokenizerFile, dtype: torch.dtype, prompt: Prompt):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config, self.tokenizer, self.prompt = opened.config, tokenizer, prompt
        self._tokenize: Tokenize | None = None

    def settings(self) -> dict[str, Any]:
        tokenizer = hashlib.blake2b(self.tokenizer.read(), digest_size=16).hexdigest()
        return {"config": self.config, "tokenizer": tokenizer, "prompt": asdict(self.prompt)}

    def load(self, device: torch.device) -> None:
        self._tokenize = self.tokenizer.load_for(self.config["text_config"]["vocab_size"], self.prompt.max_tokens)
        if self._tokenize(IMAGE_PAD) != [self.config["image_token_id"]]:
            raise UserError(
                f"{self.tokenizer.path} is not Qwen2.5-VL's tokenizer: {IMAGE_PAD} should be token "
                f"{self.config['image_token_id']}; name the folder of the right one with model.tokenizer_path"
            )
        super().load(device)

    def unload(self) -> None:
        self._tokenize = None
        super().unload()

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"text": self.states(item)} for item in items]

    def token_lengths(self, captions: Sequence[str], controls: int = 0) -> list[TokenLength]:
        """The places of pictures count as one token each: only then is the text cut."""
        texts = [self.prompt.text(caption, controls) for caption in captions]
        return self.tokenizer.lengths(texts, self.config["text_config"]["vocab_size"], self.prompt.max_tokens)

    def states(self, item: EncodeItem) -> Tensor:
        """[T, 3584] of one item."""
        return self._run(self._tokenize(self.prompt.text(item.caption)))

    def _run(self, ids: list[int], **vision: Tensor) -> Tensor:
        rows = torch.tensor([ids], device=self.device)
        output = self.network["model"](input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, **vision)
        return output.last_hidden_state[0, self.prompt.drop :].cpu()


class QwenEditTextEncoder(QwenTextEncoder):
    """Caption and control pictures to ``text`` [T, 3584]: the states of the pictures' tokens are part of it.

    The pictures are scaled as diffusers' pipelines do it: to 1024 x 1024 pixels in area for Edit, 384 x 384 for Edit-Plus, the
    sides multiples of 32.  The model rotates their tokens by row and column.  transformers 4 found out by itself which tokens these
    are; transformers 5 must be told (``mm_token_type_ids``), which diffusers 0.42.1 does not do.
    """

    reads = "caption and controls"

    def __init__(
        self, opened: OpenedNetwork, tokenizer: TokenizerFile, dtype: torch.dtype, prompt: Prompt, processor: dict[str, Any]
    ):
        super().__init__(opened, tokenizer, dtype, prompt)
        # The class by its own name: the plain one would want torchvision.
        self.processor = Qwen2VLImageProcessorPil.from_dict(processor)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "processor": json.loads(self.processor.to_json_string())}

    def states(self, item: EncodeItem) -> Tensor:
        pictures = [self.scaled(control) for control in controls_of(item, self.prompt)]
        ids = self._tokenize(self.prompt.text(item.caption, len(pictures)))
        looks = self.processor(images=pictures, return_tensors="pt").to(self.device)
        counts = iter((looks["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist())
        pad = self.config["image_token_id"]
        ids = [repeated for token in ids for repeated in [token] * (next(counts) if token == pad else 1)]
        types = torch.tensor([[int(token == pad) for token in ids]], device=self.device)
        return self._run(ids, **looks, mm_token_type_ids=types)

    def scaled(self, control: Tensor) -> Image.Image:
        """[3, 1, H, W] in [-1, 1] to the picture that the text encoder sees."""
        levels = ((control[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
        return picture.resize(calculate_dimensions(self.prompt.area, picture.width / picture.height), Image.Resampling.LANCZOS)
