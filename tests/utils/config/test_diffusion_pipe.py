"""Files of diffusion-pipe: read with a notice, or refused with the way out, and never passed over in silence."""

import re
from pathlib import Path

import pytest

from utils.config.diffusion_pipe import DATASET_NO_EFFECT, DATASET_REFUSED, DATASET_RENAMED, NO_EFFECT, REFUSED, RENAMED
from utils.config.schema import AdapterConfig, DatasetConfig, DirectoryConfig, ModelOptions, RunConfig, WandbConfig

TABLES = {"": RunConfig, "model": ModelOptions, "adapter": AdapterConfig, "wandb": WandbConfig}

# The keys of its examples/main_example.toml with a value each, for a model that there is here.
MAIN_EXAMPLE = """\
output_dir = '/data/runs'
dataset = 'data.toml'
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 100
lr_scheduler = 'linear'
blocks_to_swap = 20
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = 'unsloth'
reentrant_activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
map_num_proc = 32
compile = true
steps_per_print = 1
video_clip_mode = 'single_middle'
x_axis_examples = true
[model]
type = 'tiny'
ckpt_path = '/data/models/some'
llm_path = '/data/models/text.safetensors'
clip_path = '/data/models/clip'
dtype = 'bfloat16'
timestep_sample_method = 'logit_normal'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
[monitoring]
enable_wandb = true
wandb_api_key = ''
wandb_tracker_name = 'project'
wandb_run_name = ''
"""


def test_its_example(files):
    loaded = files.load(MAIN_EXAMPLE)
    run = loaded.run
    assert run.model.path == Path("/data/models/some")
    assert run.model.text_encoder_path == Path("/data/models/text.safetensors")
    assert run.model.image_encoder_path == Path("/data/models/clip")
    assert run.activation_checkpointing is True
    assert run.optimizer.betas == (0.9, 0.99)
    assert run.wandb == WandbConfig(project="project")
    assert loaded.dataset.video_clip_mode == "single_middle"
    about = {notice.split(": ")[1].split(" ")[0]: int(notice.split(":")[1]) for notice in loaded.notices}
    assert about == {
        "blocks_to_swap": 10,
        "eval_every_n_epochs": 11,
        "eval_micro_batch_size_per_gpu": 13,
        "eval_gradient_accumulation_steps": 14,
        "activation_checkpointing": 17,
        "reentrant_activation_checkpointing": 18,
        "caching_batch_size": 21,
        "map_num_proc": 22,
        "compile": 23,
        "steps_per_print": 24,
        "video_clip_mode": 25,
        "x_axis_examples": 26,
        "model.ckpt_path": 29,
        "model.llm_path": 30,
        "model.clip_path": 31,
        "[monitoring]": 44,
    }


@pytest.mark.parametrize("old", [old for old in RENAMED if old.startswith("model.")])
def test_other_names(files, old):
    new = RENAMED[old].removeprefix("model.")
    main = files.main(model=f'{old.removeprefix("model.")} = "there"').replace('path = "weights"\n', "")
    loaded = files.load(main)
    assert getattr(loaded.run.model, new) == Path("there")
    assert loaded.notices == [f"main.toml:6: {old} is read as model.{new}"]


def test_other_names_for_loras(files):
    lines = 'init_from_existing = "a.safetensors"\nfuse_adapters = [{path = "b.safetensors", weight = 0.5}]'
    loaded = files.load(files.main(adapter=lines))
    assert loaded.run.adapter.init_from == Path("a.safetensors")
    assert [(entry.path, entry.weight) for entry in loaded.run.model.merge_adapters] == [(Path("b.safetensors"), 0.5)]
    assert [notice.split(": ")[1] for notice in loaded.notices] == [
        "adapter.init_from_existing is read as adapter.init_from",
        "adapter.fuse_adapters is read as model.merge_adapters",
    ]


def test_a_lokr_of_whole_factors(files):
    """As its example has it: a rank with a point, of which TOML makes another kind of number."""
    main = files.main(adapter="type = 'lokr'\ndecompose_factor = 4").replace("rank = 8", "rank = 1e6")
    adapter = files.load(main).run.adapter
    assert (adapter.type, adapter.rank, adapter.decompose_factor) == ("lokr", 1_000_000, 4)
    assert files.problems(main.replace("1e6", "1.5")) == [
        "main.toml:12: adapter.rank must be a whole number of at least 1, got the number 1.5"
    ]


def test_another_name_beside_ours(files):
    assert files.problems(files.main(model='ckpt_path = "there"')) == [
        "main.toml:6: model.ckpt_path is another name for model.path, which is given too; remove one of them"
    ]


