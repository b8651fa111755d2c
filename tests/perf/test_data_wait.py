"""How long training waits for its data, on the demo's clips and model, of which the encoded data are in the cache."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from tests.distributed.harness import ROOT, run_world
from tests.perf.test_perf import best_ratio

STEPS, WARM_UP = 40, 4


@pytest.fixture
def demo(assets, tmp_path: Path) -> Path:
    """The demo's main file, with everything it names below a folder of the test."""
    assert assets.clips
    assert assets.images
    subprocess.run([sys.executable, ROOT / "launch" / "demo_data.py", tmp_path / "clips"], check=True, capture_output=True)
    command = [sys.executable, "-m", "models.tiny", "wan-i2v", tmp_path / "model", "--layout", "released", "--seed", "0"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    data = tomllib.loads((ROOT / "configs/datasets/demo.toml").read_text())
    data["directory"] = [{"path": str(tmp_path / "clips")}]
    (tmp_path / "data.toml").write_text(tomli_w.dumps(data))
    run = tomllib.loads((ROOT / "configs/wan/demo_i2v.toml").read_text())
    run |= {"output_dir": str(tmp_path / "runs"), "dataset": str(tmp_path / "data.toml"), "resume": "never", "max_steps": STEPS}
    run |= {"checkpoint_every_n_steps": STEPS, "save_every_n_steps": STEPS, "cache_dir": str(tmp_path / "cache")}
    run["model"] |= {"path": str(tmp_path / "model")}
    (tmp_path / "run.toml").write_text(tomli_w.dumps(run))
    return tmp_path / "run.toml"


@pytest.mark.parametrize("stages", [1, 2])
def test_training_on_the_demo_hardly_waits_for_data(demo: Path, stages: int):
    """The time that the step waits for its micro-batches is below 2 % of the step: the sums over a run, but for its start."""
    attempts = 0

    def ratio() -> float:
        nonlocal attempts
        attempts += 1
        name = f"run-{stages}-{attempts}"
        run_world(
            ["train.py", "--config", demo, "--set", f"run_name='{name}'", "--set", f"pipeline_stages={stages}"],
            stages,
            demo.parent,
            timeout=900,
        )
        lines = map(json.loads, (demo.parent / "runs" / name / "metrics.jsonl").read_text().splitlines())
        steps = [line for line in lines if line["kind"] == "step"][WARM_UP:]
        assert len(steps) == STEPS - WARM_UP
        waited, took = (sum(step[key] for step in steps) for key in ("data_wait_seconds", "seconds"))
        mean = f"{took / len(steps):.3f} s a step, of them {waited / len(steps):.5f} s for data"
        print(f"\n{stages} stage(s): {mean}: {waited / took:.2%}")
        return waited / took

    assert best_ratio(ratio, 0.02) < 0.02
