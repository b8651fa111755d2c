"""SD3's five networks."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, SD3Transformer2DModel

from models.common.clip import clip_text_network
from models.common.kl_vae import kl_vae_key_map, refuse_other_scale
from models.common.networks import Network
from models.common.t5 import t5_network
from models.sd3.keys import sd3_key_map
from models.sd3.sizes import LATENT_SCALE, block_numbers, transformer_config, vae_config
from utils.formats.recognise import FileFacts, Shapes
from utils.weights.keymap import KeyMap
from utils.weights.named import WeightSource


class Sd3Weights(WeightSource):
    """The key map depends on the number of blocks, which the file's names tell: it is made once they are known."""

    def __init__(self, path: Path | Sequence[Path], key_map: KeyMap):
        super().__init__(path, key_map)
        super().__init__(path, sd3_key_map(len(block_numbers(self.names()))))


NETWORKS = {
    "transformer": Network(
        title="SD3 transformer",
        key_map=lambda: sd3_key_map(blocks=1),
        kinds=("SD3Transformer2DModel",),
        config=transformer_config,
        build=SD3Transformer2DModel.from_config,
        source=Sd3Weights,
        family="sd3",
    ),
    "vae": Network(
        title="SD3 VAE",
        key_map=kl_vae_key_map,
        kinds=("AutoencoderKL",),
        config=vae_config,
        build=AutoencoderKL.from_config,
        width=lambda config: config["latent_channels"],
        accept=refuse_other_scale("SD3", LATENT_SCALE),
    ),
    # The release takes CLIP-L's pooled state without a projection.  Diffusers' folders hold the identity as its projection,
    # ComfyUI's files none; the one that some files of CLIP-L bring along is OpenAI's, and ComfyUI does not use it here either.
    "text_encoder": clip_text_network(
        "CLIP-L text encoder", projection=False, activation="quick_gelu", prefixes=("text_encoders.clip_l.transformer.",)
    ),
    "text_encoder_2": clip_text_network(
        "CLIP-G text encoder", projection=True, activation="gelu", prefixes=("text_encoders.clip_g.transformer.",)
    ),
    "text_encoder_3": t5_network(prefixes=("text_encoders.t5xxl.transformer.",)),
}

LAST_NORM = re.compile(
    r".*(?:joint|transformer)_blocks[._](\d+)[._](?:context_block[._]adaLN_modulation[._]1|norm1_context[._]linear)\.weight"
)


def key_map_of(shapes: Shapes) -> KeyMap:
    """The table of the model that a file's weights are of.

    The last block's text norm has a scale and a shift, the others' six such parts: so its shape tells which block is the last.
    Files without it need no number.
    """
    norms = {key: match for key in shapes if (match := LAST_NORM.fullmatch(key))}
    last = next((int(match[1]) for key, match in norms.items() if shapes[key][0] == 2 * shapes[key][1]), -1)
    return sd3_key_map(last + 1)


FILE_FACTS = FileFacts(
    networks=NETWORKS,
    architecture=r"stable-diffusion-3|sd3",
    key_map=key_map_of,
    sizes={(24, 1536): "medium or 3.5 medium", (38, 2432): "3.5 large"},
)
