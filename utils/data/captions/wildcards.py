"""Choices within a caption: ``a {red|blue} car`` stands for a red one and a blue one.

The syntax is that of the variants of Dynamic Prompts (docs/SYNTAX.md in adieyal/sd-dynamic-prompts): options between braces, which
may hold further choices, and a weight before an option, ``{3::red|blue}``, that is 1 where none is given.  ``\\{``, ``\\}`` and
``\\|`` are the signs themselves.  Text between the signs stays as it is written, spaces included.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

MAX_WEIGHT = 1e9
MAX_DEPTH = 20
"""Choices within choices."""
_SIGNS = re.compile(r"\\[{}|]|[{}|]")
_WEIGHT = re.compile(r"\s*(\d+\.?\d*|\.\d+)::")
_SEVERAL = re.compile(r"\s*[\d-]*\$\$")


@dataclass(frozen=True)
class Choice:
    """Texts of which one is taken."""

    options: tuple["Template", ...]
    weights: tuple[float, ...]
    """One for each option, above 0."""


Template = tuple["str | Choice", ...]
"""Texts and choices, one behind the other."""


@lru_cache(maxsize=256)
def parse(text: str) -> Template:
    """Raises ValueError, with the place in the text, if the braces do not match or what they hold is not understood."""
    # One entry for each open brace: where it stands, and its options so far, the last of which is being read.
    open_choices: list[tuple[int, list[list[str | Choice]]]] = [(0, [[]])]
    at = 0
    for match in _SIGNS.finditer(text):
        sign = match[0]
        _, options = open_choices[-1]
        options[-1].append(text[at : match.start()])
        at = match.end()
        if sign == "{":
            if len(open_choices) > MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} choices within each other, at sign {match.start() + 1}")
            open_choices.append((match.start(), [[]]))
        elif sign == "}":
            if len(open_choices) == 1:
                raise ValueError(rf"a }} without its {{, at sign {match.start() + 1}; write \}} for the sign itself")
            start, options = open_choices.pop()
            open_choices[-1][1][-1].append(_choice(options, start))
        elif sign == "|" and len(open_choices) > 1:
            options.append([])
        else:
            options[-1].append(sign[-1])
    if len(open_choices) > 1:
        raise ValueError(rf"a {{ without its }}, at sign {open_choices[-1][0] + 1}; write \{{ for the sign itself")
    [(_, [whole])] = open_choices
    return (*whole, text[at:])


def _choice(options: list[list[str | Choice]], start: int) -> Choice:
    weights = []
    for option in options:
        first = option[0] if option and isinstance(option[0], str) else ""
        if _SEVERAL.match(first):
            raise ValueError(f"a choice of several ($$), at sign {start + 1}: only one option at a time can be chosen")
        weight = 1.0
        if given := _WEIGHT.match(first):
            weight, option[0] = float(given[1]), first[given.end() :]
        if not 0 < weight <= MAX_WEIGHT:
            raise ValueError(f"a weight that is not above 0, up to {MAX_WEIGHT:g}, at sign {start + 1}; change it")
        weights.append(weight)
    return Choice(tuple(map(tuple, options)), tuple(weights))


def varies(template: Template) -> bool:
    """Whether there is anything to choose."""
    choices = [part for part in template if isinstance(part, Choice)]
    return any(len(choice.options) > 1 or varies(choice.options[0]) for choice in choices)


def resolve(template: Template, random: Random | None) -> str:
    """The text with one option of each choice; without ``random`` the first."""
    return "".join(part if isinstance(part, str) else resolve(_taken(part, random), random) for part in template)


def _taken(choice: Choice, random: Random | None) -> Template:
    if random is None or len(choice.options) == 1:
        return choice.options[0]
    return choice.options[place_of(random.random(), choice.weights)]


def place_of(quantile: float, weights: Sequence[float]) -> int:
    """The place that ``quantile``, in [0, 1), falls on when the places are as wide as their weights."""
    left = quantile * sum(weights)
    for place, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return place
    return len(weights) - 1  # rounding
