"""The copy of a checkpoint's tensors in host memory, for which training stands still, laid out as the files that are written."""

import itertools
import logging
import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from utils.weights.named import bytes_of, safetensors_header

log = logging.getLogger(__name__)

ALIGNMENT = 64
# Of the memory that the system calls available, so much is left to others.
SPARE = 0.1
# Of tensors in host memory: one thread does not use all of the memory's bandwidth.
COPY_THREADS = 2


FileContent = Iterable[bytes | memoryview]
"""What a file is to hold, to be gone through once."""


def live_contents(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileContent]:
    """A safetensors file for each kind, straight from its tensors: they may not change until it is written."""
    return {kind: _live_content(tensors) for kind, tensors in groups.items()}


def _live_content(tensors: Mapping[str, Tensor]) -> FileContent:
    names, header = safetensors_header(tensors, {})
    return itertools.chain([header], (bytes_of(tensors[name]) for name in names))


class HostCopy:
    """Host memory that is kept from one checkpoint to the next: getting pages from the system takes longer than filling them.

    For tensors on a GPU it is page-locked, so that all copies are in flight together, at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def growth(self, groups: Mapping[str, Mapping[str, Tensor]]) -> int:
        """Bytes of memory that :meth:`make_room` would have to get from the system."""
        needed = _total(groups)
        return needed if needed > len(self._memory) else 0

    def make_room(self, groups: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Get memory for the groups; whether there was any."""
        size = self.growth(groups)
        self._release()
        try:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return False
        with suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)  # a small page at a time, the system would take as long as the copy
        self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        if _gpus(groups):
            # Not torch's own: that rounds sizes up to a power of two and never gives memory back.
            code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self._locked = int(code) == 0
            if not self._locked:
                log.warning("host memory could not be page-locked (%s): checkpoints hold up training longer", code)
        return True

    def take(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileContent]:
        """A safetensors file for each kind, with the values that the tensors have now.  There must be room.

        The contents stand until the next call.
        """
        contents: dict[str, FileContent] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        start = 0
        for kind, tensors in groups.items():
            names, header = safetensors_header(tensors, {})
            offset = start
            for name in names:
                tensor = tensors[name].detach()
                place = self._memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies.append((place, tensor))
                offset += tensor.nbytes
            contents[kind] = (header, memoryview(self._memory[start:offset].numpy()))
            start = _aligned(offset)
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            # From a GPU the copies only begin here, and are in flight together.
            done = [pool.submit(place.copy_, tensor) for place, tensor in copies if not tensor.is_cuda]
            for place, tensor in copies:
                if tensor.is_cuda:
                    place.copy_(tensor, non_blocking=True)
            for copy in done:
                copy.result()
        for device in _gpus(groups):
            torch.cuda.current_stream(device).synchronize()
        return contents

    def _release(self) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._locked = torch.empty(0, dtype=torch.uint8), False


def _gpus(groups: Mapping[str, Mapping[str, Tensor]]) -> set[torch.device]:
    return {tensor.device for tensors in groups.values() for tensor in tensors.values() if tensor.is_cuda}


def _total(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(_aligned(sum(tensor.nbytes for tensor in tensors.values())) for tensors in groups.values())


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def available_host_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its control group (a Slurm job's or a container's limit)."""
    found = [int(line.split()[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if line.startswith("MemAvailable:")]
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):  # version 2
            inner = Path("/sys/fs/cgroup") / line.removeprefix("0::").strip("/")
            found += [free for group in (inner, *inner.parents) if (free := _free_in_group(group)) is not None]
    return int(min(found, default=2**63) * (1 - SPARE))


def _free_in_group(group: Path) -> int | None:
    limit = "".join(_lines(group / "memory.max"))
    if not limit.isdigit():  # "max", or no such group
        return None
    used = int("".join(_lines(group / "memory.current")))
    # Pages of files that were read or written can be had back.
    cached = [int(line.split()[1]) for line in _lines(group / "memory.stat") if line.startswith("inactive_file ")]
    return int(limit) - used + sum(cached)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
