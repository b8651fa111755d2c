"""Reading diffusion-pipe's TOML files: its names for what we have, and what to say of keys that we do not have.

The names are those of diffusion-pipe's ``examples/main_example.toml``, ``examples/dataset.toml`` and ``train.py``.  No key of
such a file is passed over in silence: it is read, or a notice says why it has no effect, or it is refused with the way out.
"""

from collections.abc import Callable

from utils.config.describe import did_you_mean, shown
from utils.config.toml_file import Keys, TomlFile, dotted

RENAMED = {
    "model.ckpt_path": "model.path",
    "model.diffusers_path": "model.path",
    "model.checkpoint_path": "model.path",
    "model.llm_path": "model.text_encoder_path",
    "model.clip_path": "model.image_encoder_path",
    "adapter.init_from_existing": "adapter.init_from",
    "adapter.fuse_adapters": "model.merge_adapters",
}
"""Other names for the same thing."""
MONITORING = {"wandb_tracker_name": "project", "wandb_run_name": "name"}
"""Keys of ``[monitoring]`` and what they are called in ``[wandb]``."""

_COMPUTES_THE_SAME = "it changes nothing that is computed, and there is no such setting"
NO_EFFECT = {
    "steps_per_print": "every step is logged",
    "logging_steps": "every step is logged",
    "x_axis_examples": "metrics.jsonl and TensorBoard hold both steps and samples",
    "caching_batch_size": "samples are encoded in batches that the encoder chooses",
    "map_num_proc": "the encoding is shared by the processes of the run",
    "regenerate_cache": "what is cached is known by its content, so a changed file is encoded again by itself",
    "trust_cache": "what is cached is known by its content, which is always checked",
    "reentrant_activation_checkpointing": "activation_checkpointing works with any number of stages",
    "compile": _COMPUTES_THE_SAME,
    "blocks_to_swap": "blocks are not swapped to the host's memory; more pipeline_stages divide the model over more GPUs",
    "disable_block_swap_for_eval": "blocks are not swapped to the host's memory",
    "eval_micro_batch_size_per_gpu": "evaluation has no batch size of its own, and leaves no sample out",
    "image_eval_micro_batch_size_per_gpu": "evaluation has no batch size of its own, and leaves no sample out",
    "eval_gradient_accumulation_steps": "evaluation has no batch size of its own, and leaves no sample out",
    "max_checkpoints": "all checkpoints and exports are kept; remove old ones by hand",
    "huggingface_repo": "exports are not uploaded",
    "upload_hf_from_epoch": "exports are not uploaded",
}
"""Keys that may stand in a file, with the reason why they have no effect.  Training computes the same without them."""

_API_KEY = "a secret does not belong in a file that is copied into the run's folder; set the environment variable WANDB_API_KEY"
REFUSED = {
    "force_constant_lr": 'set [optimizer] lr and lr_scheduler = "constant"',
    "pseudo_huber_c": 'set [model] loss = "pseudo_huber" and loss_delta',
    "eval_every_n_examples": "use eval_every_n_steps or eval_every_n_epochs",
    "save_every_n_examples": "use save_every_n_steps or save_every_n_epochs",
    "resume_from_checkpoint": 'set run_name and resume = "latest", or start with --resume',
    "monitoring.wandb_api_key": _API_KEY,
    "wandb.api_key": _API_KEY,
}
"""Keys without which training would be another one (or that may not be in a file), with the way out."""

DATASET_REFUSED = {
    "default_mask_file": "put a copy of it into mask_path for each item that has no mask; without one an item counts everywhere",
    "subsample_ratio": "set num_repeats to the share, like 0.1: an epoch then shows so much of the data, the next one another part",
}
"""The same for the dataset file, where these may stand at the top or in a directory."""
DATASET_RENAMED = {"cache_shuffle_delimiter": "tag_delimiter", "control_paths": "control_path"}
DATASET_NO_EFFECT = {
    "online_captions": "captions are read at every start, and those that changed are encoded again",
    "shuffle_metadata": "every epoch is shuffled anew",
}


