"""The page of ``--report``: its pictures are what encoders are given, its texts those of the data, and it needs nothing else."""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import load_family
from tests.utils.report.reading import difference, levels, read_page
from utils.data.encoders import ConditionEncoder
from utils.data.media.files import DataFile, content_of
from utils.data.media.pixels import load_alpha_mask, load_mask, load_pixels
from utils.data.sources.report import DirectoryReport, ScanReport
from utils.data.sources.scan import Scan
from utils.data.values import Bucket, Caption, Control, Framing, Reading, Sample, SizeRules
from utils.errors import UserError
from utils.report.findings import findings_of
from utils.report.page import refuse_folder, write_page
from utils.report.pictures import LONG_SIDE, NO_LOSS, evenly
from utils.stopping import Stopped

RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)
SEEN = "as the model sees it"


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> list[ConditionEncoder]:
    """Of an editing model, which looks at pictures and control pictures; never loaded."""
    folder = tmp_path_factory.mktemp("model")
    Family = load_family("qwen_image")
    Family.write_tiny("qwen-image-edit-plus", folder, "diffusers", seed=0)
    return Family(Family.Options(type="qwen_image", path=folder)).encoders()


def sample(path: Path, bucket: Bucket, **changes) -> Sample:
    file = DataFile(path)
    size = Image.open(path).size if path.suffix != ".mp4" else None
    settings = {"caption": "", "original_size": size, **changes}
    return Sample(f"data/{path.name}@{bucket}", file, content_of(file), bucket=bucket, **settings)


def scan_of(*samples: Sample, **report) -> Scan:
    return Scan(list(samples), ScanReport([DirectoryReport("data", Path("/somewhere/data"), **report)]))


def written(folder: Path, found: Scan, encoders, **settings):
    data = findings_of("training", found, RULES, settings.pop("counted", []))
    page = write_page(folder, "a title", "a model", [data], encoders=encoders, **{"items": 24, **settings})
    assert list(folder.iterdir()) == [page]
    return read_page(page)


@pytest.fixture
def folder(tmp_path) -> Path:
    refuse_folder(tmp_path / "page")
    return tmp_path / "page"


@pytest.fixture
def astronaut(assets) -> Path:
    return assets.images["astronaut.png"]


@pytest.mark.parametrize("framing", [Framing(), Framing(x=0.0), Framing((100, 50, 300, 150), y=0.2)], ids=str)
def test_a_picture_as_the_model_sees_it(assets, folder, encoders, framing):
    coffee = assets.images["coffee.png"]
    shown = sample(coffee, Bucket(96, 112, 1), framing=framing)
    [card] = written(folder, scan_of(shown), encoders).cards.values()
    [picture] = card.strips[SEEN]
    expected = [load_pixels(shown.file, shown.bucket, framing=each)[:, 0] for each in (framing, Framing(y=0.5, x=1.0))]
    near, far = (difference(picture, levels(pixels)) for pixels in expected)
    assert near < 4
    assert far > 4 * near
    # The file itself, small, and what is cut out of it.
    [whole] = card.strips["the file"]
    assert whole.shape == (75, 112, 3)
    assert difference(whole, np.asarray(Image.open(coffee).convert("RGB").resize((112, 75), Image.Resampling.LANCZOS))) < 4
    width, height = shown.original_size
    left, top, right, bottom = framing.box or (0, 0, width, height)
    sides = {name: card.crop[name] / 100 for name in ("left", "top", "width", "height")}
    assert left / width - 0.01 <= sides["left"] <= sides["left"] + sides["width"] <= right / width + 0.01
    assert top / height - 0.01 <= sides["top"] <= sides["top"] + sides["height"] <= bottom / height + 0.01
    assert sides["width"] * width / (sides["height"] * height) == pytest.approx(96 / 112, rel=0.02)


def test_a_large_picture_is_made_smaller(astronaut, folder, encoders):
    shown = sample(astronaut, Bucket(512, 384, 1))
    [card] = written(folder, scan_of(shown), encoders).cards.values()
    [picture] = card.strips[SEEN]
    assert max(picture.shape) == LONG_SIDE
    pixels = levels(load_pixels(shown.file, shown.bucket)[:, 0]).round().astype(np.uint8)
    expected = Image.fromarray(pixels).resize((LONG_SIDE, 210), Image.Resampling.LANCZOS)
    assert difference(picture, np.asarray(expected)) < 3


