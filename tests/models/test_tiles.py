"""A picture or clip that is too large for the memory is encoded in tiles, as diffusers' VAEs do it, and the rest as always."""

import logging

import pytest
import torch

from models import load_family
from utils.data.cache import DatasetCache
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket, Sample
from utils.errors import UserError

CPU = torch.device("cpu")
CASES = [
    # Family, variant, a size above one tile of its VAE, and one that fits.
    ("sdxl", "sdxl", Bucket(128, 64, 1), Bucket(64, 64, 1)),
    ("flux", "flux1-dev", Bucket(640, 64, 1), Bucket(64, 64, 1)),
    ("flux2", "flux2-klein", Bucket(128, 64, 1), Bucket(64, 64, 1)),
    ("qwen_image", "qwen-image", Bucket(320, 32, 1), Bucket(32, 32, 1)),
    ("wan", "wan-i2v", Bucket(320, 32, 5), Bucket(32, 32, 5)),
    ("wan", "wan-ti2v", Bucket(576, 32, 5), Bucket(32, 32, 5)),
]


def limit_memory(encoder, monkeypatch, values: int) -> None:
    """The VAE's encoder, once it is loaded, can take so many values at once."""

    def look(module, given):
        if given[0][0, :, 0].numel() > values if given[0].ndim == 5 else given[0][0].numel() > values:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    load = encoder.load

    def load_limited(device):
        load(device)
        encoder.network.encoder.register_forward_pre_hook(look)

    monkeypatch.setattr(encoder, "load", load_limited)


def setup(name, variant, buckets, assets, folder) -> tuple:
    """The VAE of a tiny model, and samples of real data of these sizes."""
    Family = load_family(name)
    Family.write_tiny(variant, folder / "model", "diffusers", seed=0)
    family = Family(Family.Options(type=name, path=folder / "model", dtype="float32"))
    vae = next(encoder for encoder in family.encoders() if encoder.name == "vae")
    file = DataFile(assets.clips["bikes.mp4"] if buckets[0].frames > 1 else assets.images["rocket.jpg"])
    fps = 16.0 if buckets[0].frames > 1 else None
    return vae, [Sample(str(bucket), file, content_of(file), "", bucket, fps=fps) for bucket in buckets]


@pytest.mark.parametrize(("name", "variant", "large", "small"), CASES, ids=[case[1] for case in CASES])
def test_what_is_too_large_is_encoded_in_diffusers_tiles(name, variant, large, small, assets, tmp_path, monkeypatch, caplog):
    vae, samples = setup(name, variant, [large, small], assets, tmp_path)
    items = [EncodeItem("", pixels=load_pixels(sample.file, sample.bucket, sample.fps)) for sample in samples]
    vae.load(CPU)
    whole = [vae.encode([item])[0] for item in items]
    network = vae.network
    if (size := getattr(network, "tile_sample_min_size", 0)) > 512:
        # FLUX.1's own tiles are as large as its pictures.
        network.tile_latent_min_size = network.tile_latent_min_size * 512 // size
        network.tile_sample_min_size = 512
    network.enable_tiling()
    tiled = vae.encode(items[:1])[0]
    vae.unload()
    assert any((whole[0][field] - tiled[field]).abs().max() > 1e-4 for field in tiled)

    limit_memory(vae, monkeypatch, values=3 * large.height * large.width - 1)
    cache = DatasetCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        assert cache.build(samples, [vae], device=CPU).complete
    assert caplog.messages == [
        f"vae: the memory is too small for {large} of {large}: those of {large} are encoded in tiles from now on"
    ]
    for sample, expected in zip(samples, [tiled, whole[1]], strict=True):
        found = cache.read(sample, [vae])
        assert found.keys() == expected.keys()
        for field, value in found.items():
            assert torch.equal(value, expected[field]), f"{sample.key} {field}"


def test_an_item_that_does_not_even_fit_in_tiles_is_named(assets, tmp_path, monkeypatch):
    vae, samples = setup("sdxl", "sdxl", [Bucket(128, 64, 1), Bucket(64, 64, 1)], assets, tmp_path)
    limit_memory(vae, monkeypatch, values=3 * 32 * 32)
    with pytest.raises(UserError, match=r"128x64x1 of 128x64x1, alone, not even in tiles. Use smaller resolutions"):
        DatasetCache(tmp_path / "cache").build(samples, [vae], device=CPU)
    assert vae._network is None
