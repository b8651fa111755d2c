"""An export of several files: all of them are there, or none."""

import pytest
import torch

from utils.errors import UserError
from utils.formats.run_exports import RunExporter, Under
from utils.topology import Topology
from utils.weights.named import save_safetensors

WEIGHTS = {"transformer.a": torch.ones(2), "transformer_2.a": torch.full((3,), 2.0)}
PARTS = {"_high_noise": "transformer.", "_low_noise": "transformer_2."}


@pytest.fixture
def exporter(tmp_path):
    """With a writer that writes both parts, or as many as ``exporter.limit`` says."""
    alone = Topology(0, 1, 1, torch.device("cpu"), {}, {}, None)

    def write(folder, name, weights, training):
        for count, (suffix, prefix) in enumerate(PARTS.items()):
            if count == made.limit:
                raise UserError("the disk is full")
            save_safetensors(
                folder / f"{name}{suffix}.safetensors", {k: v * training["factor"] for k, v in Under(prefix, weights).items()}
            )

    made = RunExporter(tmp_path / "exports", "run", alone, write)
    made.limit = len(PARTS)
    return made


def contents(exporter) -> dict[str, bytes]:
    return {
        path.relative_to(exporter.folder).as_posix(): path.read_bytes() for path in exporter.folder.rglob("*") if path.is_file()
    }


def test_both_files_or_none(exporter, caplog):
    exporter.limit = 1
    assert exporter.export("step-1", WEIGHTS, {"factor": 1}) is None
    assert "export step-1 was NOT written, training goes on: the disk is full" in caplog.text
    assert contents(exporter) == {}
    exporter.limit = 2
    assert exporter.export("step-1", WEIGHTS, {"factor": 1}) == exporter.folder / "step-1"
    whole = contents(exporter)
    assert sorted(whole) == ["step-1/run_high_noise.safetensors", "step-1/run_low_noise.safetensors"]

    # Written again, they are replaced, or left alone.
    exporter.limit = 1
    assert exporter.export("step-1", WEIGHTS, {"factor": 2}) is None
    assert contents(exporter) == whole
    exporter.limit = 2
    assert exporter.export("step-1", WEIGHTS, {"factor": 2})
    assert all(content != whole[name] for name, content in contents(exporter).items())


def test_what_a_killed_run_left_is_no_hindrance(exporter):
    left = exporter.folder / ".partial-step-1" / "step-1" / "run_high_noise.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert exporter.export("step-1", WEIGHTS, {"factor": 1})
    assert sorted(contents(exporter)) == ["step-1/run_high_noise.safetensors", "step-1/run_low_noise.safetensors"]


def test_the_names_under_a_prefix():
    asked = []

    class Lazy(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    part = Under("transformer.", Lazy(WEIGHTS))
    assert (list(part), len(part), asked) == (["a"], 1, [])
    assert torch.equal(part["a"], WEIGHTS["transformer.a"])
    assert asked == ["transformer.a"]
    assert dict(Under("", WEIGHTS)) == WEIGHTS
