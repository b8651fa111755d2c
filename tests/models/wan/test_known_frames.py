"""Pictures that are given in place of a clip's own first and last frame: the model is fed as diffusers' pipeline feeds it."""

import shutil
from dataclasses import replace

import pytest
import torch

from models.wan import Family
from tests.models.test_inputs import flat, item_for, recorded
from tests.models.wan import reference
from utils.data.cache import DatasetCache
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket, Control, Sample
from utils.draw import Draw

CPU = torch.device("cpu")


def family_of(variant: str, folder) -> Family:
    Family.write_tiny(variant, folder, "diffusers", seed=0)
    return Family(Family.Options(type="wan", path=folder, dtype="float32", **reference.OPTIONS.get(variant, {})))


def encoded(family: Family, item: EncodeItem) -> dict[str, torch.Tensor]:
    fields = {}
    for encoder in family.encoders():
        encoder.load(CPU)
        fields |= encoder.encode([item])[0]
        encoder.unload()
    return fields


@pytest.mark.parametrize(
    ("variant", "given"),
    [
        ("wan-i2v", ["first"]),
        ("wan-flf2v", ["first", "last"]),
        pytest.param("wan-flf2v", ["last"], marks=pytest.mark.slow),
        pytest.param("wan22-i2v", ["first"], marks=pytest.mark.slow),
    ],
)
def test_the_model_is_shown_the_given_picture(variant, given, assets, tmp_path):
    family = family_of(variant, tmp_path)
    assert set(given) <= set(family.size_rules.known_frames)
    own = item_for(family, assets)
    bucket = Bucket(own.pixels.shape[3], own.pixels.shape[2], 1)
    files = {"first": "coffee.png", "last": "chelsea.png"}
    item = replace(own, known_frames={name: load_pixels(DataFile(assets.images[files[name]]), bucket) for name in given})
    fields = encoded(family, item)
    assert torch.equal(fields["latents"], encoded(family, own)["latents"])
    batch = Batch(keys=["item#0"], fields={field: [value] for field, value in fields.items()})
    inputs = family.prepare_inputs(batch, Draw(0, 0)).inputs

    pipeline = reference.PIPELINES[variant].from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    calls = recorded(pipeline.transformer)
    with torch.no_grad():
        reference.predict(pipeline.transformer.eval(), inputs)
        reference.call_pipeline(pipeline, item, inputs["x"])
        reference.call_pipeline(pipeline, own, inputs["x"])
    ours, theirs, without = map(flat, calls[:3])
    for name in {"hidden_states", "encoder_hidden_states_image"} & ours.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4)
        assert (ours[name] - without[name]).abs().max() > 0.01


def test_models_that_are_shown_nothing_take_no_pictures(tmp_path):
    assert family_of("wan-t2v", tmp_path / "t2v").size_rules.known_frames == ()
    assert family_of("wan-ti2v", tmp_path / "ti2v").size_rules.known_frames == ()


def test_given_pictures_come_through_the_cache(assets, tmp_path):
    """Scaled as the clip is, and in the keys of the encoders that look at them alone."""
    family = family_of("wan-i2v", tmp_path / "model")
    for name in ("bikes.mp4", "coffee.png", "chelsea.png"):
        shutil.copy({**assets.clips, **assets.images}[name], tmp_path / name)

    def control(name: str) -> Control:
        return Control(DataFile(tmp_path / name), content_of(DataFile(tmp_path / name)))

    clip = control("bikes.mp4")
    own = Sample("clip", clip.file, clip.content, "bikes", Bucket(48, 32, 5), fps=16.0, original_size=(640, 272))
    given = [replace(own, key=name, known_frames=(("first", control(name)),)) for name in ("coffee.png", "chelsea.png")]
    cache, encoders = DatasetCache(tmp_path / "cache"), family.encoders()
    counts = [
        [part.encoded for part in cache.build(samples, encoders, device=CPU).encoders] for samples in ([own], given[:1], given)
    ]
    assert [encoder.name for encoder in encoders] == ["vae", "text", "clip"]
    assert counts == [[1, 1, 1], [1, 0, 1], [1, 0, 1]]
    for sample in given:
        picture = load_pixels(sample.known_frames[0][1].file, Bucket(48, 32, 1))
        item = EncodeItem("", "bikes", load_pixels(own.file, own.bucket, 16.0), known_frames={"first": picture})
        expected = encoded(family, item)
        found = cache.read(sample, encoders)
        assert found.keys() == expected.keys() == {"latents", "condition", "text", "clip"}
        assert all(torch.equal(value, expected[field]) for field, value in found.items())
