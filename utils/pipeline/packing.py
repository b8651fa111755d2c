"""A stage boundary carries one float tensor.

DeepSpeed runs one backward per float tensor that crosses a boundary, and each of them must get a gradient.  So everything of the
stream that needs a gradient goes into one flat float tensor, everything that does not into one byte tensor, and what is needed to
take them apart into one small header.  Nothing is rounded: when the wires have different dtypes they are widened to fp32 and
narrowed back after the boundary.
"""

import json
import math

import torch
from torch import Tensor

from utils.pipeline.layer import Stream

# Byte offsets are multiples of this, so that each part can be viewed as its own dtype.
_ALIGNMENT = 16
# Small integer tensors on the CPU (grid sizes) travel as numbers in the header: reading them needs no copy from the device.
_MAX_HEADER_NUMBERS = 64


def _is_geometry(tensor: Tensor) -> bool:
    return tensor.dtype is torch.int64 and tensor.device.type == "cpu" and tensor.numel() <= _MAX_HEADER_NUMBERS


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def pack(stream: Stream, device: torch.device) -> tuple[Tensor, ...]:
    """The stream as ``(floats?, bytes?, header)``; floats first, because DeepSpeed counts gradients by position.

    ``floats`` is there if something needs a gradient, ``bytes`` if something does not.
    """
    gradient_wires: list[Tensor] = []
    byte_wires: list[Tensor] = []
    header = []
    for name, tensor in stream.items():
        entry: dict[str, object] = {"name": name, "shape": list(tensor.shape), "dtype": _dtype_name(tensor)}
        if _is_geometry(tensor):
            entry["numbers"] = tensor.reshape(-1).tolist()
        elif tensor.requires_grad:
            entry["gradient"] = True
            gradient_wires.append(tensor)
        else:
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            byte_wires.append(torch.nn.functional.pad(raw, (0, -raw.numel() % _ALIGNMENT)))
        header.append(entry)

    packed = []
    if gradient_wires:
        dtypes = {tensor.dtype for tensor in gradient_wires}
        wire_dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        packed.append(torch.cat([tensor.reshape(-1).to(wire_dtype) for tensor in gradient_wires]))
    if byte_wires:
        packed.append(torch.cat(byte_wires))
    text = json.dumps(header, separators=(",", ":")).encode()
    packed.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device))
    return tuple(packed)


def unpack(packed: tuple[Tensor, ...]) -> Stream:
    """The stream that :func:`pack` was given, with gradients flowing back to the flat float tensor."""
    *parts, header_tensor = packed
    header = json.loads(header_tensor.cpu().numpy().tobytes())
    floats = parts.pop(0) if parts and parts[0].is_floating_point() else None
    raw = parts.pop(0) if parts else None
    stream = Stream()
    float_offset = byte_offset = 0
    for entry in header:
        shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
        numel = math.prod(shape)
        if "numbers" in entry:
            tensor = torch.tensor(entry["numbers"], dtype=dtype).reshape(shape)
        elif entry.get("gradient"):
            assert floats is not None, "the header names a gradient wire, but no float tensor came"
            tensor = floats[float_offset : float_offset + numel].view(shape).to(dtype)
            float_offset += numel
        else:
            assert raw is not None, "the header names a byte wire, but no byte tensor came"
            size = numel * dtype.itemsize
            tensor = raw[byte_offset : byte_offset + size].view(dtype).view(shape)
            byte_offset += size + (-size % _ALIGNMENT)
        stream[entry["name"]] = tensor
    return stream
