"""diffusers' pipelines of Qwen-Image, made whole where torchvision is missing and transformers is 5."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from tests.models.qwen_image.reference import PIPELINES


def opened(variant, folder) -> DiffusionPipeline:
    """The pipeline of a variant, whose text encoder is told which tokens are a picture's, as Qwen2VLProcessor says it."""
    pipeline = PIPELINES[variant].from_pretrained(folder)
    if variant == "qwen-image":
        return pipeline
    pipeline.processor = processor_of(folder)

    def tell(module, arguments, keywords):
        types = (keywords["input_ids"] == pipeline.processor.image_token_id).int()
        return arguments, {**keywords, "mm_token_type_ids": types}

    pipeline.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    return pipeline


def processor_of(folder) -> Qwen2VLProcessor:
    """Its ``__init__`` would look for a video processor, which needs torchvision; its ``__call__`` does not."""
    processor = object.__new__(Qwen2VLProcessor)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for kind in ("image", "video"):
        setattr(processor, f"{kind}_token", f"<|{kind}_pad|>")
        setattr(processor, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    processor.tokenizer, processor.video_processor, processor.chat_template = tokenizer, None, None
    return processor


def picture_of(pixels: torch.Tensor) -> Image.Image:
    """[3, 1, H, W] in [-1, 1] as the picture it was."""
    return Image.fromarray(((pixels[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
