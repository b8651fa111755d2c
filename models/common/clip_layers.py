"""CLIP's text tower as pipeline layers over transformers' modules, for families that train it.

The stream, with R the rows of token ids (a caption has one for every 75 tokens) and W the tower's width; <n> is the tower's name:

| name | shape | between |
| --- | --- | --- |
| ids_<n> | [R, 77] int64 | input to embed: token ids with start, end and padding |
| states_<n> | [R, 77, W] | embed to the last block that is used, or to pool |
| ends_<n> | [R] int64 | embed to pool: place of the end token |
| text_<n> | [R, 77, W] | output: the states after as many blocks as were asked for, without the final norm |
| pooled_<n> | [R, P] | output of pool: the state at the end token, normed and projected |
"""

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.masking_utils import create_causal_mask

from utils.pipeline.layer import PipelineLayer, Stream


class ClipEmbedLayer(PipelineLayer):
    """Token ids to the first states."""

    def __init__(self, tower: CLIPTextModel, name: str, *, finds_ends: bool):
        super().__init__()
        self.embeddings = tower.embeddings
        self.name, self.end, self.finds_ends = name, tower.config.eos_token_id, finds_ends

    def run(self, stream: Stream) -> Stream:
        ids = stream[f"ids_{self.name}"]
        # Named here: the module's own buffer is no weight, and stays where the module was made.
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        made = {f"states_{self.name}": self.embeddings(ids, position_ids=places)}
        if self.finds_ends:
            # The first one: text encoders that pad with the end token have more.
            made[f"ends_{self.name}"] = (ids == self.end).int().argmax(dim=-1)
        return stream.replaced(drop=(f"ids_{self.name}",), **made)


class ClipBlockLayer(PipelineLayer):
    """One block.  ``gives_text``: its states are the text; ``goes_on``: a block or the pooling follows."""

    def __init__(self, tower: CLIPTextModel, index: int, name: str, *, gives_text: bool, goes_on: bool):
        super().__init__()
        self.block = tower.encoder.layers[index]
        self.name, self.config = name, tower.config
        self.gives_text, self.goes_on = gives_text, goes_on

    def run(self, stream: Stream) -> Stream:
        states = stream[f"states_{self.name}"]
        mask = create_causal_mask(config=self.config, inputs_embeds=states, attention_mask=None, past_key_values=None)
        made = self.block(states, mask, is_causal=True)
        text = {f"text_{self.name}": made} if self.gives_text else {}
        if self.goes_on:
            return stream.replaced(**{f"states_{self.name}": made}, **text)
        return stream.replaced(drop=(f"states_{self.name}",), **text)


class ClipPoolLayer(PipelineLayer):
    """The final norm and the projection of the state at the end token."""

    def __init__(self, tower: CLIPTextModel, projection: nn.Module, name: str):
        super().__init__()
        self.final_layer_norm, self.text_projection = tower.final_layer_norm, projection
        self.name = name

    def run(self, stream: Stream) -> Stream:
        states, ends = stream[f"states_{self.name}"], stream[f"ends_{self.name}"]
        pooled = self.text_projection(self._at_ends(self.final_layer_norm(states), ends))
        return stream.replaced(drop=(f"states_{self.name}", f"ends_{self.name}"), **{f"pooled_{self.name}": pooled})

    @staticmethod
    def _at_ends(states: Tensor, ends: Tensor) -> Tensor:
        return states[torch.arange(len(states), device=states.device), ends]


def clip_text_layers(tower: CLIPTextModel, name: str, taken: int, projection: nn.Module | None = None) -> list[PipelineLayer]:
    """The tower's forward: embed, its blocks, and with a ``projection`` the pooling.

    ``taken``: after so many blocks the states are the text.  Without a projection those should be all that the tower has.
    """
    count = len(tower.encoder.layers)
    assert taken == count or (projection is not None and taken < count), f"{taken} blocks of {count}"
    layers: list[PipelineLayer] = [ClipEmbedLayer(tower, name, finds_ends=projection is not None)]
    for index in range(count):
        goes_on = projection is not None or index + 1 < count
        layers.append(ClipBlockLayer(tower, index, name, gives_text=index + 1 == taken, goes_on=goes_on))
    return layers if projection is None else [*layers, ClipPoolLayer(tower, projection, name)]
