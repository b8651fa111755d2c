"""ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054): the optimizer's state is spread over the replicas of a stage.

All replicas have the whole gradient, as without it.  Each steps the parameters that it owns, for which alone it keeps moments and
fp32 copies, and sends the new values to the others: so the weights have the same bits as without it.
"""

from collections.abc import Mapping

from torch import Tensor

from utils.topology import Topology


def divide(sizes: Mapping[str, int], replicas: int) -> list[list[str]]:
    """The names that each replica owns: the largest first, each to the replica that has least.  It depends on nothing else."""
    owned: list[list[str]] = [[] for _ in range(replicas)]
    filled = [0] * replicas
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        replica = filled.index(min(filled))
        owned[replica].append(name)
        filled[replica] += sizes[name]
    return owned


class ReplicaShares:
    """Which replica of this stage owns which of the stage's trainable parameters."""

    def __init__(self, parameters: Mapping[str, Tensor], topology: Topology):
        self._parameters, self._topology = dict(parameters), topology
        self._by_replica = divide({name: parameter.numel() for name, parameter in parameters.items()}, topology.replicas)
        self.owned = frozenset(self._by_replica[topology.replica])
        """Names of the parameters that this replica owns."""

    def send(self) -> None:
        """The owners' values to all replicas; collective among them."""
        for replica, names in enumerate(self._by_replica):
            self._topology.copy_to_replicas([self._parameters[name].data for name in names], source=replica)
