"""Whether an optimizer can serve a run here: found by a few steps on a few numbers."""

import json
from typing import Any

import torch
from torch import nn

from utils.config.schema import OptimizerConfig
from utils.draw import generator
from utils.errors import UserError
from utils.optim import kinds
from utils.optim.optimizers import RunOptimizer

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