def test_two_other_names_for_one_key(files):
    main = files.main(model='ckpt_path = "a"\ndiffusers_path = "b"').replace('path = "weights"\n', "")
    (problem,) = files.problems(main)
    assert problem.startswith("main.toml:7: model.diffusers_path is another name for model.path")


def test_a_wrong_value_under_another_name_is_reported_where_it_stands(files):
    main = files.main(model="ckpt_path = 3").replace('path = "weights"\n', "")
    assert files.problems(main) == ["main.toml:6: model.path must be a path in quotes, got the whole number 3"]


@pytest.mark.parametrize("key", NO_EFFECT)
def test_keys_without_effect(files, key):
    loaded = files.load(files.main(f"{key} = 7"))
    assert loaded.run == files.load().run
    assert loaded.notices == [f"main.toml:1: {key} = 7 has no effect here: {NO_EFFECT[key]}"]


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys(files, key):
    table, _, name = key.rpartition(".")
    line = f'{name} = "c0ffee"'
    if table in ("monitoring", "wandb"):
        problems = files.problems(files.main() + f"[{table}]\n{line}\n")
    else:
        problems = files.problems(files.main(**{table or "top": line}))
    assert len(problems) == 1
    assert problems[0].endswith(f": {key} is not read here: {REFUSED[key]}")
    assert "c0ffee" not in problems[0]


@pytest.mark.parametrize("key", DATASET_REFUSED)
def test_refused_keys_of_the_dataset_file(files, key):
    way_out = DATASET_REFUSED[key]
    assert files.problems(files.main(), files.data(f"{key} = 1", directory=f"{key} = 2\n")) == [
        f"data.toml:1: {key} is not read here: {way_out}",
        f"data.toml:6: directory[0].{key} is not read here: {way_out}",
    ]


def test_the_tables_name_keys_that_are_not_ours_and_lead_to_ours():
    for old, new in RENAMED.items():
        table, _, name = new.rpartition(".")
        assert name in TABLES[table].model_fields
        assert old.rpartition(".")[2] not in TABLES[table].model_fields
    for key in [*NO_EFFECT, *REFUSED]:
        table, _, name = key.rpartition(".")
        assert table == "monitoring" or name not in TABLES[table].model_fields
    ours = DatasetConfig.model_fields.keys() | DirectoryConfig.model_fields.keys()
    assert not {*DATASET_REFUSED, *DATASET_RENAMED, *DATASET_NO_EFFECT} & ours
    assert ours >= {*DATASET_RENAMED.values()}


def test_shuffled_captions(files):
    data = files.data(
        'cache_shuffle_num = 10\ncache_shuffle_delimiter = ";"',
        directory="cache_shuffle_num = 2\nshuffle_tags = false\nonline_captions = true\n",
    )
    loaded = files.load(files.main(), data)
    dataset, [directory] = loaded.dataset, loaded.dataset.directory
    assert (dataset.shuffle_tags, dataset.caption_variants, dataset.tag_delimiter) == (True, 10, ";")
    # Its cache_shuffle_num goes before its older shuffle_tags.
    assert (directory.shuffle_tags, directory.caption_variants) == (True, 2)
    assert [notice.split(": ", 1)[1][:80] for notice in loaded.notices] == [
        "cache_shuffle_delimiter is read as tag_delimiter",
        "cache_shuffle_num = 10 is read as shuffle_tags = true and caption_variants = 10;",
        "directory[0].online_captions = true has no effect here: captions are read at eve",
        "directory[0].cache_shuffle_num = 2 is read as shuffle_tags = true and caption_va",
    ]
    plain = files.load(files.main(), files.data("cache_shuffle_num = 0\nshuffle_tags = true"))
    assert (plain.dataset.shuffle_tags, plain.dataset.caption_variants) == (True, 4)
    assert plain.notices == [
        "data.toml:1: cache_shuffle_num = 0 has no effect here: shuffle_tags alone says whether tags are shuffled"
    ]


@pytest.mark.parametrize(("value", "ours"), [("true", "error"), ("false", "empty")])
def test_items_without_captions(files, value, ours):
    loaded = files.load(files.main(), files.data(f"skip_empty_caption = {value}"))
    assert loaded.dataset.on_missing_caption == ours
    (notice,) = loaded.notices
    assert notice.startswith(f'data.toml:1: skip_empty_caption = {value} is read as on_missing_caption = "{ours}"')


