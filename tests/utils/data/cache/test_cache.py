"""The cache on real clips and pictures, with small encoders: what is encoded when, and what survives kills and damage."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.utils.data.encode_worker import RULES, Bytes, Pooling, samples_of
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.cache import BuildReport, DatasetCache
from utils.data.cache.reading import CHANGED
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import load_pixels
from utils.data.sources.scan import scan
from utils.data.values import Sample
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")
# Two clips and two pictures at two resolutions; four captions.
NUM_PIXELS, NUM_CAPTIONS = 8, 4


def build(cache: DatasetCache, samples: list[Sample], encoders: list, **keys) -> BuildReport:
    return cache.build(samples, encoders, **{"device": CPU, "poll_seconds": 0.01} | keys)


def content(folder: Path, samples: list[Sample]) -> dict[str, dict[str, Tensor]]:
    cache = DatasetCache(folder)
    return {sample.key: cache.read(sample, [Pooling(), Bytes()]) for sample in samples}


def assert_same_content(one: dict[str, dict[str, Tensor]], other: dict[str, dict[str, Tensor]]) -> None:
    assert one.keys() == other.keys()
    for key, fields in one.items():
        assert fields.keys() == other[key].keys()
        assert all(torch.equal(tensor, other[key][name]) for name, tensor in fields.items()), key


def shards(folder: Path, encoder: str = "pooling") -> list[Path]:
    return sorted(folder.glob(f"{encoder}/*/*.safetensors"))


# ── what is encoded ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_encoded_once(mixed: Path, tmp_path: Path):
    samples, pooling, text = samples_of(mixed), Pooling(), Bytes()
    cache = DatasetCache(tmp_path / "cache")
    report = build(cache, samples, [pooling, text])
    assert report.complete
    assert report.lines() == [
        "pooling: 8 different inputs, 0 in the cache, 8 encoded here",
        "bytes: 4 different inputs, 0 in the cache, 4 encoded here",
    ]
    assert sorted(pooling.keys) == [sample.key for sample in samples]
    for sample in samples:
        fields = cache.read(sample, [pooling, text])
        pixels = load_pixels(sample.file, sample.bucket, sample.fps, sample.first_frame)
        assert torch.equal(fields["mean"], pixels.mean(dim=(1, 2, 3)))
        assert fields["latents"].dtype == torch.bfloat16
        assert fields["latents"].shape == (3, sample.bucket.frames, sample.bucket.height // 8, sample.bucket.width // 8)
        assert fields["text"].shape == (len(sample.caption.encode()), 6)

    again = [Pooling(), Bytes()]
    second = build(DatasetCache(tmp_path / "cache"), samples, again)
    assert [(part.found, part.encoded) for part in second.encoders] == [(NUM_PIXELS, 0), (NUM_CAPTIONS, 0)]
    assert [encoder.batches for encoder in again] == [[], []]


def test_one_changed_caption_is_one_caption_to_encode(mixed: Path, tmp_path: Path):
    build(DatasetCache(tmp_path / "cache"), samples_of(mixed), [Pooling(), Bytes()])
    (mixed / "coffee.txt").write_text("tea")
    pooling, text = Pooling(), Bytes()
    cache = DatasetCache(tmp_path / "cache")
    build(cache, samples_of(mixed), [pooling, text])
    assert (pooling.keys, text.keys) == ([], ["mixed/coffee.png@48x48x1"])
    changed = next(sample for sample in samples_of(mixed) if "coffee" in sample.key)
    assert len(cache.read(changed, [text])["text"]) == 3


def test_what_matters_to_pixels_is_in_their_key(mixed: Path, tmp_path: Path):
    cache = DatasetCache(tmp_path / "cache")

    def encoded(**keys) -> int:
        return build(cache, samples_of(mixed, resolutions=[64], **keys), [Pooling()]).encoders[0].encoded

    assert encoded() == 4
    assert encoded(frame_buckets=[1, 5]) == 2  # the clips are in another bucket
    assert encoded(fps=24.0) == 2
    assert encoded(video_clip_mode="single_middle") == 2
    assert encoded(caption_prefix="film, ", num_repeats=3) == 0
    shutil.move(mixed / "coffee.png", mixed / "cup.png")
    shutil.move(mixed / "coffee.txt", mixed / "cup.txt")
    assert encoded() == 0  # by content, not by name


def test_an_encoder_of_the_first_frame_gets_that_alone(mixed: Path, tmp_path: Path):
    class FirstFrame(Pooling):
        name = "first"
        max_frames = 1

        def outputs(self, items):
            assert all(item.pixels.shape[1] == 1 for item in items)
            return super().outputs(items)

    class WholeClip(Pooling):
        def outputs(self, items):
            return [{"whole": fields["latents"]} for fields in super().outputs(items)]

    samples, encoders = samples_of(mixed), [FirstFrame(), WholeClip()]
    cache = DatasetCache(tmp_path / "cache")
    build(cache, samples, encoders)
    assert any(sample.bucket.frames > 1 for sample in samples)
    for sample in samples:
        fields = cache.read(sample, encoders)
        assert torch.equal(fields["latents"], fields["whole"][:, :1])


def test_another_fingerprint_is_another_cache(mixed: Path, tmp_path: Path):
    cache, samples = DatasetCache(tmp_path / "cache"), samples_of(mixed)
    build(cache, samples, [Bytes()])
    new = Bytes(version=2)
    build(cache, samples, [new])
    assert len(new.keys) == NUM_CAPTIONS
    assert not torch.equal(cache.read(samples[0], [Bytes()])["text"], cache.read(samples[0], [new])["text"])


def test_batches_hold_one_shape(mixed: Path, tmp_path: Path):
    pooling, text = Pooling(), Bytes()
    samples = samples_of(mixed, resolutions=[64])
    build(DatasetCache(tmp_path / "batched"), samples, [pooling, text], batch_size=3)
    assert (pooling.batches, text.batches) == ([2, 2], [3, 1])
    build(DatasetCache(tmp_path / "single"), samples, [Pooling(), Bytes()])
    assert_same_content(content(tmp_path / "batched", samples), content(tmp_path / "single", samples))


# ── kills and damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("damage", ["cut", "header", "gone", "index"])
def test_a_damaged_shard_is_named_and_encoded_again(mixed: Path, tmp_path: Path, caplog, damage: str):
    samples, folder = samples_of(mixed), tmp_path / "cache"
    build(DatasetCache(folder, shard_items=2), samples, [Pooling(), Bytes()])
    expected = content(folder, samples)
    shard = shards(folder)[1]
    data = shard.read_bytes()
    damages = {
        "cut": lambda: shard.write_bytes(data[:-100]),
        "header": lambda: shard.write_bytes(bytes(8) + data[8:]),
        "gone": shard.unlink,
        "index": lambda: shard.with_suffix(".json").write_bytes(b"{"),
    }
    damages[damage]()
    with caplog.at_level(logging.WARNING):
        report = build(DatasetCache(folder), samples, [Pooling(), Bytes()])
    assert [(part.found, part.encoded) for part in report.encoders] == [(6, 2), (4, 0)]
    assert [message.split(" is damaged")[0] for message in caplog.messages] == [str(shard)]
    assert_same_content(content(folder, samples), expected)


def test_a_shard_without_index_is_not_believed(mixed: Path, tmp_path: Path):
    samples, folder = samples_of(mixed), tmp_path / "cache"
    build(DatasetCache(folder, shard_items=2), samples, [Pooling()])
    shards(folder)[0].with_suffix(".json").unlink()
    assert build(DatasetCache(folder), samples, [Pooling()]).encoders[0].found == 6


BROKEN = 'these files cannot be encoded; repair or remove them, or set on_bad_sample = "skip":'


def test_files_that_do_not_decode_are_all_named_and_the_rest_is_kept(mixed: Path, tmp_path: Path):
    samples = samples_of(mixed)
    for name in ("bikes.mp4", "coffee.png"):
        data = (mixed / name).read_bytes()
        (mixed / name).write_bytes(data[: len(data) // 3])
    samples = [replace(sample, content=content_of(sample.file)) for sample in samples]
    with pytest.raises(UserError) as raised:
        build(DatasetCache(tmp_path / "cache"), samples, [Pooling(), Bytes()])
    lines = str(raised.value).splitlines()
    assert lines[0] == BROKEN
    assert [line.split(": it does not decode")[0] for line in lines[1:]] == [f"  - {mixed}/bikes.mp4", f"  - {mixed}/coffee.png"]
    whole = [sample for sample in samples if "astronaut" in sample.key or "carphone" in sample.key]
    report = build(DatasetCache(tmp_path / "cache"), whole, [Pooling(), Bytes()])
    assert [(part.total, part.found) for part in report.encoders] == [(4, 4), (2, 2)]


def test_files_that_change_or_vanish_meanwhile_are_named_or_left_out(mixed: Path, tmp_path: Path):
    """Before they are read, while they are decoded, or both."""

    class Meddler(Pooling):
        """Changes the folder when it gets its first items: the second of the two sizes of each file is read later."""

        def load(self, device):
            super().load(device)
            shutil.copy(mixed / "coffee.png", mixed / "astronaut.png")
            (mixed / "bikes.mp4").unlink()

    samples = samples_of(mixed, resolutions=[64, 48, 32, 96, 80, 112])
    pooling = Meddler()
    report = build(DatasetCache(tmp_path / "cache"), samples, [pooling], on_bad_sample="skip")
    assert report.complete
    reasons = {
        "astronaut": f"{mixed}/astronaut.png: {CHANGED}",
        "bikes": f"{mixed}/bikes.mp4: it cannot be read any more (No such file or directory)",
    }
    assert report.unusable
    for sample, reason in report.unusable.items():
        assert reason == reasons[sample.key.split("/")[1].split(".")[0]]
    assert {sample.key for sample in samples} == {*pooling.keys, *(sample.key for sample in report.unusable)}
    cache = DatasetCache(tmp_path / "cache")
    for sample in samples:
        if sample not in report.unusable:
            cache.read(sample, [pooling])
        else:
            with pytest.raises(UserError, match="does not hold"):
                cache.read(sample, [pooling])
    with pytest.raises(UserError) as raised:
        build(cache, samples, [Pooling()])
    assert str(raised.value).splitlines() == [BROKEN, *(f"  - {reason}" for reason in reasons.values())]


def test_a_failing_encoder_keeps_what_it_made(mixed: Path, tmp_path: Path):
    class Failing(Pooling):
        def outputs(self, items):
            if len(self.keys) > 3:
                raise RuntimeError("out of memory")
            return super().outputs(items)

    failing, samples = Failing(), samples_of(mixed)
    with pytest.raises(RuntimeError, match="out of memory"):
        build(DatasetCache(tmp_path / "cache"), samples, [failing])
    assert failing.loaded == 0
    assert build(DatasetCache(tmp_path / "cache"), samples, [Pooling()]).encoders[0].found == 3


def test_a_cache_that_cannot_be_written(mixed: Path, tmp_path: Path):
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with pytest.raises(UserError, match=r"the cache cannot be written: .*cache_dir"):
        build(DatasetCache(tmp_path / "cache"), samples_of(mixed), [Bytes()])


def test_a_build_can_be_stopped(mixed: Path, tmp_path: Path):
    pooling, samples = Pooling(), samples_of(mixed)
    report = build(DatasetCache(tmp_path / "cache"), samples, [pooling, Bytes()], stop=lambda: len(pooling.keys) >= 3)
    assert not report.complete
    assert [part.encoded for part in report.encoders] == [3, 0]
    assert build(DatasetCache(tmp_path / "cache"), samples, [Pooling()]).encoders[0].found == 3


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_threads_read_the_same(mixed: Path, tmp_path: Path):
    samples, encoders = samples_of(mixed), [Pooling(), Bytes()]
    cache = DatasetCache(tmp_path / "cache", shard_items=1)
    build(cache, samples, encoders)
    expected = content(tmp_path / "cache", samples)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda sample: (sample.key, cache.read(sample, encoders)), samples * 20))
    for key, fields in found:
        assert_same_content({key: fields}, {key: expected[key]})


def test_what_the_cache_has_lost_is_named(mixed: Path, tmp_path: Path):
    samples, encoders, folder = samples_of(mixed), [Pooling(), Bytes()], tmp_path / "cache"
    with pytest.raises(UserError, match=r"mixed/astronaut\.png@48x48x1: .* does not hold what pooling makes of it; start again"):
        DatasetCache(folder).read(samples[0], encoders)
    cache = DatasetCache(folder)
    build(cache, samples, encoders)
    shards(folder)[0].unlink()
    with pytest.raises(UserError, match=r"pooling/.*\.safetensors cannot be read any more .*start again"):
        cache.read(samples[0], encoders)
    with pytest.raises(UserError, match=r"does not hold what pooling makes of it"):
        DatasetCache(folder).read(samples[0], encoders)


class WithControls(Bytes):
    """Looks at the control pictures and reads the caption."""

    name = "edit"
    reads = "caption and controls"

    def outputs(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        fields = super().outputs(items)
        means = [torch.stack([control.mean((1, 2, 3)) for control in item.controls]) for item in items]
        return [{**field, "controls": mean} for field, mean in zip(fields, means, strict=True)]


def test_controls_are_decoded_at_the_size_of_the_sample_and_are_in_the_key(assets, mixed: Path, tmp_path: Path):
    folder = tmp_path / "controls"
    folder.mkdir()
    for name in ("astronaut", "coffee", "bikes", "carphone_pristine"):
        shutil.copy(assets.images["rocket.jpg"], folder / f"{name}.jpg")
    cache, encoder = DatasetCache(tmp_path / "cache"), WithControls()

    def encoded() -> tuple[int, Sample]:
        directory = DirectoryConfig(path=mixed, control_path=folder)
        dataset = DatasetConfig(resolutions=[64], frame_buckets=[1, 9], directory=[directory])
        samples = scan(dataset, RULES, hash_cache=None).samples
        return build(cache, samples, [encoder]).encoders[0].encoded, samples[0]

    number, astronaut = encoded()
    assert number == 4
    pixels = load_pixels(DataFile(folder / "astronaut.jpg"), replace(astronaut.bucket, frames=1))
    assert torch.equal(cache.read(astronaut, [encoder])["controls"][0], pixels.mean((1, 2, 3)))
    (folder / "coffee.jpg").unlink()
    shutil.copy(assets.images["chelsea.png"], folder / "coffee.png")
    assert encoded()[0] == 1
    (mixed / "bikes.txt").write_text("something else")
    assert encoded()[0] == 1
