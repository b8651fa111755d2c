"""``train.py --check`` and ``--report`` from a config on, with tiny models and real pictures."""

import logging
import shutil
from pathlib import Path

import pytest
import tomli_w
import torch
from PIL import Image

from models import load_family
from models.check import PageRequest, check
from models.sdxl.tiny import write_tiny as write_sdxl
from tests.utils.report.reading import ReadPage, difference, levels, read_page
from utils.config.load import load_config
from utils.data.cache import DatasetCache
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.sources.scan import scan
from utils.data.values import Bucket
from utils.errors import UserError

CPU = torch.device("cpu")
LONG = "a very long caption about coffee, " * 40


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def pictures(assets, tmp_path) -> Path:
    folder = tmp_path / "secret place" / "pictures"
    folder.mkdir(parents=True)
    for name, caption in {"astronaut.png": "a portrait", "coffee.png": LONG, "rocket.jpg": "<script>a rocket"}.items():
        shutil.copy(assets.images[name], folder)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def config_of(folder: Path, path: Path, dataset: dict, **changes):
    (folder / "data.toml").write_text(tomli_w.dumps(dataset))
    settings = {
        "output_dir": str(folder / "runs"),
        "run_name": "my run",
        "dataset": str(folder / "data.toml"),
        "epochs": 2,
        "gradient_accumulation_steps": 2,
        "micro_batch_size_per_gpu": 2,
        "model": {"type": "wan", "path": str(path), "dtype": "float32"},
        "adapter": {"rank": 4},
        "optimizer": {"type": "adamw", "lr": 1e-3},
        **changes,
    }
    (folder / "run.toml").write_text(tomli_w.dumps(settings))
    return load_config(folder / "run.toml", lambda name: load_family(name).Options)


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    load_family("wan").write_tiny("wan-t2v", folder, "diffusers", seed=0)
    return folder


def checked(loaded, caplog, page: PageRequest | None = None) -> str:
    with caplog.at_level(logging.INFO):
        assert check(loaded, page) == 0
    return caplog.text


def rows(said: str, title: str) -> list[list[str]]:
    """The cells of a table in the log: those of its headings first."""
    lines = said[said.index(f"{title}\n") :].splitlines()[1:]
    table = []
    for line in lines:
        if not line.startswith(("|", "+")):
            break
        table += [[cell.strip() for cell in line.strip("|").split("|")]] if line.startswith("|") else []
    return table


def test_the_tables_of_a_check(assets, pictures, tmp_path, caplog):
    """Of SDXL, whose two encoders count alike."""
    write_sdxl("sdxl", tmp_path / "model", "diffusers", seed=0, tokenizer=assets.clip_tokenizer)
    model = {"type": "sdxl", "path": str(tmp_path / "model"), "max_prompt_chunks": 1}
    dataset = {"resolutions": [256], "enable_ar_bucket": True, "directory": [{"path": str(pictures), "num_repeats": 3}]}
    said = checked(config_of(tmp_path, tmp_path / "model", dataset, model=model), caplog)
    directories = rows(said, "directories")
    assert directories[0][:5] == ["directory", "pictures", "clips", "samples", "an epoch"]
    assert directories[1][:5] == ["pictures", "3", "0", "3", "9"]
    buckets = rows(said, "buckets (width x height x frames)")
    assert buckets[0] == ["bucket", "tokens", "samples", "an epoch", "batch size", "batches", "shown again"]
    assert buckets[1:] == [
        ["256x256x1", "1024", "1", "3", "2", "2", "1"],
        ["320x192x1", "960", "2", "6", "2", "3", "0"],
        ["all", "", "3", "9", "", "5", "1"],
    ]
    [_, captions] = rows(said, "length of the different captions in tokens, with those of the encoder's template and ends")
    assert captions[:2] == ["clip_l, clip_g", "3"]
    assert captions[-2:] == ["77", "1"]
    assert f"pictures/coffee.png: {int(captions[4]) - 77} of {captions[4]} tokens are cut off" in said
    assert "3 steps per epoch, 6 steps in all" in said
    assert "the config is good" in said


