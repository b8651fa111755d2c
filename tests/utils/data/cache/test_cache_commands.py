"""``python -m utils.data.cache``: what it tells and what it removes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.utils.data.encode_worker import Bytes, Pooling, samples_of
from utils.data.cache import DatasetCache
from utils.data.cache.__main__ import main

CPU = torch.device("cpu")


@pytest.fixture
def cache(mixed: Path, tmp_path: Path) -> Path:
    """Eight pictures and clips in four files of two, four captions in two."""
    folder = tmp_path / "cache"
    DatasetCache(folder, shard_items=2).build(samples_of(mixed), [Pooling(), Bytes()], device=CPU)
    return folder


def called(capsys, *arguments: object, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    out, error = capsys.readouterr()
    return error if code == 2 else out


def shards(folder: Path, encoder: str = "pooling") -> list[Path]:
    return sorted(folder.glob(f"{encoder}/*/*.safetensors"))


def flip_a_bit(file: Path) -> None:
    """In the values of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def aged(file: Path, days: float) -> Path:
    then = time.time() - 86400 * days
    os.utime(file, (then, then))
    return file


def test_ls(cache, capsys):
    [pooling] = {shard.parent for shard in shards(cache)}
    for index in pooling.glob("*-*.json"):
        aged(index, 3)
    said = called(capsys, "ls", cache)
    lines = {line.split("/")[0]: line for line in said.splitlines() if "/" in line}
    assert f"pooling/{pooling.name}  8      4 " in lines["pooling"]
    assert "3.0 days ago  Pooling  whole" in lines["pooling"]
    assert lines["bytes"].endswith("Bytes    whole")
    assert json.loads((pooling / "about.json").read_text()) == {"encoder": "pooling", "class": "Pooling"}
    shards(cache)[0].write_bytes(b"")
    shards(cache)[1].with_suffix(".json").unlink()
    said = called(capsys, "ls", cache)
    assert "4      3" in said
    assert "1 damaged, 1 without index" in said


def test_verify_reads_every_byte(cache, capsys, mixed):
    assert called(capsys, "verify", cache).count(": whole\n") == 2
    flip_a_bit(shards(cache)[2])
    # A quick look does not see it, and is not asked to.
    assert "damaged" not in called(capsys, "ls", cache)
    said = called(capsys, "verify", cache, code=1)
    assert "1 of 4 files DAMAGED" in said
    assert f"{shards(cache)[2]}: its bytes are not those that were written" in said
    assert "bytes/" in said.split("DAMAGED")[0]
    called(capsys, "prune", cache, "--read-all")
    assert len(shards(cache)) == 3
    assert DatasetCache(cache).build(samples_of(mixed), [Pooling()], device=CPU).encoders[0].encoded == 2
    called(capsys, "verify", cache)


def test_prune_removes_what_killed_runs_left_and_what_is_damaged(cache, capsys):
    folder = shards(cache)[0].parent
    old = folder / ".0-000000.safetensors.ab.tmp"
    young = folder / ".1-000000.safetensors.ab.tmp"
    for file, days in ((old, 1.1), (young, 0.5)):
        file.write_bytes(bytes(1000))
        aged(file, days)
    orphan, fresh, damaged, whole = shards(cache)
    orphan.with_suffix(".json").unlink()
    aged(orphan, 2)
    fresh.with_suffix(".json").unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    said = called(capsys, "prune", cache, "--dry-run")
    assert {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()} == before
    assert said.count("would be removed") == 3
    said = called(capsys, "prune", cache)
    gone = {old, orphan, damaged, damaged.with_suffix(".json")}
    assert before.keys() - {file for file in cache.rglob("*") if file.is_file()} == gone
    assert said.count("stays: it was changed within the last day") == 2
    assert "left by a process that was killed" in said
    assert "damaged: it has" in said
    assert whole.exists()


def test_prune_removes_what_was_not_used_for_long(cache, capsys, mixed):
    for index in [*cache.glob("pooling/*/*-*.json"), *cache.glob("bytes/*/*-*.json")]:
        aged(index, 40)
    # A run that uses them marks them, and those alone.
    DatasetCache(cache).build([sample for sample in samples_of(mixed) if "coffee" in sample.key], [Pooling()], device=CPU)
    used = [index for index in cache.glob("*/*/*-*.json") if time.time() - index.stat().st_mtime < 3600]
    assert 1 <= len(used) <= 2
    assert called(capsys, "prune", cache).splitlines() == ["freed: 0 bytes"]
    called(capsys, "prune", cache, "--unused-for", "30d")
    assert list(cache.glob("*/*/*-*.json")) == used
    assert {shard.with_suffix(".json") for shard in cache.glob("*/*/*.safetensors")} == set(used)
    assert not list(cache.glob("bytes/*"))  # nothing is left of it


def test_size(cache, capsys):
    (cache / "files.json").write_bytes(bytes(3000))
    lines = dict(line.rsplit("  ", 1) for line in called(capsys, "size", cache).splitlines())
    sizes = {name.strip(): value for name, value in lines.items()}
    assert sizes["other files"] == "3.0 kB"
    whole = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert sizes["all"] == f"{whole / 1e3:.1f} kB"


def test_what_is_no_cache_is_refused(tmp_path, capsys):
    assert "is not a folder; name the cache_dir" in called(capsys, "ls", tmp_path / "nothing", code=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("hello")
    assert "is not a cache of encoded data" in called(capsys, "prune", tmp_path / "other", code=2)
    weights = tmp_path / "models" / "wan" / "transformer" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(100))
    aged(weights, 100)
    assert "is not a cache of encoded data" in called(capsys, "prune", tmp_path / "models", "--unused-for", "1d", code=2)
    assert weights.exists()
    (tmp_path / "empty").mkdir()
    assert called(capsys, "ls", tmp_path / "empty") == "the cache is empty\n"
    with pytest.raises(SystemExit):
        main(["prune", str(tmp_path / "empty"), "--unused-for", "soon"])
    assert "'soon' is no time" in capsys.readouterr().err


def test_as_a_program(cache, process_environment):
    command = [sys.executable, "-m", "utils.data.cache", "verify", str(cache)]
    assert subprocess.run(command, env=process_environment, check=False, capture_output=True).returncode == 0
