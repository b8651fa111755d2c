"""Both transformers of Wan 2.2 A14B in one model: which micro-batch goes where, and what comes out for each."""

import pytest
import torch

from models import load_family
from models.wan.experts import PREFIXES
from tests.models.wan import reference
from utils.diffusion.timesteps import TimestepDistribution
from utils.draw import Draw
from utils.errors import UserError

BOUNDARIES = {"wan22-t2v": 0.875, "wan22-i2v": 0.9}
EXPERTS = tuple(PREFIXES)
DISTRIBUTIONS = {
    "default": {},
    "shifted": {"shift": 8.0},
    "uniform": {"timestep_sample_method": "uniform", "shift": 1.0},
    "cut": {"min_t": 0.6, "max_t": 0.95, "shift": 5.0},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each variant."""
    root = tmp_path_factory.mktemp("wan22")
    for variant in BOUNDARIES:
        load_family("wan").write_tiny(variant, root / variant, "diffusers", seed=0)
    return root


@pytest.fixture
def family_of(models):
    def make(variant="wan22-t2v", **options):
        Family = load_family("wan")
        return Family(Family.Options(type="wan", path=models / variant, dtype="float32", **options))

    return make


def keys_of(index: int, count: int) -> list[str]:
    return [f"clip-{index}.{sample}#0" for sample in range(count)]


@pytest.mark.parametrize("options", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("variant", BOUNDARIES)
def test_every_micro_batch_is_whole_in_the_range_of_its_expert(family_of, variant, options):
    """And all of them together, and each place in the micro-batch for itself, have the configured distribution."""
    routing, boundary = family_of(variant, **options).routing, BOUNDARIES[variant]
    drawn = [routing.draw(keys_of(index, 3), Draw(1, index % 2)) for index in range(2000)]
    for expert, times in drawn:
        low, high = (boundary, 1.0) if expert == "high" else (0.0, boundary)
        assert max(low, options.get("min_t", 0.0)) <= min(times)
        assert max(times) <= min(high, options.get("max_t", 1.0))
    assert {expert for expert, _ in drawn} == set(EXPERTS)

    configured = TimestepDistribution(
        options.get("timestep_sample_method", "logit_normal"),
        shift=options.get("shift", 3.0),
        low=options.get("min_t", 0.0),
        high=options.get("max_t", 1.0),
    )
    share = sum(expert == "high" for expert, _ in drawn) / len(drawn)
    assert share == pytest.approx(routing.share_of_high, abs=4 * (0.25 / 2000) ** 0.5)
    for sample in range(3):
        times = torch.tensor([times[sample] for _, times in drawn], dtype=torch.float64)
        for place in torch.linspace(0.05, 0.95, 19).tolist():
            share = float((times <= configured.at(place)).double().mean())
            # Four standard deviations of 2000 independent draws.
            assert abs(share - place) <= 4 * (place * (1 - place) / 2000) ** 0.5, (sample, place)


def test_with_one_sample_it_is_the_plain_draw(family_of):
    both, plain = family_of(), family_of(expert="high", min_t=0.0, max_t=1.0)
    for index in range(200):
        [key] = keys_of(index, 1)
        expert, [t] = both.routing.draw([key], Draw(5, 0))
        assert t == plain.timesteps.at(Draw(5, 0).quantile(key, "timestep"))
        assert expert == ("high" if t >= 0.875 else "low")


def test_the_stream_names_the_expert_of_its_times(family_of):
    for variant, boundary in BOUNDARIES.items():
        family, seen = family_of(variant, shift=8.0), set()
        for index in range(40):
            batch = reference.batch(family, index % 2)
            draw = Draw(index, 0)
            inputs = family.prepare_inputs(batch, draw).inputs
            assert inputs["expert"].dtype is torch.int64
            assert inputs["expert"].shape == ()
            expert = EXPERTS[int(inputs["expert"])]
            assert ((inputs["t"] >= 1000 * boundary) == (expert == "high")).all()
            again = family.prepare_inputs(batch, draw).inputs
            assert again.keys() == inputs.keys()
            assert all(torch.equal(again[name], inputs[name]) for name in inputs)
            seen.add(expert)
        assert seen == set(EXPERTS)
        assert "expert" not in family_of(variant, expert="low").prepare_inputs(batch, draw).inputs


def test_fixed_quantiles_give_one_time_to_all_samples(family_of):
    family = family_of()
    for place in (0.1, 0.5, 0.9, 0.99):
        expert, times = family.routing.draw(keys_of(0, 3), Draw(0, -1, fixed_time=place))
        assert set(times) == {family.timesteps.at(place)}
        assert expert == ("high" if times[0] >= 0.875 else "low")


def test_limits_that_leave_one_expert_nothing(family_of):
    with pytest.raises(UserError, match=r"meet at 0\.875; set model\.expert = 'high' to train the other alone"):
        family_of(min_t=0.875)
    with pytest.raises(UserError, match=r"meet at 0\.9; set model\.expert = 'low' to train the other alone"):
        family_of("wan22-i2v", max_t=0.9)


@pytest.mark.parametrize("options", [{}, {"min_t": 0.3, "max_t": 0.95}], ids=["all", "cut"])
@pytest.mark.parametrize("variant", BOUNDARIES)
def test_each_file_says_what_a_run_of_its_expert_alone_would(family_of, variant, options):
    files = family_of(variant, **options).export_files()
    assert list(files) == ["_high_noise", "_low_noise"]
    for expert, file in zip(EXPERTS, files.values(), strict=True):
        low, high = (BOUNDARIES[variant], 1.0) if expert == "high" else (0.0, BOUNDARIES[variant])
        limits = {"min_t": max(low, options.get("min_t", 0.0)), "max_t": min(high, options.get("max_t", 1.0))}
        alone = family_of(variant, expert=expert, **limits)
        assert file.metadata == alone.export_metadata()
        assert file.prefix == PREFIXES[expert]
        assert {suffix: only.prefix for suffix, only in alone.export_files().items()} == {"": ""}


@pytest.mark.parametrize(
    ("name", "architecture", "suffix"),
    [
        ("style_high_noise.safetensors", None, "_high_noise"),
        ("wan2.2_t2v_A14B_LOW_style.safetensors", None, "_low_noise"),
        ("style.safetensors", "wan2.2-t2v-14b-low-noise/lora", "_low_noise"),
        ("style_high_noise.safetensors", "wan2.2-t2v-14b-high-noise/lora", "_high_noise"),
    ],
)
def test_which_expert_a_lora_is_for(family_of, tmp_path, name, architecture, suffix):
    metadata = {"modelspec.architecture": architecture} if architecture else {}
    assert family_of().export_file_of(tmp_path / name, metadata) == suffix
    assert family_of(expert="high").export_file_of(tmp_path / name, metadata) == ""


@pytest.mark.parametrize(
    ("name", "architecture", "reason"),
    [
        ("style.safetensors", "wan2.1-t2v-14b/lora", "neither its name nor its metadata tells"),
        ("style_low_noise.safetensors", "wan2.2-t2v-14b-high-noise/lora", "its name and its metadata tell different ones"),
    ],
)
def test_a_lora_of_an_unknown_expert(family_of, tmp_path, name, architecture, reason):
    with pytest.raises(UserError) as raised:
        family_of().export_file_of(tmp_path / name, {"modelspec.architecture": architecture})
    assert reason in str(raised.value)
    assert "name the file …_high_noise.safetensors or …_low_noise.safetensors" in str(raised.value)
