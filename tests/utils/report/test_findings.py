"""What is said of a data set: what is cut off, which captions are counted."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data.batches.order import EpochOrder
from utils.data.batches.sizes import BatchSizes
from utils.data.encoders import ConditionEncoder, TokenLength
from utils.data.media.files import DataFile
from utils.data.media.pixels import load_pixels
from utils.data.sources.report import DirectoryReport, ScanReport
from utils.data.sources.scan import Scan
from utils.data.values import Bucket, Caption, Control, Framing, Sample, SizeRules
from utils.report.findings import count_tokens, cut_of, findings_of
from utils.report.tables import number, percent, plain, summary

RULES = SizeRules(multiple=16, frame_step=4, fps=16.0)


def sample(key: str, **changes) -> Sample:
    bucket = changes.pop("bucket", Bucket(64, 64, 1))
    return Sample(f"{key}@{bucket}", DataFile(Path(key)), content=key, caption="", bucket=bucket, **changes)


@pytest.mark.parametrize(
    ("size", "framing", "box", "cropped", "scale"),
    [
        ((64, 64), Framing(), (0, 0, 1, 1), 0, 1),
        ((256, 128), Framing(), (0.25, 0, 0.75, 1), 0.5, 0.5),
        ((256, 128), Framing(x=0.0), (0, 0, 0.5, 1), 0.5, 0.5),
        ((128, 256), Framing(y=1.0), (0, 0.5, 1, 1), 0.5, 0.5),
        ((32, 48), Framing(), (0, 1 / 6, 1, 5 / 6), 1 / 3, 2),
        ((256, 128), Framing(box=(128, 0, 160, 64)), (0.5, 0.125, 0.625, 0.375), 31 / 32, 2),
    ],
)
def test_what_of_a_file_is_seen(size, framing, box, cropped, scale):
    cut = cut_of(sample("a.png", original_size=size, framing=framing))
    assert cut.box == pytest.approx(box)
    assert (cut.cropped, cut.scale) == pytest.approx((cropped, scale))


@pytest.mark.parametrize("framing", [Framing(), Framing(x=0.1, y=0.9), Framing((20, 30, 320, 250), x=1.0)], ids=str)
@pytest.mark.parametrize("bucket", [Bucket(144, 64, 1), Bucket(48, 80, 1)], ids=str)
def test_the_box_is_what_the_pixels_show(assets, framing, bucket):
    file = DataFile(assets.images["chelsea.png"])
    image = Image.open(file.path).convert("RGB")
    cut = cut_of(sample("chelsea.png", original_size=image.size, framing=framing, bucket=bucket))
    box = [side * whole for side, whole in zip(cut.box, image.size * 2, strict=True)]
    expected = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    pixels = (load_pixels(file, bucket, framing=framing)[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    other = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)
    near, far = (np.abs(pixels - np.asarray(picture, np.float32)).mean() for picture in (expected, other))
    assert near < 2
    assert near < 0.25 * far


def test_a_file_of_unknown_size():
    assert cut_of(sample("a.png")) is None


class Words(ConditionEncoder):
    """Counts words, and a control picture as one."""

    reads = "caption"

    def __init__(self, name: str, limit: int):
        self.name, self.limit = name, limit

    def fingerprint(self) -> str:
        raise AssertionError("nothing is encoded")

    load = encode = unload = fingerprint

    def token_lengths(self, captions, controls=0):
        return [TokenLength(len(caption.split()) + controls, self.limit) for caption in captions]


def test_every_text_that_is_shown_is_counted_once_by_each_encoder():
    control = Control(DataFile(Path("c.png")), "c")
    samples = [
        sample("a.png", captions=(Caption("one"), Caption("one two three", 2.0)), caption_dropout=0.1),
        sample("b.png", captions=(Caption("one"),), controls=(control, control)),
    ]
    short, long = count_tokens(samples, [Words("l", 2), Words("g", 2), Words("t5", 9)])
    assert (short.encoders, short.limit, long.encoders, long.limit) == (("l", "g"), 2, ("t5",), 9)
    assert {text: length.tokens for text, length in short.lengths.items()} == {
        ("one", 0): 1,
        ("one two three", 0): 3,
        ("", 0): 0,
        ("one", 2): 3,
    }
    assert (short.num_cut, long.num_cut) == (2, 0)
    assert short.spread == (0, 2.0, 3)


@pytest.fixture
def untidy(tmp_path) -> Scan:
    """A data set of two directories with something of everything."""
    wide = Bucket(128, 64, 1)
    samples = [
        sample("good/a.png", original_size=(128, 128), caption_dropout=0.1, captions=(Caption("one two three"),)),
        sample("good/b.png", original_size=(32, 32), repeats=Fraction(5, 2), alpha_mask=True),
        sample("rest/c [bold]x.png", original_size=(256, 64), bucket=wide),
    ]
    directories = [
        DirectoryReport("good", tmp_path / "good", pictures=3, skipped={"d.png": f"{tmp_path / 'good'}/d.txt: it is no text"}),
        DirectoryReport("rest", tmp_path / "rest", pictures=2, uncaptioned=1, is_reg=True, unused={"e.mp4": "too short"}),
    ]
    directories[1].ignored.update({"/": 2, ".psd": 1, "": 3})
    directories[1].stray[str(tmp_path / "masks")] = ["z.png"]
    directories[0].left_over["f.mp4"] = 3
    return Scan(samples, ScanReport(directories, duplicates=[["good/a.png", "rest/c [bold]x.png"]]))


def test_tables_and_lists(untidy, tmp_path):
    told = summary(findings_of("held-out", untidy, RULES, [Words("words", 2)]))
    directories, buckets, captions = told.tables
    columns = ["directory", "pictures", "clips", "samples", "an epoch", "with mask", "no caption"]
    assert directories.columns == [*columns, "cropped mean", "most", "enlarged", "skipped", "not used"]
    assert directories.rows == [
        ["good", "3", "0", "2", "3.5", "1", "0", "0 %", "0 %", "1", "1", "0"],
        ["rest (regularisation)", "2", "0", "1", "1", "0", "1", "50 %", "50 %", "0", "0", "1"],
    ]
    assert directories.total == ["all", "5", "0", "3", "4.5", "1", "1", "17 %", "50 %", "1", "1", "1"]
    assert buckets.rows == [["64x64x1", "16", "2"], ["128x64x1", "32", "1"]]
    assert captions.rows == [["words", "2", "0", "1.5", "3", "2", "1"]]
    assert {part.title.split(",")[0].split(" (")[0]: list(part.entries) for part in told.lists} == {
        "skipped": [("good/d.png", "d.txt: it is no text")],
        "not used": [("rest/e.mp4", "too short")],
        "duplicates": [("good/a.png", "the same file as rest/c [bold]x.png")],
        "captions that words reads in part": [("good/a.png", "1 of 3 tokens are cut off")],
        "enlarged": [("good/b.png in 64x64x1", "2.00 times")],
        "clips with frames that make no whole piece": [("good/f.mp4", "3 frames at its end")],
        "masks": [("masks/z.png", "for none of rest")],
        "not looked at": [("rest", "3 files without a suffix"), ("rest", "1 .psd"), ("rest", "2 sub-folders")],
    }
    text = plain(told)
    assert "  good/d.png: d.txt: it is no text\n" in text
    assert "c [bold]x.png" in text
    assert str(tmp_path) not in text
    assert max(map(len, text.splitlines())) > 130  # a pipe has no width that anything is cut to


def test_what_an_epoch_makes_of_the_buckets():
    """Of as many tokens as there is room for, pictures with control pictures apart from those without."""
    control = Control(DataFile(Path("c.png")), "c")
    wide, clip = Bucket(128, 64, 1), Bucket(64, 64, 5)
    samples = [sample(f"d/{place}.png", repeats=Fraction(2)) for place in range(4)]
    samples += [sample(f"d/edit {place}.png", controls=(control,)) for place in range(3)]
    samples += [sample("d/wide.png", bucket=wide), sample("d/clip.mp4", bucket=clip, fps=16.0)]
    order = EpochOrder(samples, BatchSizes(max_tokens=100, rules=RULES), seed=0)
    data = findings_of("training", Scan(samples, ScanReport([])), RULES, []).trained(order, 2, "a run of some steps")
    _, buckets = summary(data).tables
    assert buckets.rows == [
        ["64x64x1", "16", "7", "11", "6", "3", "7"],  # 8 in 2 batches, 3 in another
        ["64x64x5", "32", "1", "1", "3", "1", "2"],
        ["128x64x1", "32", "1", "1", "3", "1", "2"],
    ]
    assert buckets.total == ["all", "", "9", "13", "", "5", "11"]
    # Each batch of an epoch is one of these: what is said is what happens.
    plans = order.micro_batches(0)
    assert len(plans) == 5
    assert sum(len(plan.members) for plan in plans) == 13 + 11
    assert data.notes[-1] == "a run of some steps"
    assert any("11 samples are shown once more, to fill the last micro-batch" in note for note in data.notes)


def test_what_is_lost_is_named_whole_and_the_rest_in_part(tmp_path):
    names = {f"{place:03}.png": "it is broken" for place in range(50)}
    small = [sample(f"d/{place:03}.jpg", original_size=(32, 32)) for place in range(50)]
    report = ScanReport([DirectoryReport("d", tmp_path, skipped=names)])
    text = plain(summary(findings_of("training", Scan(small, report), RULES, [])))
    assert [name for name in names if f"  d/{name}: it is broken" not in text] == []
    assert text.count("2.00 times") == 10
    assert "  and 40 more" in text
    assert "enlarged (no_upscale = true avoids it): 50" in text


def test_numbers():
    assert [number(value) for value in (12, 12.5, 12.25, Fraction(1, 3), 0)] == ["12", "12.5", "12.25", "0.33", "0"]
    assert [percent(share) for share in (0, 0.004, 0.126, 1)] == ["0 %", "0.4 %", "13 %", "100 %"]
