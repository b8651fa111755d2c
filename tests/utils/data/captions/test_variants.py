"""What training makes of captions: tables, properties, frequencies; and the same through the cache and the loader."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import factorial, sqrt
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.utils.data.encode_worker import RULES, Bytes, Pooling
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.batches.loader import BatchLoader
from utils.data.batches.order import EpochOrder, MicroBatchPlan
from utils.data.batches.workers import WorkerPool
from utils.data.cache import BuildReport, DatasetCache, inputs_of
from utils.data.captions.variants import as_shown, first_caption, tags_in, texts_of, variants, vary_tags, with_caption
from utils.data.encoders import EncodeItem
from utils.data.media.files import DataFile
from utils.data.sources.scan import scan
from utils.data.values import Batch, Bucket, Caption, MicroBatch, Sample
from utils.draw import Draw


def settings(**keys) -> DatasetConfig:
    return DatasetConfig(resolutions=[64], directory=[DirectoryConfig(path=Path("pictures"))], **keys)


def drawn_texts(captions: str | list[Caption], item: str = "pictures/a.png", seed: int = 0, **keys) -> list[str]:
    given = [Caption(captions)] if isinstance(captions, str) else captions
    return [caption.text for caption in variants(given, item, seed, settings(**keys))]


def near(count: int, draws: int, share: float) -> bool:
    """Within five standard deviations of the binomial distribution."""
    return abs(count - draws * share) <= 5 * sqrt(draws * share * (1 - share))


# ── functions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("caption", "keys", "expected"),
    [
        ("a cat", {}, "a cat"),
        ("", {}, ""),
        ("a cat", {"caption_prefix": "film, ", "caption_suffix": ", 4k"}, "film, a cat, 4k"),
        ("", {"caption_prefix": "film"}, "film"),
        ("a cat", {"trigger_word": "sks"}, "sks, a cat"),
        ("a Sks cat", {"trigger_word": "sks"}, "a Sks cat"),
        ("asks a cat", {"trigger_word": "sks"}, "sks, asks a cat"),
        ("sks_cat", {"trigger_word": "sks"}, "sks, sks_cat"),
        ("sks: a cat", {"trigger_word": "sks"}, "sks: a cat"),
        ("a cat in the style of <s1>", {"trigger_word": "<s1>"}, "a cat in the style of <s1>"),
        ("a c++ cat", {"trigger_word": "c+"}, "a c++ cat"),
        ("", {"trigger_word": "sks"}, "sks"),
        ("a cat", {"trigger_word": "sks", "caption_prefix": "photo of "}, "photo of sks, a cat"),
        ("a cat", {"trigger_word": "sks", "caption_prefix": "sks "}, "sks a cat"),
        ("a;cat", {"trigger_word": "sks", "tag_delimiter": "; "}, "sks; a;cat"),
        ("a {red|blue} cat", {}, "a {red|blue} cat"),
        ("a {red|blue} cat", {"caption_wildcards": True}, "a red cat"),
        ("{sks|} cat", {"caption_wildcards": True, "trigger_word": "sks"}, "sks cat"),
        ("b,a ,  c", {"shuffle_tags": True, "tag_dropout": 0.9}, "b,a ,  c"),
    ],
)
def test_the_first_caption(caption: str, keys: dict, expected: str):
    assert first_caption([Caption(caption), Caption("another", 100.0)], settings(**keys)) == expected


@pytest.mark.parametrize(
    ("text", "delimiter", "tags"),
    [
        ("a, b c,d", ", ", ["a", "b c", "d"]),
        (" a ,, b, ", ",", ["a", "b"]),
        ("a; b, c", ";", ["a", "b, c"]),
        ("a  b\nc", " ", ["a", "b", "c"]),
        ("a || b", " || ", ["a", "b"]),
        ("", ", ", []),
    ],
)
def test_tags(text: str, delimiter: str, tags: list[str]):
    assert tags_in(text, delimiter) == tags


TAGS = st.lists(st.text(st.characters(exclude_characters=","), min_size=1).map(str.strip).filter(bool), max_size=12)


@given(tags=TAGS, keep=st.integers(0, 14), seed=st.integers(0, 999), shuffle=st.booleans(), dropout=st.sampled_from([0.0, 0.4]))
def test_tags_are_kept_and_none_is_made(tags: list[str], keep: int, seed: int, shuffle: bool, dropout: float):
    found = vary_tags(tags, keep, shuffle, dropout, Random(seed))
    assert found[:keep] == tags[:keep]
    assert not Counter(found) - Counter(tags)
    if not dropout:
        assert Counter(found) == Counter(tags)
    if not shuffle:
        rest = iter(tags)
        assert all(any(tag == other for other in rest) for tag in found)  # in their order


def test_every_order_is_as_likely():
    random, draws = Random(3), 24_000
    counts = Counter(tuple(vary_tags("abcd", 0, True, 0.0, random)) for _ in range(draws))
    assert len(counts) == factorial(4)
    assert all(near(count, draws, 1 / 24) for count in counts.values())


def test_tags_are_dropped_at_their_rate():
    random, draws = Random(4), 10_000
    counts = Counter(tag for _ in range(draws) for tag in vary_tags("abcdef", 2, True, 0.3, random))
    assert counts["a"] == counts["b"] == draws
    assert all(near(counts[tag], draws, 0.7) for tag in "cdef")


# ── variants ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_captions_that_do_not_vary_are_the_variants():
    captions = [Caption(text, weight) for text, weight in (("a cat", 1.0), ("a dog", 3.0), ("cow", 2.0))]
    keys = {"caption_prefix": "film, ", "caption_variants": 2, "caption_wildcards": True, "keep_tokens": 5}
    for varied in ({}, {"shuffle_tags": True}, {"tag_dropout": 0.5}):
        found = variants(captions, "a", 0, settings(**keys, **varied))
        assert found == tuple(Caption("film, " + caption.text, caption.weight) for caption in captions)
    # Two that come to the same text are one.
    assert variants([Caption("sks, a"), Caption("a")], "a", 0, settings(trigger_word="sks")) == (Caption("sks, a", 2.0),)


def test_variants_of_a_caption_that_varies():
    text = ", ".join("abcdefgh")
    found = drawn_texts(text, shuffle_tags=True, keep_tokens=2, caption_variants=5)
    assert len(set(found)) == 5
    assert all(entry.startswith("a, b, ") and sorted(entry.split(", ")) == [*"abcdefgh"] for entry in found)
    assert drawn_texts(text, shuffle_tags=True, keep_tokens=2, caption_variants=5) == found
    assert drawn_texts(text, shuffle_tags=True, keep_tokens=2, caption_variants=9)[:5] == found
    assert not {*found} & {*drawn_texts(text, seed=1, shuffle_tags=True, keep_tokens=2)}
    assert not {*found} & {*drawn_texts(text, item="pictures/b.png", shuffle_tags=True, keep_tokens=2)}
    dropped = drawn_texts(text, tag_dropout=0.5, keep_tokens=1, trigger_word="h", caption_variants=20)
    assert all({"a", "h"} <= {*entry.split(", ")} for entry in dropped)
    assert {len(entry.split(", ")) for entry in dropped} > {3, 4, 5}


def test_all_texts_are_found_where_they_are_few():
    assert {*drawn_texts("b, a", shuffle_tags=True, caption_variants=3)} == {"a, b", "b, a"}
    assert {*drawn_texts("{1|2} {3|4}", caption_wildcards=True)} == {"1 3", "1 4", "2 3", "2 4"}
    # How often each came up is its weight, and the weights are the caption's.
    [first, second] = variants([Caption("{9::a|b}", 2.0)], "x", 0, settings(caption_wildcards=True, caption_variants=100))
    assert (first.text, second.text, first.weight + second.weight) == ("a", "b", pytest.approx(2.0))
    assert near(round(first.weight * 400), 800, 0.9)


def test_variants_are_shared_by_weight():
    captions = [Caption("{1|2|3|4|5|6|7|8|9} {a|b|c|d|e|f}", 6.0), Caption("{x|y}", 1.0), Caption("fixed", 3.0)]
    for number, expected in ((1, [1, 1, 1]), (3, [1, 1, 1]), (5, [3, 1, 1]), (11, [8, 2, 1])):
        found = variants(captions, "a", 0, settings(caption_wildcards=True, caption_variants=number))
        kinds = [sum(caption.text in "xy" for caption in found), sum(caption.text == "fixed" for caption in found)]
        assert [len(found) - sum(kinds), *kinds] == expected
        weights = [sum(caption.weight for caption in found if caption.text in texts) for texts in (["x", "y"], ["fixed"])]
        assert weights == pytest.approx([1.0, 3.0])
        assert sum(caption.weight for caption in found) == pytest.approx(10.0)


@given(
    captions=st.lists(
        st.builds(Caption, st.text(st.sampled_from("ab, {|}"), max_size=12), st.floats(0.1, 9)),
        min_size=1,
        max_size=4,
        unique_by=lambda caption: caption.text,
    ),
    number=st.integers(1, 6),
    shuffle=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
)
def test_properties_of_variants(captions: list[Caption], number: int, shuffle: bool, dropout: float):
    chosen = settings(caption_variants=number, shuffle_tags=shuffle, tag_dropout=dropout)
    found = variants(captions, "item", 3, chosen)
    assert len({caption.text for caption in found}) == len(found) <= max(number, len(captions))
    assert sum(caption.weight for caption in found) == pytest.approx(sum(caption.weight for caption in captions))
    assert variants(captions, "item", 3, chosen) == found
    # Another caption of the item, in whatever order, changes none of these where there is a place for each.
    alone = [
        variants([caption], "item", 3, settings(shuffle_tags=shuffle, tag_dropout=dropout, caption_variants=1))
        for caption in captions
    ]
    if number <= len(captions):
        assert {caption.text for caption in found} == {caption.text for [caption] in alone}


def test_variants_stay_what_they_are():
    """Runs are resumed, and caches used, by later versions: these are the texts that they count on."""
    found = variants([Caption("a, b, c, d"), Caption("{e|f}, g")], "x", 7, settings(shuffle_tags=True, caption_wildcards=True))
    assert [caption.text for caption in found] == ["c, d, b, a", "b, a, d, c", "g, e", "g, f"]
    draw = Draw(7, 2)
    sample = replace(SAMPLE, captions=found, caption_dropout=0.2)
    shown = [as_shown(sample, f"{sample.key}#{index}", draw).caption for index in range(8)]
    assert shown == ["g, e", "", "c, d, b, a", "", "", "g, e", "b, a, d, c", ""]


SAMPLE = Sample("data/a.png@64x64x1", DataFile(Path("a.png")), "0", "first", Bucket(64, 64, 1))


def test_captions_are_shown_at_their_weights_and_dropped_at_their_rate():
    captions = (Caption("one", 1.0), Caption("two", 2.0), Caption("five", 5.0))
    sample, epochs, repeats = replace(SAMPLE, captions=captions, caption_dropout=0.2), 100, 100
    draws = epochs * repeats
    counts = Counter(as_shown(sample, f"a#{index}", Draw(0, epoch)).caption for epoch in range(epochs) for index in range(repeats))
    assert near(counts.pop(""), draws, 0.2)
    assert counts.keys() == {"one", "two", "five"}
    assert all(near(counts[caption.text], draws, 0.8 * caption.weight / 8) for caption in captions)
    shown = [[as_shown(sample, "a#0", Draw(seed, epoch)).caption for epoch in range(20)] for seed in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]
    assert len({*shown[0]}) > 1
    assert as_shown(replace(sample, caption_dropout=1.0), "a#0", Draw(0, 0)).caption == ""
    assert as_shown(SAMPLE, "a#0", Draw(0, 0)) is SAMPLE


def test_what_has_to_be_encoded():
    captions = (Caption("one"), Caption("two"))
    texts = [
        [*texts_of(replace(SAMPLE, captions=given, caption_dropout=dropout))]
        for given, dropout in (((), 0.0), ((), 0.1), (captions, 0.0), (captions, 0.1), ((*captions, Caption("")), 0.1))
    ]
    assert texts == [["first"], ["first", ""], ["one", "two"], ["one", "two", ""], ["one", "two", ""]]
    assert [with_caption(SAMPLE, text) for text in texts_of(SAMPLE)] == [SAMPLE]


# ── in a run ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

VARYING = {
    "shuffle_tags": True,
    "caption_wildcards": True,
    "caption_variants": 3,
    "caption_dropout": 0.2,
    "captions_per_line": True,
}


@pytest.fixture
def varied(mixed: Path) -> Path:
    (mixed / "bikes.txt").write_text("{people|men} on bikes, a city, day\na street")
    (mixed / "coffee.txt").write_text("coffee, cup, table, spoon")
    return mixed


def samples_of(folder: Path, seed: int | None = 0, **keys) -> list[Sample]:
    chosen = {"resolutions": [64, 48], "frame_buckets": [1, 9], **VARYING, **keys}
    dataset = DatasetConfig(**chosen, directory=[DirectoryConfig(path=folder)])
    return scan(dataset, RULES, hash_cache=None, caption_seed=seed).samples


def build(folder: Path, samples: list[Sample], encoders: list) -> tuple[DatasetCache, BuildReport]:
    cache = DatasetCache(folder)
    return cache, cache.build(samples, encoders, device=torch.device("cpu"))


def test_every_text_is_encoded_once_and_equals_a_fresh_one(varied: Path, tmp_path: Path):
    samples, text = samples_of(varied), Bytes()
    every = {caption.text for sample in samples for caption in sample.captions or [Caption(sample.caption)]} | {""}
    # Both sizes of an item share its variants: 3 of the bikes, one of them fixed; 3 of the coffee; and two captions.
    assert len(every) == 3 + 3 + 2 + 1
    cache, report = build(tmp_path / "cache", samples, [text])
    assert [(part.total, part.encoded) for part in report.encoders] == [(len(every), len(every))]
    for sample in samples:
        for each in (with_caption(sample, text) for text in texts_of(sample)):
            [fresh] = text.outputs([EncodeItem(each.key, caption=each.caption)])
            assert torch.equal(cache.read(each, [text])["text"], fresh["text"])


def test_only_what_changed_is_encoded(varied: Path, tmp_path: Path):
    def encoded(**keys) -> list[int]:
        _, report = build(tmp_path / "cache", samples_of(varied, **keys), [Pooling(), Bytes()])
        return [part.encoded for part in report.encoders]

    assert encoded() == [8, 9]
    assert encoded() == [0, 0]
    (varied / "bikes.txt").write_text("{people|men} on bikes, a city, day\na road")
    assert encoded() == [0, 1]  # the other line keeps its two variants
    (varied / "coffee.txt").write_text("coffee, cup, table, knife")
    assert encoded() == [0, 3]
    assert encoded(caption_variants=4) == [0, 2]
    assert encoded(caption_dropout=0.5) == [0, 0]


def test_evaluation_shows_the_first_caption_alone(varied: Path):
    samples = samples_of(varied, seed=None)
    assert all((sample.captions, sample.caption_dropout) == ((), 0.0) for sample in samples)
    assert {sample.caption for sample in samples if sample.file.stem in ("bikes", "coffee")} == {
        "people on bikes, a city, day",
        "coffee, cup, table, spoon",
    }
    assert len(inputs_of(samples, Bytes())) == 4


class Shown:
    """The captions that a loader gives, decoded from what ``Bytes`` made of them."""

    def __init__(self, folder: Path, samples: list[Sample], workers: WorkerPool):
        cache, _ = build(folder, samples, [text := Bytes()])
        self.order = EpochOrder(samples, 2, seed=0)
        self.loader = BatchLoader(cache, samples, [text], self._prepare, workers)
        self.table = text.outputs([EncodeItem("all", caption="".join(map(chr, range(128))))])[0]["text"]

    def __call__(self, epoch: int, first: int = 0) -> list[tuple[str, str]]:
        """Key of the place and caption, from a micro-batch of the epoch on."""
        plans: Iterator[MicroBatchPlan] = iter(self.order.micro_batches(epoch)[first:])
        batches = self.loader.prepared((plan, Draw(0, epoch)) for plan in plans)
        said = [bytes(batch.target["shown"].tolist()).decode() for batch in batches]
        return [tuple(line.split("\t")) for text in said for line in text.splitlines()]

    def _prepare(self, batch: Batch, draw: Draw) -> MicroBatch:
        rows = [[chr(int((self.table == row).all(1).nonzero())) for row in rows] for rows in batch.fields["text"]]
        said = "".join(f"{key}\t{''.join(row)}\n" for key, row in zip(batch.keys, rows, strict=True))
        return MicroBatch({}, {"shown": torch.tensor([*said.encode()], dtype=torch.uint8)})


def test_a_run_shows_the_variants_of_each_place(varied: Path, tmp_path: Path):
    samples = samples_of(varied, num_repeats=5)
    by_key, pools = {sample.key: sample for sample in samples}, [WorkerPool(2), WorkerPool(0)]
    shown, again = (Shown(tmp_path / "cache", samples, workers) for workers in pools)
    epochs = [shown(epoch) for epoch in range(4)]
    for epoch, pairs in enumerate(epochs):
        for place, caption in pairs:
            assert caption == as_shown(by_key[place.split("#")[0]], place, Draw(0, epoch)).caption
    captions_of = [dict(pairs) for pairs in epochs]
    assert len({tuple(sorted(captions.items())) for captions in captions_of}) == len(epochs)
    seen = {(place.split("#")[0], caption) for pairs in epochs for place, caption in pairs}
    assert seen == {(sample.key, text) for sample in samples for text in texts_of(sample)}
    # Resumed at any micro-batch, and without workers, it goes on with the same captions.
    for first in (0, 1, 7, shown.order.num_micro_batches(1) - 1):
        assert again(1, first) == epochs[1][2 * first :]
    pools[0].close()
