"""Every variant's exports: a LoRA that diffusers' loader reads whole, and a full model that reads back as it was."""

import importlib

import pytest
import torch

from models import family_names, load_family
from tests.distributed.engine_worker import perturbed
from utils.adapters.manager import AdapterManager, adaptable_modules, trainable_parameters
from utils.config.schema import AdapterConfig
from utils.draw import Draw
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter, export_full
from utils.pipeline.layer import Stream
from utils.pipeline.stage_weights import fill_stage
from utils.weights.named import WeightSource

VARIANTS = [(name, variant) for name in family_names() for variant in load_family(name).variants]
FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)
CPU = torch.device("cpu")


@pytest.fixture(params=VARIANTS, ids=[variant for _, variant in VARIANTS])
def opened(request, tmp_path):
    """A family on a tiny model of one variant, and its reference."""
    name, variant = request.param
    Family = load_family(name)
    Family.write_tiny(variant, tmp_path / "model", "diffusers", seed=0)
    reference = importlib.import_module(f"tests.models.{name}.reference")
    options = getattr(reference, "OPTIONS", {}).get(variant, {})
    return Family(Family.Options(type=name, path=tmp_path / "model", dtype="float32", **options)), reference


def filled(family, adapter: AdapterManager | None):
    """The transformer with its weights and, if there is one, an adapter that changes what it computes."""
    with torch.device("meta"):
        transformer = family.build_transformer()
        if adapter:
            adapter.attach(transformer)
        layers = family.layers(transformer)
    values = perturbed(adapter.first_values(trainable_parameters(transformer).items(), 0)) if adapter else {}
    fill_stage(transformer, layers, family.weights(), values, CPU)
    return transformer, layers, values


def layered(layers, inputs) -> torch.Tensor:
    stream = Stream(inputs)
    with torch.no_grad():
        for layer in layers:
            stream = layer.eval()(stream)
    return stream["prediction"]


def test_a_lora_loads_whole_in_diffusers_and_computes_the_same(opened, tmp_path, measured):
    family, reference = opened
    adapter = AdapterManager(AdapterConfig(rank=4, alpha=10.0), family.adapter_targets)
    _, layers, values = filled(family, adapter)
    inputs = family.prepare_inputs(reference.batch(family, 0), Draw(3, 0)).inputs
    ours = layered(layers, inputs)
    file = export_adapter(
        tmp_path,
        "lora",
        values,
        expected={name: value.shape for name, value in values.items()},
        key_map=family.key_map(),
        fmt=family.lora_format,
        scales=dict.fromkeys(modules_of(values), 10.0 / 4),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )
    pipeline = reference.PIPELINES[family.variant].from_pretrained(tmp_path / "model")
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    with torch.no_grad():
        plain = reference.predict(network.eval(), inputs)
        assert (plain - ours).abs().max() > 1e-3, "the adapter changes nothing, so nothing would be shown"
        pipeline.load_lora_weights(file, adapter_name="trained")
        loaded = [name for name, _ in network.named_modules() if name.endswith("lora_A.trained")]
        assert len(loaded) == len(values) // 2
        difference = (reference.predict(network, inputs) - ours).abs().max()
    measured(family.variant, "lora", difference)
    assert difference <= 1e-5

    # And by our own reader, as a run that starts from it would.
    read = read_adapter(file, adaptable_modules(family.weights()), family.key_map())
    modules = {name.partition(".lora_")[0] for name in values}
    assert read.scales.keys() == modules
    for module in modules:
        expected = 2.5 * values[f"{module}.lora_B.weight"].flatten(1) @ values[f"{module}.lora_A.weight"].flatten(1)
        found = read.weights[f"{module}.lora_B.weight"].flatten(1) @ read.weights[f"{module}.lora_A.weight"].flatten(1)
        assert torch.allclose(read.scales[module] * found, expected, atol=1e-5)


def test_a_full_export_reads_back_as_it_was(opened, tmp_path, measured):
    family, _ = opened
    transformer, _, _ = filled(family, None)
    weights = dict(transformer.state_dict())
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    file = export_full(
        tmp_path,
        "full",
        weights,
        expected=shapes,
        key_map=family.key_map(),
        dtype=torch.float32,
        family=family.export_metadata(),
        facts=FACTS,
    )
    source = WeightSource(file, family.key_map())
    assert source.names().keys() == weights.keys()
    different = [name for name, value in weights.items() if not torch.equal(source.read(name), value)]
    measured(family.variant, "full", len(different))
    assert not different