def translate_main(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """Rewrite the main file's table to our names."""
    for old, new in RENAMED.items():
        _rename(file, _keys(old), _keys(new), problems, notices)
    for old, way_out in REFUSED.items():
        # An empty value is what the example file has where nothing was filled in.
        if file.get(_keys(old)) is not None and file.pop(_keys(old)) != "":
            problems.append(f"{file.place(_keys(old))}: {old} is not read here: {way_out}")
    for old, reason in NO_EFFECT.items():
        if file.get(_keys(old)) is not None:
            notices.append(f"{file.place(_keys(old))}: {old} = {file.pop(_keys(old))!r} has no effect here: {reason}")
    for special in _SPECIAL:
        special(file, problems, notices)


def translate_dataset(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """Rewrite the dataset file's table to our names, and refuse the keys without which training would be another one."""
    directories = file.table.get("directory")
    tables: list[Keys] = [(), *(("directory", index) for index in range(len(directories) if isinstance(directories, list) else 0))]
    for table in tables:
        for name, way_out in DATASET_REFUSED.items():
            keys = (*table, name)
            if file.get(keys) is not None:
                file.pop(keys)
                problems.append(f"{file.place(keys)}: {dotted(keys)} is not read here: {way_out}")
        for old, new in DATASET_RENAMED.items():
            _rename(file, (*table, old), (*table, new), problems, notices)
        for name, reason in DATASET_NO_EFFECT.items():
            keys = (*table, name)
            if file.get(keys) is not None:
                notices.append(f"{file.place(keys)}: {dotted(keys)} = {shown(file.pop(keys))} has no effect here: {reason}")
        _shuffled_captions(file, table, problems, notices)
        _captionless(file, table, problems, notices)


def hand_over_clip_mode(main: TomlFile, datasets: list[TomlFile], notices: list[str]) -> None:
    """``video_clip_mode`` stands in diffusion-pipe's main file and holds for every dataset that says nothing itself."""
    if "video_clip_mode" not in main.table:
        return
    place, mode = main.place(("video_clip_mode",)), main.pop(("video_clip_mode",))
    notices.append(f"{place}: video_clip_mode is a key of the dataset file; it is read as if it stood there")
    for file in datasets:
        if "video_clip_mode" not in file.table:
            file.put(("video_clip_mode",), mode, place)


def _keys(name: str) -> Keys:
    return tuple(name.split("."))


def _rename(file: TomlFile, old: Keys, new: Keys, problems: list[str], notices: list[str]) -> None:
    if file.get(old) is None:
        return
    place, value = file.place(old), file.pop(old)
    if file.get(new) is not None:
        problems.append(f"{place}: {dotted(old)} is another name for {dotted(new)}, which is given too; remove one of them")
        return
    file.put(new, value, place)
    notices.append(f"{place}: {dotted(old)} is read as {dotted(new)}")


def _unsloth(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    keys = ("activation_checkpointing",)
    if file.get(keys) == "unsloth":
        place = file.place(keys)
        file.put(keys, True, place)
        notices.append(f'{place}: activation_checkpointing = "unsloth" is read as true: activations stay on the GPU')


def _eval_datasets(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """An entry of ``eval_datasets`` may be a path alone; its name is then made from its position."""
    entries = file.get(("eval_datasets",))
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, str):
            entries[index] = {"name": f"eval{index}", "config": entry}
            notices.append(
                f'{file.place(("eval_datasets", index))}: eval_datasets[{index}] has no name and is called "eval{index}"'
            )


def _monitoring(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """``[monitoring]`` becomes ``[wandb]``, which is there only if it is wanted."""
    table = file.get(("monitoring",))
    if not isinstance(table, dict):
        return
    place = file.place(("monitoring",))
    file.pop(("monitoring",))
    enabled = table.pop("enable_wandb", False)
    wanted = {new: (old, table.pop(old)) for old, new in MONITORING.items() if old in table}
    for name in table:
        nearest = did_you_mean(name, ["enable_wandb", *MONITORING])
        problems.append(f"{file.place(('monitoring', name))}: monitoring.{name} is not a key of [monitoring]{nearest}")
    if enabled is False:
        notices.append(f"{place}: [monitoring] has no effect, since enable_wandb is not true; the table is called [wandb] here")
    elif enabled is not True:
        where = file.place(("monitoring", "enable_wandb"))
        problems.append(f"{where}: monitoring.enable_wandb must be true or false, got {shown(enabled)}")
    elif "wandb" in file.table:
        problems.append(f"{place}: [monitoring] is another name for [wandb], which is given too; remove one of them")
    else:
        file.put(("wandb",), {}, place)
        for new, (old, value) in wanted.items():
            if value != "":
                file.put(("wandb", new), value, file.place(("monitoring", old)))
        notices.append(f"{place}: [monitoring] is read as [wandb]")


def _shuffled_captions(file: TomlFile, table: Keys, problems: list[str], notices: list[str]) -> None:
    """``cache_shuffle_num`` is how often each caption is shuffled and cached; 0 leaves the captions to ``shuffle_tags``."""
    keys, ours, shuffle = (*table, "cache_shuffle_num"), (*table, "caption_variants"), (*table, "shuffle_tags")
    number = file.get(keys)
    if number is None:
        return
    place = file.place(keys)
    file.pop(keys)
    if type(number) is not int or number < 0:
        problems.append(f"{place}: {dotted(keys)} must be a whole number of at least 0, got {shown(number)}")
    elif number == 0:
        notices.append(f"{place}: {dotted(keys)} = 0 has no effect here: shuffle_tags alone says whether tags are shuffled")
    elif file.get(ours) is not None:
        problems.append(f"{place}: {dotted(keys)} is another name for {dotted(ours)}, which is given too; remove one of them")
    else:
        file.put(ours, number, place)
        file.put(shuffle, True, place)
        notices.append(
            f"{place}: {dotted(keys)} = {number} is read as shuffle_tags = true and caption_variants = {number}; an epoch shows an "
            f"item with one of its variants, not with each: num_repeats = {number} makes the epoch as long as it was"
        )


def _captionless(file: TomlFile, table: Keys, problems: list[str], notices: list[str]) -> None:
    """``skip_empty_caption`` leaves items without a caption out; here they are named before anything is trained."""
    keys, ours = (*table, "skip_empty_caption"), (*table, "on_missing_caption")
    if not isinstance(value := file.get(keys), bool):
        return  # absent, or refused as an unknown key
    place = file.place(keys)
    file.pop(keys)
    if file.get(ours) is not None:
        problems.append(f"{place}: {dotted(keys)} is another name for {dotted(ours)}, which is given too; remove one of them")
        return
    file.put(ours, "error" if value else "empty", place)
    meaning = "an item without a caption has an empty one"
    if value:
        meaning = 'an item without a caption ends the run; on_bad_sample = "skip" leaves it out'
    told = f'on_missing_caption = "{file.get(ours)}"'
    notices.append(f"{place}: {dotted(keys)} = {str(value).lower()} is read as {told}: {meaning}")


def _v_pred(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """``v_pred`` of SDXL is a choice of ``prediction``; zero terminal SNR goes with it in both."""
    keys, ours = ("model", "v_pred"), ("model", "prediction")
    if not isinstance(value := file.get(keys), bool):
        return  # absent, or refused as an unknown key
    place, prediction = file.place(keys), "v_prediction" if value else "epsilon"
    file.pop(keys)
    if file.get(ours) is not None:
        problems.append(f"{place}: model.v_pred is another name for model.prediction, which is given too; remove one of them")
        return
    file.put(ours, prediction, place)
    notices.append(f'{place}: model.v_pred = {str(value).lower()} is read as prediction = "{prediction}"')


def _whole_rank(file: TomlFile, problems: list[str], notices: list[str]) -> None:
    """``rank = 1e6``, as a LoKr that is not decomposed is written there, is a number with a point in TOML."""
    keys = ("adapter", "rank")
    if isinstance(value := file.get(keys), float) and value.is_integer():
        file.put(keys, int(value), file.place(keys))


_SPECIAL: list[Callable[[TomlFile, list[str], list[str]], None]] = [_unsloth, _eval_datasets, _monitoring, _v_pred, _whole_rank]
