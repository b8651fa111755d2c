"""Whole runs with an adapter of another kind than LoRA, on some of the blocks."""

import torch
from safetensors.torch import load_file

ADAPTER = {"type": "dora", "rank": 4, "alpha": 6.0, "layers": "1-2", "override": [{"modules": ["attn1.to_q"], "rank": 2}]}


def test_a_dora_is_trained_exported_and_taken_up_again_on_merged_weights(tiny, workspace):
    model = tiny("wan-t2v")
    common = {"max_steps": 2, "gradient_accumulation_steps": 2}
    said = workspace.train(workspace.config("first", model, adapter=ADAPTER, pipeline_stages=2, **common), processes=2)
    assert "adapter: dora of rank 2, 4 on 20 modules" in said
    [file] = workspace.run("first").glob("exports/*/*.safetensors")
    first = load_file(file)
    modules = {key.partition(".dora_scale")[0] for key in first if key.endswith(".dora_scale")}
    assert {module.split(".")[2] for module in modules} == {"1", "2"}
    assert len(modules) == 20
    assert first["diffusion_model.blocks.1.self_attn.q.lora_A.weight"].shape[0] == 2

    # On weights to which it was added by half, which tell what the file's magnitudes mean.  Nothing is learnt.
    again = workspace.config(
        "again",
        model,
        model={"type": "wan", "path": str(model), "dtype": "float32", "merge_adapters": [{"path": str(file), "weight": 0.5}]},
        adapter={**ADAPTER, "alpha": 3.0, "init_from": str(file)},
        optimizer={"type": "sgd", "lr": 0.0},
        **common,
    )
    workspace.train(again)
    [file] = workspace.run("again").glob("exports/*/*.safetensors")
    for key, tensor in load_file(file).items():
        assert torch.allclose(tensor, first[key], rtol=1e-5, atol=1e-7), key
