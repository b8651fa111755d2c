"""Lists of files: ``.jsonl`` with an object a line, ``.csv`` with a line of column names.

Paths in them that are not absolute start at the folder of the list.  A folder's ``metadata.jsonl`` or ``metadata.csv``, as Hugging
Face's image folders have it, is one too.
"""

import csv
import io
import json
import logging
import stat
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from posixpath import normpath
from typing import Any

from utils.config.describe import shown
from utils.data.captions.parsing import CaptionError, decode
from utils.data.media.files import DataFile, printable
from utils.data.sources.listing import KINDS, KNOWN_FRAMES, MEDIA, TEXTS, Found, Item, Listing, Problems, divided, stamp_of
from utils.data.sources.repeats import as_fraction

log = logging.getLogger(__name__)

LISTS = frozenset({".jsonl", ".csv"})
METADATA = ("metadata.jsonl", "metadata.csv")
"""A list in a folder that is read with it; of two the first."""
PATH_COLUMNS = ("path", "file_name")
CAPTION_COLUMNS = ("caption", "text")
OTHER_COLUMNS = ("mask", "control", "first_frame", "last_frame", "repeats", "crop")


class RowError(ValueError):
    """What is wrong with a row, without its place."""


def has_list(path: Path) -> bool:
    """Whether a directory is a list, or a folder with one in it."""
    return path.suffix.lower() in LISTS or any((path / name).is_file() for name in METADATA)


def list_rows(path: Path, encoding: str, problems: Problems) -> Listing:
    """The files of a list."""
    listing = Listing("list", nested=True)
    add_rows(path, "", listing, encoding, problems)
    return listing


def add_rows(path: Path, prefix: str, listing: Listing, encoding: str, problems: Problems) -> None:
    """Add the rows of a list to what is known of the files; ``prefix``: the list's folder in the directory, with a slash.

    Files that another file's row names as its mask, control picture or given frame are no items.
    """
    name = prefix + path.name
    try:
        rows = [*_ROWS[path.suffix.lower()](decode(path.read_bytes(), encoding))]
    except (OSError, CaptionError, RowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).replace("the caption", "the list")
        problems.whole.append(f"{printable(str(path))}: the list cannot be read ({reason}); correct it")
        return
    _Rows(path, prefix, listing, problems).add(rows)
    listing.lists.append(name)


