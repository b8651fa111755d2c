"""The release's one file: what stands in it beside the UNet."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.sdxl.files import SdxlFiles, read_training
from models.sdxl.keys import MARKERS, model_key_map
from models.sdxl.networks import NETWORKS, PREFIXES
from utils.formats.export import ReleasedTensors
from utils.formats.recognise import FileFacts
from utils.weights.named import WeightSource


class WeightsOnDisk(Mapping[str, Tensor]):
    """A network's weights by diffusers name, each read when it is asked for."""

    def __init__(self, source: WeightSource):
        self._source, self._names = source, source.names()

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def companions(files: SdxlFiles, *, v_prediction: bool, zero_snr: bool) -> Mapping[str, Tensor]:
    """The VAE, both text encoders, and the markers of velocity prediction, by their names in the file; read when asked for."""
    parts = [
        ReleasedTensors(WeightsOnDisk(getattr(files, name).source), NETWORKS[name].key_map(), None, PREFIXES[name])
        for name in ("vae", "text_encoder", "text_encoder_2")
    ]
    return ChainMap(*parts, markers(v_prediction, zero_snr))


def markers(v_prediction: bool, zero_snr: bool) -> dict[str, Tensor]:
    """What tells ComfyUI of velocity prediction.  They hold nothing: that they are there is what counts."""
    marked = {"v_pred": v_prediction, "ztsnr": v_prediction and zero_snr}
    return {name: torch.zeros(0) for name in MARKERS if marked[name]}


def _marks(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    prediction, zero_snr, _ = read_training(path)
    return markers(prediction == "v_prediction", bool(zero_snr))


FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"stable-diffusion-xl|sdxl",
    key_map=lambda shapes: model_key_map(),
    sizes={},
    folder="unet",
    marks=_marks,
)