def test_a_clip_as_a_strip_with_its_first_and_its_last_frame(assets, folder, encoders):
    bucket = Bucket(112, 48, 33)
    shown = sample(assets.clips["bikes.mp4"], bucket, fps=16.0, first_frame=24, original_size=(640, 272))
    [card] = written(folder, scan_of(shown), encoders).cards.values()
    pixels = load_pixels(shown.file, bucket, 16.0, 24)
    places = [0, 6, 13, 19, 26, 32]
    assert evenly(33, 6) == places
    assert len(card.strips[SEEN]) == 6
    for picture, place in zip(card.strips[SEEN], places, strict=True):
        assert difference(picture, levels(pixels[:, place])) < 4
    assert difference(card.strips[SEEN][0], levels(pixels[:, -1])) > 8  # it moves
    assert card.labels[:6] == [f"frame {place + 1} of 33, {(24 + place) / 16:.2f} s" for place in places]
    assert "33 frames at 16 fps from 1.50 s on" in card.facts
    whole = load_pixels(shown.file, Bucket(112, 48, 1), 16.0, 24)
    assert difference(card.strips["the file"][0], levels(whole[:, 0])) < 4


def test_masks_control_pictures_and_what_lies_behind(assets, tmp_path, folder, encoders):
    mask = tmp_path / "mask.png"
    left = np.zeros((100, 100), np.uint8)
    left[:, :50] = 255
    Image.fromarray(left).save(mask)
    paths = [assets.images[name] for name in ("chelsea.png", "rocket.jpg")]
    bucket = Bucket(96, 96, 1)
    controls = tuple(Control(DataFile(path), content_of(DataFile(path))) for path in paths)
    masked = sample(
        assets.images["coffee.png"], bucket, controls=controls, mask=Control(DataFile(mask), content_of(DataFile(mask)))
    )
    cut_out = Image.open(assets.images["chelsea.png"]).convert("RGB")
    cut_out.putalpha(Image.linear_gradient("L").resize(cut_out.size))
    cut_out.save(tmp_path / "cut out.png")
    clear = sample(tmp_path / "cut out.png", bucket, alpha_mask=True, reading=Reading(background=(0, 128, 0)))
    cards = written(folder, scan_of(masked, clear), encoders).cards
    first, second = cards[masked.key], cards[clear.key]

    [seen], [over] = first.strips[SEEN], first.strips["the loss counts where it is not red"]
    assert difference(over[:, :40], seen[:, :40]) < 4
    assert difference(over[:, 56:], 0.35 * seen[:, 56:] + 0.65 * NO_LOSS) < 4
    mask_pixels = load_mask(masked.mask.file, bucket)[0, 0].numpy()
    assert (mask_pixels[:, 8] == 1).all()
    assert (mask_pixels[:, -8] == 0).all()
    for picture, path in zip(first.strips["control pictures"], paths, strict=True):
        assert difference(picture, levels(load_pixels(DataFile(path), bucket)[:, 0])) < 4
    assert first.labels == ["chelsea.png", "rocket.jpg"]

    pixels = load_pixels(clear.file, bucket, reading=clear.reading)[:, 0]
    assert difference(second.strips[SEEN][0], levels(pixels)) < 4
    hidden = 0.65 * (1 - load_alpha_mask(clear.file, bucket)[0, 0].numpy())[..., None]
    assert 0.1 < (hidden > 0.3).mean() < 0.9
    overlay = levels(pixels) * (1 - hidden) + NO_LOSS * hidden
    assert difference(second.strips["the loss counts where it is not red"][0], overlay) < 4
    assert "control picture" not in second.strips


def test_a_given_first_frame(assets, folder, tmp_path):
    Family = load_family("wan")
    Family.write_tiny("wan-i2v", tmp_path / "model", "diffusers", seed=0)
    encoders = Family(Family.Options(type="wan", path=tmp_path / "model")).encoders()
    given = DataFile(assets.images["chelsea.png"])
    clip = sample(assets.clips["bikes.mp4"], Bucket(96, 48, 5), fps=16.0, original_size=(640, 272))
    shown = replace(clip, known_frames=(("first", Control(given, content_of(given))),))
    [card] = written(folder, scan_of(shown), encoders).cards.values()
    [picture] = card.strips["given first frame"]
    assert difference(picture, levels(load_pixels(given, Bucket(96, 48, 1))[:, 0])) < 4


