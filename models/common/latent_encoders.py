"""What VAEs and other frozen encoders of several families share."""

import gc
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from utils.data.encoders import ConditionEncoder
from utils.weights.named import WeightSource, materialise

MOST_TILE = 512
"""Pixels along each side of a tile of a VAE for pictures; those of the VAEs for clips have 256."""


class FrozenEncoder(ConditionEncoder):
    """An encoder that is one network, loaded whole to one device in one dtype, never under autocast.

    ``build`` makes the network on meta.  Modules named in ``keep_fp32`` stay in fp32 whatever the dtype is.
    """

    code_version: ClassVar[int] = 1
    """Raised when a change of the code changes the output."""

    def __init__(self, source: WeightSource, build: Callable[[], nn.Module], dtype: torch.dtype, keep_fp32: Sequence[str] = ()):
        self.source, self.dtype = source, dtype
        self._build, self._keep_fp32 = build, frozenset(keep_fp32)
        self._network: nn.Module | None = None

    def settings(self) -> dict[str, Any]:
        """What besides the weights and the dtype decides the output, as JSON values; goes into the fingerprint."""
        return {}

    def fingerprint(self) -> str:
        told = [self.name, self.code_version, str(self.dtype), self.source.fingerprint(), self.settings()]
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()

    def about(self) -> dict[str, Any]:
        told = {"dtype": str(self.dtype).removeprefix("torch."), "weights": self.source.fingerprint()}
        return {**super().about(), "code_version": self.code_version, **told, "settings": _public(self.settings())}

    def load(self, device: torch.device) -> None:
        network = self._build()
        for name, parameter in network.named_parameters():
            keep = not self._keep_fp32.isdisjoint(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if keep else self.dtype)
        left = materialise(network, self.source.names(), self.source, device=device)
        assert not left, f"{self.name}: no values for {left}"
        # What is not a weight (tables of positions) was made on the CPU.
        self._network = network.to(device).eval().requires_grad_(False)

    def unload(self) -> None:
        self._network = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def network(self) -> nn.Module:
        assert self._network is not None, f"{self.name} is used before load()"
        return self._network

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def _public(settings: Any) -> Any:
    """Without what configs have for the libraries' own use: ``_name_or_path`` and the like."""
    if isinstance(settings, dict):
        return {name: _public(value) for name, value in settings.items() if not str(name).startswith("_")}
    return [_public(value) for value in settings] if isinstance(settings, (list, tuple)) else settings


class LatentEncoder(FrozenEncoder):
    """A VAE: pixels to normalised latents and back."""

    def use_tiles(self, on: bool) -> bool:
        """diffusers' own tiles of the VAE, no larger than ``MOST_TILE``; its ``encode`` blends them into each other."""
        network = self.network
        network.use_tiling = on
        if on and getattr(network, "tile_sample_min_size", 0) > MOST_TILE:
            # As large as the pictures that the model is for, with which there would be one tile.
            scale = network.tile_sample_min_size // network.tile_latent_min_size
            network.tile_sample_min_size, network.tile_latent_min_size = MOST_TILE, MOST_TILE // scale
        return True

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [C, f, h, w] to pixels [3, F, H, W] in [-1, 1], both fp32; the result on the CPU."""


class ChannelScale:
    """Normalises latents per channel: (z - mean) / std, in fp32 and in the order of operations that diffusers' pipelines use."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._mean = torch.tensor(mean).view(-1, 1, 1, 1)
        self._inverse_std = 1.0 / torch.tensor(std).view(-1, 1, 1, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """[C, f, h, w] as the VAE makes them to fp32 with mean 0 and deviation 1."""
        return (latents.float() - self._mean.to(latents.device)) * self._inverse_std.to(latents.device)

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return latents.float() / self._inverse_std.to(latents.device) + self._mean.to(latents.device)
