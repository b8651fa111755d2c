"""Which buckets there are, which of them an item gets, and settings a model cannot take."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.media.framing import enlargement
from utils.data.media.pixels import MediaInfo
from utils.data.sources.buckets import Chooser, buckets_for, problems, settings_for
from utils.data.values import Bucket, ControlRules, SizeRules

CLIPS = SizeRules(multiple=16, frame_step=4, fps=16.0)
PICTURES = SizeRules(multiple=32, frame_step=None, fps=None)


def config(*directories: dict, **keys) -> DatasetConfig:
    entries = [DirectoryConfig(path=f"data{index}", **entry) for index, entry in enumerate(directories or ({},))]
    return DatasetConfig(**keys, directory=entries)


def buckets(**keys) -> list[list[Bucket]]:
    return buckets_for(config(**keys), CLIPS)


def test_without_aspect_ratios_each_resolution_has_one_shape():
    assert buckets(resolutions=[512, [832, 480]], frame_buckets=[1, 81]) == [
        [Bucket(512, 512, 1), Bucket(512, 512, 81)],
        [Bucket(832, 480, 1), Bucket(832, 480, 81)],
    ]
    assert buckets(resolutions=[500]) == [[Bucket(496, 496, 1)]]


def test_aspect_ratios_are_even_in_their_logarithm():
    # Ratios 2**(-1), 2**(-2/3), …, 2**1; sides are 512 times their square roots, and the nearest multiple of 16.
    sides = [(368, 720), (400, 640), (464, 576), (512, 512), (576, 464), (640, 400), (720, 368)]
    assert buckets(resolutions=[512], enable_ar_bucket=True) == [[Bucket(*side, 1) for side in sides]]


def test_aspect_ratios_by_hand():
    found = buckets(resolutions=[[640, 640]], enable_ar_bucket=True, ar_buckets=[1.0, [16, 9], [9, 16]], frame_buckets=[33])
    assert found == [[Bucket(480, 848, 33), Bucket(640, 640, 33), Bucket(848, 480, 33)]]


def test_explicit_sizes_go_before_everything_else():
    found = buckets(resolutions=[512], frame_buckets=[5], size_buckets=[[832, 480, 81], [480, 832, 33], [832, 480, 81]])
    assert found == [[Bucket(480, 832, 33), Bucket(832, 480, 81)]]


@settings(deadline=None)
@given(
    side=st.integers(128, 2048),
    low=st.floats(0.2, 1),
    high=st.floats(1, 5),
    number=st.integers(1, 12),
    multiple=st.sampled_from([16, 32]),
)
def test_buckets_keep_about_the_area_and_are_multiples(side: int, low: float, high: float, number: int, multiple: int):
    rules = SizeRules(multiple, 4, 16.0)
    given_keys = config(resolutions=[side], enable_ar_bucket=True, min_ar=low, max_ar=high, num_ar_buckets=number)
    for bucket in buckets_for(given_keys, rules)[0]:
        assert bucket.width % multiple == bucket.height % multiple == 0
        # Each side is off by half a multiple at most.
        slack = multiple / 2 * (bucket.width + bucket.height) + multiple**2 / 4
        assert abs(bucket.width * bucket.height - side**2) <= slack + 1e-6


# ── assignment ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

GRID = [Bucket(width, height, frames) for width, height in [(832, 480), (640, 640), (480, 832)] for frames in (1, 33, 81)]


def clip(width: int, height: int, frames: int, fps: float = 16.0) -> MediaInfo:
    return MediaInfo(width, height, frames, fps)


def test_pictures_get_one_frame_and_the_nearest_shape():
    assert Chooser(GRID, CLIPS, 16.0).choose(MediaInfo(1000, 1000, 1, None)) == Bucket(640, 640, 1)
    assert Chooser(GRID, CLIPS, 16.0).choose(MediaInfo(4000, 3000, 1, None)) == Bucket(832, 480, 1)
    # The border between 1 and 26:15 is at their geometric mean, 1.3166.
    assert Chooser(GRID, CLIPS, 16.0).choose(MediaInfo(1316, 1000, 1, None)) == Bucket(640, 640, 1)
    assert Chooser(GRID, CLIPS, 16.0).choose(MediaInfo(1317, 1000, 1, None)) == Bucket(832, 480, 1)


def test_clips_get_the_longest_bucket_that_they_fill():
    assert Chooser(GRID, CLIPS, 16.0).choose(clip(1920, 1080, 81)) == Bucket(832, 480, 81)
    assert Chooser(GRID, CLIPS, 16.0).choose(clip(1080, 1920, 80)) == Bucket(480, 832, 33)
    # At 25 fps, frame 80 of 81 at 16 fps is source frame 125: 126 frames are needed.
    assert Chooser(GRID, CLIPS, 16.0).choose(clip(640, 640, 126, 25.0)) == Bucket(640, 640, 81)
    assert Chooser(GRID, CLIPS, 16.0).choose(clip(640, 640, 125, 25.0)) == Bucket(640, 640, 33)


def test_items_that_no_bucket_takes_have_a_reason():
    videos = [bucket for bucket in GRID if bucket.frames > 1]
    stills = [bucket for bucket in GRID if bucket.frames == 1]
    assert (
        Chooser(GRID, CLIPS, 16.0).choose(clip(64, 64, 30, 16.0))
        == "too short: 30 frames at 16 fps, and the shortest bucket has 33"
    )
    assert (
        Chooser(GRID, CLIPS, 16.0).choose(clip(64, 64, 40, 30.0))
        == "too short: 22 frames at 16 fps, and the shortest bucket has 33"
    )
    assert Chooser(stills, CLIPS, 16.0).choose(clip(64, 64, 99)) == "a clip, and there is no bucket of more than 1 frame"
    assert Chooser(videos, CLIPS, 16.0).choose(MediaInfo(64, 64, 1, None)) == "a picture, and there is no bucket of 1 frame"
    assert Chooser(stills, PICTURES, None).choose(clip(64, 64, 99)) == "a clip, and this model takes pictures only"


def test_among_explicit_sizes_the_shape_goes_before_the_length():
    sizes = [Bucket(480, 832, 33), Bucket(832, 480, 81), Bucket(416, 240, 81)]
    assert Chooser(sizes, CLIPS, 16.0).choose(clip(480, 832, 100)) == Bucket(480, 832, 33)
    assert Chooser(sizes, CLIPS, 16.0).choose(clip(832, 480, 100)) == Bucket(832, 480, 81)
    assert (
        Chooser(sizes, CLIPS, 16.0).choose(clip(480, 832, 20)) == "too short: 20 frames at 16 fps, and the shortest bucket has 33"
    )


@settings(deadline=None)
@given(width=st.integers(16, 4000), height=st.integers(16, 4000), frames=st.integers(33, 200))
def test_no_other_bucket_fits_better(width: int, height: int, frames: int):
    chosen = Chooser(GRID, CLIPS, 16.0).choose(clip(width, height, frames))
    assert chosen.frames == (81 if frames >= 81 else 33)
    misfits = {bucket: abs(math.log(bucket.width / bucket.height) - math.log(width / height)) for bucket in GRID}
    assert misfits[chosen] <= min(misfits.values()) + 1e-8


@given(
    width=st.integers(1, 2000),
    height=st.integers(1, 2000),
    multiple=st.sampled_from([16, 32]),
    resolutions=st.lists(st.integers(64, 1200), min_size=1, max_size=2),
)
def test_without_enlarging(width: int, height: int, multiple: int, resolutions: list[int]):
    rules = SizeRules(multiple, 4, 16.0)
    for group in buckets_for(config(resolutions=resolutions, enable_ar_bucket=True), rules):
        info = MediaInfo(width, height, 1, None)
        plain = Chooser(group, rules, 16.0).choose(info)
        chosen = Chooser(group, rules, 16.0, no_upscale=True).choose(info)
        if width >= plain.width and height >= plain.height:
            assert chosen == plain
        elif isinstance(chosen, str):
            assert min(width, height) < 2 * multiple, "only what is very small, or very narrow, has none"
        else:
            assert chosen.width % multiple == chosen.height % multiple == 0
            assert chosen.width <= width
            assert chosen.height <= height
            assert enlargement((width, height), (chosen.width, chosen.height)) <= 1
            # Of the largest that would fit, each side is within a step.
            scale = min(width / plain.width, height / plain.height)
            assert abs(chosen.width - plain.width * scale) < multiple
            assert abs(chosen.height - plain.height * scale) < multiple


def test_small_items_by_hand():
    def shape(width: int, height: int) -> Bucket | str:
        return Chooser([Bucket(832, 480, 1), Bucket(480, 832, 1)], CLIPS, None, no_upscale=True).choose(
            MediaInfo(width, height, 1, None)
        )

    assert shape(832, 480) == shape(1000, 1000 * 480 // 832 + 1) == Bucket(832, 480, 1)
    assert shape(400, 240) == Bucket(400, 224, 1)  # 400 x 230.8 of its shape
    assert shape(831, 480) == Bucket(816, 480, 1)
    assert shape(100, 831) == Bucket(96, 176, 1)
    assert shape(8, 2000) == "too small: 8x2000 pixels, and without enlarging it no bucket of 16x16 is filled"


def test_the_box_of_an_item_is_what_counts():
    chooser = Chooser(GRID, CLIPS, 16.0)
    info = MediaInfo(4000, 1000, 1, None)
    assert chooser.choose(info) == Bucket(832, 480, 1)
    assert chooser.choose(info, (500, 1000)) == Bucket(480, 832, 1)


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_overrides_the_dataset():
    dataset = config(
        {},
        {"resolutions": [256], "num_repeats": 3, "caption_prefix": "style, "},
        {"frame_buckets": [5]},
        resolutions=[512],
        size_buckets=[[64, 64, 9]],
        num_repeats=2,
    )
    first, second, third = (settings_for(dataset, directory) for directory in dataset.directory)
    assert (first.num_repeats, first.caption_prefix, first.size_buckets) == (2, "", [[64, 64, 9]])
    # Its own resolutions are not overruled by the explicit sizes of the whole file.
    assert (second.num_repeats, second.caption_prefix, second.resolutions, second.size_buckets) == (3, "style, ", [256], None)
    assert (third.frame_buckets, third.size_buckets) == ([5], [[64, 64, 9]])


def test_a_directory_may_have_aspect_ratios_of_its_own():
    dataset = config(
        {"min_ar": 0.8, "max_ar": 1.25, "num_ar_buckets": 3},
        {"ar_buckets": [1.0]},
        {"max_ar": 4.0},
        resolutions=[512],
        enable_ar_bucket=True,
        ar_buckets=[0.5, 2.0],
    )
    ratios = [
        [round(bucket.width / bucket.height, 2) for bucket in buckets_for(settings_for(dataset, directory), CLIPS)[0]]
        for directory in dataset.directory
    ]
    # What the directory says of its ratios goes before the list of the whole file.
    assert ratios[0] == [0.81, 1.0, 1.24]
    assert ratios[1] == [1.0]
    assert (min(ratios[2]), max(ratios[2]), len(ratios[2])) == (0.51, 4.0, 7)
    assert problems(config({"min_ar": 3.0}, {}, resolutions=[512], enable_ar_bucket=True), CLIPS) == [
        "[[directory]] data0: min_ar, max_ar: 3 is above 2; the narrowest comes first"
    ]


def test_parts_of_clips_are_counted_where_there_are_several():
    uniform = {"video_clip_mode": "uniform"}
    assert problems(config(uniform | {"clips_per_video": 2}, resolutions=[512]), CLIPS) == []
    assert problems(config({}, uniform, resolutions=[512], clips_per_video=2), CLIPS) == []
    assert problems(config(uniform, resolutions=[512]), CLIPS) == [
        '[[directory]] data0: video_clip_mode: "uniform" needs clips_per_video: how many parts of each clip are used'
    ]
    assert problems(config(resolutions=[512], clips_per_video=2), CLIPS) == [
        'clips_per_video: it has no effect without video_clip_mode = "uniform"; set that, or remove it'
    ]


def test_control_pictures_that_the_model_does_not_take():
    dataset = config({}, {"control_path": "a"}, {"control_path": ["a", "b"]}, resolutions=[512])
    assert problems(dataset, PICTURES, ControlRules(0, 10)) == []
    none = "and this model takes no control pictures for each item; remove the key, or train the other"
    assert problems(dataset, PICTURES, ControlRules(0, 0, "train the other")) == [
        f"[[directory]] data1: control_path names 1 folder, {none}",
        f"[[directory]] data2: control_path names 2 folders, {none}",
    ]
    advice = "name as many folders, each with one control picture for each item"
    assert problems(dataset, PICTURES, ControlRules(1, None)) == [
        f"[[directory]] data0: there is no control_path, and this model takes one or more control pictures for each item; {advice}"
    ]
    assert problems(dataset, PICTURES, ControlRules(1, 1))[1:] == [
        f"[[directory]] data2: control_path names 2 folders, and this model takes one control picture for each item; {advice}"
    ]


def test_good_settings_have_no_problems():
    assert problems(config(resolutions=[512, [832, 480]], frame_buckets=[1, 5, 81]), CLIPS) == []
    assert problems(config(size_buckets=[[832, 480, 81], [512, 512, 1]]), CLIPS) == []
    assert problems(config(resolutions=[512]), PICTURES) == []
    assert problems(config(resolutions=[[1000, 700]], enable_ar_bucket=True), CLIPS) == []  # an area only


def test_all_problems_are_told_with_what_is_allowed():
    dataset = config(
        {},
        {"frame_buckets": [8]},
        {"size_buckets": [[500, 480, 10]]},
        resolutions=[512, [830, 480]],
        frame_buckets=[1, 10, 80],
        ar_buckets=[1.0],
    )
    assert problems(dataset, CLIPS) == [
        "frame_buckets: 10 frames: this model takes 4k + 1 frames (9 or 13)",
        "frame_buckets: 80 frames: this model takes 4k + 1 frames (77 or 81)",
        "resolutions: [830, 480]: this model takes widths and heights that are multiples of 16 (nearest: [832, 480])",
        "ar_buckets: it has no effect without enable_ar_bucket = true; set that, or remove it",
        "[[directory]] data1: frame_buckets: 8 frames: this model takes 4k + 1 frames (5 or 9)",
        "[[directory]] data2: size_buckets: 10 frames: this model takes 4k + 1 frames (9 or 13)",
        "[[directory]] data2: size_buckets: [500, 480]: this model takes widths and heights that are multiples of 16 "
        "(nearest: [496, 480])",
    ]


def test_a_model_of_pictures_refuses_frames():
    assert problems(config(resolutions=[512], frame_buckets=[1, 33]), PICTURES) == [
        "frame_buckets: 33 frames: this model takes pictures only, so 1 is the one value allowed"
    ]
