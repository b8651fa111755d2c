"""Dtypes, autocast and activation checkpointing of a run, as one frozen value."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RuntimePolicy:
    """How the layers compute."""

    device: torch.device
    dtype: torch.dtype
    activation_checkpointing: bool = False

    def autocast(self) -> AbstractContextManager:
        """A reusable context for the layers' forward.  In fp32 there is nothing to cast."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
