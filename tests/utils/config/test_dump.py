"""A resolved config is read again as the same values; the schema explains every key."""

import tomllib
from pathlib import Path

import pytest

from utils.config.dump import TABLES, dump_config, dump_table, schema_markdown
from utils.config.load import load_config


def test_a_dumped_config_is_read_again(files, family_options):
    main = files.main(
        'eval_datasets = [{name = "held", config = "held.toml"}, {name = "out", config = "data.toml"}]',
        'run_name = "a \\"b\\""',
        "checkpoint_every_n_minutes = 7",
        'video_clip_mode = "single_middle"',
        model='flavour = "sweet"\nckpt_path = "~/x"',
        adapter='target_modules = ["to_q", "to_k"]\nexclude_modules = "blocks\\\\.0\\\\..*"',
        optimizer="betas = [0.9, 0.95]\nmomentum = 0.5\nnested = {a = 1}",
    ).replace('path = "weights"\n', "")
    loaded = files.load(main, files.data("size_buckets = [[64, 32, 5]]"), held=files.data("ar_buckets = [1.5, [4, 3]]"))
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    dump_config(loaded, folder)
    again = load_config(folder / "config.toml", family_options)
    assert again.dataset == loaded.dataset
    assert again.eval_datasets == loaded.eval_datasets
    assert again.notices == []
    assert again.run.dataset == folder / "dataset.toml"
    assert [entry.config for entry in again.run.eval_datasets] == [folder / "eval-held.toml", folder / "eval-out.toml"]
    moved = {"dataset": loaded.run.dataset, "eval_datasets": loaded.run.eval_datasets}
    assert again.run.model_copy(update=moved) == loaded.run


def test_dumping_what_was_dumped_changes_nothing(files, family_options):
    folder = Path("runs")
    folder.mkdir()
    dump_config(files.load(), folder)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    dump_config(load_config(folder / "config.toml", family_options), folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == first


def test_defaults_are_written_and_nothing_that_is_not_set(files):
    table = tomllib.loads(dump_table(files.load().run))
    assert table["gradient_clipping"] == 1.0
    assert table["model"]["flavour"] == "plain"
    assert "epochs" not in table
    assert "alpha" not in table["adapter"]


@pytest.mark.parametrize("title", TABLES)
def test_every_key_is_explained(title):
    for name, field in TABLES[title].model_fields.items():
        assert field.description, f"{title}: {name} has no text under it"


def test_the_markdown_has_every_key_once_and_the_familys_own(family_options):
    sections = schema_markdown({"tiny": family_options("tiny")}).split("### ")[1:]
    for section, table in zip(sections, TABLES.values(), strict=False):
        rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
        assert rows == list(table.model_fields)
    assert sections[-1].splitlines() == [
        '`[model]` with `type = "tiny"`',
        "",
        "`[model]` of a family that exists in these tests only.",
        "",
        "| key | may be | default | meaning |",
        "|---|---|---|---|",
        '| `flavour` | one of "plain", "sweet" | `"plain"` | A key of the family\'s own. |',
    ]
