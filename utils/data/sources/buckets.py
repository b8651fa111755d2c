"""Which sizes a data set is trained at, and which of them a picture or clip gets.

The meaning is diffusion-pipe's: resolutions x aspect ratios x numbers of frames, or explicit sizes.
"""

import math
from collections.abc import Iterator

import numpy as np

from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.media.pixels import MediaInfo, frames_at
from utils.data.sources.lists import has_list
from utils.data.values import ANY_CONTROLS, Bucket, ControlRules, SizeRules


def settings_for(dataset: DatasetConfig, directory: DirectoryConfig) -> DatasetConfig:
    """The dataset file's settings with those that the directory overrides."""
    own = {name: value for name, value in directory if name in DatasetConfig.model_fields and value is not None}
    if "resolutions" in own:
        own.setdefault("size_buckets", None)  # or the dataset's explicit sizes would go before the directory's resolutions
    if own.keys() & {"min_ar", "max_ar", "num_ar_buckets"}:
        own.setdefault("ar_buckets", None)  # likewise
    if directory.is_reg:
        own["trigger_word"] = ""  # what is to be kept is not what the word stands for
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


class Chooser:
    """Chooses among the buckets of one resolution."""

    def __init__(self, buckets: list[Bucket], rules: SizeRules, fps: float | None, no_upscale: bool = False):
        self.rules, self.fps, self.no_upscale = rules, fps, no_upscale
        # Of one aspect ratio the longest goes first, and of these the largest.
        shapes = [
            (math.log(bucket.width / bucket.height), -bucket.frames, -bucket.width * bucket.height, bucket) for bucket in buckets
        ]
        self._pictures = [shape for shape in shapes if shape[-1].frames == 1]
        self._clips = [shape for shape in shapes if shape[-1].frames > 1]

    def choose(self, info: MediaInfo, size: tuple[int, int] | None = None) -> Bucket | str:
        """The bucket for an item, or why there is none.  ``size``: (width, height) of the part that is used; None: all of it.

        A picture goes into the buckets of one frame, a clip (as long as it is at ``fps``) into the longest that it fills, both into
        the nearest aspect ratio, measured by its logarithm.  With ``no_upscale`` what is smaller gets a smaller bucket.
        """
        if info.fps is None:
            fitting = self._pictures
            if not fitting:
                return "a picture, and there is no bucket of 1 frame"
        elif self.rules.frame_step is None or self.fps is None:
            return "a clip, and this model takes pictures only"
        elif not self._clips:
            return "a clip, and there is no bucket of more than 1 frame"
        else:
            available = frames_at(info, self.fps)
            fitting = [shape for shape in self._clips if -shape[1] <= available]
            if not fitting:
                shortest = min(-shape[1] for shape in self._clips)
                return f"too short: {available} frames at {self.fps:g} fps, and the shortest bucket has {shortest}"
        width, height = size or (info.width, info.height)
        wanted = math.log(width / height)
        # Rounded, so that sizes of one aspect ratio tie.
        bucket = min(fitting, key=lambda shape: (round(abs(shape[0] - wanted), 9), *shape[1:3]))[-1]
        return self._shrunk(bucket, width, height) if self.no_upscale else bucket

    def _shrunk(self, bucket: Bucket, width: int, height: int) -> Bucket | str:
        """The bucket, or the largest of about its shape and of sides that the model takes for which nothing is enlarged."""
        scale = min(width / bucket.width, height / bucket.height)
        if scale >= 1:
            return bucket
        multiple = self.rules.multiple
        sides = [
            min(round(side * scale / multiple), has // multiple) * multiple
            for side, has in ((bucket.width, width), (bucket.height, height))
        ]
        if 0 in sides:
            return f"too small: {width}x{height} pixels, and without enlarging it no bucket of {multiple}x{multiple} is filled"
        return Bucket(*sides, bucket.frames)


def problems(dataset: DatasetConfig, rules: SizeRules, controls: ControlRules = ANY_CONTROLS) -> list[str]:
    """Settings that this model cannot be trained with, each with its key, the value, and what is allowed."""
    found: dict[str, None] = {}
    if all(directory.is_reg for directory in dataset.directory):
        found["is_reg: every [[directory]] is a regularisation set, and there is none to train on; remove it from one of them"] = (
            None
        )
    settings = [settings_for(dataset, directory) for directory in dataset.directory]
    if any(own.clips_per_video for own in settings) and all(own.video_clip_mode != "uniform" for own in settings):
        found['clips_per_video: it has no effect without video_clip_mode = "uniform"; set that, or remove it'] = None
    for directory in dataset.directory:
        for problem in filter(None, (_control_problem(directory, controls), *_directory_problems(directory, rules))):
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
    if settings.video_clip_mode == "uniform" and not settings.clips_per_video:
        found.append(("video_clip_mode", '"uniform" needs clips_per_video: how many parts of each clip are used'))
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


def _directory_problems(directory: DirectoryConfig, rules: SizeRules) -> Iterator[str]:
    for end in ("first", "last"):
        key = f"{end}_frame_path"
        if (path := getattr(directory, key)) is not None and end not in rules.known_frames:
            shown = f"only the {rules.known_frames[0]} frame" if rules.known_frames else "no frame"
            yield f"{key} = {str(path)!r}: this model is shown {shown} of a clip; remove the key"
    if directory.is_reg and directory.trigger_word:
        yield f"trigger_word = {directory.trigger_word!r}: is_reg = true adds no trigger word; remove one of them"


def _control_problem(directory: DirectoryConfig, controls: ControlRules) -> str | None:
    number = len(directory.control_paths)
    # What a list says of its files is known when it is read.
    if controls.allows(number) or (not (controls.most == 0 and number) and has_list(directory.path)):
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
