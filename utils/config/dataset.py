"""The settings of a dataset file.  What is said of the keys in ``schema`` holds here too."""

from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import ImageColor
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from utils.config.table import FilePath, PositiveInt, Table


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value))


def _resolution(value: Any) -> Any:
    if not _whole(value) and not _pair(value):
        raise ValueError("a resolution is the side of a square like 512, or a pair [width, height], in whole pixels above 0")
    return value


def _aspect_ratio(value: Any) -> Any:
    if not (type(value) in (int, float) and value > 0) and not _pair(value):
        raise ValueError("an aspect ratio is width / height, a number above 0, or a pair [width, height]")
    return value


def _size_bucket(value: Any) -> Any:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_whole, value))):
        raise ValueError("each size bucket is [width, height, frames], three whole numbers above 0")
    return value


def _encoding(value: str) -> str:
    try:
        b"a".decode(value)
    except LookupError as error:
        raise ValueError('it is no encoding of texts that is known; write one like "cp1252", "shift_jis" or "gb18030"') from error
    except UnicodeError:
        pass  # one of more than a byte for each sign
    return value


def _tag_delimiter(value: str) -> str:
    if not value:
        raise ValueError('it may not be empty; tags are divided by a text like ", "')
    return value


def _colour(value: str) -> str:
    try:
        ImageColor.getcolor(value, "RGB")
    except ValueError as error:
        raise ValueError('it is no colour; write a name like "grey", or "#rrggbb"') from error
    return value


# The text is what `describe.allowed` says of them.
Resolution = Annotated[int | list[int], BeforeValidator(_resolution), "sides and [width, height] pairs"]
AspectRatio = Annotated[float | list[int], BeforeValidator(_aspect_ratio), "ratios and [width, height] pairs"]
SizeBucket = Annotated[list[int], BeforeValidator(_size_bucket), "[width, height, frames]"]
Encoding = Annotated[str, AfterValidator(_encoding)]
TagDelimiter = Annotated[str, AfterValidator(_tag_delimiter)]
Repeats = Annotated[float, Field(gt=0, le=10000)]
Colour = Annotated[str, AfterValidator(_colour)]
ClipMode = Literal["single_beginning", "single_middle", "multiple_overlapping", "non_overlapping", "uniform"]
FrameBuckets = Annotated[list[PositiveInt], Field(min_length=1)]


