"""Wan's frozen networks against diffusers' pipelines, and the release's files against the release's own arithmetic."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.common.text_encoders import clean_caption
from models.wan.encoders import MAX_TOKENS, wan_encoders
from models.wan.files import find_files
from models.wan.options import WanOptions
from models.wan.tiny import write_tiny
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.values import Bucket
from utils.errors import UserError

CPU = torch.device("cpu")
LAYOUTS = ("diffusers", "released", "comfy")
BUCKET = Bucket(width=96, height=64, frames=9)
CAPTION = "Two  men &amp;amp; a child’s bike,\n in the café — 自行车 🚲"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An image-to-video model with the made tokenizer, in each layout."""
    root = tmp_path_factory.mktemp("wan")
    for layout in LAYOUTS:
        write_tiny("wan-i2v", root / layout, layout, seed=3)
    return root


@pytest.fixture(scope="module")
def real_text_model(assets, tmp_path_factory):
    """The same with Wan's real tokenizer, as diffusers and ComfyUI have it."""
    root = tmp_path_factory.mktemp("wan-real")
    for layout in ("diffusers", "comfy"):
        write_tiny("wan-i2v", root / layout, layout, seed=3, tokenizer=assets.umt5_tokenizer)
    return root


@pytest.fixture(scope="module")
def clip(assets) -> Tensor:
    return load_pixels(DataFile(assets.clips["bikes.mp4"]), BUCKET, 16.0)


@pytest.fixture(scope="module")
def encoded(models, clip):
    """What each layout makes of the clip and the caption."""
    return {layout: encode(models / layout, clip) for layout in LAYOUTS}


@pytest.fixture(scope="module")
def pipeline(models):
    return WanImageToVideoPipeline.from_pretrained(models / "diffusers")


def encoders_of(path, dtype=torch.float32, condition="first"):
    found = wan_encoders(find_files(WanOptions(type="wan", path=path)), dtype, condition)
    return {encoder.name: encoder for encoder in found}


def encode(path, pixels, caption=CAPTION, dtype=torch.float32, condition="first"):
    fields = {}
    for encoder in encoders_of(path, dtype, condition).values():
        encoder.load(CPU)
        fields |= encoder.encode([EncodeItem(key="a", caption=caption, pixels=pixels)])[0]
        encoder.unload()
    return fields


