"""What every model is fed by ``prepare_inputs``, after the encoders, and by diffusers' own pipeline, for one picture and caption.

Each family's ``tests.models.<family>.reference`` tells how its pipeline is called (``call_pipeline``).
"""

import importlib
import inspect

import pytest
import torch

from models import family_names, load_family
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Batch, Bucket
from utils.draw import Draw

CPU = torch.device("cpu")
CAPTION = "a red cat and a dog on the table"
CONTROLS = {"flux1-kontext": 1, "flux2-dev": 2, "flux2-klein": 1}
"""Of the models that edit, how many pictures."""
TIMES = ("timestep",)
"""A pipeline starts at its schedule's first time, ``prepare_inputs`` at one that it draws; the families' tests compare these."""
REFERENCES = {name: importlib.import_module(f"tests.models.{name}.reference") for name in family_names()}
LIKE_ANOTHER = ("flux1-schnell", "flux2-klein", "sd35-large", "wan-flf2v", "wan22-t2v", "wan22-i2v")
"""Variants that take the same way through the code as one of the others: longer proofs."""
# Qwen-Image's pipelines scale pictures to a megapixel and need to be told of transformers 5: its own test calls them.
VARIANTS = [
    pytest.param(name, variant, id=variant, marks=[pytest.mark.slow] if variant in LIKE_ANOTHER else [])
    for name, reference in REFERENCES.items()
    if hasattr(reference, "call_pipeline")
    for variant in load_family(name).variants
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_model_is_fed_what_the_pipeline_feeds_it(name, variant, assets, tmp_path, measured):
    Family, reference = load_family(name), REFERENCES[name]
    Family.write_tiny(variant, tmp_path, "diffusers", seed=0)
    options = getattr(reference, "OPTIONS", {}).get(variant, {})
    family = Family(Family.Options(type=name, path=tmp_path, dtype="float32", **options))
    item = item_for(family, assets)
    fields = {}
    for encoder in family.encoders():
        encoder.load(CPU)
        fields |= encoder.encode([item])[0]
        encoder.unload()
    batch = Batch(keys=["item#0"], fields={field: [value] for field, value in fields.items()})
    inputs = family.prepare_inputs(batch, Draw(0, 0)).inputs

    pipeline = reference.PIPELINES[variant].from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    calls = recorded(network)
    with torch.no_grad():
        reference.predict(network.eval(), inputs)
        reference.call_pipeline(pipeline, item, inputs["x"])
    ours, theirs = map(flat, calls[:2])
    compared = ours.keys() - set(TIMES) - set(getattr(reference, "NOT_GIVEN", ()))
    assert theirs.keys() - set(TIMES) - set(getattr(reference, "NOT_GIVEN", ())) == compared
    assert len(compared) >= 2
    difference = max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in compared)
    measured(variant, "inputs", difference)
    assert difference <= 1e-4


def item_for(family, assets) -> EncodeItem:
    """A real clip or picture, with control pictures for models that edit."""
    video = family.size_rules.frame_step is not None
    bucket = Bucket(width=96, height=64, frames=5 if video else 1)
    file = assets.clips["bikes.mp4"] if video else assets.images["astronaut.png"]
    pictures = (assets.images[name] for name in ("coffee.png", "chelsea.png"))
    controls = [load_pixels(DataFile(picture), bucket) for picture in pictures]
    return EncodeItem(
        key="item",
        caption=CAPTION,
        pixels=load_pixels(DataFile(file), bucket, family.size_rules.fps),
        controls=tuple(controls[: CONTROLS.get(family.variant, 0)]),
        original_size=(512, 512),
    )


def recorded(network: torch.nn.Module) -> list[dict]:
    """What the network is called with, from now on, by the names of its arguments."""
    calls = []
    signature = inspect.signature(type(network).forward)

    def look(module, positional, keywords):
        calls.append(dict(signature.bind(module, *positional, **keywords).arguments))

    network.register_forward_pre_hook(look, with_kwargs=True)
    return calls


def flat(call: dict) -> dict[str, torch.Tensor]:
    """The tensors among the arguments, those in tables too."""
    tables = {f"{key}.{name}": value for key, table in call.items() if isinstance(table, dict) for name, value in table.items()}
    return {key: value for key, value in {**call, **tables}.items() if isinstance(value, torch.Tensor)}