def test_no_gpu_and_no_weights_are_needed(pictures, wan, tmp_path, caplog, monkeypatch):
    from utils.weights import tensor_files

    def refused(*arguments, **settings):
        raise AssertionError("weights are read")

    monkeypatch.setattr(torch.Tensor, "cuda", refused)
    monkeypatch.setattr(tensor_files.SafetensorsFile, "read", refused)
    loaded = config_of(tmp_path, wan, {"resolutions": [64], "directory": [{"path": str(pictures)}]})
    assert "the config is good" in checked(loaded, caplog, PageRequest(tmp_path / "page"))


def test_a_terminal_gets_colours_and_its_width(pictures, wan, tmp_path, caplog, monkeypatch):
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    loaded = config_of(tmp_path, wan, {"resolutions": [64], "directory": [{"path": str(pictures)}]})
    assert "64x64x1" not in checked(loaded, caplog)
    assert "\x1b[" in terminal.getvalue()
    assert "64x64x1" in terminal.getvalue()


def page_of(loaded, caplog, tmp_path, **settings) -> ReadPage:
    said = checked(loaded, caplog, PageRequest(tmp_path / "page", **settings))
    assert str(tmp_path / "page/index.html") in said
    text = (tmp_path / "page/index.html").read_text()
    assert "secret place" not in text
    assert str(tmp_path) not in text
    return read_page(tmp_path / "page/index.html")


def test_a_report_of_training_and_held_out_data(pictures, wan, tmp_path, caplog):
    held_out = tmp_path / "held_out.toml"
    held_out.write_text(tomli_w.dumps({"resolutions": [48], "directory": [{"path": str(pictures)}]}))
    dataset = {"resolutions": [64], "directory": [{"path": str(pictures)}], "caption_dropout": 0.25}
    evaluation = {"eval_datasets": [{"name": "unseen", "config": str(held_out)}], "eval_every_n_epochs": 1}
    page = page_of(config_of(tmp_path, wan, dataset, **evaluation), caplog, tmp_path)
    assert [key for key in page.order if "@64x64x1" in key] == sorted(
        f"pictures/{path.name}@64x64x1" for path in pictures.glob("*.[pj]*")
    )
    assert len(page.cards) == 6
    assert page.cards["pictures/rocket.jpg@64x64x1"].captions == [("75 %", "<script>a rocket", []), ("25 %", "", [])]
    assert page.cards["pictures/rocket.jpg@48x48x1"].captions == [("", "<script>a rocket", [])]
    assert page.cards["pictures/coffee.png@48x48x1"].captions[0][2][0].startswith("text: the last ")
    assert page.links == ["#training-64x64x1", "#unseen-48x48x1"]
    assert "3 steps per epoch" not in page.text
    assert "1 steps per epoch" in page.text


def test_decoded_from_the_cache(assets, pictures, wan, tmp_path, caplog):
    """What stands there is decode(encode(pixels)), computed by hand; and what is not encoded yet is said so."""
    shutil.copy(assets.clips["bikes.mp4"], pictures)
    (pictures / "bikes.txt").write_text("people on bikes")
    dataset = {"resolutions": [64], "frame_buckets": [1, 9], "directory": [{"path": str(pictures)}]}
    loaded = config_of(tmp_path, wan, dataset)
    page = page_of(loaded, caplog, tmp_path, decode=True)
    assert len(page.cards) == 4
    for card in page.cards.values():
        assert card.strips["decoded from the cache"] == []
        assert "not in the cache yet" in card.text

    family = load_family("wan")(loaded.run.model)
    encoders = family.encoders()
    samples = scan(loaded.dataset, family.size_rules, hash_cache=None, controls=family.controls, caption_seed=0).samples
    later = next(sample for sample in samples if sample.file.name == "rocket.jpg")
    encoded = [sample for sample in samples if sample is not later]
    DatasetCache(tmp_path / "runs/cache").build(encoded, encoders, device=CPU)
    page = page_of(loaded, caplog, tmp_path, decode=True)
    assert "not in the cache yet" in page.cards[later.key].text
    vae = encoders[0]
    vae.load(CPU)
    for sample in encoded:
        pixels = load_pixels(sample.file, sample.bucket, sample.fps, sample.first_frame)
        [fields] = vae.encode([EncodeItem("by hand", pixels=pixels)])
        by_hand = vae.decode(fields["latents"])
        card = page.cards[sample.key]
        places = [0, 2, 3, 5, 6, 8] if sample.bucket.frames == 9 else [0]
        assert len(card.strips["decoded from the cache"]) == len(places)
        for place, decoded, seen in zip(
            places, card.strips["decoded from the cache"], card.strips["as the model sees it"], strict=True
        ):
            # A random VAE gives back something else than it got, with grain that JPEG blurs.
            assert difference(decoded, levels(by_hand[:, place])) < 0.25 * difference(decoded, levels(pixels[:, place]))
            assert difference(seen, levels(pixels[:, place])) < 4


