"""Every kind of adapter on one model of every family: against plain PEFT on the plain diffusers model, and as its file is read."""

import importlib
from collections.abc import Mapping
from types import ModuleType

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from models import family_names, load_family
from models.base import ModelFamily
from tests.distributed.engine_worker import perturbed
from tests.models.comfy_adapters import patched
from utils.adapters.manager import AdapterManager, adaptable_modules, trainable_parameters
from utils.config.schema import AdapterConfig
from utils.draw import Draw
from utils.errors import UserError
from utils.formats.adapter_files import read_adapter
from utils.formats.adapter_format import LoraFormat
from utils.formats.adapter_layouts import modules_of
from utils.formats.export import TrainingFacts, export_adapter
from utils.pipeline.layer import Stream
from utils.pipeline.stage_weights import fill_stage
from utils.weights.named import canonical_name

FACTS = TrainingFacts(step=1, epoch=1, samples=1, learning_rate=1e-3, seed=0)
RANK, ALPHA = 4, 10.0
TARGETS = {"sdxl": ["proj_in", "to_q", "to_out.0", "net.2", "conv1", "conv_shortcut", "downsamplers.0.conv"]}
"""By family, where the default would leave out kinds of modules that the family has."""
FUSED = {"flux2": r".*\.(to_[qkv]|add_[qkv]_proj)"}
"""Modules of the default targets that a family's files hold as one weight, under names that stand for the whole."""
DIFFUSERS_READS = {"flux2": ("lora", "lokr")}
"""Kinds that ``load_lora_weights`` of diffusers reads as they are meant, by family; of the others ``lora`` alone."""
PEFT: Mapping[str, type[PeftConfig]] = {"loha": LoHaConfig, "lokr": LoKrConfig}
KINDS = ("lora", "rslora", "dora", "loha", "lokr")


