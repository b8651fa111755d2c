"""Ranks that wait for each other in a collective, which one of them leaves with an error.

python -m tests.distributed.watch_worker RANK
"""

import sys

import torch

from utils.metrics import setup_logging
from utils.stopping import FAILED, Stopper, leave
from utils.topology import Topology
from utils.watchdog import Watchdog


def main(failing: int) -> None:
    topology = Topology.start(stages=3)
    setup_logging(None, topology.rank)
    with Watchdog(topology, Stopper()) as watch:
        watch.phase = "step 7"
        if topology.rank == failing:
            raise RuntimeError("out of memory")
        # The others never come; with one failing the group is closed under the waiting ones, with errors of gloo's own.
        topology.sum_over_stages(torch.ones(1))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except RuntimeError:
        leave(FAILED)
