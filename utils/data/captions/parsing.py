"""The captions of an item, as they are written: a text, or several of which training shows one at a time.

They stand in a ``.txt`` or ``.json`` file beside the item, in ``captions.json``, or in the row of a list.
"""

import codecs
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from utils.config.describe import shown
from utils.config.schema import DatasetConfig
from utils.data.captions import wildcards
from utils.data.media.files import DataFile, printable
from utils.data.sources.listing import KINDS, Item, Listing, Problems, divided
from utils.data.values import Caption

log = logging.getLogger(__name__)

MAX_NAMED = 20
"""File names of one warning; the rest is counted."""
TABLE = "captions.json"
"""A file with the captions of a whole folder, by the items' file names; diffusion-pipe's."""
_AT_ONCE = 1 << 16
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MARKED = {mark[:1] for mark in _MARKS}


class CaptionError(ValueError):
    """What is wrong with a caption, without the name of its file."""


def parse_file(raw: bytes, suffix: str, settings: DatasetConfig) -> tuple[Caption, ...]:
    """The captions in a file's bytes; ``suffix``: ``.txt`` or ``.json``.  Raises CaptionError."""
    text = decode(raw, settings.caption_encoding)
    if suffix == ".json":
        return parse_value(_from_json(text), settings)
    lines = text.split("\n") if settings.captions_per_line else [text]
    return _checked([Caption(line) for line in map(str.strip, lines) if line] or [Caption("")], settings)


