"""Tiny models and a small real data set for whole runs, each made once."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import tomli_w

from models.tiny import variants
from tests.distributed.harness import ROOT, run_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """Folder of a tiny model by variant and layout, written once; the same weights in every layout."""

    @cache
    def write(variant: str, layout: str = "diffusers") -> Path:
        folder = tmp_path_factory.mktemp("tiny") / variant
        variants()[variant].write_tiny(variant, folder, layout, seed=1)
        return folder

    return write


@dataclass(frozen=True)
class Workspace:
    """Folder with a data set, a shared cache, and the runs of one test."""

    folder: Path
    dataset: Path
    cache: Path

    def config(self, name: str, model: Path, /, **changes) -> Path:
        """A main file for ``train.py``; ``changes`` replace keys, tables as a whole."""
        settings = {
            "output_dir": str(self.folder / "runs"),
            "dataset": str(self.dataset),
            "cache_dir": str(self.cache),
            "run_name": name,
            "max_steps": 8,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 0.05,
            "checkpoint_every_n_steps": 3,
            "model": {"type": "wan", "path": str(model), "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 6},
            "optimizer": {"type": "adamw", "lr": 1e-2},
            **changes,
        }
        path = self.folder / f"{name}.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in settings.items() if value is not None}))
        return path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(self, config: Path, *arguments: str | Path, processes: int = 1, expect: int = 0) -> str:
        """What ``train.py`` said."""
        return run_world(["train.py", "--config", config, *arguments], processes, self.folder, expect=expect)


@pytest.fixture(scope="session")
def clips(assets, tmp_path_factory) -> Path:
    """The demo's data set: short cuts of real footage and pictures, with captions."""
    assert assets.clips
    assert assets.images
    folder = tmp_path_factory.mktemp("data") / "clips"
    subprocess.run([sys.executable, ROOT / "launch" / "demo_data.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workspace(clips, shared_cache, tmp_path) -> Workspace:
    dataset = tmp_path / "dataset.toml"
    settings = {
        "resolutions": [48],
        "enable_ar_bucket": True,
        "num_ar_buckets": 3,
        "frame_buckets": [1, 5],
        "num_repeats": 2,
        "directory": [{"path": str(clips)}],
    }
    dataset.write_text(tomli_w.dumps(settings))
    return Workspace(tmp_path, dataset, shared_cache)


@pytest.fixture
def copied_clips(clips, tmp_path) -> Path:
    """A data set of its own, to be changed by the test."""
    return Path(shutil.copytree(clips, tmp_path / "clips"))
