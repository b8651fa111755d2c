"""What every variant of every family must fulfil.  New families are found by themselves."""

from pathlib import Path

import pytest
import torch

from models import family_names, load_family
from utils.adapters.manager import AdapterManager
from utils.config.schema import AdapterConfig
from utils.errors import UserError
from utils.formats.run_exports import Under
from utils.optim.rates import LearningRates
from utils.pipeline.stage_weights import names_of
from utils.weights.named import check_names

VARIANTS = [(name, variant) for name in family_names() for variant in load_family(name).variants]


@pytest.fixture(params=VARIANTS, ids=[variant for _, variant in VARIANTS])
def family(request, tmp_path):
    name, variant = request.param
    Family = load_family(name)
    Family.write_tiny(variant, tmp_path, "diffusers", seed=0)
    return Family(Family.Options(type=name, path=tmp_path, dtype="float32"))


def on_meta(family) -> torch.nn.Module:
    with torch.device("meta"):
        return family.build_transformer()


def test_every_parameter_belongs_to_exactly_one_layer(family):
    transformer = on_meta(family)
    owned = [id(parameter) for layer in family.layers(transformer) for parameter in layer.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(parameter) for parameter in transformer.parameters()}


def test_every_weight_belongs_to_exactly_one_part(family):
    names = [name for name, _ in on_meta(family).named_parameters()]
    found = {}
    for name in names:
        found[name] = [part for part in family.parts if LearningRates(0.0, {}, {part: family.parts[part]}).part_of(name)]
    assert {name: parts for name, parts in found.items() if len(parts) != 1} == {}


def test_encoders_that_read_captions_count_their_tokens(family):
    for encoder in family.encoders():
        lengths = encoder.token_lengths(["a cat", "a cat " * 2000], controls=family.controls.least)
        assert [length.is_cut for length in lengths] == ([False, True] if "caption" in encoder.reads else [])


def test_the_files_hold_exactly_the_model(family):
    expected = {name: tuple(tensor.shape) for name, tensor in on_meta(family).state_dict().items()}
    assert check_names(family.weights(), expected) == []


def test_every_key_goes_to_the_release_and_back(family, measured):
    key_map = family.key_map()
    whole = {name: torch.randn(info.shape) for name, info in family.weights().names().items()}
    files = [Under(file.prefix, whole) for file in family.export_files().values()]
    assert sum(map(len, files)) == len(whole)
    for state in files:
        back = key_map.to_diffusers(key_map.to_released(state))
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    measured(family.variant, "keys", len(whole))


def test_the_default_adapter_is_on_linear_modules_of_every_layer_with_attention(family):
    transformer = on_meta(family)
    layers = family.layers(transformer)
    targets = AdapterManager(AdapterConfig(rank=2), family.adapter_targets).target_names(transformer)
    modules = dict(transformer.named_modules())
    assert all(isinstance(modules[name], torch.nn.Linear) for name in targets)
    weights = {f"{name}.weight" for name in targets}
    for layer in layers:
        names = names_of([layer], transformer)
        assert weights.intersection(names) or not any(".attn" in name for name in names), names


def test_adapters_begin_as_nothing_and_depend_on_seed_and_name_alone(family):
    transformer = on_meta(family)
    manager = AdapterManager(AdapterConfig(rank=2, target_modules=["to_q"]), family.adapter_targets)
    manager.attach(transformer)
    from utils.adapters.manager import trainable_parameters

    wanted = trainable_parameters(transformer)
    values = manager.first_values(wanted.items(), seed=3)
    some = dict(list(wanted.items())[4:6])
    assert all(torch.equal(value, values[name]) for name, value in manager.first_values(some.items(), seed=3).items())
    for name, value in values.items():
        assert bool(value.any()) == (".lora_A." in name)
    other = manager.first_values(wanted.items(), seed=4)
    assert any(not torch.equal(other[name], values[name]) for name in values)


def test_released_and_comfy_files_are_the_same_model(family, tmp_path, measured):
    name = family.options.type
    reference = family.weights()
    for layout in ("released", "comfy"):
        folder = tmp_path / layout
        type(family).write_tiny(family.variant, folder, layout, seed=0)
        other = type(family)(type(family).Options(type=name, path=folder, dtype="float32"))
        assert other.variant == family.variant
        assert other.config == family.config
        source = other.weights()
        different = [key for key in reference.names() if not torch.equal(source.read(key), reference.read(key))]
        measured(family.variant, "layouts", len(different))
        assert not different


def test_a_folder_without_a_model_says_what_is_missing(family, tmp_path):
    (tmp_path / "empty").mkdir()
    Family = type(family)
    with pytest.raises(UserError) as raised:
        Family(Family.Options(type=family.options.type, path=tmp_path / "empty"))
    for key in ("transformer_path", "vae_path", "text_encoder_path"):
        assert key in str(raised.value)


def test_no_user_path_is_in_the_export_metadata(family):
    assert "modelspec.architecture" in family.export_metadata()
    assert str(Path.home()) not in str(family.export_metadata())
