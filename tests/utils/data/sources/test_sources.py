"""Real folders: what becomes a sample, what is reported, and what is refused."""

import logging
import os
import pickle
import shutil
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.media.files import DataFile
from utils.data.media.pixels import MediaInfo
from utils.data.sources import looks
from utils.data.sources.scan import scan
from utils.data.values import CENTRE, Bucket, SizeRules
from utils.errors import UserError
from utils.stopping import Stopped

RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)


def config(*folders: Path | DirectoryConfig, **keys) -> DatasetConfig:
    directories = [folder if isinstance(folder, DirectoryConfig) else DirectoryConfig(path=folder) for folder in folders]
    return DatasetConfig(**{"resolutions": [160], "frame_buckets": [1, 33]} | keys, directory=directories)


def keys_of(dataset: DatasetConfig, rules: SizeRules = RULES) -> list[str]:
    return [sample.key for sample in scan(dataset, rules, hash_cache=None).samples]


def refusal(dataset: DatasetConfig) -> str:
    with pytest.raises(UserError) as raised:
        scan(dataset, RULES, hash_cache=None)
    return str(raised.value)


def test_pictures_and_clips_become_samples(mixed: Path):
    (mixed / "bikes.txt").write_bytes("\ufeff  people on bikes — two of them\r\n".encode())
    result = scan(config(mixed, caption_prefix="film, ", num_repeats=2), RULES, hash_cache=None)
    assert [sample.key for sample in result.samples] == [
        "mixed/astronaut.png@160x160x1",
        "mixed/bikes.mp4@160x160x33",
        "mixed/carphone_pristine.mp4@160x160x33",
        "mixed/coffee.png@160x160x1",
    ]
    astronaut, bikes, *_ = result.samples
    assert (astronaut.original_size, bikes.original_size) == ((512, 512), (640, 272))
    assert (bikes.caption, bikes.fps, bikes.bucket, bikes.repeats) == (
        "film, people on bikes — two of them",
        16.0,
        Bucket(160, 160, 33),
        2,
    )
    assert (astronaut.caption, astronaut.fps) == ("film, a portrait of an astronaut", None)
    assert astronaut.file == DataFile(mixed / "astronaut.png")
    assert result.report.lines() == [
        f"mixed ({mixed}): 2 clips, 2 pictures, each 2 times an epoch",
        "       160x160x1  2 samples",
        "      160x160x33  2 samples",
        "  cut off: 29.0% of the area on average, at most 57.4% (mixed/bikes.mp4@160x160x33)",
        "  enlarged: 1 sample, at most 1.11 times (mixed/carphone_pristine.mp4@160x160x33)",
    ]
    assert pickle.loads(pickle.dumps(result)) == result


def test_each_resolution_gives_a_sample(mixed: Path):
    found = keys_of(config(mixed, resolutions=[160, 96], enable_ar_bucket=True))
    assert [key for key in found if "bikes" in key] == ["mixed/bikes.mp4@128x64x33", "mixed/bikes.mp4@224x112x33"]
    assert len(found) == 8
    # Two that come to the same bucket are one sample.
    assert len(keys_of(config(mixed, resolutions=[160, 162]))) == 4


def test_folders_of_the_same_name_are_told_apart(mixed: Path, tmp_path: Path):
    other = tmp_path / "other" / "mixed"
    shutil.copytree(mixed, other)
    found = keys_of(config(mixed, other, DirectoryConfig(path=mixed, resolutions=[96])))
    assert len(set(found)) == len(found) == 12
    assert [key for key in found if "coffee" in key] == [
        "mixed/coffee.png@160x160x1",
        "mixed[1]/coffee.png@160x160x1",
        "mixed[2]/coffee.png@96x96x1",
    ]