class DirectoryConfig(Table):
    """``[[directory]]``: a folder of pictures and clips.  Keys of the dataset file may be repeated here to override it."""

    path: FilePath
    """A folder, a `.tar` file, or a list of files: `.jsonl` or `.csv`. Captions stand beside the files, in `.txt` or `.json` files
    of the same name, in `captions.json`, or in the list."""
    recursive: bool = False
    """Take the files of all folders below it too. Folders whose name begins with a point are left out."""
    kohya_folder_names: bool = False
    """Take the folders in it that are called `<repeats>_<text>`, as kohya's trainers do: an epoch shows their files so often, times
    `num_repeats`, and the text is the caption of files that have none."""
    num_repeats: Repeats | None = None
    """Overrides the dataset file's."""
    is_reg: bool = False
    """A regularisation set: what the model knows already and should keep. An epoch shows as many samples of such sets as of all
    others together, other ones in the next epoch if there are more, and no trigger word is added to their captions."""
    loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """In training, the loss of its samples is multiplied by this."""
    control_path: FilePath | list[FilePath] | None = None
    """For editing models: a folder with the control picture of each item under the item's name; several folders for several."""
    mask_path: FilePath | None = None
    """A folder with a mask of each item under the item's name, a picture or for clips also a clip, of the item's shape: the loss
    counts where it is white, in part where it is grey, not where it is black. An item without one counts everywhere."""
    alpha_mask: bool = False
    """The alpha channel of each picture is its mask, unless `mask_path` has one."""
    first_frame_path: FilePath | None = None
    """For models that are shown the first frame: a folder with a picture of each item under the item's name, shown in place of the
    clip's own first frame."""
    last_frame_path: FilePath | None = None
    """The same for models that are shown the last frame."""
    resolutions: list[Resolution] | None = None
    """Overrides the dataset file's."""
    frame_buckets: FrameBuckets | None = None
    """Overrides the dataset file's."""
    size_buckets: list[SizeBucket] | None = None
    """Overrides the dataset file's."""
    enable_ar_bucket: bool | None = None
    """Overrides the dataset file's."""
    min_ar: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    max_ar: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    num_ar_buckets: PositiveInt | None = None
    """Overrides the dataset file's."""
    ar_buckets: list[AspectRatio] | None = None
    """Overrides the dataset file's."""
    no_upscale: bool | None = None
    """Overrides the dataset file's."""
    crop: Literal["center", "random"] | None = None
    """Overrides the dataset file's."""
    background: Colour | None = None
    """Overrides the dataset file's."""
    animated: Literal["clip", "first_frame"] | None = None
    """Overrides the dataset file's."""
    video_clip_mode: ClipMode | None = None
    """Overrides the dataset file's."""
    clips_per_video: PositiveInt | None = None
    """Overrides the dataset file's."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Overrides the dataset file's."""
    caption_prefix: str | None = None
    """Overrides the dataset file's."""
    caption_suffix: str | None = None
    """Overrides the dataset file's."""
    trigger_word: str | None = None
    """Overrides the dataset file's."""
    captions_per_line: bool | None = None
    """Overrides the dataset file's."""
    caption_encoding: Encoding | None = None
    """Overrides the dataset file's."""
    on_missing_caption: Literal["error", "empty"] | None = None
    """Overrides the dataset file's."""
    caption_wildcards: bool | None = None
    """Overrides the dataset file's."""
    shuffle_tags: bool | None = None
    """Overrides the dataset file's."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides the dataset file's."""
    keep_tokens: Annotated[int, Field(ge=0)] | None = None
    """Overrides the dataset file's."""
    tag_delimiter: TagDelimiter | None = None
    """Overrides the dataset file's."""
    caption_variants: PositiveInt | None = None
    """Overrides the dataset file's."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    """Overrides the dataset file's."""

    @property
    def control_paths(self) -> list[Path]:
        """The folders of ``control_path``."""
        given = self.control_path or []
        return given if isinstance(given, list) else [given]


