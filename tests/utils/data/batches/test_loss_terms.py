"""Masks and weights in the targets, against numbers made by hand."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.utils.data.encode_worker import RULES, Pooling
from tests.utils.data.orders import BUCKETS, sample
from utils.config.dataset import DatasetConfig, DirectoryConfig
from utils.data.batches.loader import BatchLoader
from utils.data.batches.loss_terms import target_mask, with_loss_terms
from utils.data.batches.order import MicroBatchPlan
from utils.data.batches.workers import WorkerPool
from utils.data.cache import DatasetCache
from utils.data.masks import MaskEncoder
from utils.data.sources.scan import scan
from utils.data.values import Batch, MicroBatch, Sample
from utils.diffusion.losses import averaged
from utils.draw import Draw


def micro_batch(*shape: int, **target: Tensor) -> MicroBatch:
    return MicroBatch({"x": torch.randn(shape)}, {"velocity": torch.randn(shape), **target})


def test_a_mask_is_averaged_to_the_size_of_the_target():
    mask = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.5]]])
    assert torch.equal(target_mask(mask, (2, 4)), mask)
    assert torch.equal(target_mask(mask, (1, 2)), torch.tensor([[[0.75, 0.125]]]))
    assert torch.equal(target_mask(mask, (1, 2, 4)), mask[None])


def test_frames_are_averaged_to_latent_frames_and_the_first_stands_for_itself():
    """Nine frames of one pixel are three latent frames: 0, 1 to 4, 5 to 8; with one frame each, they stay."""
    mask = torch.tensor([1.0, 1, 0, 0, 0, 1, 1, 0.5, 0.5]).view(9, 1, 1)
    assert target_mask(mask, (3, 1, 1)).flatten().tolist() == [1.0, 0.25, 0.75]
    assert target_mask(mask, (9, 1, 1)).flatten().tolist() == mask.flatten().tolist()
    assert target_mask(mask[:1] / 2, (3, 1, 1)).flatten().tolist() == [0.5] * 3


def test_a_mask_that_does_not_fit_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="a mask of"):
        target_mask(torch.ones(1, 3, 4), (2, 2))
    with pytest.raises(AssertionError, match="a mask of 6 frames for 3 latent frames"):
        target_mask(torch.ones(6, 2, 2), (3, 2, 2))


@pytest.mark.parametrize("shape", [(2, 4, 3, 6), (2, 4, 5, 3, 6)])
def test_what_has_neither_mask_nor_weight_is_not_touched(shape):
    made = micro_batch(*shape)
    for masks in ([None, None], [torch.ones(1, 3, 6), None]):
        found = with_loss_terms(made, masks, [1.0, 1.0])
        assert found.target.keys() == {"velocity"}
        assert found.target["velocity"] is made.target["velocity"]
        assert found.inputs is made.inputs


def test_a_sample_without_a_mask_counts_everywhere():
    made, mask = micro_batch(2, 4, 3, 6), torch.rand(1, 3, 6)
    found = with_loss_terms(made, [None, mask], [1.0, 1.0]).target["mask"]
    assert found.shape == (2, 1, 3, 6)
    assert torch.equal(found[0], torch.ones(1, 3, 6))
    assert torch.equal(found[1], mask)


def test_a_mask_that_is_there_is_multiplied():
    """As that of Wan TI2V, which leaves out the first latent frame."""
    rest = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1).expand(2, 1, 2, 1, 1)
    mask = torch.rand(5, 3, 6)
    found = with_loss_terms(micro_batch(2, 4, 2, 3, 6, mask=rest), [mask, None], [1.0, 1.0]).target["mask"]
    assert not found[:, :, 0].any()
    assert torch.equal(found[0, 0, 1], mask[1:].mean(0))
    assert torch.equal(found[1, 0, 1], torch.ones(3, 6))


def test_weights_are_multiplied_with_those_that_are_there():
    """As those of SDXL's min-SNR."""
    found = with_loss_terms(micro_batch(2, 4, 3, 6), [None, None], [1.0, 0.25]).target
    assert found.keys() == {"velocity", "weights"}
    assert found["weights"].tolist() == [1.0, 0.25]
    own = torch.tensor([0.5, 2.0])
    assert with_loss_terms(micro_batch(2, 4, 3, 6, weights=own), [None] * 2, [1.0, 0.25]).target["weights"].tolist() == [0.5, 0.5]


