"""What a model family supplies.  Everything else (stages, randomness, checkpoints, exports) is the same for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn

from utils.checkpoints.export import LoraFormat
from utils.checkpoints.keymap import KeyMap
from utils.checkpoints.weights import WeightSource
from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import Batch, MicroBatch, SizeRules
from utils.diffusion.losses import LOSSES, averaged
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.pipeline.layer import PipelineLayer, Stream

Layout = Literal["diffusers", "released", "comfy"]


class ModelFamily(ABC):
    """A family of released models that share an architecture."""

    Options: ClassVar[type[ModelOptions]] = ModelOptions
    """The ``[model]`` table; a family adds keys by subclassing."""
    variants: ClassVar[tuple[str, ...]]
    """Names that ``python -m models.tiny`` knows, each a shape of model that has its own code path."""
    adapter_targets: ClassVar[str]
    """Regular expression for the whole diffusers name of the modules that get an adapter by default."""
    lora_format: ClassVar[LoraFormat]
    """How a LoRA file is named so that ComfyUI and diffusers both read it whole."""
    full_prefix: ClassVar[str] = ""
    """What stands before the released names in a full export: of a release that is one file with all networks."""

    options: ModelOptions
    size_rules: SizeRules
    variant: str

    @abstractmethod
    def __init__(self, options: ModelOptions):
        """Find the files and read their headers and configs, no weights.

        Raises UserError with everything that is wrong: a missing file, weights of another family, a part that does not fit.
        """

    @abstractmethod
    def encoders(self) -> list[ConditionEncoder]:
        """The frozen networks whose outputs are cached, unloaded."""

    @abstractmethod
    def build_transformer(self) -> nn.Module:
        """The diffusers model with its true names, in training's dtype, on the default device (the caller sets ``meta``)."""

    @abstractmethod
    def weights(self) -> WeightSource:
        """The transformer's weights by diffusers name, read lazily from whatever layout the files have."""

    @abstractmethod
    def layers(self, transformer: nn.Module) -> list[PipelineLayer]:
        """The transformer's forward as a list of layers that own its parts, each part in exactly one layer."""

    @abstractmethod
    def prepare_inputs(self, batch: Batch, draw: Draw) -> MicroBatch:
        """Noise, timesteps and conditions: the first layer's stream and the loss's target, on the CPU.

        A pure function of its arguments, run on the first and on the last stage.
        """

    @abstractmethod
    def key_map(self) -> KeyMap:
        """Diffusers names to the released layout and back."""

    def loss(self, output: Stream, target: dict[str, Tensor]) -> Tensor:
        """Scalar fp32 loss of one micro-batch.

        The last layer's stream holds ``prediction``; ``target`` holds ``velocity`` of the same shape, and may hold a ``mask`` and
        ``weights`` [B] (see ``utils.diffusion.losses.averaged``).
        """
        element = LOSSES[self.options.loss](self.options.loss_delta)
        return averaged(output["prediction"], target["velocity"], element, mask=target.get("mask"), weights=target.get("weights"))

    def timestep_distribution(self, shift: float) -> TimestepDistribution:
        """The distribution of timesteps that the options ask for.  ``shift``: where they leave it to the family."""
        options = self.options
        return TimestepDistribution(
            method=options.timestep_sample_method,
            scale=options.mode_scale if options.timestep_sample_method == "mode" else options.sigmoid_scale,
            shift=options.shift or shift,
            low=options.min_t,
            high=options.max_t,
        )

    def companions(self) -> Mapping[str, Tensor]:
        """What a full export holds beside the transformer, by its name in the file; may be read when asked for.

        The other networks where the release is one file, and tensors that tell other programs of the kind of model.
        """
        return {}

    @abstractmethod
    def export_metadata(self) -> dict[str, str]:
        """ModelSpec's ``modelspec.architecture`` and what else other programs read to know the base model.  No paths."""

    @classmethod
    @abstractmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        """A small random model in the true layout, with tokenizer, encoders and VAE.  ``scale`` multiplies widths and depths."""
