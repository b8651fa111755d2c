"""SDXL's text encoders where they are trained: as parts of the model, before the UNet's layers.

A text encoder that is trained is a part of the UNet's module, so that the UNet's weights keep their names and the encoders' have
those of diffusers' pipeline: ``text_encoder.text_model.…`` (CLIP-L) and ``text_encoder_2.…`` (CLIP-G).  The stream before the UNet
is that of ``models.common.clip_layers`` with the towers ``l`` and ``g``, and, with B samples of n chunks, R rows in all:

| name | shape | between |
| --- | --- | --- |
| rows | [B, n] int64 | input to join: the rows of a sample's chunks; where they are fewer than n, they are there several times |
| text_l, text_g | [B, 77 n, W] | input to join, of an encoder that is frozen; [R, 77, W] of one that is trained |
| pooled | [B, P] | input to join and on, if text encoder 2 is frozen |
| text, pooled | as in ``layers.py`` | output of join |
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.common.clip import TOKENS
from models.common.clip_layers import clip_text_layers
from models.common.joined import JoinedWeights, NetworkWeights, merged_fingerprint
from models.common.networks import OpenedNetwork
from models.sdxl.files import SdxlFiles
from models.sdxl.options import SdxlOptions
from models.sdxl.tokens import Pad
from utils.errors import UserError
from utils.formats.adapter_files import AdapterFile
from utils.pipeline.layer import PipelineLayer, Stream
from utils.weights.named import NamedWeights


@dataclass(frozen=True)
class TextEncoder:
    """One of the two."""

    tower: str
    """Its name in the stream and among the cached fields."""
    prefix: str
    """What stands before the names of its own weights."""
    pad: Pad
    learning_rate: Callable[[SdxlOptions], float | None]


TEXT_ENCODERS = {
    "text_encoder": TextEncoder("l", "text_encoder.text_model.", "end", lambda options: options.text_encoder_1_lr),
    "text_encoder_2": TextEncoder("g", "text_encoder_2.", "zero", lambda options: options.text_encoder_2_lr),
}
"""By the name of their part in diffusers' pipeline, CLIP-L first."""


def trained_text_encoders(options: SdxlOptions) -> list[str]:
    """Names in :data:`TEXT_ENCODERS`: those with a learning rate above 0."""
    return [name for name, encoder in TEXT_ENCODERS.items() if encoder.learning_rate(options)]


def blocks_used(opened: OpenedNetwork, options: SdxlOptions) -> int:
    """After so many blocks of a text encoder its states are the text.  UserError if ``clip_skip`` leaves none."""
    layers = opened.config["num_hidden_layers"]
    used = layers - 1 - options.clip_skip
    if used < 1:
        raise UserError(f"model.clip_skip = {options.clip_skip} leaves nothing of a text encoder with {layers} layers")
    return used


def build_text_encoder(opened: OpenedNetwork, options: SdxlOptions) -> nn.Module:
    """A text encoder on meta, ``text_model`` and for CLIP-G ``text_projection`` in it.

    Of CLIP-L only the blocks that are used: what comes after them, its final norm too, has no effect and would get no gradient.
    """
    module = opened.on_meta()
    if hasattr(module, "text_projection"):
        return module
    module.encoder.layers = module.encoder.layers[: blocks_used(opened, options)]
    del module.final_layer_norm
    return nn.ModuleDict({"text_model": module})


def join_text_encoders(unet: nn.Module, files: SdxlFiles, options: SdxlOptions) -> None:
    """Make the text encoders that are trained parts of the UNet's module."""
    for name in trained_text_encoders(options):
        unet.add_module(name, build_text_encoder(getattr(files, name), options))


def trained_weights(files: SdxlFiles, options: SdxlOptions) -> NamedWeights:
    """The weights of the UNet and of the text encoders that are trained, without what they do not use."""
    trained = trained_text_encoders(options)
    used = {f"{name}.{own}" for name in trained for own in build_text_encoder(getattr(files, name), options).state_dict()}
    return _joined(files, trained, lambda name: name in used or not name.startswith("text_encoder"))