def test_captions_with_their_weights_facts_and_what_is_cut(astronaut, folder, encoders):
    text = encoders[-1]
    nasty = "</style><script>alert('x')</script> \"quoted\" & &amp; {{ title }}\nline\ttab 自行车 🚲"
    captions = (Caption("rare", 1.0), Caption(nasty, 3.0), Caption("word " * 3000))
    shown = sample(
        astronaut,
        Bucket(96, 96, 1),
        captions=captions,
        caption_dropout=0.2,
        repeats=Fraction(5, 2),
        loss_weight=0.5,
        controls=(Control(DataFile(astronaut), content_of(DataFile(astronaut))),),
    )
    plain = replace(shown, key="data/<b>'plain'\"@96x96x1", captions=(), caption="only", caption_dropout=0.0, repeats=Fraction(1))
    page = written(folder, scan_of(shown, plain), encoders, counted=[text])
    card = page.cards[shown.key]
    [length] = text.token_lengths(["word " * 3000], 1)
    assert [(share, said) for share, said, _ in card.captions] == [
        ("48 %", nasty),
        ("20 %", ""),
        ("16 %", "rare"),
        ("16 %", "word " * 3000),
    ]
    assert [cut for _, _, cut in card.captions][:3] == [[], [], []]
    assert card.captions[3][2] == [f"text: the last {length.tokens - length.limit} of {length.tokens} tokens are cut off"]
    assert card.facts == ["512 x 512", "0 % cropped", "scaled by 0.19", "2.5 times an epoch", "loss weight 0.5"]
    assert page.cards[plain.key].captions == [("", "only", [])]
    assert page.cards[plain.key].name == "data/<b>'plain'\""
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_the_page_needs_and_tells_nothing_from_outside(assets, folder, encoders, tmp_path):
    clip = assets.clips["bikes.mp4"]
    shown = sample(clip, Bucket(96, 48, 5), fps=16.0, original_size=(640, 272))
    lost = {"broken.png": "/somewhere/data/broken.png: it is cut off"}
    page = written(folder, scan_of(shown, skipped=lost), encoders)
    assert page.links == ["#training-96x48x5"]
    text = (folder / "index.html").read_text()
    assert "http" not in text
    assert "url(" not in text
    for place in (str(tmp_path), str(clip.parent), "/somewhere"):
        assert place not in text
    assert page.lists["skipped, as they cannot be used: 1"] == ["data/broken.png: broken.png: it is cut off"]


def test_each_bucket_shows_so_many_evenly_chosen(astronaut, folder, encoders):
    shown = [replace(sample(astronaut, Bucket(16, 16, 1)), key=f"data/{place:02}.png@16x16x1") for place in range(21)]
    page = written(folder, scan_of(*shown), encoders, items=6)
    assert page.order == [f"data/{place:02}.png@16x16x1" for place in (0, 4, 8, 12, 16, 20)]
    assert "6 of 21 samples shown" in page.text
    assert len(written(folder, scan_of(*shown), encoders, items=None).cards) == 21
    assert len(written(folder, scan_of(*shown), encoders, items=1).cards) == 1


def test_a_file_that_is_gone_or_changed_is_named_and_the_rest_is_shown(assets, folder, encoders, tmp_path):
    gone, changed = (Path(shutil.copy(assets.images["coffee.png"], tmp_path / f"{name}.png")) for name in ("gone", "changed"))
    samples = [sample(path, Bucket(32, 32, 1)) for path in (gone, changed, assets.images["chelsea.png"])]
    gone.unlink()
    shutil.copy(assets.images["rocket.jpg"], changed)
    first, second, third = written(folder, scan_of(*samples), encoders).cards.values()
    assert "it cannot be shown: gone.png: " in first.text
    assert "it cannot be shown: changed.png: it has changed" in second.text
    assert first.strips == second.strips == {}
    assert len(third.strips[SEEN]) == 1


def test_what_is_decoded_stands_beside_the_pixels(assets, folder, encoders):
    pixels = torch.linspace(-1.5, 1.5, 3 * 5 * 32 * 48).view(3, 5, 32, 48)
    clip = sample(assets.clips["bikes.mp4"], Bucket(48, 32, 5), fps=16.0, original_size=(640, 272))
    still = sample(assets.images["coffee.png"], Bucket(48, 32, 1))
    cached = {clip.key: pixels, still.key: "not there yet"}
    cards = written(folder, scan_of(clip, still), encoders, decode=lambda sample: cached[sample.key]).cards
    decoded = cards[clip.key].strips["decoded from the cache"]
    assert [difference(picture, levels(pixels[:, place])) < 4 for place, picture in enumerate(decoded)] == [True] * 5
    assert cards[still.key].strips["decoded from the cache"] == []
    assert "not there yet" in cards[still.key].text


def test_stopped_half_way_the_old_page_stays(astronaut, folder, encoders):
    samples = [replace(sample(astronaut, Bucket(16, 16, 1)), key=f"data/{place}.png@16x16x1") for place in range(5)]
    written(folder, scan_of(samples[0]), encoders)
    before = (folder / "index.html").read_bytes()
    asked = iter(["", "", "SIGTERM"])
    with pytest.raises(Stopped, match="SIGTERM"):
        written(folder, scan_of(*samples), encoders, stop=lambda: next(asked))
    assert (folder / "index.html").read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["index.html"]


def test_folders_that_take_no_page(tmp_path):
    (tmp_path / "index.html").write_text("<html>somebody's</html>")
    with pytest.raises(UserError, match=r"index\.html in it is not one of these pages; name another folder"):
        refuse_folder(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no page can be written there"):
        refuse_folder(tmp_path / "file")
