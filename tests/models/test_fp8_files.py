"""ComfyUI's fp8 files of every variant: transformer and text encoders are what the stored numbers stand for."""

import shutil

import pytest
import torch

from models import family_names, load_family
from models.common.latent_encoders import FrozenEncoder
from tests.models.fp8 import FORMS, rewrite
from utils.data.encoders import EncodeItem
from utils.weights.named import check_names

# One form for each family; every form of every variant is a longer proof.
CASES = [
    pytest.param(name, variant, form, marks=[] if number == 0 and place == index % len(FORMS) else [pytest.mark.slow])
    for index, name in enumerate(family_names())
    for number, variant in enumerate(load_family(name).variants)
    for place, form in enumerate(FORMS)
]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "variant", "form"), CASES, ids=lambda value: value)
def test_fp8_files_are_what_they_stand_for(name, variant, form, tmp_path):
    Family = load_family(name)
    stored, reference = tmp_path / "fp8", tmp_path / "reference"
    Family.write_tiny(variant, stored, "comfy", seed=0)
    shutil.copytree(stored, reference)
    counts = {
        file.parent.name: rewrite(file, form, reference / file.relative_to(stored))
        for file in sorted(stored.rglob("*.safetensors"))
        if file.parent.name not in ("vae", "clip_vision")
    }
    assert counts
    assert all(counts.values()), counts

    opened, expected = (Family(Family.Options(type=name, path=folder, dtype="float32")) for folder in (stored, reference))
    assert opened.variant == expected.variant == variant
    assert opened.config == expected.config
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in opened.build_transformer().state_dict().items()}
    assert check_names(opened.weights(), shapes) == []
    assert_equal(opened.weights(), expected.weights())

    # And the text encoders through their own loading: the same networks, the same states.
    pairs = [pair for pair in zip(opened.encoders(), expected.encoders(), strict=True) if pair[0].reads != "pixels"]
    assert any("caption" in ours.reads for ours, _ in pairs)
    for ours, theirs in pairs:
        assert isinstance(ours, FrozenEncoder)
        assert_equal(ours.source, theirs.source)
        if ours.reads == "caption":
            assert ours.fingerprint() != theirs.fingerprint()
            fields = [encoded(encoder) for encoder in (ours, theirs)]
            assert all(torch.equal(fields[0][field], fields[1][field]) for field in fields[1])


def assert_equal(source, expected) -> None:
    assert source.names().keys() == expected.names().keys()
    for name in expected.names():
        value = source.read(name)
        assert (tuple(value.shape), value.dtype) == source.names()[name]
        assert torch.equal(value.float(), expected.read(name).float()), name


def encoded(encoder: FrozenEncoder) -> dict[str, torch.Tensor]:
    encoder.load(CPU)
    try:
        return encoder.encode([EncodeItem("item", caption="a red cat on the dog")])[0]
    finally:
        encoder.unload()
