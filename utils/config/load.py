"""From TOML files to frozen values, with every problem of all files in one message.

Paths in a file that are not absolute start at the current directory, as in diffusion-pipe; ``~`` is the home directory.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from utils.config.describe import allowed, choices, did_you_mean, shown, table_of
from utils.config.diffusion_pipe import RENAMED, hand_over_clip_mode, translate_dataset, translate_main
from utils.config.schema import (
    AdapterConfig,
    DatasetConfig,
    DirectoryConfig,
    EmaConfig,
    LimitsConfig,
    ModelOptions,
    OptimizerConfig,
    RunConfig,
    Table,
    WandbConfig,
)
from utils.config.toml_file import Keys, TomlFile, dotted
from utils.errors import UserError, listed

Checked = TypeVar("Checked", bound=Table)

HOMES: dict[str, type[Table]] = {
    "of the main file, above its first [table]": RunConfig,
    "of [model]": ModelOptions,
    "of [adapter]": AdapterConfig,
    "of [optimizer]": OptimizerConfig,
    "of [ema]": EmaConfig,
    "of [limits]": LimitsConfig,
    "of [wandb]": WandbConfig,
    "of the dataset file": DatasetConfig,
    "of [[directory]] in the dataset file": DirectoryConfig,
}
"""Where a key belongs, for one that stands in another table: below a ``[table]`` line every key is that table's."""


VARIED_BY = {
    "keep_tokens": ("shuffle_tags", "tag_dropout"),
    "caption_variants": ("shuffle_tags", "tag_dropout", "caption_wildcards"),
}
"""Keys of a dataset file that mean something only with one of others."""


class ConfigError(UserError):
    """Everything that is wrong in the main file, the dataset file and the eval dataset files, each with its line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(listed(problems, f"The config has {count}:"))


@dataclass(frozen=True)
class LoadedConfig:
    """What a run is told to do."""

    run: RunConfig
    """``run.model`` is the family's ``Options``."""
    dataset: DatasetConfig
    eval_datasets: dict[str, DatasetConfig]
    """By the name of the entry in ``eval_datasets``."""
    notices: list[str]
    """What was read under another name or has no effect; for the log."""


class _OfAnyFamily(ModelOptions):
    """``[model]`` of a family that does not exist: the keys that all families have are checked all the same."""

    model_config = ConfigDict(extra="ignore")


