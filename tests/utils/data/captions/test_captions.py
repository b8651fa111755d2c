"""Where captions are read from: encodings, files and values of JSON, and what is wrong with each."""

import json
import logging
from pathlib import Path

import pytest

from tests.utils.data.encode_worker import RULES
from utils.config.schema import DatasetConfig, DirectoryConfig
from utils.data.captions.parsing import CaptionError, decode, parse_file, parse_value
from utils.data.sources.scan import Scan, scan
from utils.data.values import Caption
from utils.errors import UserError


def settings(**keys) -> DatasetConfig:
    return DatasetConfig(resolutions=[64], directory=[DirectoryConfig(path=Path("pictures"))], **keys)


def scanned(folder: Path, **keys) -> Scan:
    dataset = DatasetConfig(**{"resolutions": [64], "frame_buckets": [1, 9]} | keys, directory=[DirectoryConfig(path=folder)])
    return scan(dataset, RULES, hash_cache=None, caption_seed=0)


def captions_of(folder: Path, **keys) -> dict[str, str]:
    return {sample.file.name: sample.caption for sample in scanned(folder, **keys).samples}


def refusal(folder: Path, **keys) -> list[str]:
    with pytest.raises(UserError) as raised:
        scanned(folder, **keys)
    return [line.removeprefix(f"  - {folder}/") for line in str(raised.value).splitlines()[1:]]


TEXT = "a café, 自行车 🚲"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marks_say_the_encoding(encoding: str):
    """Python writes UTF-16 and UTF-32 with their marks."""
    for told in ("utf-8", "cp1252"):
        assert decode(TEXT.encode(encoding), told) == TEXT or (encoding, told) == ("utf-8", "cp1252")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), TEXT),
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), TEXT),
        (b"\x00\x00\xfe\xff" + TEXT.encode("utf-32-be"), TEXT),
        (b"\xff\xfe\x00\x00" + TEXT.encode("utf-32-le"), TEXT),
        (b"", ""),
        (b"\xef\xbb\xbf", ""),
    ],
)
def test_each_mark(raw: bytes, expected: str):
    assert decode(raw, "utf-8") == expected


def test_other_encodings_are_not_guessed():
    latin = "café".encode("latin-1")
    with pytest.raises(CaptionError, match=r"is not UTF-8 \(byte 3\); save it as UTF-8, or say in caption_encoding what it is"):
        decode(latin, "utf-8")
    with pytest.raises(CaptionError, match=r"is not UTF-16 \(byte"):
        decode(b"\xff\xfea", "utf-8")
    with pytest.raises(CaptionError, match="is not IDNA"):
        decode(latin, "idna")
    assert decode(latin, "cp1252") == "café"
    assert decode("自行车".encode("gb18030"), "gb18030") == "自行车"


LONG = " ".join(f"word{index}" for index in range(5000))