def all_weights(files: SdxlFiles) -> NamedWeights:
    """The weights of the UNet and of both text encoders."""
    return _joined(files, TEXT_ENCODERS, lambda name: True)


def _joined(files: SdxlFiles, text_encoders: Iterable[str], uses: Callable[[str], bool]) -> NamedWeights:
    parts = {TEXT_ENCODERS[name].prefix: getattr(files, name).source for name in text_encoders}
    return JoinedWeights({"": files.transformer.source, **parts}, uses)


def with_merged(files: SdxlFiles, weights: NamedWeights, merged: Sequence[tuple[AdapterFile, float]]) -> SdxlFiles:
    """The files with those text encoders changed that the adapters have something for.  ``weights``: of all, by joined names."""
    changed = {}
    for name, encoder in TEXT_ENCODERS.items() if merged else ():
        opened: OpenedNetwork = getattr(files, name)
        before = opened.source.fingerprint()
        after = merged_fingerprint(before, merged, encoder.prefix)
        if after != before:
            changed[name] = replace(opened, source=NetworkWeights(weights, encoder.prefix, after))
    return replace(files, **changed)


class JoinTextLayer(PipelineLayer):
    """What the text encoders give, to what the UNet reads: each sample's chunks behind each other, both encoders side by side."""

    def __init__(self, trained: Collection[str]):
        super().__init__()
        self.trained = frozenset(trained)

    def run(self, stream: Stream) -> Stream:
        rows = stream["rows"]
        texts = []
        for name, encoder in TEXT_ENCODERS.items():
            text = stream[f"text_{encoder.tower}"]
            if name in self.trained:
                text = text.index_select(0, rows.flatten()).unflatten(0, rows.shape).flatten(1, 2)
            texts.append(text)
        made = {"text": torch.cat(texts, dim=-1)}
        if "pooled_g" in stream:
            made["pooled"] = stream["pooled_g"].index_select(0, rows[:, 0])
        return stream.replaced(drop=("rows", "text_l", "text_g", "pooled_g"), **made)


def text_encoder_layers(model: nn.Module, files: SdxlFiles, options: SdxlOptions) -> list[PipelineLayer]:
    """The layers before the UNet's; none if no text encoder is trained."""
    trained = trained_text_encoders(options)
    layers: list[PipelineLayer] = []
    for name in trained:
        encoder = getattr(model, name)
        projection = getattr(encoder, "text_projection", None)
        taken = blocks_used(getattr(files, name), options)
        layers += clip_text_layers(encoder.text_model, TEXT_ENCODERS[name].tower, taken, projection)
    return [*layers, JoinTextLayer(trained)] if trained else []


def text_inputs(fields: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """What comes from the captions' cached fields: ``text`` and ``pooled``, or with trained text encoders what is listed above.

    Attention to a text that is there several times is attention to the text: so all samples get as many chunks.
    """
    ids = {name: values for name, values in fields.items() if name.startswith("ids_")}
    chunks = [len(rows) for rows in next(iter(ids.values()))] if ids else [len(text) // TOKENS for text in fields["text_l"]]
    count = math.lcm(*chunks)
    inputs = {name: torch.cat(rows) for name, rows in ids.items()}
    for name in ("text_l", "text_g"):
        if name in fields:
            repeated = [text.repeat(count // number, 1) for text, number in zip(fields[name], chunks, strict=True)]
            inputs[name] = torch.stack(repeated)
    if "pooled" in fields:
        inputs["pooled"] = torch.stack(fields["pooled"])
    if not ids:
        return {"text": torch.cat([inputs["text_l"], inputs["text_g"]], dim=-1), "pooled": inputs["pooled"]}
    starts = [sum(chunks[:sample]) for sample in range(len(chunks))]
    rows = [(start + torch.arange(number)).repeat(count // number) for start, number in zip(starts, chunks, strict=True)]
    return inputs | {"rows": torch.stack(rows)}