def picture_of(pixels) -> Image.Image:
    """The first frame as it was before it became numbers in [-1, 1]."""
    return Image.fromarray(((pixels[:, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


@dataclass
class TextEncoder:
    """A loaded text encoder as a function."""

    path: Path
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        self.encoder = encoders_of(self.path, self.dtype)["text"]
        self.encoder.load(CPU)

    def __call__(self, *captions) -> list[Tensor]:
        return [fields["text"] for fields in self.encoder.encode([EncodeItem(key=text, caption=text) for text in captions])]


def test_all_layouts_give_the_same_bits(encoded):
    assert {name: tuple(tensor.shape) for name, tensor in encoded["diffusers"].items()} == {
        "latents": (16, 3, 8, 12),
        "condition": (16, 3, 8, 12),
        "text": (len(encoded["diffusers"]["text"]), 32),
        "clip": (257, 160),
    }
    for layout in ("released", "comfy"):
        for name, tensor in encoded["diffusers"].items():
            assert torch.equal(encoded[layout][name], tensor), (layout, name)


def test_latents_are_the_normalised_mode(encoded, pipeline, clip):
    with torch.no_grad():
        mode = pipeline.vae.encode(clip[None]).latent_dist.mode()[0]
    mean = torch.tensor(pipeline.vae.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(pipeline.vae.config.latents_std).view(-1, 1, 1, 1)
    torch.testing.assert_close(encoded["released"]["latents"], (mode - mean) / std, rtol=1e-6, atol=1e-6)


def test_condition_is_the_pipelines(encoded, pipeline, clip):
    image = pipeline.video_processor.preprocess(picture_of(clip), height=BUCKET.height, width=BUCKET.width)
    with torch.no_grad():
        _, condition = pipeline.prepare_latents(
            image, 1, height=BUCKET.height, width=BUCKET.width, num_frames=BUCKET.frames, dtype=torch.float32, device=CPU
        )
    assert torch.equal(encoded["released"]["condition"], condition[0, 4:])  # the first four channels are the mask


def test_condition_knows_the_first_frame_only(models, clip):
    vae = encoders_of(models / "released")["vae"]
    vae.load(CPU)
    other = clip.clone()
    other[:, 1:] = other[:, 1:].flip(1)
    first, second = vae.encode([EncodeItem(key="a", pixels=clip), EncodeItem(key="b", pixels=other)])
    assert torch.equal(first["condition"], second["condition"])
    assert not torch.equal(first["latents"], second["latents"])
    assert torch.equal(first["condition"][:, 0], first["latents"][:, 0])  # the VAE is causal
    picture = vae.encode([EncodeItem(key="p", pixels=clip[:, :1])])[0]
    assert torch.equal(picture["condition"], picture["latents"])


def test_text_to_video_has_no_condition(tmp_path, clip):
    write_tiny("wan-t2v", tmp_path, "released", seed=0)
    encoders = encoders_of(tmp_path, condition=None)
    assert set(encoders) == {"vae", "text"}
    encoders["vae"].load(CPU)
    assert set(encoders["vae"].encode([EncodeItem(key="a", pixels=clip)])[0]) == {"latents"}


@pytest.fixture(scope="module")
def first_last(tmp_path_factory):
    """A model that is shown the first and the last frame, in each layout."""
    root = tmp_path_factory.mktemp("wan-flf2v")
    for layout in LAYOUTS:
        write_tiny("wan-flf2v", root / layout, layout, seed=3)
    return root


def test_first_and_last_frame_are_shown_as_in_the_pipeline(first_last, clip):
    pipeline = WanImageToVideoPipeline.from_pretrained(first_last / "diffusers")
    first, last = picture_of(clip), picture_of(clip[:, -1:])
    size = {"height": BUCKET.height, "width": BUCKET.width}
    images = [pipeline.video_processor.preprocess(picture, **size) for picture in (first, last)]
    with torch.no_grad():
        _, condition = pipeline.prepare_latents(
            images[0], 1, num_frames=BUCKET.frames, dtype=torch.float32, device=CPU, last_image=images[1], **size
        )
        states = pipeline.encode_image([first, last], CPU)
    for layout in LAYOUTS:
        fields = encode(first_last / layout, clip, condition="first and last")
        assert fields["clip"].shape == (514, 160)
        torch.testing.assert_close(fields["condition"], condition[0, 4:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fields["clip"], states.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def ti2v(tmp_path_factory):
    """A model with the VAE of Wan 2.2, in each layout."""
    root = tmp_path_factory.mktemp("wan-ti2v")
    for layout in LAYOUTS:
        write_tiny("wan-ti2v", root / layout, layout, seed=3)
    return root


def test_latents_of_the_22_vae_are_the_pipelines(ti2v, clip):
    """All layouts; a clip's first latent frame is the latent of its first picture, which is what the pipeline puts there."""
    pipeline = WanImageToVideoPipeline.from_pretrained(ti2v / "diffusers", image_encoder=None, image_processor=None)
    size = {"height": BUCKET.height, "width": BUCKET.width}
    image = pipeline.video_processor.preprocess(picture_of(clip), **size)
    with torch.no_grad():
        _, condition, mask = pipeline.prepare_latents(
            image, 1, num_channels_latents=48, num_frames=BUCKET.frames, dtype=torch.float32, device=CPU, **size
        )
    for layout in LAYOUTS:
        fields = encode(ti2v / layout, clip, condition=None)
        assert set(fields) == {"latents", "text"}
        assert fields["latents"].shape == (48, 3, 4, 6) == (48, *mask.shape[2:])
        torch.testing.assert_close(fields["latents"][:, :1], condition[0], rtol=1e-5, atol=1e-5)


def test_the_22_vae_decodes_what_it_encodes(ti2v, clip):
    vae = encoders_of(ti2v / "released", condition=None)["vae"]
    vae.load(CPU)
    latents = vae.encode([EncodeItem(key="a", pixels=clip)])[0]["latents"]
    assert vae.decode(latents).shape == clip.shape


def test_decode_is_the_pipelines(models, pipeline, encoded):
    vae = encoders_of(models / "released")["vae"]
    vae.load(CPU)
    latents = encoded["released"]["latents"]
    config = pipeline.vae.config
    mean, inverse_std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents[None] / (1.0 / inverse_std) + mean).sample[0]
    decoded = vae.decode(latents)
    assert decoded.shape == (3, BUCKET.frames, BUCKET.height, BUCKET.width)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("image", ["first frame", "astronaut.png", "rocket.jpg"])
def test_image_states_are_the_pipelines(models, pipeline, clip, assets, image):
    """Square, wide and small pictures: the processor scales the shorter side and crops."""
    bucket = Bucket(width=320, height=256, frames=1)
    pixels = clip if image == "first frame" else load_pixels(DataFile(assets.images[image]), bucket)
    encoder = encoders_of(models / "released")["clip"]
    encoder.load(CPU)
    with torch.no_grad():
        expected = pipeline.encode_image(picture_of(pixels), CPU)[0]
    assert torch.equal(encoder.encode([EncodeItem(key="a", pixels=pixels)])[0]["clip"], expected)


def test_the_models_own_image_processor_is_used(models, tmp_path, clip):
    root = Path(shutil.copytree(models / "diffusers", tmp_path / "model"))
    usual = encoders_of(root)["clip"]
    file = root / "image_processor/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_center_crop": False, "size": {"height": 224, "width": 224}}))
    squashed = encoders_of(root)["clip"]
    assert squashed.fingerprint() != usual.fingerprint()
    results = []
    for encoder in (usual, squashed):
        encoder.load(CPU)
        results.append(encoder.encode([EncodeItem(key="a", pixels=clip)])[0]["clip"])
    assert not torch.allclose(*results)


@pytest.mark.parametrize("made", [True, False], ids=["made tokenizer", "real tokenizer"])
def test_text_is_the_pipelines(request, made):
    root = request.getfixturevalue("models" if made else "real_text_model")
    pipeline = WanImageToVideoPipeline.from_pretrained(root / "diffusers", vae=None, transformer=None, image_encoder=None)
    captions = [CAPTION, "a man talks in a car", ""]
    texts = TextEncoder(root / "comfy")(*captions)
    for caption, text in zip(captions, texts, strict=True):
        with torch.no_grad():
            padded, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)
        assert padded.shape[1] == MAX_TOKENS
        assert padded[0, len(text) :].count_nonzero() == 0
        assert padded[0, len(text) - 1].count_nonzero() > 0
        torch.testing.assert_close(text, padded[0, : len(text)], rtol=1e-5, atol=1e-5)


def test_real_tokens(real_text_model):
    """Ids of the released tokenizer, the end token last."""
    encoder = TextEncoder(real_text_model / "comfy").encoder
    assert encoder._tokenize("A cat riding a horse, 一只猫") == [320, 6283, 150948, 289, 68040, 275, 273, 858, 9457, 14985, 1]


def test_text_does_not_depend_on_what_is_encoded_with_it(models):
    encode_text = TextEncoder(models / "released")
    together = encode_text("a cat", CAPTION, "a dog on a red bike")
    assert [torch.equal(text, alone) for text, alone in zip(together, encode_text("a cat", CAPTION), strict=False)] == [True, True]


def test_long_captions_are_cut_with_the_end_token_kept(models):
    encode_text = TextEncoder(models / "released")
    long, longer = encode_text("a cat " * 400, "a cat " * 500)
    assert long.shape[0] == MAX_TOKENS
    assert torch.equal(long, longer)
    assert encode_text.encoder._tokenize("a cat " * 400)[-1] == encode_text.encoder._tokenize("")[-1]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \n\t cat\u00a0here ", "a cat here"),
        ("cats &amp;amp; dogs &lt;3", "cats & dogs <3"),
        ("cafÃ© â€” open", "café — open"),
        ("ﬁne ｆｕｌｌ", "fine full"),
    ],
)
def test_captions_are_cleaned_as_the_pipeline_does(raw, clean):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_caption(raw) == clean == prompt_clean(raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(models, clip, encoded, dtype):
    for name, tensor in encode(models / "released", clip, dtype=dtype).items():
        exact = encoded["released"][name]
        assert tensor.dtype is (torch.float32 if name in ("latents", "condition") else dtype)
        assert (tensor.float() - exact).norm() / exact.norm() < {torch.bfloat16: 0.05, torch.float16: 0.003}[dtype], name


def test_fp16_keeps_the_projection_that_overflows_in_fp32(models):
    encoder = TextEncoder(models / "released", torch.float16).encoder
    dtypes = {name: parameter.dtype for name, parameter in encoder.network.named_parameters()}
    assert {name.split(".")[-2] for name, dtype in dtypes.items() if dtype is torch.float32} == {"wo"}


def test_unload_gives_the_network_back(models):
    for encoder in encoders_of(models / "released").values():
        encoder.load(CPU)
        encoder.unload()
        with pytest.raises(AssertionError, match=r"used before load\(\)"):
            _ = encoder.network


def test_fingerprint(models, tmp_path):
    """Another place gives the same one; other weights, dtype, fields or tokenizer another."""

    def prints(path, *arguments, **keywords):
        return {name: encoder.fingerprint() for name, encoder in encoders_of(path, *arguments, **keywords).items()}

    usual = prints(models / "released")
    copy = Path(shutil.copytree(models / "released", tmp_path / "elsewhere"))
    assert prints(copy) == usual
    half = prints(copy, torch.bfloat16)
    assert {name for name in half if half[name] == usual[name]} == {"vae"}, "the VAE runs in fp32 whatever the dtype is"
    more = prints(copy, condition="first and last")
    assert {name for name in usual if more[name] != usual[name]} == {"vae", "clip"}

    tokenizer = copy / "google/umt5-xxl/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("▁cat", "▁cow"))
    for file in (CLIP_FILE, "Wan2.1_VAE.pth"):
        state = torch.load(copy / file, weights_only=True)
        name = next(iter(state))
        torch.save({**state, name: state[name] + 1}, copy / file)
    assert all(usual[name] != changed for name, changed in prints(copy).items())


def test_tokenizer_of_another_model(models, tmp_path, assets):
    root = Path(shutil.copytree(models / "comfy", tmp_path / "comfy"))
    shutil.copy(assets.umt5_tokenizer / "tokenizer.json", root / "text_encoders/umt5-xxl/tokenizer.json")
    with pytest.raises(UserError, match=r"has 256300 tokens, the text encoder knows 384: they do not belong together"):
        encoders_of(root)["text"].load(CPU)


def test_damaged_tokenizer(models, tmp_path):
    root = Path(shutil.copytree(models / "comfy", tmp_path / "comfy"))
    file = root / "text_encoders/umt5-xxl/tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer in it cannot be read"):
        encoders_of(root)["text"].load(CPU)


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory):
    """A real sentencepiece model in T5's form, trained on a few lines, with ``spiece.model`` alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spiece")
    lines = ["a man talks in a car", "two men and a red bike in the café", "the cat is on the blue bike", "a dog and a cat"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 5),
        model_prefix=str(folder / "spiece"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sentencepiece_tokenizers(spiece_folder, tmp_path, layout):
    """``spiece.model`` in a folder, and for ComfyUI's layout inside the text encoder's file, which then needs no folder."""
    write_tiny("wan-t2v", tmp_path, layout, seed=0, tokenizer=spiece_folder)
    if layout == "comfy":
        shutil.rmtree(tmp_path / "text_encoders/umt5-xxl")
    text = encoders_of(tmp_path, condition=None)["text"]
    assert text.tokenizer.kind == ("tensor" if layout == "comfy" else "spiece")
    text.load(CPU)
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    assert text._tokenize("a red cat 🚲") == [*processor.encode("a red cat 🚲"), 1]
    assert len(text._tokenize("a red cat " * 400)) == MAX_TOKENS
    assert text._tokenize("a red cat " * 400)[-1] == 1


# What the release's modules do, written for its tensors: wan/modules/t5.py and clip.py of Wan2.1, vae2_2.py of Wan2.2.


def released_t5(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """[L] ids to [L, D]: RMS norms, unscaled attention with a position bias in every block, gated GELU."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[name]

    x = state["token_embedding.weight"][ids]
    count = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for block in (f"blocks.{index}." for index in range(count)):
        bias = state[f"{block}pos_embedding.embedding.weight"]
        buckets, heads = bias.shape
        distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]
        far = buckets // 4 + torch.log(distance.abs() / (buckets // 4)) / math.log(128 / (buckets // 4)) * (buckets // 4)
        near = torch.where(distance.abs() < buckets // 4, distance.abs(), far.clamp(0, buckets // 2 - 1).long())
        positions = bias[near + (distance > 0) * (buckets // 2)].permute(2, 0, 1)
        y = norm(x, f"{block}norm1.weight")
        q, k, v = (F.linear(y, state[f"{block}attn.{part}.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1) for part in "qkv")
        y = torch.softmax(q @ k.transpose(-1, -2) + positions, -1) @ v
        x = x + F.linear(y.transpose(0, 1).flatten(1), state[f"{block}attn.o.weight"])
        y = norm(x, f"{block}norm2.weight")
        gate = F.gelu(F.linear(y, state[f"{block}ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(F.linear(y, state[f"{block}ffn.fc1.weight"]) * gate, state[f"{block}ffn.fc2.weight"])
    return norm(x, "norm.weight")


def released_clip(state: dict[str, Tensor], pixels: Tensor, heads: int) -> Tensor:
    """[1, 3, 224, 224] to [257, D]: all blocks but the last, no norm after them."""

    def linear(x, name):
        return F.linear(x, state[f"visual.{name}.weight"], state[f"visual.{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"visual.{name}.weight"], state[f"visual.{name}.bias"])

    x = F.conv2d(pixels, state["visual.patch_embedding.weight"], stride=14).flatten(2).transpose(1, 2)
    x = norm(torch.cat([state["visual.cls_embedding"], x], 1) + state["visual.pos_embedding"], "pre_norm")
    count = len({name.split(".")[2] for name in state if name.startswith("visual.transformer.")})
    for block in (f"transformer.{index}." for index in range(count - 1)):
        qkv = linear(norm(x, f"{block}norm1"), f"{block}attn.to_qkv").unflatten(-1, (3, heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv))
        x = x + linear(y.transpose(1, 2).flatten(2), f"{block}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.0")), f"{block}mlp.2")
    return x[0]


def released_vae_22(state: dict[str, Tensor], picture: Tensor) -> Tensor:
    """[3, H, W] to the mode [48, H / 16, W / 16].  One picture: of a convolution over three frames only the last part counts."""

    def conv(x, name, **how):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight[:, :, -1] if weight.ndim == 5 else weight, state[f"{name}.bias"], **how)

    def norm(x, name):
        return F.normalize(x, dim=1) * x.shape[1] ** 0.5 * state[f"{name}.gamma"].flatten()[:, None, None]

    def residual(x, block):
        y = conv(F.silu(norm(x, f"{block}.residual.0")), f"{block}.residual.2", padding=1)
        y = conv(F.silu(norm(y, f"{block}.residual.3")), f"{block}.residual.6", padding=1)
        return y + (conv(x, f"{block}.shortcut") if f"{block}.shortcut.weight" in state else x)

    def shortcut(x, channels, frames, side):
        """Means over groups of what falls together; the frames before the picture are zero."""
        x = F.pixel_unshuffle(x, side).unflatten(1, (-1, 1, side * side))
        x = torch.cat([torch.zeros_like(x)] * (frames - 1) + [x], 2).flatten(1, 3)
        return x.unflatten(1, (channels, -1)).mean(2)

    def attention(x):
        q, k, v = conv(norm(x, "encoder.middle.1.norm"), "encoder.middle.1.to_qkv").flatten(2).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + conv(y, "encoder.middle.1.proj")

    # Patches of 2 x 2 pixels become channels, column before row.
    x = picture.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 4, 2, 1, 3).flatten(0, 2)[None]
    x = conv(x, "encoder.conv1", padding=1)
    for level, frames in enumerate((1, 2, 2, 1)):  # two levels halve the number of frames
        start, blocks = x, f"encoder.downsamples.{level}.downsamples"
        for index in range(2):
            x = residual(x, f"{blocks}.{index}")
        halved = f"{blocks}.2.resample.1.weight" in state
        if halved:
            x = conv(F.pad(x, (0, 1, 0, 1)), f"{blocks}.2.resample.1", stride=2)
        x = x + shortcut(start, x.shape[1], frames, 2 if halved else 1)
    x = residual(attention(residual(x, "encoder.middle.0")), "encoder.middle.2")
    x = conv(F.silu(norm(x, "encoder.head.0")), "encoder.head.2", padding=1)
    return conv(x, "conv1")[0].chunk(2)[0]


def test_22_vae_computes_what_the_release_does(ti2v, clip):
    state = torch.load(ti2v / "released/Wan2.2_VAE.pth", weights_only=True)
    vae = encoders_of(ti2v / "released", condition=None)["vae"]
    vae.load(CPU)
    latents = vae.encode([EncodeItem(key="a", pixels=clip[:, :1])])[0]["latents"]
    expected = vae.scale.normalise(released_vae_22(state, clip[:, 0])[:, None])
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_text_encoder_computes_what_the_release_does(models):
    state = torch.load(models / "released" / T5_FILE, weights_only=True)
    encode_text = TextEncoder(models / "released")
    ids = torch.tensor(encode_text.encoder._tokenize(clean_caption(CAPTION * 6)))
    assert len(ids) > 150  # so that the farthest positions occur
    torch.testing.assert_close(encode_text(CAPTION * 6)[0], released_t5(state, ids), rtol=1e-4, atol=1e-5)


def test_image_encoder_computes_what_the_release_does(models, pipeline, clip, encoded):
    state = torch.load(models / "released" / CLIP_FILE, weights_only=True)
    pixels = pipeline.image_processor(images=picture_of(clip), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoded["released"]["clip"], released_clip(state, pixels, heads=2), rtol=1e-4, atol=1e-5)


def test_pth_files_as_safetensors_are_read_too(models, tmp_path):
    """Other people's conversions: the release's names in a safetensors file, with or without the prefix of the vision tower."""
    released = models / "released"
    text, image = tmp_path / "text.safetensors", tmp_path / "image.safetensors"
    save_file(torch.load(released / T5_FILE, weights_only=True), text)
    vision = {name.removeprefix("visual."): t for name, t in torch.load(released / CLIP_FILE, weights_only=True).items()}
    save_file({name: t.contiguous() for name, t in vision.items() if not name.startswith(("textual", "log"))}, image)
    files = find_files(WanOptions(type="wan", path=released, text_encoder_path=text, image_encoder_path=image))
    for encoder, usual in zip(wan_encoders(files, torch.float32, "first"), encoders_of(released).values(), strict=True):
        source, expected = encoder.source, usual.source
        assert source.names() == expected.names()
        assert all(torch.equal(source.read(name), expected.read(name)) for name in source.names())


def test_text_encoder_saved_as_fp8_without_scales(models, tmp_path):
    root = Path(shutil.copytree(models / "comfy", tmp_path / "comfy"))
    file = root / "text_encoders/umt5_xxl_fp16.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    exact = TextEncoder(models / "comfy")("a cat")[0]
    assert 0 < (TextEncoder(root)("a cat")[0] - exact).norm() / exact.norm() < 0.2
