"""Parts that do not belong together are refused when the model is opened, which reads headers only, and the reason is told."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models import family_names, load_family
from models.base import ModelFamily
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.sources.buckets import problems
from utils.errors import UserError

LAYOUTS = ("diffusers", "released", "comfy")
FAMILY_OF = {variant: name for name in family_names() for variant in load_family(name).variants}
FIRST = {name: load_family(name).variants[0] for name in family_names()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Callable[[str, str], Path]:
    """Folder of a tiny model by variant and layout, written once."""

    @cache
    def write(variant: str, layout: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny") / variant
        load_family(FAMILY_OF[variant]).write_tiny(variant, folder, layout, seed=0)
        return folder

    return write


def opened(name: str, **options) -> ModelFamily:
    Family = load_family(name)
    return Family(Family.Options(type=name, dtype="float32", **options))


def refusal(name: str, **options) -> str:
    with pytest.raises(UserError) as raised:
        opened(name, **options)
    return str(raised.value)


# ── another family ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name in FIRST.values() else [pytest.mark.slow]) for name in FAMILY_OF]
)
def test_a_model_under_another_familys_type_is_named(variant, layout, tiny):
    """And nothing else is complained of: which VAE would fit is no question then."""
    right, folder = FAMILY_OF[variant], tiny(variant, layout)
    assert opened(right, path=folder).options.type == right
    for name in set(family_names()) - {right}:
        heading, *found = refusal(name, path=folder).splitlines()
        assert heading == "[model] cannot be used:"
        assert found
        for line in found:
            assert line.startswith(f"  - {folder}")
            assert line.endswith(f"which type = {name!r} does not train; that is trained with type = {right!r}")


def test_one_file_of_another_family_is_named(tiny):
    file = next(tiny("wan-t2v", "comfy").glob("diffusion_models/*.safetensors"))
    for name in set(family_names()) - {"wan"}:
        message = refusal(name, path=tiny(FIRST[name], "diffusers"), transformer_path=file)
        assert message.splitlines()[1:] == [
            f"  - model.transformer_path: {file} holds Wan, which type = {name!r} does not train; that is trained with type = 'wan'"
        ]


def test_a_damaged_model_beside_another_familys_is_not_hidden(tiny, tmp_path):
    for variant in ("flux1-dev", "wan-t2v"):
        load_family(FAMILY_OF[variant]).write_tiny(variant, tmp_path, "comfy", seed=0)
    file = next(tmp_path.glob("diffusion_models/wan*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} has" in refusal("wan", path=tmp_path)


# ── another size ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

VAES = {
    "flux1-dev": ("sd3-medium", "it belongs to another model"),
    "flux1-schnell": ("sdxl", "it belongs to another model"),
    "flux2-dev": ("flux1-dev", "is not a whole FLUX.2 VAE"),
    "qwen-image": ("wan-ti2v", "holds tensors that this model does not have"),
    "sd3-medium": ("flux1-dev", "it belongs to another model"),
    "sdxl": ("sd3-medium", "16, the transformer wants 4"),
    "wan-t2v": ("wan-ti2v", "48, the transformer wants 16"),
    "wan-ti2v": ("wan-t2v", "16, the transformer wants 48"),
}
"""The variant whose VAE is given to a model, and what is said."""


@pytest.mark.parametrize("variant", VAES)
def test_a_vae_of_other_latents(variant, tiny):
    other, said = VAES[variant]
    folder = tiny(other, "diffusers") / "vae"
    message = refusal(FAMILY_OF[variant], path=tiny(variant, "diffusers"), vae_path=folder)
    assert message.splitlines()[1].startswith("  - model.vae_path: ")
    assert said in message
    assert len([line for line in message.splitlines() if line.startswith("  - ")]) == 1, message


TEXT_INPUTS = {
    "flux1-dev": {"txt_in.weight": "text_encoder_2", "vector_in.in_layer.weight": "text_encoder"},
    "flux2-dev": {"txt_in.weight": "text_encoder"},
    "qwen-image": {"txt_in.weight": "text_encoder", "txt_norm.weight": None},
    "wan-t2v": {"text_embedding.0.weight": "text_encoder"},
}
"""What of a transformer reads the text, and the text encoder that it comes from."""


@pytest.mark.parametrize("variant", TEXT_INPUTS)
def test_a_text_encoder_of_another_size(variant, tmp_path):
    """The transformer is made one that wants half the width."""
    load_family(FAMILY_OF[variant]).write_tiny(variant, tmp_path, "comfy", seed=0)
    file = next(tmp_path.glob("diffusion_models/*.safetensors"))
    weights = load_file(file)
    wanted = {}
    for name, encoder in TEXT_INPUTS[variant].items():
        width = weights[name].shape[-1]
        weights[name] = weights[name][..., : width // 2].contiguous()
        if encoder:
            wanted[encoder] = f"has the width {width}, the transformer wants {width // 2}; it belongs to another model"
    save_file(weights, file)
    message = refusal(FAMILY_OF[variant], path=tmp_path)
    for encoder, said in wanted.items():
        assert said in message
        assert f"name it with model.{encoder}_path" in message


def test_a_t5_of_another_size(tiny):
    message = refusal(
        "sd3", path=tiny("sd3-medium", "diffusers"), text_encoder_3_path=tiny("flux1-dev", "diffusers") / "text_encoder_2"
    )
    assert "model.text_encoder_3_path" in message
    assert "the transformer wants 512; it belongs to another model" in message


@pytest.mark.parametrize("variant", ["sdxl", "sd3-medium"])
def test_the_two_clips_of_a_model_are_not_interchangeable(variant, tiny):
    folder = tiny(variant, "diffusers")
    message = refusal(FAMILY_OF[variant], path=folder, text_encoder_path=folder / "text_encoder_2")
    assert "model.text_encoder_path" in message
    assert "the transformer wants" in message


# ── another variant ───────────────────────────────────────────────────────────────────────────────────────────────────────────

WRONG_OPTIONS = {
    "flux1-schnell": ({"variant": "kontext"}, "has no guidance embedder: it is schnell"),
    "qwen-image-edit-2511": ({"variant": "qwen-image"}, "says that it is qwen-image-edit-2511"),
    "wan-t2v": ({"first_frame": True}, "model.first_frame = true is for Wan 2.2 TI2V-5B; this is Wan 2.1 text to video"),
}


@pytest.mark.parametrize("variant", WRONG_OPTIONS)
def test_options_of_another_variant(variant, tiny):
    options, said = WRONG_OPTIONS[variant]
    assert said in refusal(FAMILY_OF[variant], path=tiny(variant, "diffusers"), **options)


# ── control pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TRIED = (0, 1, 2, 3, 10, 11)
EDITING = {
    "flux1-kontext": {1, 2, 3, 10, 11},
    "flux2-dev": {0, 1, 2, 3, 10},
    "flux2-klein": {0, 1, 2, 3, 10},
    "qwen-image-edit": {1},
    "qwen-image-edit-plus": {1, 2, 3, 10, 11},
    "qwen-image-edit-2511": {1, 2, 3, 10, 11},
}
"""Of the numbers of control pictures that are tried, those that a model takes; the other models take none."""


@pytest.mark.parametrize("variant", FAMILY_OF)
def test_the_number_of_control_pictures_must_be_one_that_the_model_takes(variant, tiny):
    family = opened(FAMILY_OF[variant], path=tiny(variant, "diffusers"))
    assert family.variant == variant
    taken = EDITING.get(variant, {0})
    for number in TRIED:
        controls = [f"controls{place}" for place in range(number)]
        dataset = DatasetConfig(resolutions=[512], directory=[DirectoryConfig(path="pictures", control_path=controls)])
        found = problems(dataset, family.size_rules, family.controls)
        assert (number in taken) == (not found), number
        for problem in found:
            assert problem.startswith("[[directory]] pictures: ")
            assert "control_path" in problem
    if 0 not in taken:
        assert "model.variant" in family.controls.instead