def parse_value(value: Any, settings: DatasetConfig) -> tuple[Caption, ...]:
    """The captions in a value of JSON: a text, ``{"caption": text, "weight": number}``, or a list of these.

    Other keys beside ``caption`` and ``weight`` are not looked at.  Raises CaptionError.
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise CaptionError('the list of captions is empty; an empty caption is written as ""')
    return _checked([_entry(entry) for entry in entries], settings)


def _entry(entry: Any) -> Caption:
    text, weight = (entry.get("caption"), entry.get("weight", 1)) if isinstance(entry, dict) else (entry, 1)
    if not isinstance(text, str):
        raise CaptionError('a caption is a text in quotes, {"caption": text, "weight": number}, or a list of these')
    if type(weight) not in (int, float) or not 0 < weight <= wildcards.MAX_WEIGHT:
        raise CaptionError(f"the weight of a caption is a number above 0, up to {wildcards.MAX_WEIGHT:g}, not {shown(weight)}")
    return Caption(text.strip(), float(weight))


def _checked(captions: list[Caption], settings: DatasetConfig) -> tuple[Caption, ...]:
    """Each text once, with the sum of its weights."""
    weights: dict[str, float] = {}
    for caption in captions:
        weights[caption.text] = weights.get(caption.text, 0.0) + caption.weight
    for text in weights:
        if "\0" in text:
            raise CaptionError("the caption holds zero bytes: it is no text, or UTF-16 without its mark; save it as UTF-8")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CaptionError("the caption holds half of a pair of surrogates, which is no sign; correct it") from error
        if settings.caption_wildcards:
            try:
                wildcards.parse(text)
            except ValueError as error:
                raise CaptionError(f"the caption has {error}") from error
    return tuple(Caption(text, weight) for text, weight in weights.items())


def decode(raw: bytes, encoding: str) -> str:
    """The text of a file, lines ended by ``\\n``.  ``encoding`` is for files without a byte order mark.  Raises CaptionError."""
    told = encoding
    if raw[:1] in _MARKED:
        told = next((marked for mark, marked in _MARKS.items() if raw.startswith(mark)), encoding)
    try:
        return raw.decode(told).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeError as error:
        name, place = told.removesuffix("-sig").upper(), getattr(error, "start", 0)
        raise CaptionError(
            f"the caption is not {name} (byte {place}); save it as UTF-8, or say in caption_encoding what it is"
        ) from error


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"it is not JSON ({str(error)[:80]}); correct it") from error


def read_captions(listing: Listing, settings: DatasetConfig, problems: Problems) -> dict[str, tuple[Caption, ...]]:
    """The captions of a directory's items, by the items' names; those without a caption that is right are not in it.

    The row of a list goes before an item's ``.txt``, that before its ``.json``, that before its entry in the ``captions.json`` of
    its folder, and that before the name of its folder where this is a caption; an item with none of them is wrong, or has an empty
    caption, as ``on_missing_caption`` says, and is then in ``listing.uncaptioned``.
    """
    tables = _Tables(listing, settings, problems)
    found: dict[str, tuple[Caption, ...]] = {}
    used: set[str] = set()
    read: dict[str, tuple[Caption, ...] | CaptionError] = {}
    texts = {key: place for key, place in listing.texts.items() if key not in tables.files}
    for item in listing.items:
        place: object = item.row or item.found.file
        try:
            if item.caption is not None:
                found[item.name] = parse_value(item.caption, settings)
            elif (key := item.stem + ".txt") in texts or (key := item.stem + ".json") in texts:
                place = texts[key]
                used.add(key)
                if key not in read:  # of several files of one name each has it
                    read[key] = parse_file(_bytes(texts[key]), key[len(item.stem) :], settings)
                found[item.name] = read[key]
            elif (entry := tables.entry_for(item)) is not None:
                place, value = entry
                found[item.name] = parse_value(value, settings)
            elif item.folder_caption is not None:
                found[item.name] = _checked([Caption(item.folder_caption)], settings)
            elif settings.on_missing_caption == "empty":
                found[item.name] = (Caption(""),)
                listing.uncaptioned.add(item.name)
            elif not tables.broken:
                way_out = f"write one to {divided(item.found.file.name)[0]}.txt beside it (an empty file is an empty caption)"
                problems.add(item.name, place, f'it has no caption; {printable(way_out)}, or set on_missing_caption = "empty"')
        except CaptionError as error:
            problems.add(item.name, place, str(error))
        except OSError as error:
            problems.add(item.name, place, f"the caption cannot be read ({error.strerror or error})")
    _account_for(listing, {*listing.texts} - used - tables.used, problems)
    return found


def _account_for(listing: Listing, unused: set[str], problems: Problems) -> None:
    """Caption files that no item has."""
    stems = {item.stem for item in listing.items}
    for key in sorted(unused):
        stem, suffix = divided(key)
        name, place = listing.text_names[key], listing.texts[key]
        if suffix == ".json" or stem in stems or stem in listing.set_aside:  # of another program, or a second one
            listing.ignored[suffix] += 1
        elif stem in listing.others:
            other = listing.others[stem]
            reason = f"it has a caption, but files of this kind are not read; convert it to one of {KINDS}"
            problems.add(other, str(place).removesuffix(name) + other, reason)
        else:
            problems.add(name, place, "a caption without a picture or clip of the same name; remove it, or add the file")


class _Tables:
    """The ``captions.json`` files of a directory, each read when the first item needs it."""

    def __init__(self, listing: Listing, settings: DatasetConfig, problems: Problems):
        self.settings, self.problems = settings, problems
        self.keys = {key.removesuffix(TABLE): key for key, name in listing.text_names.items() if f"/{name}".endswith(f"/{TABLE}")}
        self.files = {*self.keys.values()}
        self.places = {folder: listing.texts[key] for folder, key in self.keys.items()}
        self.names: dict[str, set[str]] = {folder: set() for folder in self.keys}
        for item in listing.items if self.keys else ():
            for folder in self._folders(item):
                self.names[folder] |= {item.name.removeprefix(folder), item.found.file.member}
        self.tables: dict[str, dict[str, Any]] = {}
        self.used: set[str] = set()
        self.broken = False

    def _folders(self, item: Item) -> Iterator[str]:
        """Where the item may be named: in its own folder and, for a member of a tar file, in those above it."""
        folder = item.name.rpartition("/")[0]
        while True:
            if (name := f"{folder}/" if folder else "") in self.keys:
                yield name
            if not (folder and item.found.file.member):
                return
            folder = folder.rpartition("/")[0]

    def entry_for(self, item: Item) -> tuple[str, Any] | None:
        """Which entry the item has, and what is in it; None: none."""
        for folder in self._folders(item) if self.keys else ():
            if folder not in self.tables:
                self.tables[folder] = self._read(folder)
            for name in (item.name.removeprefix(folder), item.found.file.member):
                if name in self.tables[folder]:
                    return f"{self.places[folder]}: {name}", self.tables[folder][name]
        return None

    def _read(self, folder: str) -> dict[str, Any]:
        """What the table says, by file name; nothing if it is broken, which is one of the problems."""
        place = self.places[folder]
        self.used.add(self.keys[folder])
        try:
            table = _from_json(decode(_bytes(place), self.settings.caption_encoding))
            if not isinstance(table, dict):
                raise CaptionError("it is no table of file names with their captions; correct it")
        except (CaptionError, OSError) as error:
            self.broken = True
            self.problems.whole.append(f"{printable(str(place))}: {error}")
            return {}
        if lost := sorted(table.keys() - self.names[folder]):
            more = f" and {len(lost) - MAX_NAMED} more" if len(lost) > MAX_NAMED else ""
            named = ", ".join(map(printable, lost[:MAX_NAMED]))
            log.warning("%s: captions of files that are not there: %s%s", printable(str(place)), named, more)
        return table


def _bytes(place: str | DataFile) -> bytes:
    """Raises OSError."""
    if isinstance(place, DataFile):
        with place.open() as stream:
            return stream.read()
    descriptor = os.open(place, os.O_RDONLY)  # less to do than for a file object, for 100 000 of them
    try:
        return b"".join(iter(lambda: os.read(descriptor, _AT_ONCE), b""))
    finally:
        os.close(descriptor)
