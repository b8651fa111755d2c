"""The optimizer of one rank, with parameters, gradients and state known by name."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.config.schema import OptimizerConfig
from utils.draw import generator
from utils.errors import UserError
from utils.optim import kinds
from utils.optim.state import pack, unpack

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class RunOptimizer:
    """The optimizer of this rank's trainable parameters, known by name.  There may be none; then every method does nothing.

    With ``master_weights`` the gradients of bf16 and fp16 parameters are summed over the micro-batches in fp32, and steps are taken
    on fp32 copies of them, rounded back to the parameters after each step: a step smaller than the parameter's last bit is not
    lost.  Optimizers that keep the rounding error themselves (Kahan summation: ``adamw_optimi``, ``stableadamw``) get the fp32
    sums but no copies.  Without ``master_weights`` everything is done in the parameters' own dtype.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig):
        """Raises UserError for an unknown type, a missing package, or settings that the optimizer refuses."""
        self._config = config
        self._parameters = dict(parameters)
        self._low = {
            name: parameter
            for name, parameter in self._parameters.items()
            if config.master_weights and parameter.dtype in _LOW_PRECISION
        }
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self._low.items():
            parameter.register_post_accumulate_grad_hook(partial(self._add_to_sum, name))
        compensated = kinds.find_kind(config.type).compensated and (config.model_extra or {}).get("kahan_sum", True)
        self._masters = {} if compensated else {name: nn.Parameter(low.detach().float()) for name, low in self._low.items()}
        self._masters_are_current = False
        self._targets: dict[str, nn.Parameter] = {**self._parameters, **self._masters}
        self._parts = kinds.build(self._targets, config)
        self._averaging = [part for part in self._parts if hasattr(part, "eval") and hasattr(part, "train")]
        for part in self._averaging:
            part.train()
        self._first_groups = [deepcopy(_settings_of(part)) for part in self._parts]
        self._evaluating = False

    def _add_to_sum(self, name: str, parameter: Tensor) -> None:
        if name in self._sums:
            self._sums[name].add_(parameter.grad)
        else:
            self._sums[name] = parameter.grad.float()
        parameter.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        """The accumulated gradients themselves, by name: what is done to them in place is what :meth:`step` sees."""
        return {name: self._sums.get(name) if name in self._low else parameter.grad for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """One step.  The gradients are used up: optimizers compute in them."""
        assert not self._evaluating, "a step inside evaluation()"
        self._refresh_masters()
        for name in self._low:
            gradient = self._sums.get(name)
            self._targets[name].grad = None if gradient is None else gradient.to(self._targets[name].dtype)
        for part in self._parts:
            part.step()
        for name in self._low:
            self._targets[name].grad = None
        self._round_to_parameters()

    def zero_grad(self) -> None:
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def set_lr(self, factor: float) -> float:
        """Make the learning rate the configured one times ``factor``; returns it."""
        learning_rate = self._config.lr * factor
        for part in self._parts:
            part.param_groups[0]["lr"] = learning_rate
        return learning_rate

    @torch.no_grad()
    def _refresh_masters(self) -> None:
        """Take the parameters as they are at the first use: they may be filled after the optimizer was made."""
        if not self._masters_are_current:
            for name, master in self._masters.items():
                master.copy_(self._parameters[name])
            self._masters_are_current = True

    @torch.no_grad()
    def _round_to_parameters(self) -> None:
        if self._masters:
            torch._foreach_copy_([self._parameters[name] for name in self._masters], list(self._masters.values()))

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, the parameters are those to evaluate and export: the average, for schedule-free optimizers.

        Afterwards they are those of training again, bit for bit: an evaluation changes nothing in the run.  (The optimizers' own
        way back computes, and so rounds.)  Costs a copy of the trainable weights, when there are no gradients.
        """
        if not self._averaging:
            yield
            return
        self._refresh_masters()
        kept = {name: target.detach().clone() for name, target in self._targets.items()}
        self._evaluating = True
        try:
            for part in self._averaging:
                part.eval()
            self._round_to_parameters()
            yield
        finally:
            with torch.no_grad():
                for part in self._averaging:
                    part.train()
                for name, value in kept.items():
                    self._targets[name].copy_(value)
            self._round_to_parameters()
            self._evaluating = False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that :meth:`load_state` needs: tensors by ``<name>::<state key>``, and by name what JSON can hold.

        The fp32 master weight is ``<name>::master``.  Of an optimizer's group, what stepping has changed is kept with each
        parameter, so that the states of several stages are put together by uniting the dicts.  The tensors are the live ones,
        except that no two share memory: copy them before the next step.
        """
        assert not self._evaluating, "optimizer state taken inside evaluation()"
        self._refresh_masters()
        tensors: dict[str, Tensor] = {f"{name}::master": master.detach() for name, master in self._masters.items()}
        scalars: dict[str, Any] = {}
        for part in self._parts:
            if any(not isinstance(key, Tensor) for key in part.state):
                raise TypeError(f"{type(part).__name__} keeps state that belongs to no parameter, which a checkpoint cannot hold")
        for name, part, first_group in self._owners():
            target = self._targets[name]
            changed = {key: value for key, value in _settings_of(part).items() if _differs(value, first_group.get(key))}
            scalars[name] = {
                "optimizer": type(part).__name__,
                "state": {
                    key: pack(value, f"{name}::{key}", tensors, target.device) for key, value in part.state.get(target, {}).items()
                },
                "group": {key: pack(value, f"{name}::group.{key}", tensors, target.device) for key, value in changed.items()},
            }
        return _without_shared_memory(tensors), scalars

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state` was taken, by however many stages it was.

        Other parameters' entries are ignored.  Master weights come back too, and their parameters are set from them.  The
        learning rate and the settings stay those of the config.  Raises UserError if the state is of another optimizer, or lacks
        a parameter or a tensor.
        """
        for name, part, _ in self._owners():
            entry, master, target = scalars.get(name), tensors.get(f"{name}::master"), self._targets[name]
            if entry is None:
                raise UserError(f"the checkpoint has no optimizer state for {name!r}: was another set of weights trained?")
            if entry["optimizer"] != type(part).__name__:
                raise UserError(
                    f"the checkpoint's optimizer state is of {entry['optimizer']}, optimizer.type = {self._config.type!r} is "
                    f"{type(part).__name__}; resume with the optimizer that the run was started with"
                )
            if (master is not None) != (name in self._masters):
                raise UserError(
                    f"the checkpoint has {'an' if master is not None else 'no'} fp32 master weight of {name!r}, these settings "
                    f"ask for {'none' if master is not None else 'one'}; resume with the optimizer.master_weights and the weights' "
                    "dtype that the run was started with"
                )
            if master is not None:
                self._masters[name].copy_(master)
            part.state[target] = {key: unpack(value, tensors, target.device) for key, value in entry["state"].items()}
            part.param_groups[0].update({key: unpack(value, tensors, target.device) for key, value in entry["group"].items()})
        self._masters_are_current = True
        self._round_to_parameters()

    def _owners(self) -> Iterator[tuple[str, torch.optim.Optimizer, dict[str, Any]]]:
        """For each parameter's name the part that steps it, and that part's group as it was made."""
        names = {id(target): name for name, target in self._targets.items()}
        for part, first_group in zip(self._parts, self._first_groups, strict=True):
            for target in part.param_groups[0]["params"]:
                yield names[id(target)], part, first_group


def _settings_of(part: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer keeps for its parameters together.  The learning rate is set anew for each step."""
    return {key: value for key, value in part.param_groups[0].items() if key not in ("params", "lr")}


def _differs(value: Any, first: Any) -> bool:
    return isinstance(value, Tensor) or type(value) is not type(first) or value != first


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of each tensor whose memory an earlier one has (quantisation tables, group values): safetensors refuses those."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


# Two parameters of the trial, with gradients of very different size.
_TRIAL: dict[str, tuple[tuple[int, ...], float]] = {"matrix": ((8, 8), 1.0), "vector": ((8,), 30.0)}


class _Trial:
    """A few steps of a configured optimizer on small fp32 parameters, on the CPU, with fixed values and gradients."""

    STEPS = 6

    def __init__(self, config: OptimizerConfig, names: tuple[str, ...] = tuple(_TRIAL)):
        self.parameters = {
            name: nn.Parameter(torch.randn(_TRIAL[name][0], generator=generator("trial", name), device="cpu")) for name in names
        }
        self.optimizer = RunOptimizer(self.parameters, config)
        self.random_state = torch.get_rng_state()

    def steps(self, first: int = 0, last: int = STEPS) -> "_Trial":
        for step in range(first, last):
            for name, parameter in self.parameters.items():
                shape, size = _TRIAL[name]
                parameter.grad = size * torch.randn(shape, generator=generator("trial", name, step), device="cpu")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def continued(self, config: OptimizerConfig) -> "_Trial":
        """Another one with these weights and the state as a checkpoint would bring it."""
        other = _Trial(config)
        for name, parameter in other.parameters.items():
            parameter.data.copy_(self.parameters[name])
        tensors, scalars = self.optimizer.state()
        other.optimizer.load_state(tensors, json.loads(json.dumps(scalars)))
        return other

    def outcome(self, name: str) -> tuple[list[tuple[str, list]], Any]:
        """Weights and state of one parameter, to be compared."""
        tensors, scalars = self.optimizer.state()
        tensors[name] = self.parameters[name].detach()
        return [(key, tensors[key].tolist()) for key in sorted(tensors) if key.split("::")[0] == name], scalars[name]


def couples_parameters(config: OptimizerConfig) -> bool:
    """Whether a parameter's step depends on other parameters' gradients (one step size estimated from all, a norm over all).

    Such an optimizer would do something else on several stages.  It is tried out: two parameters stepped together and apart.
    Only for settings in which :func:`optimizer_problems` finds nothing.
    """
    together = _Trial(config).steps()
    return any(together.outcome(name) != _Trial(config, (name,)).steps().outcome(name) for name in _TRIAL)


def optimizer_problems(config: OptimizerConfig) -> list[str]:
    """What is wrong with ``[optimizer]``: its type, its keys, a missing package, or an optimizer that cannot serve a run here.

    The last is found by a few steps on a few numbers: an optimizer that needs a closure or the model, whose state a checkpoint
    cannot hold, or that would not continue from it with the same bits.
    """
    setting = f"optimizer.type = {config.type!r}"
    try:
        if problems := kinds.key_problems(config):
            return problems
        with torch.random.fork_rng(devices=[]):
            whole = _Trial(config).steps()
            if not torch.equal(whole.random_state, torch.get_rng_state()):
                return [f"{setting} cannot be used here: it draws random numbers, which a resumed run would not draw again"]
            resumed = _Trial(config).steps(last=_Trial.STEPS // 2).continued(config).steps(first=_Trial.STEPS // 2)
            if any(whole.outcome(name) != resumed.outcome(name) for name in _TRIAL):
                return [f"{setting} cannot be used here: it hides a part of its state, so a resumed run would differ"]
    except UserError as error:
        return [str(error)]
    except Exception as error:  # each package raises its own kinds
        return [f"{setting} cannot be used here: {error}"]
    return []
