"""Files with text encoders in them: what is exported is read by diffusers whole, and what other trainers wrote is not half read."""

import pytest
import tomli_w
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from models import load_family
from models.assembly import build_layers, read_loras
from models.sdxl import Family
from models.sdxl.tiny import CHECKPOINT, write_tiny
from tests.models.sdxl import reference
from tests.models.sdxl.test_text_encoders import BOTH, CPU, LORA, ONE, TWO, family_of, filled, run
from utils.adapters.manager import AdapterManager, MergedWeights, adaptable_modules, trainable_parameters
from utils.config.load import load_config
from utils.config.schema import AdapterConfig
from utils.data.encoders import EncodeItem
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_files import read_adapter
from utils.formats.export import TrainingFacts, export_adapter, export_full

FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)
SCALE = LORA["alpha"] / LORA["rank"]
CAPTION = "a cat & the red dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    for layout in ("diffusers", "released"):
        write_tiny("sdxl", root / layout, layout, seed=0)
    return root / "diffusers"


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    """A LoRA on the UNet and both text encoders: its file, its values, and what the model computes with it."""
    family = family_of(model, **BOTH)
    adapter = AdapterManager(AdapterConfig(**LORA), family.adapter_targets)
    _, layers, values = filled(family, adapter)
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(3, 0)).inputs
    with torch.no_grad():
        prediction = run(layers, inputs)
    return exported_lora(family, values, tmp_path_factory.mktemp("lora")), values, inputs, prediction


def exported_lora(family, values, folder):
    shapes = {name: value.shape for name, value in values.items()}
    return export_adapter(
        folder,
        "lora",
        values,
        expected=shapes,
        scales={name.partition(".lora_")[0]: SCALE for name in values},
        key_map=family.key_map(),
        fmt=family.lora_format,
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )


def joined(pipeline) -> nn.Module:
    """The pipeline's networks as ``reference.predict`` takes them."""
    pipeline.unet.add_module("text_encoder", nn.ModuleDict({"text_model": pipeline.text_encoder}))
    pipeline.unet.add_module("text_encoder_2", pipeline.text_encoder_2)
    return pipeline.unet.eval()


