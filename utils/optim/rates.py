"""Learning rates by part of the model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from utils.config.describe import did_you_mean
from utils.config.schema import OptimizerConfig
from utils.errors import UserError, listed
from utils.weights.named import canonical_name


@dataclass(frozen=True)
class LearningRates:
    """The learning rate of each weight after the warm-up; schedules multiply all of them by the same factor."""

    default: float
    """Of the weights whose part has no rate of its own."""
    by_part: Mapping[str, float]
    """Of the parts that have one; 0 freezes the part."""
    parts: Mapping[str, str]
    """The family's parts: name -> regular expression for module paths.  A path stands for everything below it."""

    @classmethod
    def of(cls, config: OptimizerConfig, parts: Mapping[str, str], of_model: Mapping[str, float]) -> "LearningRates":
        """``of_model``: rates that ``[model]`` has keys for; those of ``[optimizer.part_lr]`` go before them.

        Raises UserError for parts that the family does not have.
        """
        if unknown := [part for part in config.part_lr if part not in parts]:
            problems = [f"optimizer.part_lr.{part} is no part of the model{did_you_mean(part, list(parts))}" for part in unknown]
            raise UserError(listed(problems, f"[optimizer.part_lr] can have {', '.join(parts) or 'nothing'}:"))
        return cls(config.lr, {**of_model, **config.part_lr}, parts)

    def part_of(self, name: str) -> str | None:
        """The part that a weight or module belongs to."""
        return next((part for part, pattern in self.parts.items() if re.fullmatch(rf"(?:{pattern})(?:\..+)?", name)), None)

    def rate(self, name: str) -> float:
        """Of one weight, by its diffusers name."""
        return self.by_part.get(self.part_of(name), self.default)

    def freezes(self, name: str) -> bool:
        """Whether the weight or module is not trained.  A default of 0 freezes the rest where a part has a rate, and else nothing:
        a run that changes no weight has its uses too."""
        return bool(self.by_part) and self.rate(name) == 0

    def freeze(self, transformer: nn.Module) -> None:
        """Take the frozen parts' weights out of what is trained."""
        for name, parameter in transformer.named_parameters():
            if self.freezes(canonical_name(name)):
                parameter.requires_grad_(False)

    def scaled(self, factor: float) -> dict[str, float]:
        """For the metrics: ``lr``, and ``lr_<part>`` of each part that is trained at a rate of its own."""
        own = {f"lr_{part}": rate * factor for part, rate in self.by_part.items() if rate}
        return {"lr": self.default * factor, **own}

    def report(self, trained: Iterable[str]) -> list[str]:
        """For the log: what the rates mean for these weights.  Raises UserError if none of them is trained."""
        counts: dict[str | None, int] = {}
        for name in trained:
            part = self.part_of(name)
            counts[part] = counts.get(part, 0) + 1
        if not counts:
            raise UserError(
                "nothing is trained: every weight belongs to a part whose learning rate is 0; give a rate above 0 to optimizer.lr "
                f"or to a part of [optimizer.part_lr] ({', '.join(self.parts)})"
            )
        lines = []
        for part, rate in self.by_part.items():
            if rate:
                effect = f"{counts[part]} weights" if part in counts else "no effect, no weight of this part is trained"
                lines.append(f"learning rate of {part}: {rate:g} ({effect})")
            else:
                lines.append(f"learning rate of {part}: 0, it is frozen")
        rest = sum(count for part, count in counts.items() if part not in self.by_part)
        return [*lines, f"learning rate of the rest: {self.default:g} ({rest} weights)"] if lines else []
