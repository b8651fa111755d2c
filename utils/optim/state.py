"""An optimizer's state as tensors by name and values that JSON can hold, and back, exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError

_PLAIN = (type(None), bool, int, float, str)


def pack(value: Any, key: str, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """``value`` as JSON, with its tensors put into ``tensors`` under ``key`` (list entries under ``key.0``, ``key.1``, …).

    ``device`` is the parameter's: a tensor that the optimizer keeps on the host although the parameter is not there (a step
    counter) is marked, so that it comes back to the host.  Raises TypeError, naming the key, for what cannot be saved.
    """
    if isinstance(value, Tensor):
        tensors[key] = value.detach().contiguous()
        return {"tensor": key, "on_host": value.device.type == "cpu" and device.type != "cpu"}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{key}.{index}", tensors, device) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    # Subclasses (NumPy numbers, enums) would come back as something else.
    if type(value) in _PLAIN:
        return value
    raise TypeError(f"{key} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """What :func:`pack` was given, in tensors of its own.  Raises UserError for a tensor that is not there."""
    if isinstance(value, list):
        return [unpack(item, tensors, device) for item in value]
    if isinstance(value, dict) and "tuple" in value:
        return tuple(unpack(item, tensors, device) for item in value["tuple"])
    if isinstance(value, dict):
        if value["tensor"] not in tensors:
            raise UserError(f"the checkpoint has no tensor {value['tensor']!r} of the optimizer's state")
        return tensors[value["tensor"]].to("cpu" if value["on_host"] else device, copy=True)
    return value
