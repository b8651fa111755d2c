"""Real folders: what becomes a sample, what is reported, and what is refused."""

import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.files import DataFile
from utils.data.sources import scan
from utils.data.values import Bucket, SizeRules
from utils.errors import UserError

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


def test_many_problems_are_counted(tmp_path: Path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(50):
        (folder / f"{index:02}.txt").write_text("")
    lines = refusal(config(folder)).splitlines()
    assert (lines[0][:29], len(lines), lines[-1]) == ("the data set has 50 problems ", 42, "  - and 10 more")


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
