"""What a model family supplies.  Everything else (stages, randomness, checkpoints, exports) is the same for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn

from utils.config.schema import ModelOptions
from utils.data.encoders import ConditionEncoder
from utils.data.values import NO_CONTROLS, Batch, ControlRules, MicroBatch, SizeRules
from utils.diffusion.losses import LOSSES, averaged
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.formats.adapter_files import AdapterFile
from utils.formats.adapter_format import LoraFormat
from utils.formats.recognise import FileFacts
from utils.pipeline.layer import PipelineLayer, Stream
from utils.weights.keymap import KeyMap
from utils.weights.named import NamedWeights

Layout = Literal["diffusers", "released", "comfy"]


@dataclass(frozen=True)
class ExportFile:
    """One file of an export."""

    prefix: str
    """What begins the names of its weights in the model, and is left out in the file."""
    metadata: Mapping[str, str]
    """See :meth:`ModelFamily.export_metadata`."""


class ModelFamily(ABC):
    """A family of released models that share an architecture."""

    Options: ClassVar[type[ModelOptions]] = ModelOptions
    """The ``[model]`` table; a family adds keys by subclassing."""
    variants: ClassVar[tuple[str, ...]]
    """Names that ``python -m models.tiny`` knows, each a shape of model that has its own code path."""
    adapter_targets: ClassVar[str]
    """Regular expression for the whole diffusers name of the modules that get an adapter by default."""
    parts: ClassVar[Mapping[str, str]]
    """Parts of the model that users give learning rates of their own: name -> regular expression for the diffusers path of a module
    or weight, which stands for everything below it.  Every weight is in exactly one part."""
    lora_format: ClassVar[LoraFormat]
    """How a LoRA file is named so that ComfyUI and diffusers both read it whole."""
    file_facts: ClassVar[FileFacts]
    """How files of the family are recognised and converted without a model at hand."""

    options: ModelOptions
    size_rules: SizeRules
    controls: ControlRules = NO_CONTROLS
    """How many control pictures each sample must and may have."""
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
    def weights(self) -> NamedWeights:
        """The transformer's weights by diffusers name, read lazily from whatever layout the files have."""

    def adaptable_weights(self) -> NamedWeights:
        """What adapter files may be for: the transformer's weights, and those of frozen encoders that such files know."""
        return self.weights()

    def take_merged(self, weights: NamedWeights, merged: Sequence[tuple[AdapterFile, float]]) -> None:
        """Let frozen encoders compute with ``merge_adapters``: ``weights`` are :meth:`adaptable_weights` with them.  Called before
        :meth:`encoders`."""
        return None

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

    def full_key_map(self) -> KeyMap:
        """Diffusers names to the keys of a full export; in a release that is one file, these tell the networks from each other."""
        return self.key_map()

    @classmethod
    def part_lr(cls, options: ModelOptions) -> Mapping[str, float]:
        """Learning rates by part that ``[model]`` has keys for; ``[optimizer.part_lr]`` goes before them."""
        return {}

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

    def export_files(self) -> Mapping[str, ExportFile]:
        """The files of an export, by what follows the run's name in the file's name.  Together they hold every weight."""
        return {"": ExportFile("", self.export_metadata())}

    def export_file_of(self, path: Path, metadata: Mapping[str, str]) -> str:
        """Which of :meth:`export_files` an adapter's file belongs to.  Raises UserError if that is not clear."""
        return ""

    @abstractmethod
    def export_metadata(self) -> dict[str, str]:
        """ModelSpec's ``modelspec.architecture`` and what else other programs read to know the base model.  No paths."""

    @classmethod
    @abstractmethod
    def write_tiny(cls, variant: str, folder: Path, layout: Layout, seed: int, scale: int = 1) -> None:
        """A small random model in the true layout, with tokenizer, encoders and VAE.  ``scale`` multiplies widths and depths."""
