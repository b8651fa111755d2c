"""The optimizer of one rank, with parameters, gradients and state known by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from utils.config.schema import OptimizerConfig
from utils.errors import UserError
from utils.optim import kinds
from utils.optim.shares import ReplicaShares
from utils.optim.state import pack, unpack

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class RunOptimizer:
    """The optimizer of this rank's trainable parameters, known by name.  There may be none; then every method does nothing.

    With ``master_weights`` the gradients of bf16 and fp16 parameters are summed over the micro-batches in fp32, and steps are taken
    on fp32 copies of them, rounded back to the parameters after each step: a step smaller than the parameter's last bit is not
    lost.  Optimizers that keep the rounding error themselves (Kahan summation: ``adamw_optimi``, ``stableadamw``) get the fp32
    sums but no copies.  Without ``master_weights`` everything is done in the parameters' own dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        rate_of: Callable[[str], float] | None = None,
        shares: ReplicaShares | None = None,
    ):
        """``rate_of``: the learning rate of a parameter, by name; without it, the config's for all.  ``shares``: for ZeRO stage 1,
        the parameters that this replica steps; then :meth:`step` and :meth:`evaluation` are collective among the replicas.

        Raises UserError for an unknown type, a missing package, or settings that the optimizer refuses.
        """
        self._config = config
        self._parameters = dict(parameters)
        self._shares = shares
        self.owned = [name for name in parameters if shares is None or name in shares.owned]
        """The parameters that are stepped here, and have state here."""
        self.is_shared = shares is not None
        """Whether other replicas have other parts of the state."""
        self._low = {
            name: parameter
            for name, parameter in self._parameters.items()
            if config.master_weights and parameter.dtype in _LOW_PRECISION
        }
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self._low.items():
            parameter.register_post_accumulate_grad_hook(partial(self._add_to_sum, name))
        compensated = kinds.find_kind(config.type).compensated and (config.model_extra or {}).get("kahan_sum", True)
        with_masters = [] if compensated else [name for name in self.owned if name in self._low]
        self._masters = {name: nn.Parameter(self._low[name].detach().float()) for name in with_masters}
        self._masters_are_current = False
        self._targets = {name: self._masters.get(name, self._parameters[name]) for name in self.owned}
        built = kinds.build(self._targets, config, rate_of or (lambda name: config.lr))
        self._parts, self._rates = [part for part, _ in built], [rate for _, rate in built]
        self._averages = kinds.averages(config)
        self._set_mode("train")
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

    def complete_gradients(self, names: Iterable[str]) -> None:
        """Zeros for those of ``names`` that have no gradient."""
        for name in names:
            parameter = self._parameters[name]
            if name in self._low and name not in self._sums:
                self._sums[name] = torch.zeros_like(parameter, dtype=torch.float32)
            elif name not in self._low and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """One step.  The gradients are used up: optimizers compute in them."""
        assert not self._evaluating, "a step inside evaluation()"
        self._refresh_masters()
        low = [name for name in self.owned if name in self._low]
        for name in low:
            gradient = self._sums.get(name)
            self._targets[name].grad = None if gradient is None else gradient.to(self._targets[name].dtype)
        for part in self._parts:
            part.step()
        for name in low:
            self._targets[name].grad = None
        self._publish()

    def zero_grad(self) -> None:
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None

    def set_lr(self, factor: float) -> None:
        """Make each learning rate the configured one times ``factor``."""
        for part, rate in zip(self._parts, self._rates, strict=True):
            part.param_groups[0]["lr"] = rate * factor

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

    @torch.no_grad()
    def _publish(self) -> None:
        """What was stepped into the parameters, on all replicas."""
        self._round_to_parameters()
        self._send()

    def _send(self) -> None:
        if self._shares is not None:
            self._shares.send()

    def _set_mode(self, mode: str) -> None:
        """``train`` or ``eval``, for optimizers that average."""
        for part in self._parts if self._averages else []:
            getattr(part, mode)()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Inside, the parameters are those to evaluate and export: the average, for schedule-free optimizers.

        Afterwards they are those of training again, bit for bit: an evaluation changes nothing in the run.  (The optimizers' own
        way back computes, and so rounds.)  Costs a copy of the trainable weights, when there are no gradients.
        """
        if not self._averages:
            yield
            return
        with self._given_back(self._targets):
            try:
                self._set_mode("eval")
                self._publish()
                yield
            finally:
                self._set_mode("train")

    def values(self) -> dict[str, Tensor]:
        """What is stepped here, as precisely as it is known: the fp32 copies where there are any.  The live tensors."""
        self._refresh_masters()
        return {name: target.detach() for name, target in self._targets.items()}

    @contextmanager
    def substituted(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the parameters have these values, of all that are owned here; afterwards their own again, bit for bit."""
        with self._given_back({name: self._parameters[name] for name in values}):
            with torch.no_grad():
                for name, value in values.items():
                    self._parameters[name].copy_(value)
            self._send()
            yield

    @contextmanager
    def _given_back(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Afterwards these have the values of before, and the parameters too."""
        assert not self._evaluating, "one evaluation inside another"
        self._refresh_masters()
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._evaluating, failed = True, True
        try:
            yield
            failed = False
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    tensors[name].copy_(value)
            self._round_to_parameters()
            self._evaluating = False
            if not failed:  # else the other replicas may never come here
                self._send()

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