@pytest.mark.parametrize(
    ("text", "keys", "expected"),
    [
        ("  a cat \r\n", {}, [("a cat", 1)]),
        ("a cat\n\na dog\n", {}, [("a cat\n\na dog", 1)]),
        ("a cat\r\na dog\ra cow\x85here", {}, [("a cat\na dog\na cow\x85here", 1)]),
        ("a cat\r\na dog\ra cow\x85here", {"captions_per_line": True}, [("a cat", 1), ("a dog", 1), ("a cow\x85here", 1)]),
        ("a cat\n\n a dog \r\n", {"captions_per_line": True}, [("a cat", 1), ("a dog", 1)]),
        ("a cat\na dog\na cat", {"captions_per_line": True}, [("a cat", 2), ("a dog", 1)]),
        (" \n\n", {"captions_per_line": True}, [("", 1)]),
        ("", {}, [("", 1)]),
        ("{a|b} {", {}, [("{a|b} {", 1)]),
        ("{a|b}", {"caption_wildcards": True}, [("{a|b}", 1)]),
        (LONG, {}, [(LONG, 1)]),
    ],
)
def test_texts(text: str, keys: dict, expected: list[tuple[str, float]]):
    assert parse_file(text.encode(), ".txt", settings(**keys)) == tuple(Caption(*entry) for entry in expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (" a cat ", [("a cat", 1)]),
        ("", [("", 1)]),
        (["a cat", "a dog"], [("a cat", 1), ("a dog", 1)]),
        ({"caption": "a cat", "tags": ["x"], "width": 3}, [("a cat", 1)]),
        (
            [{"caption": "a cat", "weight": 3}, "a dog", {"caption": "a cow", "weight": 0.5}],
            [("a cat", 3), ("a dog", 1), ("a cow", 0.5)],
        ),
        ([{"caption": "a cat", "weight": 2}, " a cat"], [("a cat", 3)]),
    ],
)
def test_values(value, expected: list[tuple[str, float]]):
    wanted = tuple(Caption(*entry) for entry in expected)
    assert parse_value(value, settings()) == wanted
    assert parse_file(json.dumps(value).encode(), ".json", settings()) == wanted


SHAPE = 'a caption is a text in quotes, {"caption": text, "weight": number}, or a list of these'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("[]", "the list of captions is empty"),
        ("3", SHAPE),
        ("null", SHAPE),
        ("{}", SHAPE),
        ('["a", ["b"]]', SHAPE),
        ('{"caption": 3}', SHAPE),
        ('{"caption": "a", "weight": 0}', "the weight of a caption is a number above 0, up to 1e+09, not the whole number 0"),
        ('{"caption": "a", "weight": true}', "a number above 0, up to 1e+09, not true"),
        ('{"caption": "a", "weight": NaN}', "a number above 0, up to 1e+09, not the number nan"),
        ('{"caption": "a", "weight": "2"}', "a number above 0, up to 1e+09, not the string '2'"),
        ('{"caption": "a", "weight": 1' + "0" * 400 + "}", "up to 1e+09, not the whole number 1000"),
        ('{"caption": "a"', "it is not JSON (Expecting"),
        ("[" * 100_000, "it is not JSON"),
        (r'"\ud83d"', "half of a pair of surrogates"),
        (r'"a\u0000b"', "zero bytes"),
    ],
)
def test_values_that_are_refused(raw: str, message: str):
    with pytest.raises(CaptionError) as raised:
        parse_file(raw.encode(), ".json", settings())
    assert message in str(raised.value)


def test_texts_that_are_refused():
    with pytest.raises(CaptionError, match="UTF-16 without its mark"):
        parse_file("a cat".encode("utf-16-le"), ".txt", settings())
    with pytest.raises(CaptionError, match=r"the caption has a \{ without its \}, at sign 3"):
        parse_file(b"a {red|blue", ".txt", settings(caption_wildcards=True))


# ── in a folder ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_txt_goes_before_a_json_and_that_before_the_table(mixed: Path, caplog):
    for name in ("bikes", "coffee", "astronaut"):
        (mixed / f"{name}.json").write_text(json.dumps(f"{name} in JSON"))
    table = {
        "bikes.mp4": "b",
        "coffee.png": "c",
        "astronaut.png": ["astronaut in the table"],
        "carphone_pristine.mp4": "p",
        "x.png": "?",
    }
    (mixed / "captions.json").write_text(json.dumps(table))
    expected = {"bikes.mp4": "people on bikes in a city", "coffee.png": "a cup of coffee on a table"}
    expected |= {"astronaut.png": "a portrait of an astronaut", "carphone_pristine.mp4": "a man talks in a car"}
    # With a .txt for each, JSON files are another program's.
    assert captions_of(mixed) == expected
    assert scanned(mixed).report.lines()[-1] == "  not looked at: 4 .json"
    (mixed / "coffee.txt").unlink()
    (mixed / "astronaut.txt").unlink()
    (mixed / "astronaut.json").unlink()
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        found = scanned(mixed)
    assert {sample.file.name: sample.caption for sample in found.samples} == expected | {
        "coffee.png": "coffee in JSON",
        "astronaut.png": "astronaut in the table",
    }
    assert found.report.lines()[-1] == "  not looked at: 1 .json"
    assert caplog.messages == [f"{mixed / 'captions.json'}: captions of files that are not there: x.png"]


