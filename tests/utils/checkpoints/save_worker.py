"""One rank of a run that saves: ``python -m tests.utils.checkpoints.save_worker RUN STAGES``.  Each rank prints what it saw."""

import json
import sys
from pathlib import Path

import torch

from utils.checkpoints.checkpoint import Checkpoint, Progress
from utils.checkpoints.disk import Disk
from utils.checkpoints.manager import CheckpointManager
from utils.checkpoints.retention import Retention
from utils.topology import Topology


class DiskOfOneRank(Disk):
    """Full for as long as it is told to be."""

    full = False

    def sync(self, file) -> None:
        if self.full:
            raise OSError(28, "No space left on device", file.name)
        super().sync(file)


def own_state(topology: Topology, step: int) -> tuple[dict, dict]:
    """A weight for each stage, and a moment for each rank, as when optimizer state is spread over the replicas."""
    place = f"stage-{topology.stage}.replica-{topology.replica}"
    groups = {"optimizer": {f"{place}::exp_avg": torch.full((5,), step + topology.rank / 8)}}
    if topology.writes_weights:
        groups["weights"] = {f"stage-{topology.stage}": torch.full((1000,), float(step))}
    return groups, {"optimizer": {place: {"step": step}}}


def main() -> None:
    run, stages = Path(sys.argv[1]), int(sys.argv[2])
    topology = Topology.start(stages)
    disk = DiskOfOneRank()
    checkpoints = CheckpointManager(run, topology, Retention(last=2), disk)
    seen = []
    for step in (1, 2, 3, 4):
        disk.full = step == 2 and topology.rank == topology.world_size - 1
        groups, scalars = own_state(topology, step)
        checkpoints.save(Progress(step), groups, scalars, {"step": step})
        for tensors in groups.values():
            for tensor in tensors.values():
                tensor.zero_()
        topology.barrier()  # collectives of training, while the files are written
        if step != 3:
            path = checkpoints.finish()
            seen.append(path.name if path else None)
    topology.barrier()
    whole = Checkpoint(run / "checkpoints" / "step-00000004")
    weights = whole.weights([f"stage-{stage}" for stage in range(stages)])
    assert all(tensor.eq(4).all() for tensor in weights.values())
    ended = [[saved.step, saved.path is not None, saved.errors, saved.bytes] for saved in checkpoints.poll()]
    (run / f"seen-{topology.rank}.json").write_text(json.dumps({"finished": seen, "ended": ended}))
    topology.stop()


if __name__ == "__main__":
    main()