class DatasetConfig(Table):
    """The dataset file."""

    resolutions: list[Resolution] = []
    """Sizes to train at: a number is the side of a square of equal area (`512`), a pair is `[width, height]`."""
    enable_ar_bucket: bool = False
    """Sort by aspect ratio into buckets of about the area of each resolution, instead of cropping all to its shape."""
    min_ar: Annotated[float, Field(gt=0)] = 0.5
    """Narrowest aspect ratio (width / height) of the buckets."""
    max_ar: Annotated[float, Field(gt=0)] = 2.0
    """Widest aspect ratio of the buckets."""
    num_ar_buckets: PositiveInt = 7
    """Number of aspect ratios, evenly spaced in their logarithm."""
    ar_buckets: list[AspectRatio] | None = None
    """The aspect ratios themselves, or `[width, height]` pairs, instead of the three keys above."""
    frame_buckets: FrameBuckets = [1]
    """Numbers of frames to train at. A clip goes into the largest bucket that it fills; 1 is for pictures."""
    size_buckets: list[SizeBucket] | None = None
    """Buckets as `[width, height, frames]`, instead of all of the above."""
    no_upscale: bool = False
    """Never enlarge: an item that is smaller than its bucket gets a smaller bucket of about that shape."""
    crop: Literal["center", "random"] = "center"
    """What stays of an item that is wider or higher than its bucket's shape: the middle, or a place that is drawn for each item,
    once for the run. A list of files may give each item a box of its own to use."""
    background: Colour = "white"
    """What lies behind transparent parts of pictures: a colour's name, or `#rrggbb`."""
    animated: Literal["clip", "first_frame"] = "clip"
    """What animated pictures (GIF, WebP, PNG, AVIF) are taken for: clips, or pictures that show their first frame."""
    video_clip_mode: ClipMode = "single_beginning"
    """Which part of a clip longer than its bucket is used: its beginning, its middle, `multiple_overlapping`: as many parts as
    cover all of it, evenly spaced; `non_overlapping`: as many whole ones as fit behind each other; `uniform`: `clips_per_video`
    parts, evenly spaced."""
    clips_per_video: PositiveInt | None = None
    """For `uniform`: how many parts of a clip are used, fewer where they would be the same."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second that clips are resampled to. Default: the family's."""
    num_repeats: Repeats = 1
    """How often an epoch shows each item. With a fraction an epoch shows some items once more than others, and later epochs the
    others: 0.5 shows each in every second epoch."""
    sampling_temperature: Annotated[float, Field(ge=1)] | None = None
    """Evens out directories of different sizes: an epoch, as long as without it, is divided among them by (samples x repeats) to
    the power of 1 / temperature, but for regularisation sets. 1 changes nothing, a large number gives each the same share."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """What happens when an item cannot be used because it is broken, has no caption, or lacks its control picture: `stop` ends the
    run before it trains, with all of them named; `skip` names them in the log and the report and trains without them."""
    caption_prefix: str = ""
    """Text put before every caption."""
    caption_suffix: str = ""
    """Text put after every caption."""
    trigger_word: str = ""
    """A word put before each caption that does not hold it, followed by `tag_delimiter`."""
    captions_per_line: bool = False
    """Each line of a `.txt` file is a caption of its own. Training shows one at a time."""
    caption_encoding: Encoding = "utf-8"
    """How caption files are encoded that have no byte order mark, as UTF-16 has."""
    on_missing_caption: Literal["error", "empty"] = "error"
    """`empty` gives an item without a caption file an empty caption; how many there are is reported."""
    caption_wildcards: bool = False
    """`{red|blue}` in a caption is one of the two, `{3::red|blue}` three times as often red; choices may hold choices. A
    sign after a backslash is the sign itself."""
    shuffle_tags: bool = False
    """Shuffle the tags that a caption is made of."""
    tag_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which each tag is left out."""
    keep_tokens: Annotated[int, Field(ge=0)] = 0
    """So many tags at the start of a caption stay there, and are not left out."""
    tag_delimiter: TagDelimiter = ", "
    """What is between tags; the spaces around it do not matter."""
    caption_variants: PositiveInt = 4
    """How many texts are made and encoded of an item whose captions vary by wildcards, shuffling or tag dropout; each caption has
    at least one. More of them take more room in the cache."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability with which an item is shown with an empty caption, without prefix and trigger word."""
    directory: Annotated[list[DirectoryConfig], Field(min_length=1)]
    """The folders, tar files and lists, at least one."""

    @field_validator("max_ar")
    @classmethod
    def _aspect_ratios_are_in_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("min_ar", 0.0):
            raise ValueError(f"it must not be below min_ar = {info.data['min_ar']}")
        return value

    @field_validator("clips_per_video")
    @classmethod
    def _counts_uniform_parts(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("video_clip_mode") == "uniform":
            raise ValueError('video_clip_mode = "uniform" needs it: how many parts of each clip are used')
        return value

    @field_validator("directory")
    @classmethod
    def _sizes_are_known(cls, value: list[DirectoryConfig], info: ValidationInfo) -> list[DirectoryConfig]:
        if not {"resolutions", "size_buckets"} <= info.data.keys() or info.data["resolutions"] or info.data["size_buckets"]:
            return value
        if bare := [str(entry.path) for entry in value if not (entry.resolutions or entry.size_buckets)]:
            raise ValueError(
                "give resolutions (or size_buckets) for the whole file or for each directory; "
                f"there are none for: {', '.join(bare)}"
            )
        return value
