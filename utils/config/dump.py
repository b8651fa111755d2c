"""The resolved config back to TOML, and the schema as the tables of ``configs/README.md``.

``python -m utils.config.dump models configs/README.md`` writes the tables anew between the file's markers.  The first argument is
the package that holds the families; this package does not know it.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import tomli_w
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from utils.config.describe import allowed
from utils.config.load import LoadedConfig
from utils.config.schema import (
    AdapterConfig,
    AdapterOverride,
    DatasetConfig,
    DirectoryConfig,
    EmaConfig,
    EvalDataset,
    LimitsConfig,
    ModelOptions,
    OptimizerConfig,
    RunConfig,
    Table,
    WandbConfig,
)

TABLES: dict[str, type[Table]] = {
    "Main file": RunConfig,
    "Entries of `eval_datasets`": EvalDataset,
    "`[model]`": ModelOptions,
    "`[adapter]`": AdapterConfig,
    "`[[adapter.override]]`": AdapterOverride,
    "`[optimizer]`": OptimizerConfig,
    "`[ema]`": EmaConfig,
    "`[limits]`": LimitsConfig,
    "`[wandb]`": WandbConfig,
    "Dataset file": DatasetConfig,
    "`[[directory]]` in the dataset file": DirectoryConfig,
}
BEGIN, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"


def dump_table(table: Table) -> str:
    """A table and those inside it as TOML, defaults included; what is None is left out, which reads back as None."""
    return tomli_w.dumps(table.model_dump(mode="json", exclude_none=True))


def dump_config(config: LoadedConfig, folder: Path) -> None:
    """Write the config as resolved: ``config.toml``, and beside it the dataset files that it names.

    ``load_config(folder / "config.toml")`` gives the same config again, from the same current directory.
    """
    files = {"dataset.toml": config.dataset} | {f"eval-{name}.toml": dataset for name, dataset in config.eval_datasets.items()}
    for name, dataset in files.items():
        (folder / name).write_text(dump_table(dataset), encoding="utf-8")
    evals = [entry.model_copy(update={"config": folder / f"eval-{entry.name}.toml"}) for entry in config.run.eval_datasets]
    run = config.run.model_copy(update={"dataset": folder / "dataset.toml", "eval_datasets": evals})
    (folder / "config.toml").write_text(dump_table(run), encoding="utf-8")


def schema_markdown(families: dict[str, type[ModelOptions]]) -> str:
    """Every key with what it may be, its default and its meaning; for each family what it adds to ``[model]`` or has otherwise."""
    sections = [_section(title, table, table.model_fields) for title, table in TABLES.items()]
    for name, options in families.items():
        own = {key: field for key, field in options.model_fields.items() if not _same(field, ModelOptions.model_fields.get(key))}
        if own:
            sections.append(_section(f'`[model]` with `type = "{name}"`', options, own))
    return "\n".join(sections)


def _section(title: str, table: type[Table], fields: dict[str, FieldInfo]) -> str:
    lines = [f"### {title}", "", _line(table.__doc__), "", "| key | may be | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {allowed(field)} | {_default(field)} | {_line(field.description)} |" for name, field in fields.items()]
    return "\n".join(lines) + "\n"


def _same(field: FieldInfo, other: FieldInfo | None) -> bool:
    return other is not None and (allowed(field), field.default, field.description) == (
        allowed(other),
        other.default,
        other.description,
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**needed**"
    return "" if field.default is None or field.default == {} else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    return (
        tomli_w.dumps({"value": value})
        .removeprefix("value = ")
        .replace("\n", "")
        .replace("    ", " ")
        .replace("[ ", "[")
        .replace(",]", "]")
    )


def _line(text: str | None) -> str:
    """A docstring as one line of a table."""
    return " ".join((text or "").replace("``", "`").replace("|", "\\|").split())


def write_tables(package: str, readme: Path) -> None:
    """Put the tables of the schema and of the package's families between the markers of the file."""
    families = importlib.import_module(package)
    options = {name: families.load_family(name).Options for name in families.family_names()}
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + schema_markdown(options) + END + after, encoding="utf-8")


if __name__ == "__main__":
    write_tables(sys.argv[1], Path(sys.argv[2]))
