"""Measure how far every variant is from diffusers, and write the table in ``tests/README.md``.

    python -m tests.measure [--from FILE]

The numbers are those that the tests hold against their limits (the fixture ``measured``), so the table says what is tested.  A new
variant is found by the tests, and so by this command.  ``--from``: do not run the tests, take what they recorded with
``pytest --record FILE``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from models import family_names, load_family

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- begin: written by python -m tests.measure -->\n", "<!-- end -->\n"
TESTS = (
    "tests/models/test_contract.py",
    "tests/models/test_exports.py",
    "tests/models/test_inputs.py",
    "tests/models/qwen_image/test_family.py",
    "tests/distributed/test_engine.py",
)


@dataclass(frozen=True)
class Quantity:
    """A column of the table."""

    heading: str
    show: Callable[[float], str]


def _difference(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _number_different(value: float) -> str:
    return f"{value:.0f} different" if value else "same bits"


QUANTITIES = {
    "loss": Quantity("loss", _difference),
    "gradients": Quantity("gradients", _difference),
    "stages": Quantity("2 and 3 stages, resumed", _number_different),
    "inputs": Quantity("inputs", _difference),
    "keys": Quantity("weights named", lambda value: f"{value:.0f}"),
    "layouts": Quantity("layouts", _number_different),
    "lora": Quantity("LoRA", _difference),
    "full": Quantity("full export", _number_different),
}
MISSING = "—"

Measured = Mapping[str, Mapping[str, float]]


def variants() -> list[str]:
    return [variant for name in family_names() for variant in load_family(name).variants]


def table(measured: Measured) -> str:
    """The variants' numbers as a Markdown table."""
    lines = [
        f"| variant | {' | '.join(quantity.heading for quantity in QUANTITIES.values())} |",
        f"|---|{'---:|' * len(QUANTITIES)}",
    ]
    for variant in variants():
        values = measured.get(variant, {})
        cells = [quantity.show(values[name]) if name in values else MISSING for name, quantity in QUANTITIES.items()]
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rows(readme: str) -> dict[str, list[str]]:
    """The table's cells by variant."""
    text = readme.partition(BEGIN)[2].partition(END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    return {variant.strip("`"): values for variant, *values in cells}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="record", type=Path, metavar="FILE", help="what pytest recorded with --record FILE")
    record, failed = parser.parse_args().record, 0
    with tempfile.TemporaryDirectory() as folder:
        if record is None:
            record = Path(folder) / "measured.json"
            failed = subprocess.run([sys.executable, "-m", "pytest", *TESTS, "-q", "--record", record], cwd=ROOT).returncode
        if failed:
            sys.stderr.write("the tests failed; the table is left as it was\n")
            return failed
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table(json.loads(record.read_text())) + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
