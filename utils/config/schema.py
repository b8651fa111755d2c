"""The settings of a run, one frozen pydantic model per TOML table.

A key is documented by the text under it; ``configs/README.md`` repeats them and a test holds the two together.  Key names and
meanings are those of diffusion-pipe's TOML files where it has the idea.  A family's own ``[model]`` keys are in the family's
``Options``, a subclass of :class:`ModelOptions`.

Impossible combinations are refused by validators of single fields that look at the fields above them, not of whole tables: so
they are reported together with every other problem, at the line of the key.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    Strict,
    ValidationInfo,
    field_validator,
)

from utils.stopping import LEAST_MARGIN_SECONDS


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value))


def _resolution(value: Any) -> Any:
    if not _whole(value) and not _pair(value):
        raise ValueError("a resolution is the side of a square like 512, or a pair [width, height], in whole pixels above 0")
    return value


def _aspect_ratio(value: Any) -> Any:
    if not (type(value) in (int, float) and value > 0) and not _pair(value):
        raise ValueError("an aspect ratio is width / height, a number above 0, or a pair [width, height]")
    return value


def _size_bucket(value: Any) -> Any:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_whole, value))):
        raise ValueError("each size bucket is [width, height, frames], three whole numbers above 0")
    return value


def block_numbers(text: str) -> set[int]:
    """The numbers that a text like ``0-9,20`` names.  ValueError for another text, and for a range that names none."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found:
            raise ValueError(f'{text!r} names no blocks; write numbers, and ranges from low to high, like "0-9,20"')
        numbers.update(found)
    return numbers


def _block_ranges(value: str | dict[str, str]) -> str | dict[str, str]:
    for text in [value] if isinstance(value, str) else value.values():
        block_numbers(text)
    return value


def seconds_in(text: str) -> float:
    """The seconds in a text like ``3h50m``, ``90s`` or ``1d``.  ValueError for another text, and for no time at all."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    found = re.fullmatch(r"\s*(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?\s*(?:(\d+)s)?\s*", text)
    seconds = sum(int(number or 0) * size for number, size in zip(found.groups(), units.values(), strict=True)) if found else 0
    if not seconds:
        raise ValueError(f'{text!r} is no time; write days, hours, minutes and seconds, in this order, like "3h50m" or "90s"')
    return float(seconds)


def _time(value: str) -> str:
    seconds_in(value)
    return value


def _encoding(value: str) -> str:
    try:
        b"a".decode(value)
    except LookupError as error:
        raise ValueError('it is no encoding of texts that is known; write one like "cp1252", "shift_jis" or "gb18030"') from error
    except UnicodeError:
        pass  # one of more than a byte for each sign
    return value


def _tag_delimiter(value: str) -> str:
    if not value:
        raise ValueError('it may not be empty; tags are divided by a text like ", "')
    return value


def _folder_name(value: str) -> str:
    if not value.strip(".") or any(sign in value for sign in "/\\"):
        raise ValueError("it becomes the name of a folder or file, so it may not be empty or hold a slash")
    return value


def _colour(value: str) -> str:
    try:
        ImageColor.getcolor(value, "RGB")
    except ValueError as error:
        raise ValueError('it is no colour; write a name like "grey", or "#rrggbb"') from error
    return value


DtypeName = Literal["float32", "bfloat16", "float16"]
# float16 is for files: to train in it, the loss would have to be scaled.
TrainingDtype = Literal["float32", "bfloat16"]
# TOML has lists and strings only: these two are read from them although the tables are strict about types.
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(value).expanduser() if isinstance(value, str) else value)]
Pair = Annotated[tuple[float, float], Strict(False)]
PositiveInt = Annotated[int, Field(ge=1)]
Name = Annotated[str, AfterValidator(_folder_name)]
# The text is what `describe.allowed` says of them.
Resolution = Annotated[int | list[int], BeforeValidator(_resolution), "sides and [width, height] pairs"]
AspectRatio = Annotated[float | list[int], BeforeValidator(_aspect_ratio), "ratios and [width, height] pairs"]
SizeBucket = Annotated[list[int], BeforeValidator(_size_bucket), "[width, height, frames]"]
BlockRanges = Annotated[str | dict[str, str], AfterValidator(_block_ranges), 'numbers like "0-9,20", or a table of them']
Time = Annotated[str, AfterValidator(_time), 'a time like "3h50m"']
Encoding = Annotated[str, AfterValidator(_encoding)]
TagDelimiter = Annotated[str, AfterValidator(_tag_delimiter)]
Repeats = Annotated[float, Field(gt=0, le=10000)]
Colour = Annotated[str, AfterValidator(_colour)]
ClipMode = Literal["single_beginning", "single_middle", "multiple_overlapping", "non_overlapping", "uniform"]
FrameBuckets = Annotated[list[PositiveInt], Field(min_length=1)]


class Table(BaseModel):
    """A TOML table: unknown keys are errors, types are not coerced, values cannot be changed after reading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        validate_default=True,  # the validators of combinations speak up for keys that were not given, too
        allow_inf_nan=False,  # TOML knows inf and nan; no setting means anything with them
    )


