"""What a page of ``--report`` holds, read with the standard library's parser."""

import base64
import io
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class ReadCard:
    name: str = ""
    strips: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Title -> pictures, uint8 [height, width, 3]; ``the file`` is the original."""
    labels: list[str] = field(default_factory=list)
    crop: dict[str, float] = field(default_factory=dict)
    """``left``, ``top``, ``width`` and ``height`` in per cent."""
    facts: list[str] = field(default_factory=list)
    captions: list[tuple[str, str, list[str]]] = field(default_factory=list)
    """Share, text, and what is said of its length."""
    text: str = ""


@dataclass
class ReadPage:
    cards: dict[str, ReadCard] = field(default_factory=dict)
    """By the samples' keys."""
    order: list[str] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    """Title -> rows, the headings first."""
    lists: dict[str, list[str]] = field(default_factory=dict)
    text: str = ""
    """All that is to be read."""
    links: list[str] = field(default_factory=list)
    """Whatever an attribute refers to, but pictures in the page."""
    tags: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    """Keeps the elements that are open, as (tag, class), and the text of the innermost one."""

    VOID = ("img", "meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.page, self.card, self.open, self.texts = ReadPage(), None, [], []
        self.strip = self.title = self.share = ""
        self.cut: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.page.tags.add(tag)
        assert not any(name.startswith("on") for name in given), given
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if name in given and not given[name].startswith("data:image/jpeg;base64,"):
                self.page.links.append(given[name])
        if tag == "article":
            self.card = self.page.cards[given["data-sample"]] = ReadCard()
            self.page.order.append(given["data-sample"])
        if tag == "img":
            picture = Image.open(io.BytesIO(base64.b64decode(given["src"].partition(",")[2], validate=True)))
            assert picture.format == "JPEG"
            assert picture.size == (int(given["width"]), int(given["height"]))
            self.card.strips.setdefault(self.strip, []).append(np.asarray(picture))
        if given.get("class") == "crop":
            sides = [entry.split(":") for entry in given["style"].split(";")]
            self.card.crop = {name.strip(): float(value.strip().removesuffix("%")) for name, value in sides}
        if tag not in self.VOID:
            self.open.append((tag, given.get("class", "")))
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] != "style":
            self.page.text += data
            self.texts[-1] += data
            if self.card:
                self.card.text += data

    def handle_endtag(self, tag: str) -> None:
        (opened, kind), text = self.open.pop(), self.texts.pop()
        assert opened == tag, f"<{opened}> is closed by </{tag}>"
        inside = [name for _, name in self.open]
        page, card = self.page, self.card
        if tag == "article":
            self.card = None
        elif tag == "caption":
            page.tables[text] = [[]]
            self.title = text
        elif tag == "tr":
            page.tables[self.title].append([])
        elif tag in ("th", "td"):
            page.tables[self.title][-1].append(text)
        elif tag == "summary":
            page.lists[text] = []
            self.title = text
        elif tag == "li" and "facts" in inside:
            card.facts.append(text)
        elif tag == "li" and "captions" not in inside:
            page.lists[self.title].append(text)
        elif tag == "h4":
            card.name = text
        elif tag == "h5":
            self.strip = text
            card.strips[text] = []
        elif tag == "figcaption":
            card.labels.append(text)
        elif kind == "weight":
            self.share, self.cut = text, []
        elif kind == "cut":
            self.cut.append(text)
        elif kind in ("text", "none"):
            card.captions.append((self.share, "" if kind == "none" else text, self.cut))


def read_page(path: Path) -> ReadPage:
    """AssertionError for markup that is not well nested, and for scripts in attributes."""
    reader = _Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    assert reader.open == []
    for title, rows in reader.page.tables.items():
        reader.page.tables[title] = [row for row in rows if row]
    return reader.page


def levels(pixels) -> np.ndarray:
    """Pixels [3, height, width] in [-1, 1] as [height, width, 3] from 0 to 255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()


def difference(picture: np.ndarray, expected: np.ndarray) -> float:
    """Mean absolute difference in levels; what JPEG does to real pictures at the page's quality is below 4."""
    assert picture.shape == expected.shape, (picture.shape, expected.shape)
    return float(np.abs(picture.astype(np.float32) - expected).mean())
