"""The weights of several networks as those of one model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from utils.formats.adapter_files import AdapterFile
from utils.weights.named import NamedWeights
from utils.weights.tensor_files import TensorInfo


class JoinedWeights:
    """Each network's weights with its prefix before their names, read from its own files.

    ``uses``: whether the model has a weight of this name; what the files hold besides is left out.  Without it all are used.
    """

    def __init__(self, sources: Mapping[str, NamedWeights], uses: Callable[[str], bool] = lambda name: True):
        self._names: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[NamedWeights, str]] = {}
        for prefix, source in sources.items():
            for own, info in source.names().items():
                if uses(name := prefix + own):
                    self._names[name], self._places[name] = info, (source, own)

    def names(self) -> dict[str, TensorInfo]:
        return dict(self._names)

    def read(self, name: str) -> Tensor:
        source, own = self._places[name]
        return source.read(own)


class NetworkWeights:
    """One network's share of joined weights, by its own names: in the place of its files where something was merged into them."""

    def __init__(self, joined: NamedWeights, prefix: str, fingerprint: str):
        self._joined, self._prefix, self._fingerprint = joined, prefix, fingerprint

    def names(self) -> dict[str, TensorInfo]:
        names = self._joined.names().items()
        return {name.removeprefix(self._prefix): info for name, info in names if name.startswith(self._prefix)}

    def read(self, name: str) -> Tensor:
        return self._joined.read(self._prefix + name)

    def fingerprint(self) -> str:
        return self._fingerprint


def merged_fingerprint(fingerprint: str, merged: Sequence[tuple[AdapterFile, float]], prefix: str) -> str:
    """That of a network's weights with what adapters have for it; unchanged if they have nothing.

    ``prefix`` begins the names of its modules in the adapters.  Equal adapters in another order or spelling may give another one.
    """
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    found = False
    for file, strength in merged:
        for name in (name for name in file.weights if name.startswith(prefix)):
            digest.update(f"{file.kind} {strength} {name} ".encode())
            digest.update(file.weights[name].contiguous().view(-1).view(torch.uint8).numpy())
            found = True
        digest.update(repr([(module, scale) for module, scale in file.scales.items() if module.startswith(prefix)]).encode())
    return digest.hexdigest() if found else fingerprint
