"""Small real encoders for the cache's tests, and a process that encodes a folder with them.

    python -m tests.utils.data.encode_worker DATA CACHE --out FOLDER        as one rank of a run, or alone

Writes ``rank-N.json`` with what became of the build.  With ``--die-after ITEMS`` the process kills itself, as ``kill -9`` would,
before the next item.
"""

import argparse
import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.cache import DatasetCache
from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.sources.scan import scan
from utils.data.values import Sample, SizeRules
from utils.errors import UserError
from utils.topology import Topology

RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)


class Counted(ConditionEncoder):
    """Remembers what it was asked to encode."""

    def __init__(self, version: int = 1, die_after: int | None = None):
        self.version, self.die_after = version, die_after
        self.keys: list[str] = []
        self.batches: list[int] = []
        self.loaded = 0

    def fingerprint(self) -> str:
        return f"{self.name} version {self.version}"

    def load(self, device: torch.device) -> None:
        self.loaded += 1

    def unload(self) -> None:
        self.loaded -= 1

    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        assert self.loaded == 1
        if self.die_after is not None and len(self.keys) >= self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.keys += [item.key for item in items]
        self.batches.append(len(items))
        return self.outputs(items)

    def outputs(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        raise NotImplementedError


class Pooling(Counted):
    """The means of 8 x 8 patches of each frame, and of the whole: views of the batch's tensors, in bf16 and fp32."""

    name = "pooling"
    reads = "pixels"

    def outputs(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        pixels = torch.stack([item.pixels for item in items])
        pooled = functional.avg_pool3d(pixels, (1, 8, 8)).to(torch.bfloat16)
        means = pixels.mean(dim=(2, 3, 4))
        return [{"latents": pooled[index], "mean": means[index]} for index in range(len(items))]


class Bytes(Counted):
    """A caption's bytes, looked up in a fixed table: as many rows as the caption is long."""

    name = "bytes"
    reads = "caption"

    def outputs(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        table = torch.randn(256, 6, generator=torch.Generator().manual_seed(self.version))
        return [{"text": table[torch.tensor([*item.caption.encode()], dtype=torch.long)]} for item in items]


def samples_of(*folders: Path, **keys) -> list[Sample]:
    settings = {"resolutions": [64, 48], "frame_buckets": [1, 9]} | keys
    dataset = DatasetConfig(**settings, directory=[DirectoryConfig(path=folder) for folder in folders])
    return scan(dataset, RULES, hash_cache=None).samples


class Tardy(Pooling):
    """Takes its time for each item."""

    def __init__(self, seconds: float, **keys):
        super().__init__(**keys)
        self.seconds = seconds

    def outputs(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        time.sleep(self.seconds * len(items))
        return super().outputs(items)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--slow", type=float, nargs="*", default=[], metavar="SECONDS", help="of each rank, for each item")
    parser.add_argument("--resolutions", type=int, nargs="*", default=[64, 48])
    parser.add_argument("--die-after", type=int)
    parser.add_argument("--vanish", metavar="FILE", help="rank 0 removes it when all ranks know the samples")
    parser.add_argument("--skip", action="store_true")
    arguments = parser.parse_args()
    topology = Topology.start(1)
    samples = samples_of(arguments.data, resolutions=arguments.resolutions)
    seconds = arguments.slow[topology.rank] if arguments.slow else 0.0
    encoders = [Tardy(seconds, die_after=arguments.die_after), Bytes()]
    topology.barrier()
    if arguments.vanish and topology.is_main:
        (arguments.data / arguments.vanish).unlink()
    told = {}
    try:
        report = DatasetCache(arguments.cache, shard_items=2).build(
            samples,
            encoders,
            device=torch.device("cpu"),
            topology=topology,
            on_bad_sample="skip" if arguments.skip else "stop",
            poll_seconds=0.05,
        )
        told |= {"encoders": list(map(asdict, report.encoders)), "complete": report.complete}
        told["unusable"] = {sample.key: reason for sample, reason in report.unusable.items()}
    except UserError as error:
        told |= {"error": str(error), "everywhere": error.everywhere}
    told["encoded"] = [encoder.keys for encoder in encoders]
    (arguments.out / f"rank-{topology.rank}.json").write_text(json.dumps(told))
    topology.stop()


if __name__ == "__main__":
    main()
