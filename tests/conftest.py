"""What all tests share: real data, the record of what they measure, the skip of GPU tests, the environment of processes."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

import assets as assets_module

ROOT = Path(__file__).resolve().parents[1]

# Set by launchers; a test that is itself run under one must not be taken for one of its ranks.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Assets:
    """Real data as ``launch/assets.py`` fetches it.  Asking for a part that could not be had skips the test with the reason."""

    folder: Path
    missing: dict[str, str]
    """``clips``, ``images``, ``tokenizers``, … -> why it is not there."""

    def _files(self, what: str) -> dict[str, Path]:
        if what in self.missing:
            pytest.skip(f"{what}: {self.missing[what]}")
        return {path.name: path for path in assets_module.PACKAGES[what].targets(self.folder).values()}

    @property
    def clips(self) -> dict[str, Path]:
        """``bikes.mp4`` (640x272, 250 frames, 25 fps), ``bigbuckbunny.mp4``, ``carphone_pristine.mp4``, … by name."""
        return self._files("clips")

    @property
    def images(self) -> dict[str, Path]:
        """``astronaut.png`` (512x512), ``camera.png`` (grey), ``horse.png`` (with alpha), ``rocket.jpg``, … by name."""
        return self._files("images")

    @property
    def umt5_tokenizer(self) -> Path:
        """The folder of Wan's real tokenizer, for ``AutoTokenizer.from_pretrained``."""
        return self._files("tokenizers")["tokenizer.json"].parent

    @property
    def clip_tokenizer(self) -> Path:
        """The folder of CLIP-L's real tokenizer."""
        return self._files("clip_tokenizer")["vocab.json"].parent

    @property
    def t5_tokenizer(self) -> Path:
        """The folder of T5's real tokenizer, as ``tokenizer.json`` and as ``spiece.model``."""
        return self._files("t5_tokenizer")["tokenizer.json"].parent

    @property
    def qwen_tokenizer(self) -> Path:
        """The folder of Qwen 2.5's real tokenizer, as ``tokenizer.json``."""
        return self._files("qwen_tokenizer")["tokenizer.json"].parent


@pytest.fixture(scope="session")
def assets() -> Assets:
    return Assets(assets_module.DEFAULT_FOLDER, assets_module.fetch())


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """For processes that a test starts: our imports, one thread each, no launcher's variables, nothing from the network."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES and not name.startswith("SLURM_")
    }
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return inherited | accelerator | ours


@pytest.fixture
def measured(request) -> Callable[[str, str, float], None]:
    """``measured(variant, quantity, value)`` keeps a number that a test holds against its limit; of several the largest.

    With ``--record FILE`` they are written down; ``tests/measure.py`` names the quantities and makes a table of them.
    """

    def keep(variant: str, quantity: str, value: float) -> None:
        request.node.user_properties.append((MEASURED, (variant, quantity, float(value))))

    return keep


MEASURED = "measured"


class Record:
    """What the tests measured, collected where their reports come together."""

    def __init__(self, file: Path):
        self.file = file
        self.values: dict[str, dict[str, float]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "teardown" else ():
            if name == MEASURED:
                variant, quantity, number = value
                kept = self.values.setdefault(variant, {})
                kept[quantity] = max(number, kept.get(quantity, 0.0))

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.values, indent=2, sort_keys=True) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write what the tests measure to this JSON file")


# How long an example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--record")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(file), "record")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if ROOT / "tests" / "perf" in item.path.parents:
            item.add_marker(pytest.mark.slow)  # benchmarks: only with launch/test --all
