"""The captions of an item, as they are written: a text, or several of which training shows one at a time.

They stand in a ``.txt`` or ``.json`` file beside the item, in ``captions.json``, or in the row of a list.
"""

import codecs
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.config.describe import shown
from utils.config.schema import DatasetConfig
from utils.data import wildcards
from utils.data.values import Caption

log = logging.getLogger(__name__)

MAX_NAMED = 20
"""File names of one warning; the rest is counted."""
TABLE = "captions.json"
"""A file with the captions of a whole folder, by the items' file names; diffusion-pipe's."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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


@dataclass
class FolderCaptions:
    """The captions of a folder's items."""

    captions: dict[Path, tuple[Caption, ...]] = field(default_factory=dict)
    """By item; those without a caption that is right are not in it."""
    missing: list[Path] = field(default_factory=list)
    """Items that have an empty caption because they have none."""
    unused: list[Path] = field(default_factory=list)
    """Caption files that belong to no item, or were not needed."""


def read_folder(media: Sequence[Path], files: Sequence[Path], settings: DatasetConfig, wrong: list[str]) -> FolderCaptions:
    """The captions of ``media`` from ``files``, the ``.txt`` and ``.json`` files that lie beside them.

    An item's ``.txt`` goes before its ``.json``, and that before its entry in ``captions.json``; one with none of them is wrong, or
    has an empty caption, as ``on_missing_caption`` says.  What is wrong is added to ``wrong``.
    """
    beside = {(path.with_suffix(""), path.suffix.lower()): path for path in files if path.name != TABLE}
    sources = {path: beside.get((path.with_suffix(""), ".txt")) or beside.get((path.with_suffix(""), ".json")) for path in media}
    tables = {path.parent: path for path in files if path.name == TABLE}
    needed = {path.parent for path, source in sources.items() if source is None}
    entries = {folder: _table(path, media, settings, wrong) for folder, path in tables.items() if folder in needed}
    found = FolderCaptions(unused=sorted({*files} - {*sources.values()} - {tables[folder] for folder in entries}))
    for path, source in sources.items():
        table = entries.get(path.parent, {})
        try:
            if source is not None:
                found.captions[path] = parse_file(source.read_bytes(), source.suffix.lower(), settings)
            elif path.name in table:
                source = tables[path.parent]
                found.captions[path] = parse_value(table[path.name], settings)
            elif settings.on_missing_caption == "empty":
                found.captions[path] = (Caption(""),)
                found.missing.append(path)
            else:
                way_out = f"write one to {path.stem}.txt beside it (an empty file is an empty caption)"
                wrong.append(f'{path}: it has no caption; {way_out}, or set on_missing_caption = "empty"')
        except CaptionError as error:
            entry = f": {path.name}" if source.name == TABLE else ""
            wrong.append(f"{source}{entry}: {error}")
        except OSError as error:
            wrong.append(f"{source}: the caption cannot be read ({error.strerror})")
    return found


def _table(path: Path, media: Sequence[Path], settings: DatasetConfig, wrong: list[str]) -> dict[str, Any]:
    """What ``captions.json`` says, by file name; nothing if it is broken, which is added to ``wrong``."""
    try:
        table = _from_json(decode(path.read_bytes(), settings.caption_encoding))
        if not isinstance(table, dict):
            raise CaptionError("it is no table of file names with their captions; correct it")
    except (CaptionError, OSError) as error:
        wrong.append(f"{path}: {error}")
        return {}
    if lost := sorted(table.keys() - {item.name for item in media if item.parent == path.parent}):
        more = f" and {len(lost) - MAX_NAMED} more" if len(lost) > MAX_NAMED else ""
        log.warning("%s: captions of files that are not there: %s%s", path, ", ".join(lost[:MAX_NAMED]), more)
    return table