def test_a_lora_has_kohyas_names_and_loads_whole_in_diffusers(model, lora):
    file, values, inputs, prediction = lora
    keys = load_file(file)
    assert len(keys) == 3 * len(values) // 2
    for name in (
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_1_mlp_fc2.lora_up.weight",
        "lora_te2_text_model_encoder_layers_2_self_attn_out_proj.alpha",
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight",
    ):
        assert name in keys
    assert {name.split("_text_model")[0] for name in keys if "_text_model" in name} == {"lora_te1", "lora_te2"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    plain = joined(pipeline)
    with torch.no_grad():
        before = reference.predict(plain, inputs)
        pipeline.load_lora_weights(file, adapter_name="trained")
        loaded = {name for name, part in plain.named_modules() if hasattr(part, "lora_A")}
        assert loaded == {name.partition(".lora_")[0] for name in values}
        found = reference.predict(plain, inputs)
    assert (before - prediction).abs().max() > 1e-3
    assert (found - prediction).abs().max() <= 1e-5


def test_a_lora_of_the_text_encoders_alone_changes_them_alone(model, lora, tmp_path):
    _, values, _, _ = lora
    family = family_of(model, unet_lr=0.0, **BOTH)
    own = {name: value for name, value in values.items() if name.startswith("text_encoder")}
    file = exported_lora(family, own, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.load_lora_weights(file)
    loaded = {name for name, part in joined(pipeline).named_modules() if hasattr(part, "lora_A")}
    assert loaded == {name.partition(".lora_")[0] for name in own}


def test_a_lora_is_read_back(model, lora):
    file, values, _, _ = lora
    family = family_of(model)
    read = read_adapter(file, adaptable_modules(family.adaptable_weights()), family.key_map())
    assert read.weights.keys() == values.keys()
    for name, value in values.items():
        expected = value * SCALE if ".lora_B." in name else value
        assert torch.allclose(
            read.weights[name] * (read.scales[name.partition(".lora_")[0]] if ".lora_B." in name else 1), expected
        )


def test_frozen_text_encoders_compute_with_what_is_merged(model, lora):
    """Their cached output, their fingerprint, and the companions of a full export."""
    file, _, _, _ = lora
    family, before = family_of(model), family_of(model)
    weights = MergedWeights(family.adaptable_weights())
    read = read_adapter(file, adaptable_modules(weights), family.key_map())
    weights = weights.with_adapter(read, 0.5)
    family.take_merged(weights, weights.merged)
    fields = {}
    for encoder, plain in zip(family.encoders(), before.encoders(), strict=True):
        assert (encoder.fingerprint() == plain.fingerprint()) is (encoder.name == "vae")
        if encoder.name != "vae":
            encoder.load(CPU)
            fields |= encoder.encode([EncodeItem("a", caption=CAPTION)])[0]
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    arguments = {"device": CPU, "do_classifier_free_guidance": False}
    with torch.no_grad():
        plain, _, _, _ = pipeline.encode_prompt(CAPTION, **arguments)
        pipeline.load_lora_weights(file, adapter_name="trained")
        pipeline.set_adapters("trained", 0.5)
        hidden, _, pooled, _ = pipeline.encode_prompt(CAPTION, **arguments)
    found = torch.cat([fields["text_l"], fields["text_g"]], dim=-1)
    assert (found - plain[0]).abs().max() > 1e-2
    torch.testing.assert_close(found, hidden[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fields["pooled"], pooled[0], rtol=1e-5, atol=1e-5)
    q_proj = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(family.companions()[family.full_key_map().released_name(q_proj)], weights.read(q_proj))


def test_a_lora_without_text_encoders_leaves_them_as_they_were(model, lora, tmp_path):
    file, values, _, _ = lora
    save_file({name: value for name, value in load_file(file).items() if "lora_te" not in name}, tmp_path / "unet.safetensors")
    family = family_of(model)
    weights = MergedWeights(family.adaptable_weights())
    read = read_adapter(tmp_path / "unet.safetensors", adaptable_modules(weights), family.key_map())
    assert len(read.weights) == sum(not name.startswith("text_encoder") for name in values)
    weights = weights.with_adapter(read, 1.0)
    prints = [encoder.fingerprint() for encoder in family.encoders()]
    family.take_merged(weights, weights.merged)
    assert [encoder.fingerprint() for encoder in family.encoders()] == prints


@pytest.mark.parametrize("trained", [ONE, TWO, BOTH], ids=["1", "2", "both"])
def test_diffusers_reads_an_exported_checkpoint_with_trained_text_encoders(model, tmp_path, trained):
    family = family_of(model.parent / "released", **trained)
    module, layers, _ = filled(family)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.05)
    weights = dict(module.state_dict())
    file = export_full(
        tmp_path,
        "trained",
        weights,
        expected={name: tuple(value.shape) for name, value in weights.items()},
        key_map=family.full_key_map(),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
        companions=family.companions(),
    )
    found, released = load_file(file), load_file(model.parent / "released" / f"{CHECKPOINT}.safetensors")
    assert found.keys() == released.keys()
    changed = {key for key, value in released.items() if not torch.equal(found[key], value)}
    assert changed == set(family.full_key_map().to_released(weights))
    pipeline = StableDiffusionXLPipeline.from_single_file(file, config=str(model), local_files_only=True)
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(0, 0)).inputs
    with torch.no_grad():
        assert (reference.predict(joined(pipeline), inputs) - run(layers, inputs)).abs().max() <= 1e-5
    # And a run that starts from it has its weights, those that it does not train too.
    (tmp_path / "trained.json").write_text((model.parent / "released" / f"{CHECKPOINT}.json").read_text())
    again = family_of(file, tokenizer_path=model / "tokenizer", **trained).weights()
    assert all(torch.equal(again.read(name), value) for name, value in weights.items())


def opened(model, folder, options, adapter=None):
    """What ``train.py`` makes of a config with these keys in ``[model]`` and ``[adapter]``."""
    (folder / "data.toml").write_text('resolutions = [64]\n[[directory]]\npath = "pictures"\n')
    config = {
        "output_dir": "runs",
        "dataset": str(folder / "data.toml"),
        "epochs": 1,
        "model": {"type": "sdxl", "path": str(model), "dtype": "float32", **options},
        "optimizer": {"type": "sgd", "lr": 0.1},
        **({"adapter": adapter} if adapter else {}),
    }
    (folder / "main.toml").write_text(tomli_w.dumps(config))
    config = load_config(folder / "main.toml", lambda name: load_family(name).Options).run
    family = Family(config.model)
    module, _, _, adapter = build_layers(config, family)
    return config, family, adapter, module


def test_a_run_starts_from_a_lora_of_another_trainer(model, lora, tmp_path):
    """kohya's has adapters on the blocks that are not used, which were never changed; on frozen text encoders it is refused."""
    file, values, _, _ = lora
    unused = "lora_te1_text_model_encoder_layers_2_mlp_fc1"
    shapes = {"lora_down.weight": (4, 64), "lora_up.weight": (128, 4)}
    foreign = load_file(file) | {f"{unused}.{part}": torch.zeros(shape) for part, shape in shapes.items()}
    foreign[f"{unused}.lora_down.weight"] += 1
    save_file(foreign, tmp_path / "kohya.safetensors")
    adapter = {**LORA, "init_from": str(tmp_path / "kohya.safetensors")}
    config, family, manager, module = opened(model, tmp_path, BOTH, adapter)
    _, started_from = read_loras(config, family, manager, module)
    [(path, read)] = started_from.items()
    first = manager.values_from(read, trainable_parameters(module).items(), path)
    assert first.keys() == values.keys()
    assert all(torch.allclose(first[name], value, atol=1e-6) for name, value in values.items())

    for trained in ({}, TWO):
        with pytest.raises(UserError, match=r"on text_encoder\.text_model\..*this run does not train.*keeps their network frozen"):
            read_loras(*opened(model, tmp_path, trained, adapter))


def test_rates_of_the_model_table_go_to_the_parts(model, tmp_path):
    _, _, _, module = opened(model, tmp_path, {"unet_lr": 0.0, **TWO}, LORA)
    assert {name.split(".")[0] for name in trainable_parameters(module)} == {"text_encoder_2"}
    _, _, _, module = opened(model, tmp_path, {"unet_lr": 0.0, **ONE})
    assert {name.split(".")[0] for name in trainable_parameters(module)} == {"text_encoder"}
