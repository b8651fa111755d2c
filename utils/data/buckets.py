"""Which sizes a data set is trained at, and which of them a picture or clip gets.

The meaning is diffusion-pipe's: resolutions x aspect ratios x numbers of frames, or explicit sizes.
"""

import math

import numpy as np

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.media import MediaInfo, frames_at
from utils.data.values import ANY_CONTROLS, Bucket, ControlRules, SizeRules


def settings_for(dataset: DatasetConfig, directory: DirectoryConfig) -> DatasetConfig:
    """The dataset file's settings with those that the directory overrides."""
    own = {name: value for name, value in directory if name in DatasetConfig.model_fields and value is not None}
    if "resolutions" in own:
        own.setdefault("size_buckets", None)  # or the dataset's explicit sizes would go before the directory's resolutions
    if own.keys() & {"min_ar", "max_ar", "num_ar_buckets"}:
        own.setdefault("ar_buckets", None)  # likewise
    return dataset.model_copy(update=own)


def buckets_for(settings: DatasetConfig, rules: SizeRules) -> list[list[Bucket]]:
    """The buckets, one list for each resolution: an item gets one bucket, and so one sample, from every list.

    With ``enable_ar_bucket`` a bucket has about the area of its resolution; sides are rounded to what the model takes.
    """
    if settings.size_buckets:
        return [sorted(Bucket(*size) for size in {tuple(size) for size in settings.size_buckets})]
    groups = []
    for resolution in settings.resolutions:
        width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
        ratios = _aspect_ratios(settings) if settings.enable_ar_bucket else [width / height]
        sizes = {_size(width * height, ratio, rules.multiple) for ratio in ratios}
        groups.append(sorted(Bucket(*size, frames) for size in sizes for frames in set(settings.frame_buckets)))
    return groups


def assign(info: MediaInfo, buckets: list[Bucket], rules: SizeRules, fps: float | None) -> Bucket | str:
    """The bucket for an item among those of one resolution, or why there is none.

    A picture goes into the buckets of one frame, a clip (as long as it is at ``fps``) into the longest that it fills, both into
    the nearest aspect ratio, measured by its logarithm.
    """
    if info.fps is None:
        fitting = [bucket for bucket in buckets if bucket.frames == 1]
        if not fitting:
            return "a picture, and there is no bucket of 1 frame"
    elif rules.frame_step is None or fps is None:
        return "a clip, and this model takes pictures only"
    else:
        lengths = [bucket.frames for bucket in buckets if bucket.frames > 1]
        if not lengths:
            return "a clip, and there is no bucket of more than 1 frame"
        available = frames_at(info, fps)
        fitting = [bucket for bucket in buckets if 1 < bucket.frames <= available]
        if not fitting:
            return f"too short: {available} frames at {fps:g} fps, and the shortest bucket has {min(lengths)}"
    wanted = math.log(info.width / info.height)

    def misfit(bucket: Bucket) -> tuple[float, int, int]:
        # Rounded, so that sizes of one aspect ratio tie; then the longest goes first, and of these the largest.
        return round(abs(math.log(bucket.width / bucket.height) - wanted), 9), -bucket.frames, -bucket.width * bucket.height

    return min(fitting, key=misfit)


def problems(dataset: DatasetConfig, rules: SizeRules, controls: ControlRules = ANY_CONTROLS) -> list[str]:
    """Settings that this model cannot be trained with, each with its key, the value, and what is allowed."""
    found: dict[str, None] = {}
    for directory in dataset.directory:
        if problem := _control_problem(directory, controls):
            found[f"[[directory]] {directory.path}: {problem}"] = None
        for key, problem in _problems(settings_for(dataset, directory), rules):
            is_own = any(getattr(directory, part, None) is not None for part in key.split(", "))
            place = f"[[directory]] {directory.path}: {key}" if is_own else key
            found[f"{place}: {problem}"] = None
    return list(found)


def _problems(settings: DatasetConfig, rules: SizeRules) -> list[tuple[str, str]]:
    explicit = settings.size_buckets or []
    if settings.enable_ar_bucket or explicit:
        shapes = [("size_buckets", size[:2]) for size in explicit]
    else:
        shapes = [("resolutions", size) for size in settings.resolutions if not isinstance(size, int)]
    lengths = [("size_buckets", size[2]) for size in explicit] or [("frame_buckets", n) for n in settings.frame_buckets]
    found = [(key, _length_problem(frames, rules)) for key, frames in lengths]
    found += [(key, _shape_problem(shape, rules.multiple)) for key, shape in shapes]
    if settings.min_ar > settings.max_ar:
        found.append(("min_ar, max_ar", f"{settings.min_ar:g} is above {settings.max_ar:g}; the narrowest comes first"))
    if settings.ar_buckets and not settings.enable_ar_bucket:
        found.append(("ar_buckets", "it has no effect without enable_ar_bucket = true; set that, or remove it"))
    return [(key, problem) for key, problem in found if problem]


def _length_problem(frames: int, rules: SizeRules) -> str | None:
    step = rules.frame_step
    if step is None:
        return None if frames == 1 else f"{frames} frames: this model takes pictures only, so 1 is the one value allowed"
    if (frames - 1) % step == 0:
        return None
    below = (frames - 1) // step * step + 1
    return f"{frames} frames: this model takes {step}k + 1 frames ({below} or {below + step})"


def _shape_problem(shape: list[int], multiple: int) -> str | None:
    if all(side % multiple == 0 for side in shape):
        return None
    nearest = [_rounded(side, multiple) for side in shape]
    return f"{list(shape)}: this model takes widths and heights that are multiples of {multiple} (nearest: {nearest})"


def _control_problem(directory: DirectoryConfig, controls: ControlRules) -> str | None:
    number = len(directory.control_paths)
    if controls.allows(number):
        return None
    given = f"control_path names {number} folder{'s' * (number != 1)}" if number else "there is no control_path"
    advice = "remove the key" if controls.most == 0 else "name as many folders, each with one control picture for each item"
    instead = f", or {controls.instead}" if controls.instead else ""
    return f"{given}, and this model takes {controls} for each item; {advice}{instead}"


def _aspect_ratios(settings: DatasetConfig) -> list[float]:
    if settings.ar_buckets:
        return [ratio[0] / ratio[1] if isinstance(ratio, list) else ratio for ratio in settings.ar_buckets]
    return np.geomspace(settings.min_ar, settings.max_ar, settings.num_ar_buckets).tolist()


def _size(area: int, ratio: float, multiple: int) -> tuple[int, int]:
    return _rounded(math.sqrt(area * ratio), multiple), _rounded(math.sqrt(area / ratio), multiple)


def _rounded(side: float, multiple: int) -> int:
    return max(multiple, round(side / multiple) * multiple)
