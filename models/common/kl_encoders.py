"""The convolutional VAE of SDXL, SD3 and FLUX.1 as encoders whose outputs are cached."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from models.common.latent_encoders import LatentEncoder
from models.common.networks import OpenedNetwork
from utils.data.encoders import EncodeItem
from utils.draw import generator
from utils.errors import UserError


class KlVaeEncoder(LatentEncoder):
    """A picture to ``latents`` [C, 1, h, w], fp32: (z - shift) * scale, height and width divided by 8.

    z is drawn from the VAE's distribution, as the models were trained, with noise that depends on the picture's pixels alone.
    """

    name = "vae"
    reads = "pixels"

    def __init__(self, opened: OpenedNetwork, dtype: torch.dtype):
        super().__init__(opened.source, opened.on_meta, dtype)
        self.config = {name: value for name, value in opened.on_meta().config.items() if not name.startswith("_")}
        self.shift, self.scale = self.config["shift_factor"] or 0.0, self.config["scaling_factor"]

    def settings(self) -> dict[str, Any]:
        return {"config": self.config}

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"latents": self._drawn(item.pixels)} for item in items]

    def _drawn(self, pixels: Tensor) -> Tensor:
        distribution = self._distribution(pixels)
        content = hashlib.blake2b(pixels.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        noise = torch.randn(distribution.mean.shape, generator=generator("latents", content))
        return self.normalise(distribution.mean.float() + distribution.std.float() * noise.to(self.device))

    def _distribution(self, pixels: Tensor) -> Any:
        """diffusers' DiagonalGaussianDistribution of one picture [3, 1, H, W]."""
        return self.network.encode(pixels[:, 0][None].to(self.device, self.dtype)).latent_dist

    def normalise(self, latents: Tensor) -> Tensor:
        """[1, C, h, w] as the VAE makes them to [C, 1, h, w] as the model reads them, on the CPU."""
        return ((latents.float() - self.shift) * self.scale).transpose(0, 1).contiguous().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        restored = latents.to(self.device).float().transpose(0, 1) / self.scale + self.shift
        return self.network.decode(restored.to(self.dtype)).sample.transpose(0, 1).float().cpu()


class KlReferenceEncoder(KlVaeEncoder):
    """An item's control pictures to ``references`` [n, C, h, w]: the mode of each one's distribution, as at inference.

    UserError for an item without control pictures: a model that edits would learn to do without them.
    """

    name = "references"
    reads = "controls"

    @torch.no_grad()
    def encode(self, items: list[EncodeItem]) -> list[dict[str, Tensor]]:
        return [{"references": self._references(item)} for item in items]

    def _references(self, item: EncodeItem) -> Tensor:
        if not item.controls:
            raise UserError(
                f"{item.key} has no control picture, and this model edits control pictures; "
                "name their folder with control_path in the dataset's [[directory]]"
            )
        return torch.stack([self.normalise(self._distribution(picture).mode())[:, 0] for picture in item.controls])
