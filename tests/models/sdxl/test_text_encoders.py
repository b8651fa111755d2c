"""Training the text encoders: against transformers' and diffusers' own modules put together by hand."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from models.sdxl import Family
from models.sdxl.tiny import write_tiny
from tests.distributed.engine_worker import perturbed
from tests.models.sdxl import reference
from utils.adapters.manager import AdapterManager, trainable_parameters
from utils.config.schema import AdapterConfig
from utils.data.encoders import EncodeItem
from utils.data.values import Batch
from utils.draw import Draw
from utils.errors import UserError
from utils.pipeline.layer import Stream
from utils.pipeline.stage_weights import fill_stage, names_of
from utils.weights.named import canonical_name, check_names

CPU = torch.device("cpu")
ONE, TWO = {"text_encoder_1_lr": 1e-4}, {"text_encoder_2_lr": 2e-4}
BOTH = ONE | TWO
TRAINED = {"1": ONE, "2": TWO, "both": BOTH}
LORA = {"rank": 4, "alpha": 10.0}
UNET_LAYERS = 23
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "vocab_size": 49408}


def conditioner() -> set[str]:
    """The text encoders' weights in ``sd_xl_base_1.0.safetensors``."""
    clip_l, clip_g = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    names = {f"{clip_l}embeddings.{kind}_embedding.weight" for kind in ("token", "position")}
    names |= {f"{clip_g}{name}" for name in ("token_embedding.weight", "positional_embedding", "text_projection")}
    for kind in ("weight", "bias"):
        names |= {f"{clip_l}final_layer_norm.{kind}", f"{clip_g}ln_final.{kind}"}
        parts = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")))
        names |= {f"{clip_l}encoder.layers.{block}.{part}.{kind}" for block in range(12) for part in parts}
        parts = (
            f"attn.in_proj_{kind}",
            *(f"{part}.{kind}" for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")),
        )
        names |= {f"{clip_g}transformer.resblocks.{block}.{part}" for block in range(32) for part in parts}
    return names


CONDITIONER = conditioner()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("sdxl")
    for layout in ("diffusers", "released", "comfy"):
        write_tiny("sdxl", root / layout, layout, seed=0)
    return root


@pytest.fixture(scope="module")
def model(models):
    return models / "diffusers"


@pytest.fixture(scope="module")
def real(assets, tmp_path_factory):
    """With CLIP's real tokenizer."""
    root = tmp_path_factory.mktemp("sdxl-real")
    write_tiny("sdxl", root, "diffusers", seed=0, tokenizer=assets.clip_tokenizer)
    return root


def family_of(path, **options) -> Family:
    return Family(Family.Options(type="sdxl", path=path, dtype="float32", **options))


def filled(family: Family, adapter: AdapterManager | None = None):
    """The model with its weights and an adapter that is not nothing, its layers, and the adapter's values."""
    with torch.device("meta"):
        module = family.build_transformer()
        if adapter:
            adapter.attach(module)
        layers = family.layers(module)
    values = perturbed(adapter.first_values(trainable_parameters(module).items(), 0)) if adapter else {}
    fill_stage(module, layers, family.weights(), values, CPU)
    return module, layers, values


def run(layers, inputs) -> torch.Tensor:
    stream = Stream(inputs)
    for layer in layers:
        stream = layer(stream)
    return stream["prediction"]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("trained", "clip_skip"), [("1", 0), ("2", 0), ("both", 1)])