class _Rows:
    """One list that is being read."""

    def __init__(self, path: Path, prefix: str, listing: Listing, problems: Problems):
        self.path, self.prefix, self.listing, self.problems = path, prefix, listing, problems
        self.folder = str(path.parent)
        self.items = {item.name: item for item in listing.items}
        self.real: dict[str, str] = {}
        """Folders without links."""
        self.named: set[str] = set()
        """Items that rows have, and of which a row is wrong; files that belong to another."""
        self.refused: set[str] = set()
        self.belonging: set[str] = set()

    def add(self, rows: list[tuple[int, Any]]) -> None:
        columns: set[str] = set()
        for line, row in rows:
            place = f"{self.path}:{line}"
            try:
                if isinstance(row, RowError):
                    raise row
                if not isinstance(row, dict):
                    raise RowError(f"a row is an object with the name of a file and what belongs to it, not {shown(row)}")
                columns.update(row)
                self._add_row(row, place)
            except RowError as error:
                self.problems.add(f"{self.prefix}{self.path.name}:{line}", place, str(error))
        self._name_unknown(columns)
        self.listing.items = []
        for name, item in self.items.items():
            if name in self.refused or (name not in self.named and item.found.identity in self.belonging):
                self.listing.set_aside.add(item.stem)
            else:
                self.listing.items.append(item)

    def _name_unknown(self, columns: set[str]) -> None:
        known = {*OTHER_COLUMNS}
        for names in (PATH_COLUMNS, CAPTION_COLUMNS):
            known.add(next((name for name in names if name in columns), names[0]))
        if unknown := sorted(columns - known):
            log.warning("%s: columns that are not read: %s", printable(str(self.path)), ", ".join(map(printable, unknown)))

    def _add_row(self, row: dict[str, Any], place: str) -> None:
        path = _path(row, next((name for name in PATH_COLUMNS if name in row), PATH_COLUMNS[0]))
        if path is None:
            raise RowError(f"it names no file; write it to the column {' or '.join(PATH_COLUMNS)}")
        name = self._name(path)
        try:
            item = self._item(name, path)
            item.box, item.row = _box(row.get("crop")), place
            item.repeats *= _repeats(row.get("repeats"))
            item.caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
            item.mask, item.controls = self._file(row, "mask"), tuple(map(self._found, _paths(row.get("control"))))
            item.known_frames = {end: found for end in KNOWN_FRAMES if (found := self._file(row, f"{end}_frame"))}
        except RowError:
            self.refused.add(printable(name))
            self.listing.set_aside.add(divided(name)[0])
            raise
        self.belonging |= {found.identity for found in (item.mask, *item.controls, *item.known_frames.values()) if found}
        self.named.add(item.name)
        self.items[item.name] = item

    def _name(self, path: str) -> str:
        """What the row's file is called in the directory."""
        if path.startswith("/") and not path.startswith(f"{self.folder}/"):
            return normpath(path)
        return self.prefix + normpath(path.removeprefix(f"{self.folder}/"))

    def _item(self, name: str, path: str) -> Item:
        """The row's own item: what the folder has of that name, or another file; a second row of a file makes a second item."""
        stem, suffix = divided(name)
        if suffix not in MEDIA:
            raise RowError(f"{printable(path)}: files of this kind are not read; convert it to one of {KINDS}")
        called = printable(name)
        if (item := self.items.get(called)) and called not in self.named:
            return item
        found = self._found(path)
        times = 2
        while called in self.named:
            called, times = f"{printable(name)}[{times}]", times + 1
        for kind in TEXTS:
            beside = f"{divided(str(found.file.path))[0]}{kind}"
            if stem + kind not in self.listing.texts and Path(beside).is_file():
                self.listing.texts[stem + kind], self.listing.text_names[stem + kind] = beside, stem + kind
        return Item(called, found, stem)

    def _file(self, row: dict[str, Any], column: str) -> Found | None:
        path = _path(row, column)
        return None if path is None else self._found(path)

    def _found(self, path: str) -> Found:
        file = Path(path if path.startswith("/") else f"{self.folder}/{path}")
        folder = str(file.parent)
        try:
            state = file.stat()
            if folder not in self.real:
                self.real[folder] = str(file.parent.resolve())
        except OSError as error:
            raise RowError(f"{printable(path)}: it cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(state.st_mode):
            raise RowError(f"{printable(path)}: it cannot be read (it is no file, but a folder, a pipe or a device)")
        return Found(DataFile(file), f"{self.real[folder]}/{file.name}", stamp_of(state))


def _path(row: dict[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is not None and (not isinstance(value, str) or not value or "\0" in value):
        raise RowError(f"{column} is the name of a file, not {shown(value)}")
    return value


def _paths(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(path, str) and path and "\0" not in path for path in values):
        raise RowError(f"control is the name of a file, or a list of them, not {shown(value)}")
    return values


def _box(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and len(value) == 4 and all(type(side) is int for side in value)
    if not (whole and 0 <= value[0] < value[2] and 0 <= value[1] < value[3]):
        raise RowError(f"crop is [left, top, right, bottom] in whole pixels, not {shown(value)}")
    return tuple(value)


def _repeats(value: Any) -> Fraction:
    if value is None:
        return Fraction(1)
    try:
        if type(value) in (int, float):
            return as_fraction(value)
    except ValueError:
        pass
    raise RowError(f"repeats is a number above 0 and at most 10000, not {shown(value)}")


def _json_rows(text: str) -> Iterator[tuple[int, Any]]:
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            try:
                yield line, json.loads(row)
            except (ValueError, RecursionError) as error:
                yield line, RowError(f"it is not JSON ({str(error)[:80]})")


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Rows with what is not empty; numbers and lists are written as in JSON.  Raises RowError for columns without a name."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield line, RowError(f"it is not CSV ({error})")
            continue
        if cells is None:
            return
        if not columns:
            columns = [cell.strip() for cell in cells]
            if "" in columns or len({*columns}) < len(columns):
                raise RowError("its first line must name each column, and each once")
            continue
        if not cells:
            continue
        if len(cells) != len(columns):
            yield line, RowError(f"it has {len(cells)} cells, and the first line names {len(columns)} columns")
            continue
        row = {column: cell for column, cell in zip(columns, cells, strict=True) if cell}
        yield line, {column: _cell(column, cell) for column, cell in row.items()} | dict.fromkeys(columns - row.keys())


def _cell(column: str, cell: str) -> Any:
    """Numbers and boxes as in JSON, and control pictures if there are several; everything else is text as it stands."""
    if column in ("repeats", "crop") or (column == "control" and cell.startswith("[")):
        try:
            return json.loads(f"[{cell}]" if column == "crop" and not cell.startswith("[") else cell)
        except ValueError:
            return cell
    return cell


_ROWS: dict[str, Callable[[str], Iterator[tuple[int, Any]]]] = {".jsonl": _json_rows, ".csv": _csv_rows}