class Opened:
    """A tiny model of a family, with its reference."""

    def __init__(self, name: str, folder):
        self.name, self.folder = name, folder
        Family = load_family(name)
        variant = Family.variants[0]
        Family.write_tiny(variant, folder, "diffusers", seed=0)
        self.reference: ModuleType = importlib.import_module(f"tests.models.{name}.reference")
        options = getattr(self.reference, "OPTIONS", {}).get(variant, {})
        self.family: ModelFamily = Family(Family.Options(type=name, path=folder, dtype="float32", **options))
        micro_batch = self.family.prepare_inputs(self.reference.batch(self.family, 0), Draw(3, 0))
        self.inputs, self.target = micro_batch.inputs, micro_batch.target

    def config(self, kind: str) -> AdapterConfig:
        targets = TARGETS.get(self.name)
        # One block has another rank, another list of blocks another alpha.
        override = [{"modules": r"(.+?)\.1\..*", "rank": RANK // 2, "alpha": 3.0}]
        excluded = FUSED.get(self.name) if kind in ("loha", "lokr") else None
        return AdapterConfig(type=kind, rank=RANK, alpha=ALPHA, target_modules=targets, exclude_modules=excluded, override=override)

    def adapted(self, config: AdapterConfig, values: Mapping[str, Tensor] | None = None):
        """Manager, layers and weights of the adapter: ``values``, or such as after some training."""
        manager = AdapterManager(config, self.family.adapter_targets)
        with torch.device("meta"):
            transformer = self.family.build_transformer()
            manager.attach(transformer)
            layers = self.family.layers(transformer)
        base = self.family.weights()
        if values is None:
            values = perturbed(manager.first_values(trainable_parameters(transformer).items(), 0, base))
        fill_stage(transformer, layers, base, values, torch.device("cpu"))
        return manager, transformer, layers, values

    def layered(self, layers) -> Tensor:
        stream = Stream(self.inputs)
        for layer in layers:
            stream = layer.eval()(stream)
        return stream["prediction"]

    def plain(self) -> nn.Module:
        return self.reference.plain_model(self.folder).eval()

    def export(self, folder, manager: AdapterManager, values: Mapping[str, Tensor], fmt: LoraFormat | None = None):
        return export_adapter(
            folder,
            manager.config.type,
            values,
            expected={name: value.shape for name, value in values.items()},
            scales={module: manager.scale_of(module) for module in modules_of(values)},
            key_map=self.family.key_map(),
            fmt=fmt or self.family.lora_format,
            dtype=torch.float32,
            family=self.family.export_metadata(),
            facts=FACTS,
            base=self.family.weights().read,
        )


@pytest.fixture(scope="module", params=family_names())
def opened(request, tmp_path_factory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp("model"))


def in_plain_peft(opened: Opened, manager: AdapterManager, values: Mapping[str, Tensor]) -> nn.Module:
    """The plain diffusers model with PEFT's own adapter, of PEFT's patterns."""
    model = opened.plain()
    config, names = manager.config, modules_of(values)
    patterns = {
        "target_modules": names,
        "rank_pattern": {name: manager.size_of(name).rank for name in names},
        "alpha_pattern": {name: manager.size_of(name).alpha for name in names},
    }
    if config.type in PEFT:
        peft = PEFT[config.type](r=config.rank, alpha=config.alpha, **patterns)
    else:
        switches = {"use_rslora": config.type == "rslora", "use_dora": config.type == "dora"}
        peft = LoraConfig(r=config.rank, lora_alpha=config.alpha, **switches, **patterns)
    model.requires_grad_(False)
    inject_adapter_in_model(peft, model)
    for name, parameter in trainable_parameters(model).items():
        parameter.data.copy_(values[name])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients_equal_plain_peft_and_the_file_says_the_same_to_all_readers(opened, kind, tmp_path):
    manager, transformer, layers, values = opened.adapted(opened.config(kind))
    ours = opened.layered(layers)
    model = in_plain_peft(opened, manager, values)
    theirs = opened.reference.predict(model, opened.inputs)
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - opened.reference.predict(opened.plain(), opened.inputs)).abs().max() > 1e-3, "the adapter changes nothing"
    for output in (ours, theirs):
        opened.family.loss(Stream(prediction=output), opened.target).backward()
    expected = {canonical_name(name): parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in trainable_parameters(transformer).items()}
    assert found.keys() == expected.keys() == values.keys()
    norm = torch.stack([value.norm() for value in expected.values() if value is not None]).norm()
    for name, value in found.items():
        if value is not None:
            assert (value - expected[name]).norm() <= 1e-5 * max(expected[name].norm(), 1e-3 * norm), name

    manager.refuse_unwritable(modules_of(values), opened.family.key_map(), opened.family.lora_format)
    file = opened.export(tmp_path, manager, values)
    ours = ours.detach()
    assert (in_comfy(opened, file) - ours).abs().max() <= 1e-5

    base = opened.family.weights()
    read = read_adapter(file, adaptable_modules(base), opened.family.key_map(), base=base.read)
    again = manager.values_from(read, trainable_parameters(transformer).items(), file)
    assert again.keys() == values.keys()
    _, _, layers, _ = opened.adapted(manager.config, again)
    assert (opened.layered(layers).detach() - ours).abs().max() <= 1e-5


def in_comfy(opened: Opened, file) -> Tensor:
    """What ComfyUI's reader makes of the file, computed by the diffusers model."""
    family, fmt = opened.family, opened.family.lora_format
    state = {name: value.detach() for name, value in opened.plain().state_dict().items()}
    if fmt.names == "released":
        state = family.key_map().to_diffusers(
            patched(family.key_map().to_released(state), fmt.prefix, fmt.separator, load_file(file))
        )
    else:
        state = patched(state, fmt.prefix, fmt.separator, load_file(file))
    model = opened.plain()
    model.load_state_dict(state)
    with torch.no_grad():
        return opened.reference.predict(model, opened.inputs)


def in_diffusers(opened: Opened, file) -> Tensor:
    pipeline = opened.reference.PIPELINES[opened.family.variant].from_pretrained(opened.folder)
    network = getattr(pipeline, "transformer", None) or pipeline.unet
    pipeline.load_lora_weights(file, adapter_name="trained")
    with torch.no_grad():
        return opened.reference.predict(network.eval(), opened.inputs)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_diffusers_reads_the_kinds_that_the_documentation_says(opened, kind, tmp_path):
    manager, _, layers, values = opened.adapted(opened.config(kind))
    file = opened.export(tmp_path, manager, values)
    with torch.no_grad():
        ours = opened.layered(layers)
    if kind in DIFFUSERS_READS.get(opened.name, ("lora",)):
        assert (in_diffusers(opened, file) - ours).abs().max() <= 1e-5
        return
    # It refuses the file, or leaves out the magnitudes.  When this fails diffusers has learnt to read it, and the tables change.
    try:
        found = in_diffusers(opened, file)
    except ValueError:
        return
    assert kind == "dora"
    assert (found - ours).abs().max() > 1e-3


def test_diffusers_reads_a_dora_with_its_own_names_and_magnitudes(opened, tmp_path):
    manager, _, layers, values = opened.adapted(opened.config("dora"))
    prefix = "unet." if opened.name == "sdxl" else "transformer."
    file = opened.export(tmp_path, manager, values, LoraFormat(prefix, "diffusers", magnitude="lora_magnitude_vector"))
    with torch.no_grad():
        assert (in_diffusers(opened, file) - opened.layered(layers)).abs().max() <= 1e-5


def refusal(name: str, tmp_path, config: AdapterConfig) -> str:
    opened = Opened(name, tmp_path)
    manager = AdapterManager(config, opened.family.adapter_targets)
    with torch.device("meta"):
        transformer = opened.family.build_transformer()
        manager.attach(transformer)
    modules = modules_of(trainable_parameters(transformer))
    with pytest.raises(UserError) as raised:
        manager.refuse_unwritable(modules, opened.family.key_map(), opened.family.lora_format)
    return str(raised.value)


def test_what_a_familys_files_cannot_hold_is_refused_before_training(tmp_path):
    text = refusal("flux2", tmp_path / "lokr", AdapterConfig(type="lokr", rank=RANK))
    assert 'adapter.type = "lokr" on transformer_blocks.0.attn.to_q and ' in text
    assert "adapter.exclude_modules" in text
    text = refusal("flux2", tmp_path / "dora", AdapterConfig(type="dora", rank=RANK, target_modules=["to_q", "to_out.0"]))
    assert 'adapter.type = "dora" on transformer_blocks.0.attn.to_q' in text
    assert "give one to all modules that they share a weight with" in text
    # ComfyUI moves the rows of what is added, and not those of the magnitude.
    text = refusal("sd3", tmp_path / "moved", AdapterConfig(type="dora", rank=RANK, target_modules=["norm_out.linear"]))
    assert 'adapter.type = "dora" on norm_out.linear:' in text
