"""What the loader makes of good files, and what it says of every kind of mistake."""

import tempfile
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.diffusion_pipe import MONITORING, NO_EFFECT, REFUSED, RENAMED
from utils.config.dump import TABLES
from utils.config.load import ConfigError, LoadedConfig, load_config


def test_the_smallest_config(files, family_options):
    loaded = files.load()
    assert loaded.run.output_dir == Path("runs")
    assert loaded.run.max_steps == 10
    assert loaded.run.epochs is None
    assert loaded.run.adapter.rank == 8
    assert loaded.run.adapter.alpha is None
    assert type(loaded.run.model) is family_options("tiny")
    assert loaded.run.model.flavour == "plain"
    assert loaded.dataset.directory[0].path == Path("clips")
    assert loaded.eval_datasets == {}
    assert loaded.notices == []


def test_values_cannot_be_changed(files):
    with pytest.raises(ValueError, match="frozen"):
        files.load().run.seed = 1


def test_no_adapter_means_full_fine_tuning(files):
    text = files.main().replace("[adapter]\nrank = 8\n", "")
    assert files.load(text).run.adapter is None


def test_the_home_directory_is_expanded(files, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    main = files.main().replace('"runs"', '"~/runs"').replace('"data.toml"', '"~/data.toml"')
    assert files.load(main).run.output_dir == Path.cwd() / "runs"


def test_keys_of_the_optimizer_are_passed_on(files):
    assert files.load(files.main(optimizer="momentum = 0.9")).run.optimizer.model_extra == {"momentum": 0.9}


def test_whole_numbers_serve_as_numbers(files):
    assert files.load(files.main("gradient_clipping = 1")).run.gradient_clipping == 1.0


ONE_MISTAKE = {
    "unknown key with a near one": (
        {"top": "pipeline_stage = 2"},
        "main.toml:1: pipeline_stage is not a known key; did you mean `pipeline_stages`?",
    ),
    "more to keep where all are kept": (
        {"top": 'keep_last = "all"\nkeep_every_n_steps = 100'},
        'main.toml:2: keep_every_n_steps = 100: keep_last = "all" keeps every checkpoint already; give a number there',
    ),
    "the best of what is not measured": (
        {"top": "keep_best = 2"},
        "main.toml:1: keep_best = 2: without eval_datasets there is no held-out loss to compare by",
    ),
    "the best of what is never measured": (
        {"top": 'eval_datasets = [{name = "a", config = "data.toml"}]\nkeep_best = 2'},
        "main.toml:2: keep_best = 2: no held-out loss is measured; set eval_every_n_steps or eval_every_n_epochs",
    ),
    "unknown key that is part of one": (
        {"top": "batch_size = 2"},
        "main.toml:1: batch_size is not a known key; did you mean `micro_batch_size_per_gpu`?",
    ),
    "unknown key with nothing near": (
        {"adapter": "qqq = 2"},
        "main.toml:10: adapter.qqq is not a known key; allowed: type, rank, alpha, decompose_factor, init_from, dropout, dtype, "
        "target_modules, exclude_modules, layers, override",
    ),
    "unknown key of the family": (
        {"model": 'flavor = "sweet"'},
        "main.toml:6: model.flavor is not a known key; did you mean `flavour`?",
    ),
    "unknown key near another program's name": (
        {"model": 'ckpt_pth = "x"'},
        "main.toml:6: model.ckpt_pth is not a known key; did you mean `ckpt_path`?",
    ),
    "unknown table": (
        {"top": "zzz = {}"},
        "main.toml:1: zzz is not a known key; configs/README.md lists the keys",
    ),
    "key below the wrong table": (
        {"adapter": "max_steps = 2"},
        "main.toml:10: adapter.max_steps is not a known key; it is a key of the main file, above its first [table]",
    ),
    "key above its table": ({"top": "rank = 2"}, "main.toml:1: rank is not a known key; it is a key of [adapter]"),
    "key of the other file": (
        {"top": "frame_buckets = [1]"},
        "main.toml:1: frame_buckets is not a known key; it is a key of the dataset file or of [[directory]] in the dataset file",
    ),
    "text for a number": (
        {"top": 'pipeline_stages = "8"'},
        "main.toml:1: pipeline_stages must be a whole number of at least 1, got the string '8'",
    ),
    "true for a number": (
        {"top": "pipeline_stages = true"},
        "main.toml:1: pipeline_stages must be a whole number of at least 1, got true",
    ),
    "a broken number for a whole one": (
        {"top": "epochs = 1.5"},
        "main.toml:1: epochs must be a whole number of at least 1, got the number 1.5",
    ),
    "a table for a number": ({"top": "seed = {a = 1}"}, "main.toml:1: seed must be a whole number, got the table {'a': 1}"),
    "a date for text": (
        {"top": "run_name = 2026-01-31"},
        "main.toml:1: run_name must be text in quotes, got the value datetime.date(2026, 1, 31)",
    ),
    "text for a table": ({"top": 'wandb = "on"'}, "main.toml:1: wandb must be a table, got the string 'on'"),
    "text for true": (
        {"top": 'eval_before_first_step = "yes"'},
        "main.toml:1: eval_before_first_step must be true or false, got the string 'yes'",
    ),
    "below the least": (
        {"top": "warmup_steps = -1"},
        "main.toml:1: warmup_steps must be a whole number of at least 0, got the whole number -1",
    ),
    "at the open end of a range": (
        {"adapter": "dropout = 1.0"},
        "main.toml:10: adapter.dropout must be a number of at least 0 and below 1, got the number 1.0",
    ),
    "no number": (
        {"top": "gradient_clipping = nan"},
        "main.toml:1: gradient_clipping must be a number of at least 0, got the number nan",
    ),
    "infinite": (
        {"top": "checkpoint_every_n_minutes = inf"},
        "main.toml:1: checkpoint_every_n_minutes must be a number above 0, got",
    ),
    "none of the choices, near one": (
        {"top": 'resume = "lastest"\nrun_name = "a"'},
        'main.toml:1: resume must be one of "never", "latest", "latest-or-new", got the string \'lastest\'; did you mean `latest`?',
    ),
    "none of the choices, near none": (
        {"model": 'transformer_dtype = "nf4"'},
        'main.toml:6: model.transformer_dtype must be one of "float32", "bfloat16", got the string \'nf4\'',
    ),
    "choice of the family": (
        {"model": 'flavour = "sweat"'},
        'main.toml:6: model.flavour must be one of "plain", "sweet", got the string \'sweat\'; did you mean `sweet`?',
    ),
    "list of a wrong length": (
        {"optimizer": "betas = [0.9]"},
        "main.toml:13: optimizer.betas must be a list of 2 numbers, got the list [0.9]",
    ),
    "wrong member of a list": (
        {"top": "eval_timesteps = [0.1, 2.0]"},
        "main.toml:1: eval_timesteps must be a list of numbers above 0 and below 1, got the list [0.1, 2.0]",
    ),
    "neither numbers nor a table": (
        {"adapter": "layers = [1, 2]"},
        'main.toml:10: adapter.layers must be numbers like "0-9,20", or a table of them, got the list [1, 2]',
    ),
    "ranges of blocks": (
        {"adapter": 'layers = {transformer_blocks = "9-0"}'},
        "main.toml:10: adapter.layers = {'transformer_blocks': '9-0'}: '9-0' names no blocks; write numbers, and ranges from low "
        'to high, like "0-9,20"',
    ),
    "an override without effect": (
        {"adapter": 'override = [{modules = ["to_q"]}]'},
        "main.toml:10: adapter.override[0].alpha: give a rank or an alpha, or these modules are like the others",
    ),
    "dropout of a kind that has none": (
        {"adapter": 'type = "lokr"\ndropout = 0.1'},
        'main.toml:11: adapter.dropout = 0.1: type = "lokr" is added to the weight and has no input to drop; remove it, or use a '
        "lora or dora",
    ),
    "neither text nor a list": (
        {"adapter": "target_modules = [1]"},
        "main.toml:10: adapter.target_modules must be text in quotes or a list of texts, got the list [1]",
    ),
    "value of many lines": (
        {"top": 'seed = """\na\nb"""'},
        r"main.toml:1: seed must be a whole number, got the string 'a\nb'",
    ),
    "key below a value of many lines": (
        {"top": "eval_timesteps = [\n 0.5, # a comment ]\n]\nepochs = 0"},
        "main.toml:4: epochs must be a whole number of at least 1, got the whole number 0",
    ),
    "inline table": (
        {"top": 'wandb = {project = "a", nam = "b"}'},
        "main.toml:1: wandb.nam is not a known key; did you mean `name`?",
    ),
    "member of a list of tables": (
        {"top": "eval_datasets = [1]"},
        "main.toml:1: eval_datasets[0] must be a table, got the whole number 1",
    ),
}


@pytest.mark.parametrize("case", ONE_MISTAKE)
def test_one_mistake_in_the_main_file(files, case):
    changes, expected = ONE_MISTAKE[case]
    (problem,) = files.problems(files.main(**changes))
    assert problem.startswith(expected)


def test_rank_0(files):
    assert files.problems(files.main().replace("rank = 8", "rank = 0")) == [
        "main.toml:10: adapter.rank must be a whole number of at least 1, got the whole number 0"
    ]


def test_missing_keys_are_reported_at_their_table(files):
    main = files.main().replace('output_dir = "runs"\n', "").replace("rank = 8\n", "").replace("lr = 1e-4\n", "")
    assert files.problems(main) == [
        "main.toml:1: output_dir is missing; it must be a path in quotes",
        "main.toml:8: adapter.rank is missing; it must be a whole number of at least 1",
        "main.toml:10: optimizer.lr is missing; it must be a number of at least 0",
    ]


def test_an_empty_file(files):
    assert files.problems("") == [
        "main.toml:1: output_dir is missing; it must be a path in quotes",
        "main.toml:1: dataset is missing; it must be a path in quotes",
        "main.toml:1: max_steps: give epochs or max_steps, or the run has no end",
        "main.toml:1: model is missing; it must be a table",
        "main.toml:1: optimizer is missing; it must be a table",
    ]


def test_an_unknown_family_does_not_hide_other_problems(files):
    main = files.main(model="dtype = 16\nflavour = 1").replace('"tiny"', '"tinny"')
    assert files.problems(main) == [
        'main.toml:6: model.dtype must be one of "float32", "bfloat16", got the whole number 16',
        "main.toml:8: model.type = 'tinny': there is no such family; allowed: tiny",
    ]


@pytest.mark.parametrize("model", ['model = "tiny"', "[model]\ntype = 3"])
def test_no_usable_family(files, model):
    main = files.main().replace('[model]\ntype = "tiny"\npath = "weights"', model)
    (problem,) = files.problems(main if model.startswith("[") else f"{model}\n" + main.replace(model, ""))
    assert problem.partition(": ")[2] in (
        "model must be a table, got the string 'tiny'",
        "model.type must be text in quotes, got the whole number 3",
    )


def test_problems_of_all_files_in_one_message(files):
    main = files.main(
        'eval_datasets = [{name = "held", config = "held.toml"}, {name = "gone", config = "gone.toml"}]',
        "pipeline_stagess = 2",
        adapter="alpha = 0",
    )
    data = files.data("frame_buckets = [1, 0]", directory='num_repeat = 2\n[[directory]]\nnum_repeats = "2"\n')
    held = files.data("min_ar = -1")
    assert files.problems(main, data, held=held) == [
        f"main.toml:1: eval_datasets[1].config = 'gone.toml': gone.toml: the file cannot be read (No such file or directory); "
        f"relative paths start at {Path.cwd()}",
        "main.toml:2: pipeline_stagess is not a known key; did you mean `pipeline_stages`?",
        "main.toml:12: adapter.alpha must be a number above 0, got the whole number 0",
        "data.toml:1: frame_buckets must be a list of whole numbers of at least 1, got the list [1, 0]",
        "data.toml:6: directory[0].num_repeat is not a known key; did you mean `num_repeats`?",
        "data.toml:7: directory[1].path is missing; it must be a path in quotes",
        "data.toml:8: directory[1].num_repeats must be a number above 0 and at most 10000, got the string '2'",
        "held.toml:1: min_ar must be a number above 0, got the whole number -1",
    ]


def test_the_message_counts(files):
    with pytest.raises(ConfigError) as caught:
        files.load(files.main("sed = 1", "epoch = 1"))
    assert str(caught.value) == (
        "The config has 2 problems:\n"
        "  - main.toml:1: sed is not a known key; did you mean `seed`?\n"
        "  - main.toml:2: epoch is not a known key; did you mean `epochs`?"
    )


COMBINATIONS = {
    "an empty range of timesteps": (
        {"model": "min_t = 0.9\nmax_t = 0.5"},
        "main.toml:7: model.max_t = 0.5: it must be above min_t = 0.9",
    ),
    "a range that ends where it begins": ({"model": "min_t = 1"}, "main.toml:5: model.max_t: it must be above min_t = 1.0"),
    "resume without a name": (
        {"top": 'resume = "latest"'},
        "main.toml:1: resume = 'latest': it needs run_name, or it is not known which run to continue",
    ),
    "a name that is a path": (
        {"top": 'run_name = "a/b"'},
        "main.toml:1: run_name = 'a/b': it becomes the name of a folder or file, so it may not be empty or hold a slash",
    ),
    "a name that leads upwards": ({"top": 'run_name = ".."'}, "main.toml:1: run_name = '..': it becomes the name of"),
    "split without manual": (
        {"top": "pipeline_stages = 2\npartition_split = [3]"},
        "main.toml:2: partition_split = [3]: it is only read with partition_method = \"manual\", which is 'parameters'; "
        "remove one of them",
    ),
    "manual without split": (
        {"top": 'pipeline_stages = 3\npartition_method = "manual"'},
        'main.toml:1: partition_split: partition_method = "manual" needs pipeline_stages - 1 = 2 numbers here, '
        "the first layer of each stage after the first",
    ),
    "split of another length": (
        {"top": 'pipeline_stages = 3\npartition_method = "manual"\npartition_split = [1]'},
        'main.toml:3: partition_split = [1]: partition_method = "manual" needs pipeline_stages - 1 = 2 numbers here',
    ),
    "split that does not rise": (
        {"top": 'pipeline_stages = 3\npartition_method = "manual"\npartition_split = [4, 4]'},
        "main.toml:3: partition_split = [4, 4]: the numbers must rise and begin at 1 or above, so that every stage has a layer",
    ),
    "split that begins at 0": (
        {"top": 'pipeline_stages = 2\npartition_method = "manual"\npartition_split = [0]'},
        "main.toml:3: partition_split = [0]: the numbers must rise",
    ),
    "two eval datasets of one name": (
        {"top": 'eval_datasets = [{name = "a", config = "data.toml"}, {name = "a", config = "data.toml"}]'},
        'main.toml:1: eval_datasets: every entry needs a name of its own, not "training"; taken: a',
    ),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_impossible_combinations(files, case):
    changes, expected = COMBINATIONS[case]
    (problem,) = files.problems(files.main(**changes))
    assert problem.startswith(expected)


def test_a_run_needs_an_end(files):
    main = files.main().replace("max_steps = 10\n", "")
    assert files.problems(main) == ["main.toml:1: max_steps: give epochs or max_steps, or the run has no end"]
    assert files.load("epochs = 3\n" + main).run.epochs == 3


def test_combinations_are_reported_with_other_problems(files):
    problems = files.problems(files.main("sed = 1", 'resume = "latest"').replace("max_steps = 10\n", ""))
    assert [problem.partition(":")[2].split(": ")[1].split(" ")[0] for problem in problems] == ["max_steps", "sed", "resume"]


DATASET_MISTAKES = {
    "size bucket of two numbers": (
        "size_buckets = [[512, 512]]",
        "data.toml:1: size_buckets = [[512, 512]]: each size bucket is [width, height, frames], three whole numbers above 0",
    ),
    "size bucket with a broken number": ("size_buckets = [[512, 512, 1.5]]", "data.toml:1: size_buckets = [[512, 512, 1.5]]: each"),
    "no frame bucket": (
        "frame_buckets = []",
        "data.toml:1: frame_buckets must be a list of whole numbers of at least 1, got the list []",
    ),
    "aspect ratios in the wrong order": ("min_ar = 3.0", "data.toml:1: max_ar: it must not be below min_ar = 3.0"),
    "aspect ratio of 0": ("ar_buckets = [0]", "data.toml:1: ar_buckets = [0]: an aspect ratio is width / height, a number above 0"),
    "unknown way to cut a clip": (
        'video_clip_mode = "middle"',
        'data.toml:1: video_clip_mode must be one of "single_beginning", "single_middle", "multiple_overlapping", '
        '"non_overlapping", "uniform", got the string \'middle\'',
    ),
}


@pytest.mark.parametrize("case", DATASET_MISTAKES)
def test_one_mistake_in_the_dataset_file(files, case):
    line, expected = DATASET_MISTAKES[case]
    (problem,) = files.problems(files.main(), files.data(line))
    assert problem.startswith(expected)


@pytest.mark.parametrize("resolution", ['"512"', "0", "[1, 2, 3]", "[640, 0]", "1.5", "true"])
def test_resolutions(files, resolution):
    (problem,) = files.problems(files.main(), files.data().replace("[64]", f"[64, {resolution}]"))
    assert problem.startswith("data.toml:1: resolutions = [64, ")
    assert problem.endswith("a resolution is the side of a square like 512, or a pair [width, height], in whole pixels above 0")


def test_sizes_may_stand_in_the_directories(files):
    bare = files.data().replace("resolutions = [64]\n", "")
    (problem,) = files.problems(files.main(), bare)
    assert problem.endswith(
        "give resolutions (or size_buckets) for the whole file or for each directory; there are none for: clips"
    )
    assert files.load(files.main(), bare + "resolutions = [[64, 32]]\n").dataset.directory[0].resolutions == [[64, 32]]
    assert files.load(files.main(), "size_buckets = [[64, 64, 5]]\n" + bare).dataset.size_buckets == [[64, 64, 5]]


def test_a_dataset_without_directories(files):
    assert files.problems(files.main(), "resolutions = [64]\n") == [
        "data.toml:1: directory is missing; it must be a list of tables"
    ]
    assert files.problems(files.main(), "resolutions = [64]\ndirectory = []\n") == [
        "data.toml:2: directory must be a list of tables, got the list []"
    ]


SYNTAX = {
    "text without quotes": (
        "seed = 1\nrun_name = demo\n",
        "main.toml:2:12: this is not valid TOML: Invalid value; text stands in quotes, and true and false are written small",
    ),
    "a key given twice": ("seed = 1\nseed = 2\n", "main.toml:2:9: this is not valid TOML: Cannot overwrite a value"),
    "a table given twice": ("[a]\n[a]\n", "main.toml:2:3: this is not valid TOML: Cannot declare ('a',) twice"),
    "an open list": ("seed = 1\na = [1,\n2\n", "main.toml:3:1: this is not valid TOML: Unclosed array"),
}


@pytest.mark.parametrize("case", SYNTAX)
def test_syntax_errors_have_line_and_column(files, case):
    text, expected = SYNTAX[case]
    assert files.problems(text) == [expected]


def test_a_syntax_error_in_a_dataset_file_is_reported_with_the_rest(files):
    assert files.problems(files.main("sed = 1"), "resolutions = [64\n") == [
        "main.toml:1: sed is not a known key; did you mean `seed`?",
        "main.toml:3: dataset = 'data.toml': data.toml:1:1: this is not valid TOML: Unclosed array",
    ]


def test_files_that_cannot_be_read(files, family_options, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: the file cannot be read \(No such file or directory\)"):
        load_config(Path("nowhere.toml"), family_options)
    with pytest.raises(ConfigError, match=r"the file cannot be read \(Is a directory\)"):
        load_config(tmp_path, family_options)
    Path("latin.toml").write_bytes('run_name = "Müller"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.toml: byte 13 is not UTF-8"):
        load_config(Path("latin.toml"), family_options)


def test_eval_datasets(files):
    main = files.main('eval_datasets = [{name = "held", config = "held.toml"}]', "eval_every_n_steps = 5")
    loaded = files.load(main, held=files.data("fps = 8"))
    assert loaded.eval_datasets["held"].fps == 8
    assert loaded.notices == []


def test_evaluation_without_data_gives_a_notice(files):
    assert files.load(files.main("eval_every_n_epochs = 1")).notices == [
        "main.toml:1: eval_every_n_epochs = 1 has no effect, since there are no eval_datasets"
    ]


def test_caption_keys_that_need_others_give_a_notice(files):
    lines = "caption_variants = 8\nkeep_tokens = 1"
    assert files.load(files.main(), files.data(lines, directory="keep_tokens = 2\n")).notices == [
        "data.toml:2: keep_tokens = 1 has no effect without one of shuffle_tags, tag_dropout",
        "data.toml:7: directory[0].keep_tokens = 2 has no effect without one of shuffle_tags, tag_dropout",
        "data.toml:1: caption_variants = 8 has no effect without one of shuffle_tags, tag_dropout, caption_wildcards",
    ]
    assert files.load(files.main(), files.data(lines, directory="tag_dropout = 0.1\n")).notices == []
    assert files.load(files.main(), files.data("caption_variants = 4\nkeep_tokens = 0")).notices == []


class TestOverrides:
    def test_values(self, files):
        run = files.load(
            files.main(),
            files.data(),
            "optimizer.lr=5e-5",
            "max_steps = 3",
            "run_name=my run",
            'model.flavour="sweet"',
            "activation_checkpointing=true",
            "output_dir=/elsewhere/runs",
            "optimizer.betas=[0.9, 0.95]",
        ).run
        assert (run.optimizer.lr, run.max_steps, run.run_name, run.model.flavour) == (5e-5, 3, "my run", "sweet")
        assert run.activation_checkpointing is True
        assert run.output_dir == Path("/elsewhere/runs")
        assert run.optimizer.betas == (0.9, 0.95)

    def test_a_table_is_made(self, files):
        assert files.load(files.main(), files.data(), "wandb.mode=offline").run.wandb.mode == "offline"

    def test_the_last_one_counts(self, files):
        assert files.load(files.main(), files.data(), "seed=1", "seed=2").run.seed == 2

    def test_the_family_and_the_dataset_can_be_overridden(self, files):
        loaded = files.load(files.main(), files.data(), "dataset=other.toml", other=files.data("fps = 3"))
        assert loaded.dataset.fps == 3
        assert files.problems(files.main(), files.data(), "model.type=x") == [
            "--set model.type: model.type = 'x': there is no such family; allowed: tiny"
        ]

    def test_another_programs_name(self, files):
        main = files.main().replace('path = "weights"\n', "")
        assert files.load(main, files.data(), "model.ckpt_path=there").run.model.path == Path("there")

    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("adapter.rnk=3", "--set adapter.rnk: adapter.rnk is not a known key; did you mean `rank`?"),
            ("lr=3", "--set lr: lr is not a known key; it is a key of [optimizer]"),
            ("no.table=3", "main.toml:1: no is not a known key; configs/README.md lists the keys"),
            ("adapter.rank=0", "--set adapter.rank: adapter.rank must be a whole number of at least 1, got the whole number 0"),
            ("optimizer.zero=2", "--set optimizer.zero: optimizer.zero must be one of 0, 1, got the whole number 2"),
            ("optimizer.part_lr.a=-1", "main.toml:12: optimizer.part_lr must be a table of numbers of at least 0, got the table"),
            ("adapter.rank=four", "--set adapter.rank: adapter.rank must be a whole number of at least 1, got the string 'four'"),
            ("seed", "--set seed: write it as key=value or table.key=value"),
            ("adapter.=3", "--set adapter.: write it as key=value or table.key=value"),
            ("dataset.fps=3", "--set dataset.fps: dataset is not a table, so it has no key fps"),
            ("run_name='a", "--set run_name: the value is not valid TOML: "),
        ],
    )
    def test_mistakes(self, files, override, expected):
        (problem,) = files.problems(files.main(), files.data(), override)
        assert problem.startswith(expected)

    def test_a_secret_is_not_repeated(self, files):
        (problem,) = files.problems(files.main(), files.data(), "wandb.api_key=c0ffee")
        assert "c0ffee" not in problem
        assert "WANDB_API_KEY" in problem


NAMES = st.sampled_from(
    sorted(
        {name for table in TABLES.values() for name in table.model_fields}
        | {part for key in [*RENAMED, *NO_EFFECT, *REFUSED] for part in key.split(".")}
        | {*MONITORING, "enable_wandb", "0", "no such key"}
    )
)
VALUES = st.recursive(
    st.sampled_from([0, 1, 1.5, -3, True, "", "manual", "latest", "tiny", "unsloth", "data.toml", "main.toml", "nowhere.toml"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=8)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(main=DOCUMENTS, data=DOCUMENTS, override=st.tuples(st.lists(NAMES, min_size=1, max_size=3), VALUES))
def test_whatever_stands_in_the_files_is_answered(family_options, main, data, override):
    """A config, or one error that names a place for each problem: never another exception."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("main.toml").write_text(tomli_w.dumps({"dataset": "data.toml", "model": {"type": "tiny"}} | main))
        Path("data.toml").write_text(tomli_w.dumps(data))
        assignment = f"{'.'.join(override[0])}={tomli_w.dumps({'': override[1]}).partition(' = ')[2]}"
        try:
            assert isinstance(load_config(Path("main.toml"), family_options, [assignment]), LoadedConfig)
        except ConfigError as error:
            for problem in error.problems:
                assert problem.startswith(("main.toml:", "data.toml:", "nowhere.toml:", "--set "))