def load_config(path: Path, options_of: Callable[[str], type[ModelOptions]], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the main file and the dataset files that it names.

    ``options_of`` gives a family's ``Options`` and raises UserError for an unknown family.  ``overrides`` are ``key.sub=value``,
    each value in TOML or plain text.  Raises ConfigError.
    """
    try:
        main = TomlFile.read(path)
    except UserError as error:
        raise ConfigError([str(error)]) from error
    problems: list[str] = []
    notices: list[str] = []
    for assignment in overrides:
        try:
            main.override(assignment)
        except UserError as error:
            problems.append(str(error))
    translate_main(main, problems, notices)
    files = _dataset_files(main, problems)
    hand_over_clip_mode(main, list(files.values()), notices)

    model = _check_model(main, options_of, problems)
    # A model that was refused is reported already; the rest of the file is checked with a stand-in.
    table = main.table | ({"model": model or ModelOptions.model_construct()} if isinstance(main.get(("model",)), dict) else {})
    run = _check(RunConfig, main, table, (), problems)
    datasets = {}
    for keys, file in files.items():
        translate_dataset(file, problems, notices)
        datasets[keys] = _check(DatasetConfig, file, file.table, (), problems)
    if problems:
        raise ConfigError(_in_reading_order(problems))
    notices.extend(_settings_without_effect(run, main))
    for keys, file in files.items():
        notices.extend(_caption_keys_without_effect(datasets[keys], file))
    evals = {entry.name: datasets["eval_datasets", index, "config"] for index, entry in enumerate(run.eval_datasets)}
    return LoadedConfig(run, datasets["dataset",], evals, notices)


def _dataset_files(main: TomlFile, problems: list[str]) -> dict[Keys, TomlFile]:
    """The files that the main file names, by the key that names them."""
    entries = main.get(("eval_datasets",))
    named: list[Keys] = [("dataset",)]
    named += [("eval_datasets", index, "config") for index in range(len(entries) if isinstance(entries, list) else 0)]
    files: dict[Keys, TomlFile] = {}
    for keys in named:
        if isinstance(value := main.get(keys), str):
            try:
                files[keys] = TomlFile.read(Path(value).expanduser())
            except UserError as error:
                problems.append(f"{main.place(keys)}: {dotted(keys)} = {value!r}: {error}")
    return files


def _check_model(main: TomlFile, options_of: Callable[[str], type[ModelOptions]], problems: list[str]) -> ModelOptions | None:
    table = main.get(("model",))
    if not isinstance(table, dict):
        return None  # missing, or no table: said with the rest of the main file
    options: type[ModelOptions] = _OfAnyFamily
    if isinstance(name := table.get("type"), str):
        try:
            options = options_of(name)
        except UserError as error:
            problems.append(f"{main.place(('model', 'type'))}: {error}")
    return _check(options, main, table, ("model",), problems)


def _check(model: type[Checked], file: TomlFile, table: dict[str, Any], prefix: Keys, problems: list[str]) -> Checked | None:
    """The table as a value, or None and its problems."""
    try:
        return model.model_validate(table)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            keys, field, owner = _locate(model, error["loc"])
            keys = prefix + keys
            problems.append(f"{file.place(keys)}: {_sentence(error, keys, field, owner, file)}")
        return None


def _locate(model: type[Table], location: tuple[str | int, ...]) -> tuple[Keys, FieldInfo | None, type[Table]]:
    """The key that pydantic's location means, its field, and the table it is in.

    Below a field that is no table pydantic goes on with positions and the members of unions; they are left out, since the message
    says what the whole value may be.
    """
    keys: Keys = ()
    rest = location
    while True:
        keys, field, rest = (*keys, rest[0]), model.model_fields.get(rest[0]), rest[1:]
        inner = table_of(field.annotation) if field else None
        if not rest or inner is None:
            return keys, field, model
        if isinstance(rest[0], int):
            keys, rest = (*keys, rest[0]), rest[1:]
            if not rest:
                return keys, field, model
        model = inner


def _sentence(error: dict[str, Any], keys: Keys, field: FieldInfo | None, owner: type[Table], file: TomlFile) -> str:
    name, value = dotted(keys), file.get(keys)
    if field is None:
        return f"{name} is not a known key{_where_instead(str(keys[-1]), keys, owner)}"
    if error["type"] == "missing" and value is None:
        return f"{name} is missing; it must be {allowed(field)}"
    if error["type"] == "value_error":
        given = "" if value is None or table_of(field.annotation) else f" = {value!r}"
        return f"{name}{given}: {error['ctx']['error']}"
    if isinstance(keys[-1], int):
        return f"{name} must be a table, got {shown(value)}"
    return f"{name} must be {allowed(field)}, got {shown(value)}{did_you_mean(value, choices(field.annotation))}"


def _where_instead(name: str, keys: Keys, owner: type[Table]) -> str:
    """The way out for an unknown key: the table that has it, else a key of a like name, else what there is.

    The value is not repeated: it may be a secret.
    """
    if homes := [home for home, table in HOMES.items() if name in table.model_fields]:
        return f"; it is a key {' or '.join(homes)}"
    table = dotted(keys[:-1])
    other_names = [old.rpartition(".")[2] for old in RENAMED if old.rpartition(".")[0] == table]
    names = list(owner.model_fields)
    listing = f"allowed: {', '.join(names)}" if len(names) <= 15 else "configs/README.md lists the keys"
    return did_you_mean(name, names + other_names) or f"; {listing}"


def _in_reading_order(problems: list[str]) -> list[str]:
    """Each problem once, file by file, down the lines."""
    files = [problem.split(":")[0] for problem in problems]

    def place(problem: str) -> tuple[int, int]:
        line = re.match(r"[^:]*:(\d+):", problem)
        return files.index(problem.split(":")[0]), int(line[1]) if line else 0

    return sorted(dict.fromkeys(problems), key=place)


def _settings_without_effect(run: RunConfig, main: TomlFile) -> list[str]:
    """Notices for settings that are right in themselves and change nothing in this run."""
    if run.eval_datasets:
        return []
    return [
        f"{main.place((name,))}: {name} = {getattr(run, name)} has no effect, since there are no eval_datasets"
        for name in ("eval_every_n_steps", "eval_every_n_epochs")
        if getattr(run, name) is not None
    ]


def _caption_keys_without_effect(dataset: DatasetConfig, file: TomlFile) -> list[str]:
    """The same for captions that none of the dataset's folders varies."""
    tables: list[tuple[Keys, Table]] = [((), dataset)]
    tables += [(("directory", index), directory) for index, directory in enumerate(dataset.directory)]
    notices = []
    for name, needed in VARIED_BY.items():
        if not any(getattr(table, other) for _, table in tables for other in needed):
            # A default may stand in the file of a run as it was resolved.
            unset = (None, DatasetConfig.model_fields[name].default)
            notices += [
                f"{file.place((*keys, name))}: {dotted((*keys, name))} = {value} has no effect without one of {', '.join(needed)}"
                for keys, table in tables
                if (value := getattr(table, name)) not in unset
            ]
    return notices
