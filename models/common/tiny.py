"""Writing tiny random models: random weights by name, a small tokenizer, and files in the layouts of releases."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from utils.draw import generator
from utils.weights.named import save_safetensors

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")
"""The last two tokens of CLIP's vocabulary."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A network on meta, which knows its config, and its weights by diffusers name."""

    module: nn.Module
    state: State

    @classmethod
    def made(cls, name: str, build: Callable[[], nn.Module], seed: int, tied: frozenset[str] = frozenset()) -> "Part":
        """``build`` makes the module (it is called on meta); ``name`` tells its random values from those of other parts.

        ``tied``: further names of weights that are there under another name; they get no values of their own.
        """
        with torch.device("meta"):
            module = build()
        return cls(module, random_state(module, seed, name, tied))


def random_state(module: nn.Module, seed: int, part: str, tied: frozenset[str] = frozenset()) -> State:
    """Values for each parameter of a module, by the parameter's name, so that they do not depend on the order."""
    return {
        name: _random_values(name, tuple(tensor.shape), generator(seed, part, name))
        for name, tensor in module.state_dict().items()
        if name not in tied
    }


def _random_values(name: str, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=source)
    module, _, kind = f".{name}".rpartition(".")
    if kind == "gamma" or (kind == "weight" and "norm" in module.rpartition(".")[2]):
        return 1 + 0.1 * normal
    if kind == "bias":
        return 0.02 * normal
    return normal / math.sqrt(math.prod(shape[1:]))


def write_t5_tokenizer(folder: Path) -> None:
    """A small tokenizer in T5's form: letters, marks and a few words, and bytes for all else, so that any caption comes back."""
    words = ["a", "the", "of", "and", "in", "on", "with", "is", "man", "woman", "cat", "dog", "red", "blue"]
    pieces = ["▁", *ascii_letters, *digits, *punctuation, *(f"▁{word}" for word in words)]
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(piece, -4.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    end = SPECIAL_TOKENS.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, end, unknown = SPECIAL_TOKENS
    # transformers' T5 class would make the tokenizer anew, without the bytes.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": end, "unk_token": unknown}
    write_json(folder / "tokenizer_config.json", {**config, "model_max_length": 512})


def write_clip_tokenizer(folder: Path, pad: str = CLIP_ENDS[1]) -> None:
    """A small tokenizer in CLIP's form, ``vocab.json`` and ``merges.txt`` as in releases: every byte, and a few words.

    ``pad``: the end token as in CLIP-L, ``!`` (token 0) as in CLIP-G.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *CLIP_ENDS]
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges), "utf-8")
    start, end = CLIP_ENDS
    config = {"tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    write_json(folder / "tokenizer_config.json", {**config, "model_max_length": 77})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def write_shards(path: Path, state: State, count: int) -> None:
    """``path``, or as many shards of it with their index, as diffusers and transformers write them."""
    if count == 1:
        save_safetensors(path, state, {"format": "pt"})
        return
    names = sorted(state)
    files = [f"{path.stem}-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    for index, file in enumerate(files):
        save_safetensors(path.with_name(file), {name: state[name] for name in names[index::count]}, {"format": "pt"})
    weight_map = {name: files[index % count] for index, name in enumerate(names)}
    total = sum(tensor.nbytes for tensor in state.values())
    write_json(path.with_name(f"{path.name}.index.json"), {"metadata": {"total_size": total}, "weight_map": weight_map})
