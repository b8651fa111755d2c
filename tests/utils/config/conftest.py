"""A valid pair of files, and what the loader says of it after a change."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from utils.config.load import ConfigError, LoadedConfig, load_config
from utils.config.schema import ModelOptions
from utils.errors import UserError

MAIN = """\
output_dir = "runs"
dataset = "data.toml"
max_steps = 10

[model]
type = "tiny"
path = "weights"

[adapter]
rank = 8

[optimizer]
type = "adamw"
lr = 1e-4
"""
DATA = """\
resolutions = [64]

[[directory]]
path = "clips"
"""


class TinyOptions(ModelOptions):
    """``[model]`` of a family that exists in these tests only."""

    flavour: Literal["plain", "sweet"] = "plain"
    """A key of the family's own."""


def options_of(name: str) -> type[ModelOptions]:
    if name != "tiny":
        raise UserError(f"model.type = {name!r}: there is no such family; allowed: tiny")
    return TinyOptions


class Files:
    """Writes config files into the current directory and loads them."""

    def load(self, main: str = MAIN, data: str = DATA, *overrides: str, **others: str) -> LoadedConfig:
        for name, text in {"main": main, "data": data, **others}.items():
            Path(f"{name}.toml").write_text(text, encoding="utf-8")
        return load_config(Path("main.toml"), options_of, overrides)

    def problems(self, *args: str, **others: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.load(*args, **others)
        assert all(problem in str(caught.value) for problem in caught.value.problems)
        assert "pydantic" not in str(caught.value)
        return caught.value.problems

    @staticmethod
    def main(*lines: str, top: str = "", **tables: str) -> str:
        """The valid main file with more lines at its top, or at the top of a table."""
        text = "\n".join([*lines, *([top] if top else []), MAIN])
        for table, line in tables.items():
            assert f"[{table}]\n" in text
            text = text.replace(f"[{table}]\n", f"[{table}]\n{line}\n")
        return text

    @staticmethod
    def data(*lines: str, directory: str = "") -> str:
        return "\n".join([*lines, DATA]) + directory


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    return Files()


@pytest.fixture(scope="session")
def family_options() -> Callable[[str], type[ModelOptions]]:
    return options_of
