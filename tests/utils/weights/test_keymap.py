"""The key map against itself in both directions, and against diffusers' own FLUX conversion for fused and swapped tensors."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.errors import UserError
from utils.weights.keymap import Fuse, KeyMap, ModulePlace, Rename, Source, Transform


def swap_halves(tensor):
    return torch.cat([tensor.chunk(2)[1], tensor.chunk(2)[0]])


def make_map():
    return KeyMap(
        [
            Rename("embed.{p}", "img_in.{p}"),
            Rename("table", "modulation"),
            Fuse("double.{i}.qkv.{p}", ("blocks.{i}.to_q.{p}", "blocks.{i}.to_k.{p}", "blocks.{i}.to_v.{p}")),
            Fuse("single.{i}.linear1.{p}", ("single.{i}.q.{p}", "single.{i}.mlp.{p}"), shares=(1, 4)),
            Transform("blocks.1.out.{p}", "double.1.proj.{p}", swap_halves, swap_halves),  # before the pattern that covers it
            Rename("blocks.{i}.out.{p}", "double.{i}.proj.{p}"),
        ],
        prefixes=("model.diffusion_model.",),
        ignored=("blocks.{i}.unused",),
    )


@st.composite
def states(draw):
    """A state dict in diffusers names, with any subset of the modules whole."""
    width, columns = draw(st.integers(1, 3)) * 2, draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = {"embed": width} if draw(st.booleans()) else {}
    for block in range(draw(st.integers(0, 3))):
        rows |= {f"blocks.{block}.{name}": width for name in ("to_q", "to_k", "to_v", "out")}
        rows |= {f"single.{block}.q": width, f"single.{block}.mlp": 4 * width}
    state = {"table": torch.randn(1, 6, width, generator=generator)}
    for name, count in rows.items():
        state[f"{name}.weight"] = torch.randn(count, columns, generator=generator)
        if draw(st.booleans()) and not name.startswith(("blocks", "single")):
            state[f"{name}.bias"] = torch.randn(count, generator=generator)
    return state


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@settings(max_examples=60, deadline=None)
@given(states())
def test_round_trip(state):
    key_map = make_map()
    released = key_map.to_released(state)
    assert_same(key_map.to_diffusers(released), state)
    assert_same(key_map.to_released(key_map.to_diffusers(released)), released)
    assert key_map.layout_of(state) == "diffusers"
    assert key_map.layout_of(released) == ("released" if released.keys() != state.keys() else "diffusers")
    for name, tensor in state.items():
        source = key_map.sources_of(name, "released")
        assert source.key == key_map.released_name(name)
        assert name in key_map.diffusers_names(source.key, "released")
        assert torch.equal(source.take(released[source.key]), tensor)
        assert key_map.sources_of(name, "diffusers") == Source(name)


def flux_map():
    """FLUX.1's names (black-forest-labs/flux, model.py), as far as they show fusing, unequal shares and swapped halves."""

    def embedder(ours, theirs):
        return [
            Rename(f"time_text_embed.{ours}.linear_1.{{p}}", f"{theirs}.in_layer.{{p}}"),
            Rename(f"time_text_embed.{ours}.linear_2.{{p}}", f"{theirs}.out_layer.{{p}}"),
        ]

    def norms(ours, theirs, added=""):
        return [
            Rename(f"{ours}.attn.norm_{added}q.weight", f"{theirs}.query_norm.scale"),
            Rename(f"{ours}.attn.norm_{added}k.weight", f"{theirs}.key_norm.scale"),
        ]

    ours, theirs, single = "transformer_blocks.{i}", "double_blocks.{i}", "single_transformer_blocks.{i}"
    return KeyMap(
        [
            Rename("x_embedder.{p}", "img_in.{p}"),
            Rename("context_embedder.{p}", "txt_in.{p}"),
            *embedder("timestep_embedder", "time_in"),
            *embedder("text_embedder", "vector_in"),
            *embedder("guidance_embedder", "guidance_in"),
            Transform("norm_out.linear.{p}", "final_layer.adaLN_modulation.1.{p}", swap_halves, swap_halves),
            Rename("proj_out.{p}", "final_layer.linear.{p}"),
            Rename(f"{ours}.norm1.linear.{{p}}", f"{theirs}.img_mod.lin.{{p}}"),
            Rename(f"{ours}.norm1_context.linear.{{p}}", f"{theirs}.txt_mod.lin.{{p}}"),
            Fuse(f"{theirs}.img_attn.qkv.{{p}}", tuple(f"{ours}.attn.to_{name}.{{p}}" for name in "qkv")),
            Fuse(f"{theirs}.txt_attn.qkv.{{p}}", tuple(f"{ours}.attn.add_{name}_proj.{{p}}" for name in "qkv")),
            *norms(ours, f"{theirs}.img_attn.norm"),
            *norms(ours, f"{theirs}.txt_attn.norm", added="added_"),
            Rename(f"{ours}.attn.to_out.0.{{p}}", f"{theirs}.img_attn.proj.{{p}}"),
            Rename(f"{ours}.attn.to_add_out.{{p}}", f"{theirs}.txt_attn.proj.{{p}}"),
            Rename(f"{ours}.ff.net.0.proj.{{p}}", f"{theirs}.img_mlp.0.{{p}}"),
            Rename(f"{ours}.ff.net.2.{{p}}", f"{theirs}.img_mlp.2.{{p}}"),
            Rename(f"{ours}.ff_context.net.0.proj.{{p}}", f"{theirs}.txt_mlp.0.{{p}}"),
            Rename(f"{ours}.ff_context.net.2.{{p}}", f"{theirs}.txt_mlp.2.{{p}}"),
            Rename(f"{single}.norm.linear.{{p}}", "single_blocks.{i}.modulation.lin.{p}"),
            Fuse(
                "single_blocks.{i}.linear1.{p}",
                (*(f"{single}.attn.to_{name}.{{p}}" for name in "qkv"), f"{single}.proj_mlp.{{p}}"),
                shares=(1, 1, 1, 4),
            ),
            Rename(f"{single}.proj_out.{{p}}", "single_blocks.{i}.linear2.{p}"),
            *norms(single, "single_blocks.{i}.norm"),
        ]
    )


