"""The settings of a run, one frozen pydantic model per TOML table; those of a dataset file are in ``dataset``.

A key is documented by the text under it; ``configs/README.md`` repeats them and a test holds the two together.  Key names and
meanings are those of diffusion-pipe's TOML files where it has the idea.  A family's own ``[model]`` keys are in the family's
``Options``, a subclass of :class:`ModelOptions`.

Impossible combinations are refused by validators of single fields that look at the fields above them, not of whole tables: so
they are reported together with every other problem, at the line of the key.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, SerializeAsAny, Strict, ValidationInfo, field_validator

from utils.config.dataset import DatasetConfig as DatasetConfig
from utils.config.dataset import DirectoryConfig as DirectoryConfig
from utils.config.table import FilePath, PositiveInt, Table
from utils.stopping import LEAST_MARGIN_SECONDS


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


def _folder_name(value: str) -> str:
    if not value.strip(".") or any(sign in value for sign in "/\\"):
        raise ValueError("it becomes the name of a folder or file, so it may not be empty or hold a slash")
    return value


DtypeName = Literal["float32", "bfloat16", "float16"]
# float16 is for files: to train in it, the loss would have to be scaled.
TrainingDtype = Literal["float32", "bfloat16"]
# TOML has no pairs, and the tables are strict about types.
Pair = Annotated[tuple[float, float], Strict(False)]
Name = Annotated[str, AfterValidator(_folder_name)]
# The text is what `describe.allowed` says of it.
BlockRanges = Annotated[str | dict[str, str], AfterValidator(_block_ranges), 'numbers like "0-9,20", or a table of them']
Time = Annotated[str, AfterValidator(_time), 'a time like "3h50m"']


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
    (or an export) and a checkpoint took so far, the run saves and ends with exit code 75, which asks for another start."""
    hang_timeout: Time | None = None
    """A step that takes longer is taken for hung: the stacks of all ranks are written to the run's folder, and the run ends for a
    restart. The first steps of a start are not measured. Default: ten times the recent steps, and at least 10 minutes. Anywhere
    else, from the start to the end, what takes long is waited for; but a process that gives no sign of life for so long (default
    10 minutes, and never less than 20 s) ends the run in the same way: one that is stopped, or whose machine is frozen or swaps."""

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
