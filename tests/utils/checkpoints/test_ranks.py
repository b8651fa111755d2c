"""Several processes save together, while they use their collectives for other things."""

import json
import re

import torch

from tests.distributed.harness import run_world
from tests.utils.checkpoints.runs import manager
from utils.checkpoints.checkpoint import Progress


def test_each_rank_writes_its_share_and_the_failure_of_one_costs_one_checkpoint(tmp_path):
    """Two stages of two replicas; the disk of the last rank is full at step 2."""
    run = tmp_path / "run"
    run.mkdir()
    run_world(["-m", "tests.utils.checkpoints.save_worker", run, "2"], 4, tmp_path)
    seen = [json.loads((run / f"seen-{rank}.json").read_text()) for rank in range(4)]
    assert all(rank["finished"] == ["step-00000001", None, "step-00000004"] for rank in seen)
    assert all(rank["ended"] == [] for rank in seen[1:]), "rank 0 tells"
    size = 2 * 1000 * 4 + 4 * 5 * 4
    one, two, three, four = seen[0]["ended"]
    assert (one, three, four) == ([1, True, [], size], [3, True, [], size], [4, True, [], size])
    assert two[1] is False
    [error] = two[2]
    assert re.fullmatch(r"rank 3 \(stage 1\): \[Errno 28\] No space left on device: '.*optimizer-001-001.safetensors'", error)

    checkpoints = manager(run)
    assert [checkpoint.named_step for checkpoint in checkpoints.all()] == [3, 4]
    assert checkpoints.leftovers() == []
    for checkpoint in checkpoints.all():
        step = checkpoint.named_step
        assert checkpoint.problems() == []
        assert checkpoint.progress == Progress(step)
        assert sorted(checkpoint.manifest["files"]) == [
            *(f"optimizer-{stage:03d}-{replica:03d}.safetensors" for stage in (0, 1) for replica in (0, 1)),
            "weights-000-000.safetensors",
            "weights-001-000.safetensors",
        ]
        places = [f"stage-{stage}.replica-{replica}" for stage in (0, 1) for replica in (0, 1)]
        tensors, scalars = checkpoint.optimizer(places)
        assert scalars == {place: {"step": step} for place in places}
        for rank, place in enumerate(places):
            assert torch.equal(tensors[f"{place}::exp_avg"], torch.full((5,), step + rank / 8))
        assert checkpoint.manifest["written_by"]["stages"] == 2
