"""What tells Wan's models apart, and which of them is trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.common.networks import Config
from utils.errors import UserError

Condition = Literal["first", "first and last"]
"""Which frames of a clip the model is shown beside the noisy latents, as further channels."""
Expert = Literal["high", "low"]
"""Wan 2.2 A14B has two transformers: one for the noisy timesteps, one for the others."""
Trained = Literal["both", "high", "low"]
"""Which of them a run trains."""


@dataclass(frozen=True)
class Variant:
    """A shape of model that has its own code path."""

    title: str
    release: str
    """``wan2.1`` or ``wan2.2``."""
    kind: str
    """What the release calls it in ``config.json``."""
    in_channels: int = 16
    latent_channels: int = 16
    condition: Condition | None = None
    with_clip: bool = False
    boundary: float | None = None
    """The two experts of Wan 2.2 A14B meet here: the high-noise one is used for t >= boundary."""
    multiple: int = 16
    fps: float = 16.0

    @property
    def signature(self) -> tuple[int, int, bool, bool]:
        """(channels in, channels out, with CLIP branch, with position embedding of the CLIP branch)."""
        return self.in_channels, self.latent_channels, self.with_clip, self.with_clip and self.condition == "first and last"


VARIANTS = {
    "wan-t2v": Variant("Wan 2.1 text to video", "wan2.1", "t2v"),
    "wan-i2v": Variant("Wan 2.1 image to video", "wan2.1", "i2v", in_channels=36, condition="first", with_clip=True),
    "wan-flf2v": Variant(
        "Wan 2.1 first and last frame to video", "wan2.1", "flf2v", in_channels=36, condition="first and last", with_clip=True
    ),
    "wan22-t2v": Variant("Wan 2.2 T2V-A14B", "wan2.2", "t2v", boundary=0.875),
    "wan22-i2v": Variant("Wan 2.2 I2V-A14B", "wan2.2", "i2v", in_channels=36, condition="first", boundary=0.9),
    "wan-ti2v": Variant("Wan 2.2 TI2V-5B", "wan2.2", "ti2v", in_channels=48, latent_channels=48, multiple=32, fps=24.0),
}
UNSUPPORTED = {(48, 16, True, False): "Wan Fun Control"}
"""Models that are known but not trained, by signature."""

EXPERT_IN_NAME = re.compile(r"(high|low)[_-]?noise|a14b[_-](high|low)(?![a-z])", re.IGNORECASE)


def variant_of(config: Config, expert: Trained | None = None) -> str:
    """A name in :data:`VARIANTS`, by the transformer's config.  UserError, with what was recognised, for any other model.

    ``expert``: the transformer is known to be an expert.  Without it Wan 2.2's T2V-A14B is not told from Wan 2.1, whose shape
    it has.
    """
    with_image, with_positions = config.get("image_dim") is not None, config.get("pos_embed_seq_len") is not None
    signature = (config["in_channels"], config["out_channels"], with_image, with_positions)
    fitting = [name for name, variant in VARIANTS.items() if variant.signature == signature]
    if not fitting:
        what = UNSUPPORTED.get(signature, f"an unknown Wan model with {signature[0]} channels in and {signature[1]} out")
        known = ", ".join(variant.title for variant in VARIANTS.values())
        raise UserError(f"this is {what}, which is not supported yet; supported are {known}")
    return next((name for name in fitting if (VARIANTS[name].boundary is None) == (expert is None)), fitting[0])


def expert_in(text: str) -> Expert | None:
    """The expert that a name speaks of: ``high_noise``, ``A14B-LOW``, …"""
    found = EXPERT_IN_NAME.search(text)
    return (found[1] or found[2]).lower() if found else None


def expert_named(path: Path) -> Expert | None:
    """Which expert a transformer's file or folder is by its name.

    ``high_noise_model/`` and ``low_noise_model/`` of the release, ``transformer/`` beside ``transformer_2/`` of diffusers,
    ``wan2.2_t2v_high_noise_14B_fp16.safetensors`` and the like of ComfyUI.
    """
    for place in (path, path.parent):
        if found := expert_in(place.name):
            return found
        if place.name == "transformer_2":
            return "low"
        if place.name == "transformer" and (place.parent / "transformer_2").is_dir():
            return "high"
    return None


def trained_timesteps(variant: Variant, expert: Trained | None) -> tuple[float, float]:
    """The ends of the timesteps that a model is used for."""
    if variant.boundary is None or expert in ("both", None):
        return 0.0, 1.0
    return (variant.boundary, 1.0) if expert == "high" else (0.0, variant.boundary)
