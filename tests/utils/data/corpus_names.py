"""Awkward names and places of files, and awkward captions."""

import io
import os
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from tests.utils.data.corpus import Corpus, picture

CAFE = "café ☕ 猫 😀"


def add_names(corpus: Corpus) -> None:
    with Image.open(corpus.images["chelsea.png"]) as image:
        cat = image.convert("RGB").resize((96, 64))
    stream = io.BytesIO()
    cat.save(stream, "PNG")
    data, looks = stream.getvalue(), picture(np.asarray(cat))
    clip = corpus.clips["carphone_distorted.mp4"].read_bytes()

    for name, stem in (
        ("spaces", "  two  spaces "),
        ("quotes", 'it\'s "quoted" `here`'),
        ("newline", "two\nlines"),
        ("NFC", unicodedata.normalize("NFC", CAFE)),
        ("NFD", unicodedata.normalize("NFD", CAFE)),
        ("250 characters", "x" * 246),
        ("a dash in front", "-rf"),
        ("percent and hash", "100%d #1 50%"),
        ("brackets", "[a] {b} (c) <d> $HOME *?"),
        ("points", "v1.2.final"),
        ("right to left", "שלום עולם"),
    ):
        corpus.add(f"name: {name}", f"{stem}.png", data, looks)
    corpus.add("name: capital suffix", "SHOUTED.PNG", data, looks)
    from tests.utils.data.corpus_clips import _square

    for name, stem in (("colon", "file:not a protocol"), ("pattern", "frame%03d"), ("clip with quotes", 'it\'s "moving"\n')):
        corpus.add(f"name: {name}", f"{stem}.mp4", clip, _square(corpus.clips["carphone_distorted.mp4"]))

    elsewhere = corpus.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "target.png").write_bytes(data)
    corpus.add("link to a file", "link.png", lambda path: path.symlink_to(elsewhere / "target.png"), looks)
    corpus.add(
        "link to nothing",
        "dangling.png",
        lambda path: path.symlink_to(elsewhere / "nothing.png"),
        "it cannot be read (No such file",
    )
    corpus.add("link to itself", "loop.png", lambda path: path.symlink_to(path), "it cannot be read (Too many levels of symbolic")
    corpus.add("named pipe", "pipe.png", os.mkfifo, "it cannot be read (it is no file, but a folder, a pipe or a device)")

    def in_a_loop(path: Path) -> None:
        path.write_bytes(data)
        (path.parent / "again").symlink_to(path.parent, target_is_directory=True)

    corpus.add("folder that links to itself", "round.png", in_a_loop, looks, settings={"recursive": True})


def add_captions(corpus: Corpus) -> None:
    with Image.open(corpus.images["coffee.png"]) as image:
        coffee = image.convert("RGB").resize((48, 32))
    stream = io.BytesIO()
    coffee.save(stream, "PNG")
    data, looks = stream.getvalue(), picture(np.asarray(coffee))
    text = "ein Café in Zürich"
    long = " ".join(f"word{index}" for index in range(5000))
    for name, raw, reads in (
        ("with a byte order mark", text.encode("utf-8-sig"), text),
        ("UTF-16, little end first", b"\xff\xfe" + text.encode("utf-16-le"), text),
        ("UTF-16, big end first", b"\xfe\xff" + text.encode("utf-16-be"), text),
        ("UTF-32", b"\xff\xfe\x00\x00" + text.encode("utf-32-le"), text),
        ("empty", b"", ""),
        ("spaces and line ends alone", b" \r\n\t\n", ""),
        ("line ends of Windows", b"\r\na cup,\r\nof coffee\r\n", "a cup,\nof coffee"),
        ("5000 words", long.encode(), long),
    ):
        corpus.add(f"caption: {name}", f"caption {name}.png", data, looks, caption=raw, reads=reads)
    corpus.add(
        "caption: Latin-1",
        "caption latin.png",
        data,
        looks,
        caption=text.encode("latin-1"),
        reads=None,
        caption_problem="the caption is not UTF-8 (byte 7)",
    )
    corpus.add(
        "caption: Latin-1, as the settings say",
        "caption latin.png",
        data,
        looks,
        caption=text.encode("latin-1"),
        reads=text,
        settings={"caption_encoding": "latin-1"},
    )
    corpus.add(
        "caption: missing", "caption missing.png", data, looks, caption=None, reads=None, caption_problem="it has no caption"
    )
    corpus.add(
        "caption: missing, as the settings allow",
        "uncaptioned.png",
        data,
        looks,
        caption=None,
        reads="",
        settings={"on_missing_caption": "empty"},
    )