def test_loss_and_every_gradient_equal_the_plain_models(model, trained, clip_skip, kind):
    family = family_of(model, clip_skip=clip_skip, **TRAINED[trained])
    adapter = AdapterManager(AdapterConfig(**LORA), family.adapter_targets) if kind == "lora" else None
    module, layers, values = filled(family, adapter)
    names = [name for name in ("text_encoder", "text_encoder_2") if hasattr(module, name)]
    plain = reference.plain_model(model, names)
    if adapter:
        plain.requires_grad_(False)
        config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=family.adapter_targets)
        inject_adapter_in_model(config, plain)
        for name, parameter in trainable_parameters(plain).items():
            # The block of CLIP-L that is left out has none of ours; what it computes is not used.
            parameter.data.copy_(values[name]) if name in values else None

    batch = family.prepare_inputs(reference.batch(family, 0), Draw(3, 0))
    losses = [
        family.loss({"prediction": prediction}, batch.target)
        for prediction in (run(layers, batch.inputs), reference.predict(plain, batch.inputs, clip_skip))
    ]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    theirs = {canonical_name(name): p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {canonical_name(name): p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} >= set(names)
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        # The bias of a key has no gradient but for rounding, which is held against the whole.
        assert (ours[name] - gradient).norm() <= 1e-5 * (whole if name.endswith("k_proj.bias") else gradient.norm()), name


@pytest.mark.parametrize(("trained", "clip_skip"), [("1", 1), ("2", 1), ("both", 0)])
def test_captions_give_what_the_frozen_encoders_give(real, trained, clip_skip):
    """Through the encoders of the cache, with captions of one, two and three chunks in one micro-batch."""
    captions = ["a cat", " ".join(["red cat"] * 50), " ".join(["blue dog"] * 100)]
    texts = []
    for options in ({}, TRAINED[trained]):
        family = family_of(real, clip_skip=clip_skip, **options)
        fields = {"latents": [torch.zeros(4, 1, 4, 4)] * 3, "time_ids": [torch.zeros(6, dtype=torch.int64)] * 3}
        for encoder in family.encoders()[1:]:
            encoder.load(CPU)
            encoded = encoder.encode([EncodeItem(str(index), caption=caption) for index, caption in enumerate(captions)])
            fields |= {name: [part[name] for part in encoded] for name in encoded[0]}
            encoder.unload()
        inputs = family.prepare_inputs(Batch([f"{index}#0" for index in range(3)], fields), Draw(0, 0)).inputs
        stream, layers = Stream(inputs), filled(family)[1] if options else []
        for layer in layers[: -UNET_LAYERS or None]:
            stream = layer(stream)
        assert stream.keys() == {"x", "t", "time_ids", "text", "pooled"}
        texts.append(stream)
    assert texts[0]["text"].shape[1] == 6 * 77
    for name in ("text", "pooled"):
        torch.testing.assert_close(texts[1][name], texts[0][name], rtol=1e-5, atol=1e-5)


def test_layers_files_and_model_hold_the_same_weights_in_every_layout(models):
    states = []
    for layout in ("diffusers", "released", "comfy"):
        family = family_of(models / layout, **BOTH)
        module, layers, _ = filled(family)
        owned = [name for layer in layers for name in names_of([layer], module)]
        state = dict(module.state_dict())
        assert len(owned) == len(set(owned))
        assert set(owned) == state.keys()
        assert check_names(family.weights(), {name: tuple(value.shape) for name, value in state.items()}) == []
        states.append(state)
    assert all(torch.equal(state[name], value) for state in states[1:] for name, value in states[0].items())


def test_what_is_trained_of_the_released_sizes(model):
    """kohya's modules but for the last block of CLIP-L, and the tensors of the release's checkpoint but for what has no effect."""
    family = family_of(model, **BOTH)
    for name, sizes in {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G}.items():
        opened = getattr(family.files, name)
        object.__setattr__(opened, "config", {**opened.config, **sizes})
    with torch.device("meta"):
        module = family.build_transformer()
    targets = AdapterManager(AdapterConfig(**LORA), family.adapter_targets).target_names(module)
    for name, blocks in {"text_encoder": 11, "text_encoder_2": 32}.items():
        assert [target for target in targets if target.startswith(f"{name}.")] == [
            f"{name}.text_model.encoder.layers.{block}.{part}"
            for block in range(blocks)
            for part in (*(f"self_attn.{p}_proj" for p in ("k", "v", "q", "out")), "mlp.fc1", "mlp.fc2")
        ]
    state = {name: value for name, value in module.state_dict().items() if name.startswith("text_encoder")}
    released = family.full_key_map().to_released(state)
    left_out = {name for name in CONDITIONER if "embedders.0" in name and (".layers.11." in name or "final_layer_norm" in name)}
    assert released.keys() == CONDITIONER - left_out
    assert len(left_out) == 18
    assert released["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert {name: value.shape for name, value in family.full_key_map().to_diffusers(released).items()} == {
        name: value.shape for name, value in state.items()
    }


def test_settings_that_leave_nothing_of_a_text_encoder_are_refused(model):
    with pytest.raises(UserError, match=r"model\.clip_skip = 2 leaves nothing of a text encoder with 3 layers"):
        family_of(model, clip_skip=2)


def test_rates_say_what_is_trained(model):
    def parts(**options) -> tuple[set[str], dict[str, float]]:
        family = family_of(model, **options)
        with torch.device("meta"):
            names = {name.split(".")[0] for name, _ in family.build_transformer().named_parameters()}
        return names & {"text_encoder", "text_encoder_2"}, Family.part_lr(family.options)

    assert parts() == (set(), {})
    assert parts(unet_lr=0.0, **ONE) == ({"text_encoder"}, {"unet": 0.0, "text_encoder_1": 1e-4})
    assert parts(text_encoder_1_lr=0.0, **TWO) == ({"text_encoder_2"}, {"text_encoder_1": 0.0, "text_encoder_2": 2e-4})
    caches = [[encoder.name for encoder in family_of(model, **options).encoders()] for options in ({}, ONE, BOTH)]
    assert caches == [["vae", "clip_l", "clip_g"], ["vae", "clip_g", "clip_tokens"], ["vae", "clip_tokens"]]