def test_fused_and_swapped_tensors_agree_with_diffusers():
    # Diffusers' conversion has FLUX's width of 3072 built in; rows are real, columns are cut to 2 to keep the tensors small.
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    state = {
        name: torch.randn(*tensor.shape[:1], *([2] if tensor.dim() > 1 else [])) for name, tensor in model.state_dict().items()
    }
    released = flux_map().to_released(state)
    assert "double_blocks.1.img_attn.qkv.weight" in released
    assert_same(flux_map().to_diffusers(released), state)
    assert_same(convert_flux_transformer_checkpoint_to_diffusers(dict(released)), state)


def test_the_b_of_a_lora_goes_through_a_transform():
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    (moved,) = make_map().to_released({"blocks.1.out.weight": b}).values()
    torch.testing.assert_close(moved @ a, swap_halves(b @ a))


def test_module_path():
    key_map = make_map()
    assert key_map.module_path("embed") == "img_in"
    assert key_map.module_path("blocks.20.out") == "double.20.proj"
    for path in ("blocks.0.to_q", "blocks.1.out"):
        with pytest.raises(ValueError, match=f"{path} is not just renamed"):
            key_map.module_path(path)
    with pytest.raises(ValueError, match=r"blocks\.0\.nothing\.weight is not a name"):
        key_map.module_path("blocks.0.nothing")


def test_unknown_names_are_named_with_the_nearest_known_one():
    key_map = make_map()
    state = {"blocks.17.to_qq.bias": torch.zeros(1), "table": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"blocks\.17\.to_qq\.bias \(the nearest known name is blocks\.17\.to_q\.bias\)") as caught:
        key_map.to_released(state)
    assert "table" not in str(caught.value)
    with pytest.raises(ValueError, match=r"(?s)- a0\n.*- a4\n.*and 3 more"):
        key_map.to_diffusers({f"a{index}": torch.zeros(1) for index in range(8)})
    for name in ("blocks.x.out.weight", "blocks.0.out.scale", "embed.weight.more", "embedXweight"):
        assert key_map.unknown([name], "diffusers") == [name]


def test_parts_of_a_fused_tensor():
    key_map = make_map()
    parts = {f"blocks.0.to_{name}.weight": torch.zeros(2, 2) for name in "qk"}
    with pytest.raises(ValueError, match=r"double\.0\.qkv\.weight is made of .*; blocks\.0\.to_v\.weight missing"):
        key_map.to_released(parts)
    with pytest.raises(ValueError, match=r"have \[2, 9\] rows; they should be in proportion \[1, 4\]"):
        key_map.to_released({"single.0.q.bias": torch.zeros(2), "single.0.mlp.bias": torch.zeros(9)})
    with pytest.raises(UserError, match=r"double\.0\.qkv\.bias has the shape \[7\]; its rows should be a multiple of 3"):
        key_map.to_diffusers({"double.0.qkv.bias": torch.zeros(7)})


def test_layout_of():
    key_map = make_map()
    released = ["img_in.weight", "double.0.qkv.weight", "double.0.proj.bias"]
    prefixed = [f"model.diffusion_model.{key}" for key in released]
    assert key_map.layout_of(released) == "released"
    assert key_map.layout_of([*prefixed, *(f"vae.{index}" for index in range(50))]) == "released"
    assert key_map.stripped([*prefixed, "vae.0"]) == dict(zip(released, prefixed, strict=True))
    assert key_map.layout_of(["embed.weight", "blocks.0.to_q.weight", "stranger"]) == "diffusers"
    assert key_map.layout_of(["embed.weight", "stranger", "stranger.2"]) is None
    assert key_map.layout_of([]) is None


def test_ignored_names_are_left_out():
    key_map = make_map()
    assert key_map.to_released({"blocks.3.unused": torch.zeros(1)}) == {}
    assert key_map.to_diffusers({"blocks.3.unused": torch.zeros(1)}) == {}
    assert key_map.diffusers_names("blocks.3.unused", "diffusers") == []


@pytest.mark.parametrize(
    ("path", "separator", "expected"),
    [
        ("double.3.qkv", ".", ModulePlace("double.3.qkv", "released", ("blocks.3.to_q", "blocks.3.to_k", "blocks.3.to_v"))),
        ("double_12_qkv", "_", ModulePlace("double.12.qkv", "released", ("blocks.12.to_q", "blocks.12.to_k", "blocks.12.to_v"))),
        ("blocks_12_to_k", "_", ModulePlace("blocks.12.to_k", "diffusers", ("blocks.12.to_k",))),
        ("single.0.linear1", ".", ModulePlace("single.0.linear1", "released", ("single.0.q", "single.0.mlp"))),
        ("blocks_1_out", "_", ModulePlace("blocks.1.out", "diffusers", ("blocks.1.out",))),
        ("img_in", "_", ModulePlace("img_in", "released", ("embed",))),
        ("double_3_qkv", ".", None),
        ("double.3.qkv", "_", None),
        ("double.x.qkv", ".", None),
        ("modulation", ".", None),  # a tensor, not a module
    ],
)
def test_the_module_that_a_path_means(path, separator, expected):
    """Without a list of the model's modules, also where the parts are joined by ``_``."""
    assert make_map().place_of(path, separator) == expected