def test_the_loss_is_that_of_the_masked_areas_by_their_weights():
    """Each sample's mean over its own area, whatever its size; then the mean of the samples, by weight."""
    made = micro_batch(2, 4, 3, 6)
    left, corner = torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)
    left[..., :3], corner[..., 0, 0] = 1, 0.5
    target = with_loss_terms(made, [left, corner], [1.0, 0.25]).target
    prediction = torch.randn(2, 4, 3, 6)
    square = (prediction - made.target["velocity"]).square()
    expected = (square[0, :, :, :3].mean() + 0.25 * square[1, :, 0, 0].mean()) / 2
    found = averaged(prediction, target["velocity"], mask=target["mask"], weights=target["weights"])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Fields:
    """Stands for the cache: latents of each sample, and a mask of those that have one."""

    def __init__(self, masks: dict[str, Tensor]):
        self.masks = masks

    def read(self, sample: Sample, encoders: object) -> dict[str, Tensor]:
        fields = {"latents": torch.full((4, 1, 8, 8), float(Path(sample.key.split("@")[0]).stem.removeprefix("data/")))}
        return fields | ({"mask": self.masks[sample.key]} if sample.key in self.masks else {})


def test_the_loader_adds_them_behind_the_family_and_evaluation_leaves_out_the_weights():
    samples = [sample(number, BUCKETS[0], loss_weight=weight) for number, weight in enumerate((1.0, 0.5, 1.0))]
    mask = torch.rand(1, 8, 8)
    seen: list[set[str]] = []

    def prepare(batch: Batch, draw: Draw) -> MicroBatch:
        seen.append(set(batch.fields))
        latents = torch.stack([value[:, 0] for value in batch.fields["latents"]])
        return MicroBatch({"x": latents}, {"velocity": -latents})

    loader = BatchLoader(Fields({samples[0].key: mask}), samples, [], prepare, WorkerPool(0))
    both, plain = MicroBatchPlan(0, ((samples[0].key, 0), (samples[1].key, 0))), MicroBatchPlan(1, ((samples[2].key, 0),))
    trained, held_out = (loader.micro_batch(both, draw).target for draw in (Draw(0, 0), Draw(0, -1, fixed_time=0.5)))
    assert trained["weights"].tolist() == [1.0, 0.5]
    assert held_out.keys() == {"velocity", "mask"}
    for target in (trained, held_out):
        assert torch.equal(target["mask"], torch.stack([mask, torch.ones(1, 8, 8)]))
    assert loader.micro_batch(plain, Draw(0, 0)).target.keys() == {"velocity"}
    assert seen == [{"latents"}] * 3


def test_masks_of_real_files_reach_the_target(mixed: Path, tmp_path: Path):
    """White in the left half: of a picture, and of a clip whose nine frames are three in the target."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, size in (("astronaut", (512, 512)), ("bikes", (640, 272))):
        mask = Image.new("L", size, "black")
        mask.paste("white", (0, 0, size[0] // 2, size[1]))
        mask.save(masks / f"{name}.png")
    directory = DirectoryConfig(path=mixed, mask_path=masks, loss_weight=0.5)
    dataset = DatasetConfig(resolutions=[64], frame_buckets=[1, 9], directory=[directory])
    samples = {sample.file.stem: sample for sample in scan(dataset, RULES, hash_cache=None).samples}
    encoders = [Pooling(), MaskEncoder()]
    cache = DatasetCache(tmp_path / "cache")
    cache.build(list(samples.values()), encoders, device=torch.device("cpu"))

    def prepare(batch: Batch, draw: Draw) -> MicroBatch:
        latents = torch.stack([value.float()[:, ::4] for value in batch.fields["latents"]])
        return MicroBatch({}, {"velocity": latents})

    def target(*names: str) -> dict[str, Tensor]:
        return loader.micro_batch(MicroBatchPlan(0, tuple((samples[name].key, 0) for name in names)), Draw(0, 0)).target

    with WorkerPool(0) as workers:
        loader = BatchLoader(cache, list(samples.values()), encoders, prepare, workers)
        pictures, clip, without = target("astronaut", "coffee"), target("bikes"), target("carphone_pristine")
    assert pictures["mask"].shape == (2, 1, 1, 8, 8)
    assert clip["mask"].shape == (1, 1, 3, 8, 8)
    for found in (pictures["mask"][0], clip["mask"][0]):
        # Lanczos rings a little at the edge, which lies between two columns.
        assert (found[..., :3] - 1).abs().max() <= 0.02
        assert found[..., 5:].abs().max() <= 0.02
    assert torch.equal(pictures["mask"][1], torch.ones(1, 1, 8, 8))
    assert "mask" not in without
    assert pictures["weights"].tolist() == [0.5, 0.5]
