"""The table of optimizers: name in the TOML -> classes, and the keys that they take.

Names are compared without regard to case, as in diffusion-pipe's files, whose names stand here too.  What is not in the table is
looked up among the classes of pytorch_optimizer.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from utils.config.schema import OptimizerConfig
from utils.errors import UserError, listed

# How a step is computed is decided here, not in the TOML; and a step is taken when the whole gradient is there and clipped.
_OURS = {"params", "lr", "foreach", "fused", "triton", "capturable", "differentiable", "maximize", "gradient_release"}


def _any_shape(parameter: Tensor) -> bool:
    return True


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim == 2


@dataclass(frozen=True)
class Part:
    """One optimizer class of a kind."""

    package: str
    """Where the class is imported from."""
    name: str
    """The class."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that we set where the user does not."""
    withheld: frozenset[str] = frozenset()
    """Arguments that the user may not set."""
    takes: Callable[[Tensor], bool] = _any_shape
    """Which parameters it steps, of those that no part before it took."""


@dataclass(frozen=True)
class Kind:
    """What an optimizer's name stands for."""

    parts: tuple[Part, ...]
    extra: str | None = None
    """The extra of pyproject.toml that installs its package."""
    compensated: bool = False
    """Whether it keeps what rounding loses by itself (Kahan summation), so that bf16 weights need no fp32 copy."""


# Fused steps have the same bits whatever else is stepped with a tensor and however many threads do it (a test holds this).
_ADAMW = Part("torch.optim", "AdamW", given={"fused": True})
_EIGHT_BIT = Kind(
    (Part("bitsandbytes.optim", "AdamW8bit", withheld=frozenset({"amsgrad", "optim_bits", "args", "is_paged"})),),
    extra="bitsandbytes",
)


def _kahan(name: str) -> Kind:
    # Set, not left to the class: it would decide at the first step, and not again after resuming with other stages.
    return Kind((Part("optimi", name, given={"kahan_sum": True}),), extra="optimi", compensated=True)


def _schedule_free(name: str) -> Kind:
    # The run's own `warmup_steps` scales the learning rate that these see.
    return Kind((Part("schedulefree", name, withheld=frozenset({"warmup_steps"})),), extra="schedulefree")


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind((_ADAMW,)),
    "sgd": Kind((Part("torch.optim", "SGD", given={"fused": True}),)),
    # Its epsilon is a pair of two meanings, which the one number of `optimizer.eps` cannot say.
    "adafactor": Kind((Part("torch.optim", "Adafactor", withheld=frozenset({"eps"})),)),
    # Orthogonalised momentum for matrices, AdamW for the rest; `betas` and `eps` are AdamW's.  Updates are scaled to AdamW's size
    # (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate serves both.
    "muon": Kind(
        (
            Part(
                "torch.optim",
                "Muon",
                given={"adjust_lr_fn": "match_rms_adamw"},
                withheld=frozenset({"eps"}),
                takes=_is_matrix,
            ),
            _ADAMW,
        )
    ),
    "adamw8bit": _EIGHT_BIT,
    # diffusion-pipe's own class; here fp32 master weights do what its Kahan summation does.
    "adamw8bitkahan": _EIGHT_BIT,
    "adamw_optimi": _kahan("AdamW"),
    "stableadamw": _kahan("StableAdamW"),
    "prodigy": Kind((Part("prodigyopt", "Prodigy", withheld=frozenset({"fsdp_in_use"})),), extra="prodigy"),
    "adamw_schedulefree": _schedule_free("AdamWScheduleFree"),
    "radam_schedulefree": _schedule_free("RAdamScheduleFree"),
    "sgd_schedulefree": _schedule_free("SGDScheduleFree"),
}


def _import(name: str, extra: str | None, wanted_by: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(
            f'{wanted_by} needs the package {package}, which cannot be imported ({error}): pip install -e ".[{extra}]"'
        ) from error


def find_kind(type_: str) -> Kind:
    """The row for ``optimizer.type``.  Raises UserError for an unknown name or a missing package."""
    name = type_.lower()
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    setting = f"optimizer.type = {type_!r}"
    known = f"known are {', '.join(OPTIMIZERS)}, and every class of pytorch_optimizer by its name"
    try:
        library = _import("pytorch_optimizer", "pytorch-optimizer", setting)
    except UserError as error:
        raise UserError(f"{setting} is not known{_near(name, OPTIMIZERS)}; {known}. If it is one of those, {error}") from error
    others = library.get_supported_optimizers()
    plain = name.replace("_", "").replace("-", "")
    if plain not in others:
        raise UserError(f"{setting} is not known{_near(name, OPTIMIZERS) or _near(name, others)}; {known}")
    return Kind((Part("pytorch_optimizer", library.load_optimizer(plain).__name__),), extra="pytorch-optimizer")


def _near(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""


def _settings(config: OptimizerConfig) -> dict[str, Any]:
    """The keys of ``[optimizer]`` that are the optimizer's own."""
    named = {key: getattr(config, key) for key in ("betas", "weight_decay", "eps")}
    given = {key: value for key, value in named.items() if value is not None} | (config.model_extra or {})
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _class(part: Part, kind: Kind, config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    return getattr(_import(part.package, kind.extra, f"optimizer.type = {config.type!r}"), part.name)


def _accepted(part: Part, kind: Kind, config: OptimizerConfig) -> set[str]:
    parameters = inspect.signature(_class(part, kind, config)).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return named - _OURS - part.withheld


def key_problems(config: OptimizerConfig) -> list[str]:
    """Keys of ``[optimizer]`` that the optimizer does not take.  Raises UserError as :func:`find_kind`."""
    kind = find_kind(config.type)
    accepted = sorted({key for part in kind.parts for key in _accepted(part, kind, config)})
    return [
        f"optimizer.{key} is not a setting of {config.type!r}{_near(key, accepted)}; accepted: {', '.join(accepted)}"
        for key in _settings(config)
        if key not in accepted
    ]


def averages(config: OptimizerConfig) -> bool:
    """Whether the optimizer keeps an average of the weights by itself, and so has a training and an evaluation mode."""
    kind = find_kind(config.type)
    return any(hasattr(_class(part, kind, config), "eval") for part in kind.parts)


def build(
    parameters: Mapping[str, Tensor], config: OptimizerConfig, rate_of: Callable[[str], float]
) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers that step ``parameters``, each with one group and its learning rate; none where there is nothing to step.

    ``rate_of``: the learning rate of a parameter, by name.  Raises UserError for an unknown type, a missing package, or settings
    that the class refuses.
    """
    kind = find_kind(config.type)
    if problems := key_problems(config):
        raise UserError(listed(problems, "the optimizer's settings:"))
    settings, rest, built = _settings(config), dict(parameters), []
    for part in kind.parts:
        by_rate: dict[float, list[Tensor]] = {}
        for name in [name for name, parameter in rest.items() if part.takes(parameter)]:
            by_rate.setdefault(rate_of(name), []).append(rest.pop(name))
        accepted = _accepted(part, kind, config)
        arguments = {**part.given, **{key: value for key, value in settings.items() if key in accepted}}
        for rate, taken in by_rate.items():
            try:
                built.append((_class(part, kind, config)(taken, lr=rate, **arguments), rate))
            except Exception as error:  # each package raises its own kinds
                raise UserError(f"optimizer.type = {config.type!r} refuses its settings: {error}") from error
    return built
