"""Several ranks that encode one data set: each item once, nobody waits for a slow rank, and all know what was broken."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tomli_w
import torch

from tests.distributed.harness import run_world, world
from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.cache import DatasetCache
from utils.stopping import USER_ERROR

WORKER = ["-m", "tests.utils.data.encode_worker"]
RESOLUTIONS = [32, 48, 64, 80, 96, 112, 128, 144, 160]


def reports(folder: Path, ranks: int) -> list[dict]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_whoever_is_free_takes_the_next_piece(copied_clips, tmp_path):
    slow = [0.01, 0.6, 0.01]  # seconds for an item; the second rank is as slow as one with other clips might be
    run_world(
        [*WORKER, copied_clips, tmp_path / "cache", "--out", tmp_path, "--slow", *slow, "--resolutions", *RESOLUTIONS], 3, tmp_path
    )
    told = reports(tmp_path, 3)
    samples = samples_of(copied_clips, resolutions=RESOLUTIONS)
    counts = [len(report["encoded"][0]) for report in told]
    assert max(counts) - min(counts) > len(samples) / 6
    assert min(counts) == counts[1]
    # Each item once, although a rank asks for the next piece while it has one.
    assert Counter(key for report in told for key in report["encoded"][0]) == Counter(sample.key for sample in samples)
    texts = {sample.caption for sample in samples}
    assert sum(len(report["encoded"][1]) for report in told) == len(texts)
    for report in told:
        assert report["complete"]
        assert [(part["total"], part["found"]) for part in report["encoders"]] == [(len(samples), 0), (len(texts), 0)]
    # As one process makes it.
    encoders = [Pooling(), Bytes()]
    shared, alone = DatasetCache(tmp_path / "cache"), DatasetCache(tmp_path / "alone")
    assert shared.build(samples, [Pooling(), Bytes()], device=torch.device("cpu")).encoders[0].encoded == 0
    alone.build(samples, encoders, device=torch.device("cpu"))
    for sample in samples:
        expected = alone.read(sample, encoders)
        assert {name: value.tolist() for name, value in shared.read(sample, encoders).items()} == {
            name: value.tolist() for name, value in expected.items()
        }


@pytest.mark.parametrize("skip", [True, False])
def test_all_ranks_know_what_is_broken(copied_clips, tmp_path, skip):
    samples = samples_of(copied_clips)
    victim = samples[0].file.name
    arguments = [copied_clips, tmp_path / "cache", "--out", tmp_path, "--vanish", victim, *(["--skip"] if skip else [])]
    run_world([*WORKER, *arguments], 2, tmp_path)
    first, second = reports(tmp_path, 2)
    reason = f"{samples[0].file}: it cannot be read any more (No such file or directory)"
    lost = [sample.key for sample in samples if sample.file.name == victim]
    if skip:
        assert first["unusable"] == second["unusable"] == dict.fromkeys(lost, reason)
        assert first["complete"]
        assert second["complete"]
    else:
        assert first["error"] == second["error"]
        assert first["error"].splitlines()[1:] == [f"  - {reason}"]
        assert first["everywhere"]
    encoded = Counter(key for report in (first, second) for key in report["encoded"][0])
    assert encoded == Counter(sample.key for sample in samples if sample.key not in lost)


def test_a_rank_that_dies_leaves_what_it_made(copied_clips, tmp_path):
    """Killed in the middle, and the others with it, as the watchdog does; then continued by another number of ranks."""
    arguments = [copied_clips, tmp_path / "cache", "--out", tmp_path, "--slow", 0.05, 0.05]
    with world([*WORKER, *arguments, "--die-after", 3], 2, tmp_path) as running:
        running.wait_until(lambda: any(process.poll() is not None for process in running.processes))
        running.kill()
    run_world([*WORKER, *arguments], 1, tmp_path)
    [report] = reports(tmp_path, 1)
    # Shards of two: of three that were encoded, two were written.
    assert report["encoders"][0]["found"] >= 2
    assert report["encoders"][0]["found"] + report["encoders"][0]["encoded"] == report["encoders"][0]["total"]


def damaged(clip: Path) -> None:
    """Its frames are where they were, and the first ones are whole; the later ones are noise."""
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    noise = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    data[start + length // 3 : start + length] = noise[length // 3 :]
    clip.write_bytes(data)


def test_a_run_trains_without_what_cannot_be_encoded_only_if_it_is_told_to(workspace, tiny, copied_clips):
    clip = sorted(copied_clips.glob("*.mp4"))[0]
    damaged(clip)
    config = workspace.config("skips", tiny("wan-t2v"), pipeline_stages=2, max_steps=1, gradient_accumulation_steps=2)

    def dataset(**keys) -> None:
        directory = {"path": str(copied_clips)}
        settings = {"resolutions": [48], "frame_buckets": [1, 5], "video_clip_mode": "single_middle", **keys}
        workspace.dataset.write_text(tomli_w.dumps({**settings, "directory": [directory]}))

    dataset()
    said = workspace.train(config, processes=2, expect=USER_ERROR)
    assert 'these files cannot be encoded; repair or remove them, or set on_bad_sample = "skip":\n' in said
    assert f"  - {clip}: " in said
    assert said.count("these files cannot be encoded") == 1  # rank 0 tells it for all
    dataset(on_bad_sample="skip")
    said = workspace.train(config, processes=2)
    assert f"training data: {copied_clips.name}/{clip.name}@48x48x5 is left out: {clip}: " in said
    assert "finished: 1 steps" in said