def test_skipped_files_are_in_both(pictures, wan, tmp_path, caplog):
    (pictures / "broken.png").write_bytes((pictures / "astronaut.png").read_bytes()[:5000])
    (pictures / "broken.txt").write_text("a broken picture")
    Image.new("RGB", (20, 20)).save(pictures / "bare.png")
    masks = pictures.with_name("masks")
    masks.mkdir()
    Image.new("L", (40, 20)).save(masks / "coffee.png")
    dataset = {"resolutions": [64], "directory": [{"path": str(pictures), "mask_path": str(masks)}]}
    with pytest.raises(UserError, match=r"(?s)bare\.png.*broken\.png|broken\.png.*bare\.png"):
        check(config_of(tmp_path, wan, dataset), PageRequest(tmp_path / "page"))
    assert list((tmp_path / "page").iterdir()) == []
    loaded = config_of(tmp_path, wan, {**dataset, "on_bad_sample": "skip"})
    page = page_of(loaded, caplog, tmp_path)
    [named] = [entries for title, entries in page.lists.items() if title.startswith("skipped")]
    assert [entry.split(":")[0] for entry in sorted(named)] == [f"pictures/{name}.png" for name in ("bare", "broken", "coffee")]
    assert "its mask masks/coffee.png: it has 40x20 pixels" in max(named)
    assert [entry for entry in named if f"  {entry}" not in caplog.text] == []
    assert len(page.cards) == 2


def test_duplicates_and_what_is_enlarged(assets, pictures, wan, tmp_path, caplog):
    shutil.copy(pictures / "astronaut.png", pictures / "twin.png")
    (pictures / "twin.txt").write_text("the same")
    small = Image.open(pictures / "coffee.png").resize((100, 80))
    small.save(pictures / "small.png")
    (pictures / "small.txt").write_text("small")
    dataset = {"resolutions": [256], "directory": [{"path": str(pictures)}]}
    page = page_of(config_of(tmp_path, wan, dataset), caplog, tmp_path)
    [duplicates] = [entries for title, entries in page.lists.items() if title.startswith("duplicates")]
    assert duplicates == ["pictures/astronaut.png: the same file as pictures/twin.png"]
    [enlarged] = [entries for title, entries in page.lists.items() if title.startswith("enlarged")]
    assert enlarged == ["pictures/small.png in 256x256x1: 3.20 times"]
    card = page.cards["pictures/small.png@256x256x1"]
    assert "enlarged 3.20 times" in card.facts
    assert "20 % cropped" in card.facts
    seen = load_pixels(DataFile(pictures / "small.png"), Bucket(256, 256, 1))
    assert difference(card.strips["as the model sees it"][0], levels(seen[:, 0])) < 4


def test_a_folder_that_cannot_be_used_is_said_before_anything_takes_long(wan, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("mine")
    loaded = config_of(tmp_path, wan, {"resolutions": [64], "directory": [{"path": str(tmp_path / "missing")}]})
    with pytest.raises(UserError, match="name another folder"):
        check(loaded, PageRequest(tmp_path / "page"))
    assert (tmp_path / "page/index.html").read_text() == "mine"


def test_other_ranks_say_nothing(pictures, wan, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    loaded = config_of(tmp_path, wan, {"resolutions": [64], "directory": [{"path": str(pictures)}]})
    assert check(loaded, PageRequest(tmp_path / "page")) == 0
    assert not (tmp_path / "page").exists()
