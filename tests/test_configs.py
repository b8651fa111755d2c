"""Every file in configs/ is read, fits its family, and configs/README.md explains every key there is."""

import re
from pathlib import Path

import pytest

from models import family_names, load_family
from models.base import ModelFamily
from utils.config.dump import BEGIN, END, schema_markdown, write_tables
from utils.config.load import LoadedConfig, load_config
from utils.config.schema import DatasetConfig
from utils.config.toml_file import TomlFile
from utils.data.sources import buckets
from utils.optim.trials import optimizer_problems

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
README = CONFIGS / "README.md"
DATASETS = sorted((CONFIGS / "datasets").glob("*.toml"))
MAINS = sorted(set(CONFIGS.rglob("*.toml")) - set(DATASETS))


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(CONFIGS).as_posix() for path in paths]


def options_of(name: str):
    return load_family(name).Options


def load(path: Path) -> LoadedConfig:
    return load_config(path, options_of)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, ModelFamily]:
    """A tiny model of the first variant of each family, for the sizes that it takes."""
    made = {}
    for name in family_names():
        family = load_family(name)
        folder = tmp_path_factory.mktemp(name)
        family.write_tiny(family.variants[0], folder, "released", seed=0)
        made[name] = family(family.Options(type=name, path=folder))
    return made


def test_there_are_examples_of_every_family():
    assert {path.parent.name for path in MAINS} == set(family_names())
    assert DATASETS


@pytest.mark.parametrize("path", MAINS, ids=names(MAINS))
def test_main_files(path, families):
    loaded = load(path)
    assert loaded.notices == [], "an example uses our own names, and no key without effect"
    assert loaded.run.model.type == path.parent.name
    assert optimizer_problems(loaded.run.optimizer) == []
    rules = families[path.parent.name].size_rules
    for dataset in (loaded.dataset, *loaded.eval_datasets.values()):
        assert buckets.problems(dataset, rules) == []


@pytest.mark.parametrize("path", DATASETS, ids=names(DATASETS))
def test_dataset_files(path):
    DatasetConfig.model_validate(TomlFile.read(path).table)


@pytest.mark.parametrize("path", MAINS + DATASETS, ids=names(MAINS + DATASETS))
def test_examples_that_are_commented_out(path, tmp_path):
    """What a reader may uncomment has to be right too: ``# key = value`` lines and the tables among them."""
    text = path.read_text()
    uncommented = re.sub(r"^# (?=[a-z_]+ = |\[)", "", text, flags=re.MULTILINE)
    example = tmp_path / path.name
    example.write_text(uncommented)
    if path in DATASETS:
        DatasetConfig.model_validate(TomlFile.read(example).table)
    else:
        held_out = CONFIGS / "datasets" / "clips.toml"
        example.write_text(uncommented.replace("configs/datasets/held_out.toml", str(held_out)))
        load(example)


def test_the_readme_lists_the_examples():
    text = README.read_text()
    assert [name for name in names(MAINS + DATASETS) if f"]({name})" not in text and name != "datasets/demo.toml"] == []


def test_the_readme_explains_every_key():
    options = {name: options_of(name) for name in family_names()}
    shown = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == schema_markdown(options), "run: python -m utils.config.dump models configs/README.md"


def test_the_readme_can_be_written_anew(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(f"{BEGIN}.*{END}", f"{BEGIN}old\n{END}", README.read_text(), flags=re.DOTALL))
    write_tables("models", copy)
    assert copy.read_text() == README.read_text()
