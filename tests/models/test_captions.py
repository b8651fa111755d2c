"""Caption variants through real text encoders: what the cache holds of each is what the encoder makes of its text alone."""

import shutil
from pathlib import Path

import pytest
import torch

from models import load_family
from models.qwen_image import tiny as qwen_image
from models.sdxl import tiny as sdxl
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.batches.loader import BatchLoader
from utils.data.batches.order import MicroBatchPlan
from utils.data.batches.workers import WorkerPool
from utils.data.cache import DatasetCache
from utils.data.captions.variants import as_shown, texts_of, with_caption
from utils.data.encoders import ConditionEncoder, EncodeItem
from utils.data.media.pixels import load_pixels
from utils.data.sources.scan import scan
from utils.data.values import Bucket, Sample
from utils.draw import Draw

CPU = torch.device("cpu")
SETTINGS = {"shuffle_tags": True, "keep_tokens": 1, "caption_variants": 3, "caption_dropout": 0.3, "trigger_word": "sks"}


@pytest.fixture
def pictures(assets, tmp_path: Path) -> Path:
    """Two pictures with captions that vary, and another picture beside each."""
    for name, (picture, control, caption) in {
        "a": ("astronaut.png", "chelsea.png", "a portrait, an astronaut, a flag, NASA"),
        "b": ("coffee.png", "rocket.jpg", "a café, a cup of coffee, 自行车, a table"),
    }.items():
        for folder, file in (("pictures", picture), ("controls", control)):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(assets.images[file], tmp_path / folder / f"{name}{Path(file).suffix}")
        (tmp_path / "pictures" / f"{name}.txt").write_text(caption)
    return tmp_path


def fresh(encoder: ConditionEncoder, sample: Sample) -> dict[str, torch.Tensor]:
    """Encoded alone, without the cache, by an encoder that is loaded."""
    size = Bucket(sample.bucket.width, sample.bucket.height, 1)
    controls = tuple(load_pixels(control.file, size) for control in sample.controls)
    item = EncodeItem("alone", caption=sample.caption, controls=controls if "controls" in encoder.reads else ())
    [fields] = encoder.encode([item])
    return fields


@pytest.mark.parametrize(("name", "variant"), [("sdxl", "sdxl"), ("qwen_image", "qwen-image-edit-plus")])
def test_every_variant_is_encoded_as_if_it_were_alone(name: str, variant: str, assets, pictures: Path):
    # SDXL with CLIP's real tokenizer; the edit model reads a caption together with its control picture.
    if name == "sdxl":
        sdxl.write_tiny(variant, pictures / "model", "diffusers", seed=0, tokenizer=assets.clip_tokenizer)
    else:
        qwen_image.write_tiny(variant, pictures / "model", "diffusers", seed=0)
    Family = load_family(name)
    family = Family(Family.Options(type=name, path=pictures / "model", dtype="float32"))
    directory = DirectoryConfig(path=pictures / "pictures", control_path=None if name == "sdxl" else pictures / "controls")
    dataset = DatasetConfig(resolutions=[64, 96], directory=[directory], **SETTINGS)
    samples = scan(dataset, family.size_rules, hash_cache=None, controls=family.controls, caption_seed=5).samples
    encoders = [encoder for encoder in family.encoders() if "caption" in encoder.reads]
    cache = DatasetCache(pictures / "cache")
    report = cache.build(samples, encoders, device=CPU, batch_size=2)
    # Three variants of each picture, whatever its sizes; the empty caption once, or once for each control picture at each size.
    per_encoder = 2 * 3 + 1 if name == "sdxl" else 4 * (3 + 1)
    assert [part.encoded for part in report.encoders] == [per_encoder] * len(encoders)

    expected: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for encoder in encoders:
        encoder.load(CPU)
    for sample in samples[::3]:
        for each in (with_caption(sample, text) for text in texts_of(sample)):
            assert each.caption == "" or each.caption.startswith("sks, a ")
            made = [fresh(encoder, each) for encoder in encoders]
            expected[each.key, each.caption] = {field: value for fields in made for field, value in fields.items()}
            found = cache.read(each, encoders)
            assert found.keys() == expected[each.key, each.caption].keys()
            assert all(torch.equal(value, expected[each.key, each.caption][field]) for field, value in found.items())

    loader, sample = BatchLoader(cache, samples, encoders, family.prepare_inputs, WorkerPool(0)), samples[0]
    seen = set()
    for epoch in range(12):
        batch = loader.read(plan := MicroBatchPlan.single(0, sample.key), draw := Draw(5, epoch))
        caption = as_shown(sample, plan.keys[0], draw).caption
        assert all(torch.equal(batch.fields[field][0], value) for field, value in expected[sample.key, caption].items())
        seen.add(caption)
    assert len(seen) > 2