def test_the_content_is_what_is_hashed(mixed: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(mixed, copy)
    (copy / "coffee.png").write_bytes((copy / "coffee.png").read_bytes() + b"\n")
    first, second = (scan(config(folder), RULES, hash_cache=None).samples for folder in (mixed, copy))
    assert [a.content == b.content for a, b in zip(first, second, strict=True)] == [True, True, True, False]


def test_what_cannot_be_used_is_named(mixed: Path, write_clip, caplog):
    shutil.move(write_clip("short.mp4", frames=40), mixed)
    (mixed / "short.txt").write_text("short")
    (mixed / "notes.json").write_text("{}")
    (mixed / "._bikes.mp4").write_text("left by another system")
    (mixed / "sub").mkdir()
    with caplog.at_level(logging.WARNING):
        report = scan(config(mixed), RULES, hash_cache=None).report
    reason = "too short: 26 frames at 16 fps, and the shortest bucket has 33"
    assert report.unused == {"mixed/short.mp4": reason}
    assert f"  not used: short.mp4: {reason}" in report.lines()
    assert report.lines()[-1] == "  not looked at: 1 .json, 1 sub-folder, 1 hidden file"
    assert caplog.messages == [f"{mixed}: 1 file cannot be used:\n  - short.mp4: {reason}"]


def test_everything_that_is_wrong_is_told_at_once(mixed: Path, assets, tmp_path: Path):
    clip = assets.clips["bikes.mp4"].read_bytes()
    (mixed / "cut.mp4").write_bytes(clip[: len(clip) // 2])
    (mixed / "empty.png").write_bytes(b"")
    for name in ("cut.txt", "empty.txt", "lonely.txt", "phone.txt"):
        (mixed / name).write_text("a caption")
    (mixed / "phone.psd").write_bytes(b"?")
    (mixed / "coffee.txt").unlink()
    (mixed / "astronaut.txt").write_bytes(b"caf\xe9")
    missing = tmp_path / "missing"
    assert refusal(config(missing, mixed)).splitlines() == [
        'the data set has 7 problems (on_bad_sample = "skip" trains without the files that have one):',
        f"  - [[directory]] path = '{missing}': it cannot be read (No such file or directory); correct the path",
        f"  - {mixed}/astronaut.txt: the caption is not UTF-8 (byte 3); save it as UTF-8, or say in caption_encoding what it is",
        f"  - {mixed}/coffee.png: it has no caption; write one to coffee.txt beside it (an empty file is an empty caption), "
        'or set on_missing_caption = "empty"',
        f"  - {mixed}/lonely.txt: a caption without a picture or clip of the same name; remove it, or add the file",
        f"  - {mixed}/phone.psd: it has a caption, but files of this kind are not read; convert it to one of .apng, .avi, .avif, "
        ".bmp, .flv, .gif, .heic, .heif, .jfif, .jp2, .jpeg, .jpg, .m4v, .mkv, .mov, .mp4, .mpeg, .mpg, .png, .tif, .tiff, .webm, "
        ".webp, .wmv",
        f"  - {mixed}/cut.mp4: it does not decode (Invalid data found when processing input): it is cut off, damaged, or no clip",
        f"  - {mixed}/empty.png: the file is empty",
    ]


def test_many_problems_are_counted_and_the_log_names_all(tmp_path: Path, caplog):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(50):
        (folder / f"{index:02}.txt").write_text("")
    lines = refusal(config(folder)).splitlines()
    assert (lines[0][:29], len(lines), lines[-1]) == ("the data set has 50 problems ", 42, "  - and 10 more, which the log names")
    assert all(f"{index:02}.txt: a caption without" in caplog.messages[0] for index in range(50))


def test_settings_the_model_cannot_take(mixed: Path):
    assert refusal(config(mixed, frame_buckets=[1, 10])).splitlines() == [
        "the dataset does not fit the model:",
        "  - frame_buckets: 10 frames: this model takes 4k + 1 frames (9 or 13)",
    ]


def test_an_empty_data_set_says_what_was_found(mixed: Path, tmp_path: Path):
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for name in ("astronaut.png", "coffee.png"):
        (mixed / name).unlink()
        (mixed / name).with_suffix(".txt").unlink()
    assert refusal(config(nothing, mixed, frame_buckets=[1])).splitlines() == [
        "the data set is empty: nothing in it can be trained on. Add captioned files, or frame_buckets that fit them. Found:",
        f"nothing ({nothing}): 0 clips, 0 pictures",
        f"mixed ({mixed}): 2 clips, 0 pictures",
        "  not used: bikes.mp4: a clip, and there is no bucket of more than 1 frame",
        "  not used: carphone_pristine.mp4: a clip, and there is no bucket of more than 1 frame",
    ]


# ── parts of clips ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parts_of_a_clip_have_keys_of_their_own(mixed: Path):
    for name in ("carphone_pristine.mp4", "astronaut.png", "coffee.png"):
        (mixed / name).unlink()
        (mixed / name).with_suffix(".txt").unlink()
    # 250 frames at 25 fps are 160 at 16.
    key = "mixed/bikes.mp4@160x160x33"
    assert keys_of(config(mixed, video_clip_mode="single_middle")) == [key]
    assert keys_of(config(mixed, video_clip_mode="multiple_overlapping")) == [key] + [
        f"{key}+{first}" for first in (127, 31, 63, 95)
    ]
    found = scan(config(mixed, video_clip_mode="non_overlapping", frame_buckets=[33, 49]), RULES, hash_cache=None)
    assert [(sample.key, sample.first_frame) for sample in found.samples] == [
        ("mixed/bikes.mp4@160x160x49", 0),
        ("mixed/bikes.mp4@160x160x49+49", 49),
        ("mixed/bikes.mp4@160x160x49+98", 98),
    ]
    [report] = found.report.directories
    assert (report.clips, report.samples, report.left_over) == (1, 3, {"bikes.mp4@160x160x49": 13})
    assert "  13 frames at the ends of 1 clip make no whole part and are not used" in report.lines()
    uniform = config(mixed, video_clip_mode="uniform", clips_per_video=3)
    assert {sample.first_frame for sample in scan(uniform, RULES, hash_cache=None).samples} == {0, 63, 127}


# ── how often ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_regularisation_sets_and_temperature_are_in_the_repeats(small, tmp_path: Path):
    for folder, number in (("dog", 2), ("cat", 8), ("reg", 3)):
        for index in range(number):
            small(tmp_path / folder / f"{folder}{index}.png", folder)
    directories = [
        DirectoryConfig(path=tmp_path / "dog", num_repeats=4),
        DirectoryConfig(path=tmp_path / "cat", num_repeats=0.25),
        DirectoryConfig(path=tmp_path / "reg", is_reg=True, loss_weight=0.5),
    ]
    keys = {"resolutions": [64], "trigger_word": "sks"}

    def repeats(**more) -> dict[str, set[Fraction]]:
        found = scan(config(*directories, **keys, **more), RULES, hash_cache=None)
        shown: dict[str, set[Fraction]] = {}
        for sample in found.samples:
            shown.setdefault(sample.file.path.parent.name, set()).add(sample.repeats)
        assert [part.shown for part in found.report.directories] == [
            sum(sample.repeats for sample in found.samples if sample.key.startswith(f"{part.name}/"))
            for part in found.report.directories
        ]
        return shown

    assert repeats() == {"dog": {4}, "cat": {Fraction(1, 4)}, "reg": {Fraction(10, 3)}}
    # Ten samples an epoch, of which 8 and 2; their square roots are as 2 to 1.
    evened = repeats(sampling_temperature=2.0)
    assert evened == {"dog": {Fraction(10, 3)}, "cat": {Fraction(10, 3) / 8}, "reg": {Fraction(10, 3)}}
    samples = scan(config(*directories, **keys), RULES, hash_cache=None).samples
    assert {(sample.file.path.parent.name, sample.caption, sample.loss_weight) for sample in samples} == {
        ("dog", "sks, dog", 1.0),
        ("cat", "sks, cat", 1.0),
        ("reg", "reg", 0.5),
    }
    assert refusal(config(DirectoryConfig(path=tmp_path / "reg", is_reg=True), resolutions=[64])).splitlines()[1:] == [
        "  - is_reg: every [[directory]] is a regularisation set, and there is none to train on; remove it from one of them"
    ]
    nothing = DirectoryConfig(path=tmp_path / "dog", frame_buckets=[33])
    assert "only the regularisation sets" in refusal(config(nothing, directories[2], resolutions=[64]))
    own = DirectoryConfig(path=tmp_path / "reg", is_reg=True, trigger_word="sks")
    assert "trigger_word = 'sks': is_reg = true adds no trigger word" in refusal(config(own, directories[0]))


# ── what is cut off, enlarged, there twice ────────────────────────────────────────────────────────────────────────────────────


def test_random_crops_hang_on_the_seed_and_the_item(mixed: Path):
    def places(seed: int | None, **keys) -> list[tuple[float, float]]:
        found = scan(config(mixed, crop="random", **keys), RULES, hash_cache=None, caption_seed=seed)
        return [(sample.framing.x, sample.framing.y) for sample in found.samples]

    assert places(1) == places(1)
    assert places(1) != places(2)
    assert places(None) == places(None)
    assert len({*places(1)}) == 4
    # An item is cut at one place in all of its buckets.
    assert sorted(places(1, resolutions=[160, 96])) == sorted(places(1) * 2)
    assert all(0 <= place < 1 for pair in places(3) for place in pair)
    assert {*scan(config(mixed), RULES, hash_cache=None, caption_seed=1).samples[0:1]}.pop().framing == CENTRE


def test_small_items_are_not_enlarged_by_choice(small, tmp_path: Path):
    data = tmp_path / "data"
    small(data / "large.png", "large", size=(200, 200))
    small(data / "small.png", "small", size=(50, 90))
    small(data / "tiny.png", "tiny", size=(100, 12))
    enlarged = scan(config(data), RULES, hash_cache=None).report.directories[0].upscaled
    assert {key.partition("@")[0]: factor for key, factor in enlarged.items()} == {"data/small.png": 3.2, "data/tiny.png": 13.3333}
    found = scan(config(data, no_upscale=True), RULES, hash_cache=None)
    assert [sample.key for sample in found.samples] == ["data/large.png@160x160x1", "data/small.png@48x48x1"]
    assert found.report.unused == {
        "data/tiny.png": "too small: 100x12 pixels, and without enlarging it no bucket of 16x16 is filled"
    }
    assert found.report.directories[0].upscaled == {}


def test_files_of_one_content_are_named(mixed: Path):
    shutil.copy(mixed / "coffee.png", mixed / "tea.png")
    shutil.copy(mixed / "coffee.txt", mixed / "tea.txt")
    # A folder that is named twice has no duplicates in itself.
    report = scan(config(mixed, DirectoryConfig(path=mixed, resolutions=[96])), RULES, hash_cache=None).report
    assert report.duplicates == [["mixed/coffee.png", "mixed/tea.png"]]
    assert report.lines()[-1] == ("there more than once: 1 file of the same content as others: mixed/coffee.png = mixed/tea.png")


# ── files that cannot be used ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_files_are_skipped_by_choice_and_named(mixed: Path, caplog):
    (mixed / "coffee.png").write_bytes(b"")
    (mixed / "astronaut.txt").unlink()
    (mixed / "lonely.txt").write_text("?")
    with caplog.at_level(logging.WARNING):
        found = scan(config(mixed, on_bad_sample="skip"), RULES, hash_cache=None)
    assert [sample.file.name for sample in found.samples] == ["bikes.mp4", "carphone_pristine.mp4"]
    assert found.report.skipped == {
        "mixed/astronaut.png": "it has no caption; write one to astronaut.txt beside it (an empty file is an empty caption), "
        'or set on_missing_caption = "empty"',
        "mixed/coffee.png": "the file is empty",
        "mixed/lonely.txt": "a caption without a picture or clip of the same name; remove it, or add the file",
    }
    assert caplog.messages[0].startswith("3 files cannot be used, and the run goes without:\n")
    assert all(name.partition("/")[2] in caplog.messages[0] for name in found.report.skipped)
    for name in ("bikes", "carphone_pristine"):
        (mixed / f"{name}.mp4").write_bytes(b"?")
    message = refusal(config(mixed, on_bad_sample="skip"))
    assert message.startswith("the data set is empty: nothing in it can be trained on.")
    assert "skipped: bikes.mp4" in message


def test_a_place_that_is_wrong_is_never_skipped(mixed: Path, tmp_path: Path):
    (mixed / "coffee.txt").unlink()
    message = refusal(config(mixed, tmp_path / "gone", on_bad_sample="skip"))
    assert message.splitlines()[0] == "the data set has 2 problems:"


def test_a_file_that_changes_while_it_is_read_is_named(mixed: Path, monkeypatch):
    path = mixed / "coffee.png"
    plain = looks.content_of

    def slow(file: DataFile) -> str:
        found = plain(file)
        if file.path == path:
            path.write_bytes(path.read_bytes() + b"more")
        return found

    monkeypatch.setattr(looks, "content_of", slow)
    assert refusal(config(mixed)).splitlines()[1:] == [f"  - {path}: it changed while it was read; start again when it is whole"]

    def gone(file: DataFile) -> str:
        file.path.unlink() if file.path == path else None
        return plain(file)

    monkeypatch.setattr(looks, "content_of", gone)
    assert refusal(config(mixed)).splitlines()[1:] == [f"  - {path}: it cannot be read (No such file or directory)"]


# ── the memory of files ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_known_files_are_not_read_again(mixed: Path, tmp_path: Path):
    memory = tmp_path / "cache" / "files.json"
    first = scan(config(mixed), RULES, hash_cache=memory)
    path = mixed / "bikes.mp4"
    times = path.stat()
    path.write_bytes(bytes(times.st_size))  # no clip any more; same size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scan(config(mixed), RULES, hash_cache=memory) == first
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(UserError, match=r"bikes\.mp4: it does not decode"):
        scan(config(mixed), RULES, hash_cache=memory)


def test_a_file_in_the_place_of_another_is_read_again(mixed: Path, tmp_path: Path):
    memory = tmp_path / "files.json"
    before = scan(config(mixed), RULES, hash_cache=memory)
    path = mixed / "coffee.png"
    times, size = path.stat(), path.stat().st_size
    other = tmp_path / "other.png"
    data = path.read_bytes()
    other.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size; behind the picture's end
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, times.st_mtime_ns)
    after = scan(config(mixed), RULES, hash_cache=memory)
    changed = [a.key for a, b in zip(before.samples, after.samples, strict=True) if a.content != b.content]
    assert changed == ["mixed/coffee.png@160x160x1"]


def test_two_runs_write_one_memory(mixed: Path, small, tmp_path: Path):
    """What one run finds meanwhile, the other keeps."""
    memory = tmp_path / "files.json"
    ours = looks.FileMemory(memory)
    small(tmp_path / "other" / "a.png", "a")
    scan(config(tmp_path / "other", resolutions=[64]), RULES, hash_cache=memory)
    theirs = {*looks.FileMemory(memory).entries}
    ours.put("/data/b.png", (1, 2, 3), looks.Look("00", MediaInfo(8, 8, 1, None)))
    ours.write()
    assert {*looks.FileMemory(memory).entries} == theirs | {"/data/b.png"}
    assert looks.FileMemory(memory).get("/data/b.png", (1, 2, 3)) == looks.Look("00", MediaInfo(8, 8, 1, None))
    assert looks.FileMemory(memory).get("/data/b.png", (1, 2, 4)) is None


def test_members_of_a_tar_file_are_known_again(small, tmp_path: Path, monkeypatch):
    memory, tar = tmp_path / "files.json", tmp_path / "data.tar"
    pictures = [small(tmp_path / name, name) for name in ("a.png", "b.png")]

    def write(order: list[Path]) -> None:
        with tarfile.open(tar, "w") as opened:
            for path in order:
                opened.add(path, path.name)
                opened.add(path.with_suffix(".txt"), f"{path.stem}.txt")

    write(pictures)
    first = scan(config(tar, resolutions=[64]), RULES, hash_cache=memory)
    with monkeypatch.context() as patched:
        patched.setattr(looks, "probe", None)
        patched.setattr(tarfile, "open", None)
        assert scan(config(tar, resolutions=[64]), RULES, hash_cache=memory) == first
    write(pictures[::-1])
    again = scan(config(tar, resolutions=[64]), RULES, hash_cache=memory)
    assert [sample.content for sample in again.samples] == [sample.content for sample in first.samples]
    assert again.samples != first.samples  # they lie elsewhere in it


def test_what_was_looked_at_before_a_stop_is_remembered(mixed: Path, tmp_path: Path):
    memory = tmp_path / "files.json"
    with pytest.raises(Stopped, match="enough"):
        scan(config(mixed), RULES, hash_cache=memory, stop=lambda: "enough")
    assert len(looks.FileMemory(memory).entries) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 0, "files": {}}', b'{"version": 1}', b"\xff\xff"])
def test_a_broken_memory_is_ignored_and_written_anew(mixed: Path, tmp_path: Path, content: bytes):
    memory = tmp_path / "files.json"
    expected = scan(config(mixed), RULES, hash_cache=memory)
    good = memory.read_bytes()
    memory.write_bytes(content)
    assert scan(config(mixed), RULES, hash_cache=memory) == expected
    assert memory.read_bytes() == good


def test_control_pictures_go_with_the_files_of_their_name(assets, mixed: Path, tmp_path: Path):
    folders = [tmp_path / "depth", tmp_path / "pose"]
    for folder, names in zip(folders, (("rocket.jpg", "chelsea.png"), ("camera.png", "horse.png")), strict=True):
        folder.mkdir()
        for target, source in zip(("astronaut", "coffee"), names, strict=True):
            shutil.copy(assets.images[source], folder / f"{target}{Path(source).suffix}")
    for name in ("bikes", "carphone_pristine"):
        (mixed / f"{name}.mp4").unlink()
        (mixed / f"{name}.txt").unlink()
    directory = DirectoryConfig(path=mixed, control_path=folders)
    astronaut, coffee = scan(config(directory), RULES, hash_cache=None).samples
    assert [control.file.path for control in astronaut.controls] == [folders[0] / "astronaut.jpg", folders[1] / "astronaut.png"]
    assert len({control.content for sample in (astronaut, coffee) for control in sample.controls}) == 4
    assert len(scan(config(DirectoryConfig(path=mixed, control_path=folders[0])), RULES, hash_cache=None).samples[0].controls) == 1

    (folders[1] / "coffee.png").unlink()
    missing = tmp_path / "nowhere"
    message = refusal(config(DirectoryConfig(path=mixed, control_path=[folders[1], missing])))
    assert f"{mixed / 'coffee.png'}: there is no control picture of that name in {folders[1]}; add coffee.png" in message
    assert f"control_path = '{missing}': the folder cannot be read" in message
