"""CLIP's text tower against transformers' own use of it: both kinds, both paddings, files of either naming."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.common.clip import ClipTextEncoder, clip_text_network
from models.common.networks import open_network
from models.common.text_encoders import CLIP_NAMES, find_tokenizer
from models.common.tiny import random_state, write_clip_tokenizer
from utils.errors import UserError

CPU = torch.device("cpu")
CAPTIONS = ["the red cat, and the dog", "", "a horse " * 100]
KINDS = {True: CLIPTextModelWithProjection, False: CLIPTextModel}


def made(projection: bool, vocabulary: int, **config):
    """A random encoder, 128 wide, whose end token is the last of its vocabulary."""
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    sizes = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 48}
    model = KINDS[projection](CLIPTextConfig(vocab_size=vocabulary, **sizes, **ends, **config))
    model.load_state_dict(random_state(model, 0, "clip"))
    return model.eval()


def file_of(model, path):
    """As the releases have it: with ``text_model.`` before every name of the tower, and with what they hold besides."""
    state = {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in model.state_dict().items()
    }
    save_file({**state, "logit_scale": torch.zeros(()), "text_model.embeddings.position_ids": torch.arange(77)[None]}, path)
    return path


@pytest.mark.parametrize(("projection", "activation", "pad"), [(False, "quick_gelu", "end"), (True, "gelu", "zero")])
def test_states_and_pooled_output_are_those_of_transformers(assets, tmp_path, projection, activation, pad):
    model = made(projection, 49408, hidden_act=activation)
    network = clip_text_network("CLIP", projection=projection, activation=activation)
    opened = open_network(network, file_of(model, tmp_path / "clip.safetensors"))
    assert network.width(opened.config) == (48 if projection else 128)
    encoder = ClipTextEncoder(opened, find_tokenizer(assets.clip_tokenizer, CLIP_NAMES), torch.float32, pad=pad)
    encoder.load(CPU)
    tokenizer = AutoTokenizer.from_pretrained(assets.clip_tokenizer, **({"pad_token": "!"} if pad == "zero" else {}))
    for caption in CAPTIONS:
        ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(encoder.token_ids(caption), ids)
        with torch.no_grad():
            expected = model(input_ids=ids, output_hidden_states=True)
            text = encoder.states(ids)
        assert torch.equal(text.pooled, (expected.text_embeds if projection else expected.pooler_output)[0])
        assert len(text.hidden) == 4
        assert all(torch.equal(ours, theirs[0]) for ours, theirs in zip(text.hidden, expected.hidden_states, strict=True))


def test_files_that_transformers_5_saves_have_no_prefix(tmp_path):
    model = made(False, 300)
    model.save_pretrained(tmp_path)
    source = open_network(clip_text_network("CLIP", projection=False, activation="quick_gelu"), tmp_path).source
    assert source.layout == "diffusers"
    assert all(torch.equal(source.read(name), tensor) for name, tensor in model.state_dict().items())


def test_a_width_that_does_not_tell_the_number_of_heads(tmp_path):
    model = CLIPTextModel(
        CLIPTextConfig(vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    network = clip_text_network("CLIP", projection=False, activation="quick_gelu")
    with pytest.raises(UserError, match=r"width 24 is not a multiple of 64.*config\.json"):
        open_network(network, file_of(model, tmp_path / "clip.safetensors"))
    model.config.save_pretrained(tmp_path)
    assert open_network(network, tmp_path / "clip.safetensors").config["num_attention_heads"] == 2


@pytest.mark.parametrize("text", ["the red dog", "Größe: 3 × 4, “naïve” 自行车 🚲", "tab\tand\nline", "", "A CAT"])
def test_the_made_tokenizer_is_one_of_clips(tmp_path, text):
    write_clip_tokenizer(tmp_path)
    tokenize, theirs = find_tokenizer(tmp_path, CLIP_NAMES).load(77), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenize(text) == theirs(text).input_ids
    assert tokenize(text)[-1] == tokenize.vocabulary - 1
    # A tokenizer.json, which some releases have, says the same.
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = find_tokenizer(tmp_path, CLIP_NAMES)
    assert found.kind == "json"
    assert found.load(77)(text) == tokenize(text)
