"""Both transformers of Wan 2.2 A14B as one model: each micro-batch goes through the one that its timesteps belong to.

The two are named as in diffusers' pipeline: ``transformer`` for high noise, ``transformer_2`` for low noise.  A layer of the
pipeline holds the layers of both at its place, and the stream says which of them runs:

| name | shape | between |
| --- | --- | --- |
| expert | [] int64, on the CPU | input to last layer: the place in :data:`PREFIXES` of the expert that the micro-batch belongs to |
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffusers import WanTransformer3DModel
from torch import nn

from models.wan.layers import RotaryTable, wan_layers
from models.wan.variants import Expert
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.pipeline.layer import PipelineLayer, Stream

PREFIXES: dict[Expert, str] = {"high": "transformer.", "low": "transformer_2."}
"""What begins the names of each expert's weights."""


@dataclass(frozen=True)
class Routing:
    """Which expert a micro-batch goes to, and the timesteps of its samples."""

    timesteps: TimestepDistribution
    boundary: float
    """The expert for high noise is used for t >= boundary."""

    def of(self, expert: Expert) -> TimestepDistribution:
        """The part of the distribution that belongs to an expert."""
        if expert == "high":
            return replace(self.timesteps, low=max(self.timesteps.low, self.boundary))
        return replace(self.timesteps, high=min(self.timesteps.high, self.boundary))

    @property
    def share_of_high(self) -> float:
        """About which part of the micro-batches goes to the expert for high noise."""
        return sum(self.timesteps.at((place + 0.5) / 1000) >= self.boundary for place in range(1000)) / 1000

    def expert_at(self, t: float) -> Expert:
        return "high" if t >= self.boundary else "low"

    def draw(self, keys: Sequence[str], draw: Draw) -> tuple[Expert, list[float]]:
        """The expert of a micro-batch, and the timestep of each sample.

        The first sample's timestep decides.  A sample whose own timestep belongs to the other expert draws again from this one's
        part.  So the timesteps have the configured distribution, whatever the size of the micro-batches: the first sample's is
        drawn from it, and the others' from the part that the first one's lies in.
        """
        times = [self.timesteps.at(draw.quantile(key, "timestep")) for key in keys]
        expert = self.expert_at(times[0])
        part = self.of(expert)
        return expert, [
            t if self.expert_at(t) == expert else part.at(draw.quantile(key, f"timestep for {expert} noise"))
            for key, t in zip(keys, times, strict=True)
        ]


class Experts(nn.Module):
    """Owns both models, so that their weights have the names of diffusers' pipeline.  It has no forward: the layers have."""

    def __init__(self, transformer: WanTransformer3DModel, transformer_2: WanTransformer3DModel):
        super().__init__()
        self.transformer, self.transformer_2 = transformer, transformer_2


class ExpertLayer(PipelineLayer):
    """The layers of both experts at one place of the pipeline, of which a micro-batch runs one."""

    def __init__(self, experts: Sequence[PipelineLayer], is_last: bool):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self._is_last = is_last

    def run(self, stream: Stream) -> Stream:
        expert = stream["expert"]
        output = self.experts[int(expert)].run(stream.replaced(drop=("expert",)))
        return output if self._is_last else output.replaced(expert=expert)


def expert_layers(model: Experts) -> list[PipelineLayer]:
    """As many layers as one transformer has."""
    rotary = RotaryTable(model.transformer)
    pairs = list(zip(*(wan_layers(expert, rotary) for expert in (model.transformer, model.transformer_2)), strict=True))
    return [ExpertLayer(pair, is_last=pair is pairs[-1]) for pair in pairs]