class MergedAdapter(Table):
    """One entry of ``merge_adapters``."""

    path: FilePath
    """A LoRA file, of ComfyUI, diffusers, kohya or PEFT."""
    weight: float = 1.0
    """Strength at which it is added to the base weights."""


class ModelOptions(Table):
    """``[model]``: what every family understands.  Families add their own keys in a subclass."""

    type: str
    """The family: the name of a folder under `models/` (`wan`)."""
    path: FilePath | None = None
    """The model's folder: a diffusers folder, the original release, or a folder of ComfyUI files. The layout is found out."""
    transformer_path: FilePath | None = None
    """The transformer alone: a `.safetensors` file (any layout) or a folder. Overrides what `path` holds."""
    vae_path: FilePath | None = None
    """The VAE alone: `.safetensors`, `.pth` or a folder."""
    text_encoder_path: FilePath | None = None
    """The text encoder alone: `.safetensors`, `.pth` or a folder."""
    image_encoder_path: FilePath | None = None
    """The image encoder (CLIP vision) alone: `.safetensors`, `.pth` or a folder."""
    tokenizer_path: FilePath | None = None
    """A tokenizer folder, for files that carry no tokenizer."""
    merge_adapters: list[MergedAdapter] = []
    """LoRAs that are added to the base weights before training."""
    dtype: TrainingDtype = "bfloat16"
    """The dtype of computing, and of the encoders."""
    transformer_dtype: TrainingDtype | None = None
    """The dtype in which the transformer's weights are held. Default: `dtype`."""
    timestep_sample_method: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal"
    """How timesteps are drawn before the shift; `mode` and `cosmap` are those of the SD3 paper."""
    sigmoid_scale: Annotated[float, Field(gt=0)] = 1.0
    """Scale of the normal before the sigmoid of `logit_normal`."""
    mode_scale: Annotated[float, Field(ge=-1, le=1.75)] = 1.29
    """Scale of `mode`: above 0 the middle is drawn more often, below 0 the ends."""
    shift: Annotated[float, Field(gt=0)] | None = None
    """Constant timestep shift s: t' = s t / (1 + (s - 1) t). Default: the family's."""
    min_t: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lower end of the timesteps that are trained. The distribution is cut there, not squeezed."""
    max_t: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Upper end of the timesteps that are trained."""
    loss: Literal["mse", "huber", "smooth_l1", "pseudo_huber"] = "mse"
    """The loss of each element. All of them are the square near zero; the others are linear far away."""
    loss_delta: Annotated[float, Field(gt=0)] = 0.1
    """Where `huber`, `smooth_l1` and `pseudo_huber` turn from the square to the line."""

    @field_validator("max_t")
    @classmethod
    def _range_is_not_empty(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("min_t", -1.0):
            raise ValueError(f"it must be above min_t = {info.data['min_t']}")
        return value


class AdapterOverride(Table):
    """``[[adapter.override]]``: another rank or strength for some of the modules."""

    modules: str | list[str]
    """The modules, in the form of `target_modules`. Each must match one that gets an adapter."""
    rank: PositiveInt | None = None
    """Rank of these modules' matrices. Default: `[adapter] rank`."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Alpha of these modules. Default: `[adapter] alpha`, or without it their rank."""

    @field_validator("alpha")
    @classmethod
    def _says_something(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is None and info.data.get("rank", 0) is None:
            raise ValueError("give a rank or an alpha, or these modules are like the others")
        return value


class AdapterConfig(Table):
    """``[adapter]``: train a small adapter. Without this table the whole transformer is trained."""

    type: Literal["lora", "rslora", "dora", "loha", "lokr"] = "lora"
    """The kind of adapter. `rslora` is a LoRA scaled by alpha / sqrt(rank), `dora` a LoRA that also learns the length of each row
    of the weight, `loha` the product of two LoRAs, element by element, `lokr` a Kronecker product."""
    rank: PositiveInt
    """Rank of the adapter's matrices. For `lokr` a rank that is too high to save anything keeps the larger factor whole."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapter is scaled by alpha / rank. Default: `rank`, a scale of 1."""
    decompose_factor: PositiveInt | None = None
    """For `lokr`: the size that the smaller factor has if it divides the module's. Default: near the square root."""
    init_from: FilePath | list[FilePath] | None = None
    """A file of the same kind and rank to start from, of ComfyUI, diffusers, kohya or PEFT, instead of from nothing. A list where a
    run's adapter is exported as several files, as that of both transformers of Wan 2.2 A14B."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input. Not for `loha` and `lokr`."""
    dtype: TrainingDtype = "float32"
    """The dtype of the adapter's weights."""
    target_modules: str | list[str] | None = None
    """Modules that get an adapter, by diffusers name: a regular expression for the whole name, or a list of name endings.
    Default: the family's."""
    exclude_modules: str | list[str] | None = None
    """Modules that are left out although `target_modules` matches, in the same form."""
    layers: BlockRanges | None = None
    """Only blocks of these numbers get an adapter: `"0-9,20"`. Where the model has several lists of blocks, a table with the
    numbers of each: `{transformer_blocks = "0-9", single_transformer_blocks = "20-37"}`; a list that is not named gets none."""
    override: list[AdapterOverride] = []
    """Modules with a rank or alpha of their own."""

    @field_validator("decompose_factor")
    @classmethod
    def _is_of_a_lokr(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("type", "lokr") != "lokr":
            raise ValueError(f'it is only read with type = "lokr", which is {info.data["type"]!r}; remove one of them')
        return value

    @field_validator("dropout")
    @classmethod
    def _has_an_input(cls, value: float, info: ValidationInfo) -> float:
        if value and (kind := info.data.get("type")) in ("loha", "lokr"):
            raise ValueError(f'type = "{kind}" is added to the weight and has no input to drop; remove it, or use a lora or dora')
        return value


class OptimizerConfig(Table):
    """``[optimizer]``.  Other keys than these are handed to the optimizer, and checked against what it takes."""

    model_config = ConfigDict(extra="allow")

    type: str
    """Name in the table of optimizers (`adamw`, `sgd`, `adafactor`, `muon`, …) or a class of pytorch_optimizer."""
    lr: Annotated[float, Field(ge=0)]
    """Learning rate after the warm-up."""
    part_lr: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Learning rates of parts of the model, as `[optimizer.part_lr]` with `part = rate`; 0 freezes the part. `lr` is the rate of
    the rest, which an `lr` of 0 freezes. Each family's page names its parts."""
    betas: Pair | None = None
    """Decay rates of the running averages. Default: the optimizer's."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay. Default: the optimizer's."""
    eps: Annotated[float, Field(ge=0)] | None = None
    """The optimizer's epsilon. Default: the optimizer's."""
    master_weights: bool = True
    """Keep an fp32 copy of trained bf16 or fp16 weights, so that small updates are not lost. Costs 4 bytes a weight."""
    zero: Literal[0, 1] = 0
    """1: ZeRO stage 1, the optimizer's state and the fp32 copies are spread over the replicas, each of which keeps its share. The
    weights are the same, bit for bit; a step sends each of them once more. It may change when a run is resumed."""


class LimitsConfig(Table):
    """``[limits]``: when a run ends before it is done."""

    time: Time | None = None
    """Time of the job, from its start (under Slurm the job's). Shortly before it is over, by at least a minute and by what a step
    and a checkpoint took so far, the run saves and ends with exit code 75, which asks for another start."""
    hang_timeout: Time | None = None
    """A step that takes longer is taken for hung: the stacks of all ranks are written to the run's folder, and the run ends for a
    restart. The first steps of a start are not measured. Default: ten times the recent steps, and at least 10 minutes."""

    @field_validator("time")
    @classmethod
    def _leaves_room(cls, value: str | None) -> str | None:
        if value is not None and seconds_in(value) <= LEAST_MARGIN_SECONDS:
            raise ValueError(f"it must be above {LEAST_MARGIN_SECONDS:.0f} s, which are kept free at its end for saving")
        return value


class EmaConfig(Table):
    """``[ema]``: also keep an exponential moving average of the trained weights, which is exported beside them."""

    decay: Annotated[float, Field(gt=0, lt=1)]
    """How much of the average stays at each step: 0.999 averages about the last 1000 steps."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """Steps before the average begins."""
    ramp: bool = True
    """Average fewer steps at first, with a decay of (1 + n) / (10 + n) in the n-th step until that is above `decay`."""
    evaluate: bool = False
    """Measure the held-out loss with the average instead of the weights."""
    offload: bool = False
    """Keep the average in host memory. It saves 4 bytes a trained weight on the GPU; each step copies the weights to the host."""


class WandbConfig(Table):
    """``[wandb]``: send the metrics to Weights & Biases as well."""

    project: str = "flowstage"
    """Project that the run appears in."""
    entity: str | None = None
    """User or team that owns the project."""
    name: str | None = None
    """Name of the run there. Default: `run_name`."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes to the run's folder, for `wandb sync` later."""


class EvalDataset(Table):
    """One entry of ``eval_datasets``."""

    name: Name
    """Name under which the loss is reported."""
    config: FilePath
    """Dataset file with the held-out data."""


class RunConfig(Table):
    """The main file."""

    output_dir: FilePath
    """Folder in which each run gets its own folder."""
    dataset: FilePath
    """The dataset file."""
    run_name: Name | None = None
    """Name of the run's folder in `output_dir`. Default: the time of the start. Needed for `resume`."""
    seed: int = 0
    """Seed of every random choice: order, noise, timesteps, dropout, the adapter's first weights."""
    resume: Literal["never", "latest", "latest-or-new"] = "never"
    """`never`: start anew; `latest`: continue from the run's newest whole checkpoint; `latest-or-new`: the same if there is one."""
    cache_dir: FilePath | None = None
    """Folder of the encoded data, shared by runs. Default: `output_dir/cache`."""

    epochs: PositiveInt | None = None
    """Stop after so many passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps. With `epochs` too, whichever comes first."""
    micro_batch_size_per_gpu: PositiveInt = 1
    """Samples that travel through the pipeline together. The loss is their mean, and each micro-batch of a step counts the same."""
    image_micro_batch_size_per_gpu: PositiveInt | None = None
    """The same for buckets of one frame, pictures, which take less room than clips. Default: `micro_batch_size_per_gpu`."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Instead of these two: as many samples of a bucket as have at most so many tokens in the model, and one at least. `--check`
    shows the tokens of each bucket."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step and replica. With stages, at least twice their number keeps them busy."""
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient. 0: no clipping."""
    max_bad_steps: PositiveInt = 20
    """A step whose loss or gradient is not finite is skipped, and its samples are named. After so many in a row the run ends, with
    a checkpoint that has the weights of the last good step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from near 0."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up, to 0 at the last step for `linear` and `cosine`."""

    pipeline_stages: PositiveInt = 1
    """GPUs that one copy of the model is divided over. The number of processes must be a multiple of it."""
    partition_method: Literal["parameters", "uniform", "manual"] = "parameters"
    """How layers are divided over the stages: by weights (frozen ones too), by number of layers, or by `partition_split`."""
    partition_split: list[int] | None = None
    """For `manual`: the first layer of each stage after the first, as `--check` numbers them."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: much less memory, about a third more time."""
    num_loader_workers: Annotated[int, Field(ge=0)] = 2
    """Processes of each rank on the first and the last stage that read encoded samples ahead of training, two micro-batches each.
    0: the rank reads them itself, when it needs them."""

    save_every_n_steps: PositiveInt | None = None
    """Export the trained weights every so many steps. The end of the run always exports."""
    save_every_n_epochs: PositiveInt | None = None
    """Export the trained weights every so many epochs."""
    save_dtype: DtypeName | None = None
    """The dtype of exported weights. Default: `[adapter] dtype`, or the transformer's for full fine-tuning."""
    checkpoint_every_n_steps: PositiveInt | None = None
    """Write a checkpoint, from which a run can be resumed, every so many steps. The end of the run always writes one."""
    checkpoint_every_n_epochs: PositiveInt | None = None
    """Write a checkpoint every so many epochs."""
    checkpoint_every_n_minutes: Annotated[float, Field(gt=0)] | None = None
    """Write a checkpoint every so many minutes."""

    eval_datasets: list[EvalDataset] = []
    """Held-out datasets; their loss is measured with fixed noise at fixed timesteps."""
    eval_every_n_steps: PositiveInt | None = None
    """Evaluate every so many steps."""
    eval_every_n_epochs: PositiveInt | None = None
    """Evaluate every so many epochs."""
    eval_before_first_step: bool = True
    """Evaluate before training too, if there are eval datasets."""
    eval_timesteps: list[Annotated[float, Field(gt=0, lt=1)]] = [0.1, 0.3, 0.5, 0.7, 0.9]
    """Quantiles of the timestep distribution at which the held-out loss is measured."""

    keep_last: PositiveInt | Literal["all"] = 3
    """Keep so many of the newest checkpoints. An older one is removed when a new one is whole on the disk. Exports always stay."""
    keep_every_n_steps: PositiveInt | None = None
    """Keep the first checkpoint of each so many steps as well."""
    keep_best: PositiveInt | None = None
    """Keep so many checkpoints with the lowest held-out loss as well (the mean over `eval_datasets`). Each evaluation then writes a
    checkpoint."""

    model: SerializeAsAny[ModelOptions]
    """The model."""
    adapter: AdapterConfig | None = None
    """The adapter; absent for full fine-tuning."""
    optimizer: OptimizerConfig
    """The optimizer."""
    limits: LimitsConfig | None = None
    """How long the run and a step may take."""
    ema: EmaConfig | None = None
    """An average of the trained weights; absent: none."""
    wandb: WandbConfig | None = None
    """Weights & Biases; absent: not used."""

    @field_validator("resume")
    @classmethod
    def _names_the_run(cls, value: str, info: ValidationInfo) -> str:
        if value != "never" and info.data.get("run_name", "") is None:
            raise ValueError("it needs run_name, or it is not known which run to continue")
        return value

    @field_validator("max_tokens_per_micro_batch")
    @classmethod
    def _replaces_fixed_sizes(cls, value: int | None, info: ValidationInfo) -> int | None:
        fixed = {"micro_batch_size_per_gpu": 1, "image_micro_batch_size_per_gpu": None}
        if value is not None and (given := [name for name, default in fixed.items() if info.data.get(name, default) != default]):
            raise ValueError(f"it chooses the batch sizes, which {' and '.join(given)} fixes; remove one of them")
        return value

    @field_validator("max_steps")
    @classmethod
    def _has_an_end(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("epochs", 0) is None:
            raise ValueError("give epochs or max_steps, or the run has no end")
        return value

    @field_validator("keep_every_n_steps", "keep_best")
    @classmethod
    def _keeps_more(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("keep_last") == "all":
            raise ValueError('keep_last = "all" keeps every checkpoint already; give a number there, or remove this key')
        return value

    @field_validator("keep_best")
    @classmethod
    def _has_losses(cls, value: int | None, info: ValidationInfo) -> int | None:
        when = ("eval_every_n_steps", "eval_every_n_epochs")
        if value is not None and info.data.get("eval_datasets") == []:
            raise ValueError("without eval_datasets there is no held-out loss to compare by")
        if value is not None and all(key in info.data and info.data[key] is None for key in when):
            raise ValueError(f"no held-out loss is measured; set {' or '.join(when)}")
        return value

    @field_validator("partition_split")
    @classmethod
    def _splits_into_stages(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if "partition_method" not in info.data or "pipeline_stages" not in info.data:
            return value
        method, stages = info.data["partition_method"], info.data["pipeline_stages"]
        if method != "manual":
            if value is not None:
                raise ValueError(f'it is only read with partition_method = "manual", which is {method!r}; remove one of them')
        elif value is None or len(value) != stages - 1:
            raise ValueError(
                f'partition_method = "manual" needs pipeline_stages - 1 = {stages - 1} numbers here, '
                "the first layer of each stage after the first"
            )
        elif value != sorted(set(value)) or min(value, default=1) < 1:
            raise ValueError("the numbers must rise and begin at 1 or above, so that every stage has a layer")
        return value

    @field_validator("eval_datasets")
    @classmethod
    def _names_differ(cls, value: list[EvalDataset]) -> list[EvalDataset]:
        names = ["training", *(entry.name for entry in value)]  # what the training data are called in reports
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f'every entry needs a name of its own, not "training"; taken: {", ".join(repeated)}')
        return value


class DirectoryConfig(Table):
    """``[[directory]]``: a folder of pictures and clips.  Keys of the dataset file may be repeated here to override it."""

    path: FilePath
    """A folder, a `.tar` file, or a list of files: `.jsonl` or `.csv`. Captions stand beside the files, in `.txt` or `.json` files
    of the same name, in `captions.json`, or in the list."""
    recursive: bool = False
    """Take the files of all folders below it too. Folders whose name begins with a point are left out."""
    kohya_folder_names: bool = False
    """Take the folders in it that are called `<repeats>_<text>`, as kohya's trainers do: an epoch shows their files so often, and
    the text is the caption of files that have none."""
    num_repeats: Repeats | None = None
    """Overrides the dataset file's."""
    is_reg: bool = False
    """A regularisation set: what the model knows already and should keep. An epoch shows as many of its samples as of all others
    together, other ones in the next epoch if there are more, and no trigger word is added to their captions."""
    loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """In training, the loss of its samples is multiplied by this."""
    control_path: FilePath | list[FilePath] | None = None
    """For editing models: a folder with the control picture of each item under the item's name; several folders for several."""
    mask_path: FilePath | None = None
    """A folder with a mask of each item under the item's name, a picture or for clips also a clip: the loss counts where it is
    white, in part where it is grey, not where it is black. An item without one counts everywhere."""
    alpha_mask: bool = False
    """The alpha channel of each picture is its mask, unless `mask_path` has one."""
    first_frame_path: FilePath | None = None
    """For models that are shown the first frame: a folder with a picture of each item under the item's name, shown in place of the
    clip's own first frame."""
    last_frame_path: FilePath | None = None
    """The same for models that are shown the last frame."""
    resolutions: list[Resolution] | None = None
    """Overrides the dataset file's."""
    frame_buckets: FrameBuckets | None = None
    """Overrides the dataset file's."""
    size_buckets: list[SizeBucket] | None = None
    """Overrides the dataset file's."""
    enable_ar_bucket: bool | None = None
    """Overrides the dataset file's."""
    min_ar: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    max_ar: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    num_ar_buckets: PositiveInt | None = None
    """Overrides the dataset file's."""
    ar_buckets: list[AspectRatio] | None = None
    """Overrides the dataset file's."""
    no_upscale: bool | None = None
    """Overrides the dataset file's."""
    crop: Literal["center", "random"] | None = None
    """Overrides the dataset file's."""
    background: Colour | None = None
    """Overrides the dataset file's."""
    animated: Literal["clip", "first_frame"] | None = None
    """Overrides the dataset file's."""
    video_clip_mode: ClipMode | None = None
    """Overrides the dataset file's."""
    clips_per_video: PositiveInt | None = None
    """Overrides the dataset file's."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    caption_prefix: str | None = None
    """Overrides the dataset file's."""
    caption_suffix: str | None = None
    """Overrides the dataset file's."""
    trigger_word: str | None = None
    """Overrides the dataset file's."""
    captions_per_line: bool | None = None
    """Overrides the dataset file's."""
    caption_encoding: Encoding | None = None
    """Overrides the dataset file's."""
    on_missing_caption: Literal["error", "empty"] | None = None
    """Overrides the dataset file's."""
    caption_wildcards: bool | None = None
    """Overrides the dataset file's."""
    shuffle_tags: bool | None = None
    """Overrides the dataset file's."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides the dataset file's."""
    keep_tokens: Annotated[int, Field(ge=0)] | None = None
    """Overrides the dataset file's."""
    tag_delimiter: TagDelimiter | None = None
    """Overrides the dataset file's."""
    caption_variants: PositiveInt | None = None
    """Overrides the dataset file's."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    """Overrides the dataset file's."""

    @property
    def control_paths(self) -> list[Path]:
        """The folders of ``control_path``."""
        given = self.control_path or []
        return given if isinstance(given, list) else [given]


class DatasetConfig(Table):
    """The dataset file."""

    resolutions: list[Resolution] = []
    """Sizes to train at: a number is the side of a square of equal area (`512`), a pair is `[width, height]`."""
    enable_ar_bucket: bool = False
    """Sort by aspect ratio into buckets of about the area of each resolution, instead of cropping all to its shape."""
    min_ar: Annotated[float, Field(gt=0)] = 0.5
    """Narrowest aspect ratio (width / height) of the buckets."""
    max_ar: Annotated[float, Field(gt=0)] = 2.0
    """Widest aspect ratio of the buckets."""
    num_ar_buckets: PositiveInt = 7
    """Number of aspect ratios, evenly spaced in their logarithm."""
    ar_buckets: list[AspectRatio] | None = None
    """The aspect ratios themselves, or `[width, height]` pairs, instead of the three keys above."""
    frame_buckets: FrameBuckets = [1]
    """Numbers of frames to train at. A clip goes into the largest bucket that it fills; 1 is for pictures."""
    size_buckets: list[SizeBucket] | None = None
    """Buckets as `[width, height, frames]`, instead of all of the above."""
    no_upscale: bool = False
    """Never enlarge: an item that is smaller than its bucket gets a smaller bucket of about that shape."""
    crop: Literal["center", "random"] = "center"
    """What stays of an item that is wider or higher than its bucket's shape: the middle, or a place that is drawn for each item,
    once for the run. A list of files may give each item a box of its own to use."""
    background: Colour = "white"
    """What lies behind transparent parts of pictures: a colour's name, or `#rrggbb`."""
    animated: Literal["clip", "first_frame"] = "clip"
    """What animated pictures (GIF, WebP, PNG, AVIF) are taken for: clips, or pictures that show their first frame."""
    video_clip_mode: ClipMode = "single_beginning"
    """Which part of a clip longer than its bucket is used: its beginning, its middle, `multiple_overlapping`: as many parts as
    cover all of it, evenly spaced; `non_overlapping`: as many whole ones as fit behind each other; `uniform`: `clips_per_video`
    parts, evenly spaced."""
    clips_per_video: PositiveInt | None = None
    """For `uniform`: how many parts of a clip are used, fewer where they would be the same."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second that clips are resampled to. Default: the family's."""
    num_repeats: Repeats = 1
    """How often an epoch shows each item. With a fraction an epoch shows some items once more than others, and later epochs the
    others: 0.5 shows each in every second epoch."""
    sampling_temperature: Annotated[float, Field(ge=1)] | None = None
    """Evens out directories of different sizes: an epoch, as long as without it, is divided among them by (items x repeats) to the
    power of 1 / temperature. 1 changes nothing, a large number gives each directory the same share."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What happens when an item cannot be used because it is broken, has no caption, or lacks its control picture: `stop` ends the
    run before it trains, with all of them named; `skip` names them in the log and the report and trains without them."""
    caption_prefix: str = ""
    """Text put before every caption."""
    caption_suffix: str = ""
    """Text put after every caption."""
    trigger_word: str = ""
    """A word put before each caption that does not hold it, followed by `tag_delimiter`."""
    captions_per_line: bool = False
    """Each line of a `.txt` file is a caption of its own. Training shows one at a time."""
    caption_encoding: Encoding = "utf-8"
    """How caption files are encoded that have no byte order mark, as UTF-16 has."""
    on_missing_caption: Literal["error", "empty"] = "error"
    """`empty` gives an item without a caption file an empty caption; how many there are is reported."""
    caption_wildcards: bool = False
    """`{red|blue}` in a caption is one of the two, `{3::red|blue}` three times as often red; choices may hold choices. A
    sign after a backslash is the sign itself."""
    shuffle_tags: bool = False
    """Shuffle the tags that a caption is made of."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which each tag is left out."""
    keep_tokens: Annotated[int, Field(ge=0)] = 0
    """So many tags at the start of a caption stay there, and are not left out."""
    tag_delimiter: TagDelimiter = ", "
    """What is between tags; the spaces around it do not matter."""
    caption_variants: PositiveInt = 4
    """How many texts are made and encoded of an item whose captions vary by wildcards, shuffling or tag dropout; each caption has
    at least one. More of them take more room in the cache."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability with which an item is shown with an empty caption, without prefix and trigger word."""
    directory: Annotated[list[DirectoryConfig], Field(min_length=1)]
    """The folders, tar files and lists, at least one."""

    @field_validator("max_ar")
    @classmethod
    def _aspect_ratios_are_in_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("min_ar", 0.0):
            raise ValueError(f"it must not be below min_ar = {info.data['min_ar']}")
        return value

    @field_validator("clips_per_video")
    @classmethod
    def _counts_uniform_parts(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("video_clip_mode") == "uniform":
            raise ValueError('video_clip_mode = "uniform" needs it: how many parts of each clip are used')
        return value

    @field_validator("directory")
    @classmethod
    def _sizes_are_known(cls, value: list[DirectoryConfig], info: ValidationInfo) -> list[DirectoryConfig]:
        if not {"resolutions", "size_buckets"} <= info.data.keys() or info.data["resolutions"] or info.data["size_buckets"]:
            return value
        if bare := [str(entry.path) for entry in value if not (entry.resolutions or entry.size_buckets)]:
            raise ValueError(
                "give resolutions (or size_buckets) for the whole file or for each directory; "
                f"there are none for: {', '.join(bare)}"
            )
        return value