def test_caption_keys_that_are_wrong(files):
    lines = 'cache_shuffle_num = 2.5\nskip_empty_caption = "no"\ncache_shuffle_delimiter = ""'
    assert files.problems(files.main(), files.data(lines)) == [
        "data.toml:1: cache_shuffle_num must be a whole number of at least 0, got the number 2.5",
        "data.toml:2: skip_empty_caption is not a known key; configs/README.md lists the keys",
        "data.toml:3: tag_delimiter = '': it may not be empty; tags are divided by a text like \", \"",
    ]
    lines = 'cache_shuffle_num = 2\ncaption_variants = 3\nskip_empty_caption = true\non_missing_caption = "empty"'
    assert files.problems(files.main(), files.data(lines)) == [
        "data.toml:1: cache_shuffle_num is another name for caption_variants, which is given too; remove one of them",
        "data.toml:3: skip_empty_caption is another name for on_missing_caption, which is given too; remove one of them",
    ]


def test_monitoring_that_is_off(files):
    loaded = files.load(files.main() + "[monitoring]\nenable_wandb = false\nwandb_tracker_name = 'x'\n")
    assert loaded.run.wandb is None
    assert loaded.notices == [
        "main.toml:15: [monitoring] has no effect, since enable_wandb is not true; the table is called [wandb] here"
    ]


def test_monitoring_mistakes(files):
    main = files.main() + '[monitoring]\nenable_wandb = "yes"\nwandb_tracker_nam = "x"\n'
    assert files.problems(main) == [
        "main.toml:16: monitoring.enable_wandb must be true or false, got the string 'yes'",
        "main.toml:17: monitoring.wandb_tracker_nam is not a key of [monitoring]; did you mean `wandb_tracker_name`?",
    ]
    assert files.problems(files.main() + "[monitoring]\nenable_wandb = true\n[wandb]\n") == [
        "main.toml:15: [monitoring] is another name for [wandb], which is given too; remove one of them"
    ]


def test_clip_mode_of_the_main_file(files):
    main = files.main(
        'video_clip_mode = "single_middle"',
        'eval_datasets = ["held.toml"]',
    )
    loaded = files.load(main, files.data('video_clip_mode = "single_beginning"'), held=files.data())
    assert loaded.dataset.video_clip_mode == "single_beginning"
    assert loaded.eval_datasets["eval0"].video_clip_mode == "single_middle"
    assert loaded.notices == [
        'main.toml:2: eval_datasets[0] has no name and is called "eval0"',
        "main.toml:1: video_clip_mode is a key of the dataset file; it is read as if it stood there",
    ]


def test_a_wrong_clip_mode_is_reported_where_it_stands(files):
    (problem,) = files.problems(files.main('video_clip_mode = "single_end"'))
    assert problem.startswith('main.toml:1: video_clip_mode must be one of "single_beginning", "single_middle"')


# What examples/*dataset.toml and utils/dataset.py of diffusion-pipe read.
DATASET_KEYS = {
    *("path", "resolutions", "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "frame_buckets"),
    *("size_buckets", "num_repeats", "subsample_ratio", "shuffle_metadata", "caption_prefix", "shuffle_tags"),
    *("cache_shuffle_num", "cache_shuffle_delimiter", "skip_empty_caption", "online_captions", "control_path", "control_paths"),
    *("mask_path", "default_mask_file"),
}
TRANSLATED = {"cache_shuffle_num", "skip_empty_caption"}


def test_each_key_of_a_dataset_file_is_read_or_spoken_of():
    ours = DatasetConfig.model_fields.keys() | DirectoryConfig.model_fields.keys()
    handled = {*DATASET_REFUSED, *DATASET_RENAMED, *DATASET_NO_EFFECT, *TRANSLATED}
    assert (DATASET_KEYS & ours) | handled == DATASET_KEYS


def test_the_readme_tells_of_each_key_of_a_dataset_file():
    text = Path("configs/README.md").read_text()
    table = text.partition("Every key of a dataset file, and what becomes of it:\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    named = [key for keys, *_ in rows for key in re.findall("`([a-z_]+)`", keys)]
    assert sorted(named) == sorted(DATASET_KEYS)
    for keys, verdict, how in rows:
        assert verdict in ("same", "better", "different")
        for key in re.findall("`([a-z_]+)`", keys):
            assert ("Refused" in how) == (key in DATASET_REFUSED)
            assert ("No effect" in how) == (key in DATASET_NO_EFFECT)
            assert key not in DATASET_RENAMED or DATASET_RENAMED[key] in keys + how


def test_several_control_folders(files):
    loaded = files.load(files.main(), files.data(directory='control_paths = ["a", "b"]\n'))
    assert loaded.dataset.directory[0].control_paths == [Path("a"), Path("b")]
    assert loaded.notices == ["data.toml:5: directory[0].control_paths is read as directory[0].control_path"]