def test_items_without_a_caption_may_have_an_empty_one(mixed: Path):
    (mixed / "coffee.txt").unlink()
    (mixed / "bikes.txt").write_text("")
    assert refusal(mixed) == [
        "coffee.png: it has no caption; write one to coffee.txt beside it (an empty file is an empty caption), or set "
        'on_missing_caption = "empty"'
    ]
    found = scanned(mixed, on_missing_caption="empty", caption_prefix="film")
    assert {sample.file.name for sample in found.samples if sample.caption == "film"} == {"coffee.png", "bikes.mp4"}
    # An empty file is a caption that was meant to be empty.
    assert "  without a caption, shown with an empty one: 1 file" in found.report.lines()


def test_what_is_wrong_is_named(mixed: Path):
    (mixed / "astronaut.txt").write_bytes("café".encode("latin-1"))
    (mixed / "bikes.txt").write_text("a {red|blue bike")
    (mixed / "coffee.txt").unlink()
    (mixed / "coffee.json").write_text("[]")
    (mixed / "carphone_pristine.txt").unlink()
    (mixed / "captions.json").write_text('{"carphone_pristine.mp4": 3}')
    assert refusal(mixed, caption_wildcards=True) == [
        "astronaut.txt: the caption is not UTF-8 (byte 3); save it as UTF-8, or say in caption_encoding what it is",
        r"bikes.txt: the caption has a { without its }, at sign 3; write \{ for the sign itself",
        f"captions.json: carphone_pristine.mp4: {SHAPE}",
        'coffee.json: the list of captions is empty; an empty caption is written as ""',
    ]
    (mixed / "captions.json").write_text("[]")
    assert "captions.json: it is no table of file names with their captions; correct it" in refusal(mixed)
    (mixed / "captions.json").unlink()
    (mixed / "coffee.json").write_text('["tea", "coffee"]')
    (mixed / "carphone_pristine.txt").write_text("a man")
    assert captions_of(mixed, caption_encoding="cp1252") == {
        "astronaut.png": "café",
        "bikes.mp4": "a {red|blue bike",
        "carphone_pristine.mp4": "a man",
        "coffee.png": "tea",
    }


def test_a_directory_has_keys_of_its_own(mixed: Path):
    (mixed / "coffee.txt").write_text("tea\ncoffee")
    directories = [
        DirectoryConfig(path=mixed),
        DirectoryConfig(path=mixed, captions_per_line=False, trigger_word="", caption_dropout=0.5),
    ]
    keys = {"captions_per_line": True, "trigger_word": "sks", "caption_suffix": "!"}
    dataset = DatasetConfig(resolutions=[64], frame_buckets=[1, 9], directory=directories, **keys)
    samples = scan(dataset, RULES, hash_cache=None, caption_seed=0).samples
    first, second = [sample for sample in samples if sample.file.name == "coffee.png"]
    assert [caption.text for caption in first.captions] == ["sks, tea!", "sks, coffee!"]
    assert (second.caption, second.captions, second.caption_dropout) == ("tea\ncoffee!", (), 0.5)


@pytest.mark.parametrize("keys", [{"caption_encoding": "klingon"}, {"caption_encoding": "hex"}, {"tag_delimiter": ""}])
def test_settings_that_are_refused(keys: dict[str, str]):
    with pytest.raises(ValueError, match=r"it is no encoding of texts|it may not be empty"):
        settings(**keys)
