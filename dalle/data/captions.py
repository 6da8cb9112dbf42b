"""The captions of a folder: same-stem .txt files, and tables called captions.csv and captions.jsonl at any depth."""

import csv
import json
import os
import posixpath
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from dalle.errors import UserError

TABLES = ("captions.csv", "captions.jsonl")
FILE_COLUMNS = ("file", "file_name")  # the second is the name of Hugging Face's imagefolder
MAX_CAPTION = 65_536  # characters of a caption, bytes of a .txt
MAX_TABLE_BYTES = 256 << 20


class FolderCaptions:
    """All captions of the pictures in a folder, in the order .txt, csv, jsonl, each once for a picture.

    A .txt holds a caption a line. captions.csv has a header row with the columns file (or file_name) and caption;
    captions.jsonl an object a line with the same keys, whose caption is a string or a list of strings. Paths in a table
    are relative to its own folder; a picture may come in several rows. Whitespace is collapsed to single spaces.

    root: the folder; files: relative posix paths of what is in it; pictures: those of them that are pictures.
    ``skipped`` lists what was left out as (name, reason), a line of a table as "captions.csv:7".
    Raises UserError for a table that cannot be opened, or a csv that does not name its columns.
    """

    def __init__(self, root: Path, files: Iterable[str], pictures: Iterable[str]) -> None:
        self.root = root
        self.skipped: list[tuple[str, str]] = []
        self._found: dict[str, dict[str, None]] = {picture: {} for picture in pictures}  # dicts as ordered sets
        names = sorted(files)
        self._read_texts([name for name in names if name.lower().endswith(".txt")])
        for kind, read in zip(TABLES, (self._read_csv, self._read_jsonl), strict=True):
            for name in names:
                if posixpath.basename(name) == kind:
                    read(name)

    def of(self, picture: str) -> tuple[str, ...]:
        return tuple(self._found[picture])

    def _read_texts(self, names: list[str]) -> None:
        stems: dict[str, list[str]] = {}
        for picture in self._found:
            stems.setdefault(os.path.splitext(picture)[0], []).append(picture)
        for name in names:
            pictures = stems.get(os.path.splitext(name)[0])
            try:
                if not pictures:
                    raise ValueError("caption without a picture")
                _check_file(self.root / name, MAX_CAPTION)
                lines = (self.root / name).read_text(encoding="utf-8-sig").splitlines()
                captions = [line for line in lines if line.strip()]
                if not captions:
                    raise ValueError("empty")
            except (ValueError, OSError) as error:
                self.skipped.append((name, _reason(error)))
                continue
            for picture in pictures:
                self._add(name, picture, captions)

    def _read_csv(self, name: str) -> None:
        with _open_table(self.root / name) as file:
            rows = csv.DictReader(file, strict=True)
            columns = _columns(rows, self.root / name)
            column = next((column for column in FILE_COLUMNS if column in columns), None)
            if column is None or "caption" not in columns:
                found = ", ".join(map(_short, columns)) or "nothing"
                raise UserError(f"the first row of {self.root / name} holds {found}: it has to name the columns file "
                                "and caption, with a comma between them")
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    self.skipped.append((f"{name}:{rows.reader.line_num}", str(error)))
                    continue
                self._add_row(name, rows.reader.line_num, row, row[column])

    def _read_jsonl(self, name: str) -> None:
        with _open_table(self.root / name) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not a JSON object")
                except (ValueError, RecursionError) as error:
                    self.skipped.append((f"{name}:{number}", _reason(error)))
                    continue
                self._add_row(name, number, row, next((row[key] for key in FILE_COLUMNS if key in row), None))

    def _add_row(self, table: str, number: int, row: dict, file: object) -> None:
        place, captions = f"{table}:{number}", row.get("caption")
        captions = [captions] if isinstance(captions, str) else captions
        picture = posixpath.normpath(posixpath.join(posixpath.dirname(table), file)) if isinstance(file, str) else None
        if None in row:
            self.skipped.append((place, "more values than columns: quote captions that hold a comma"))
        elif not file or not isinstance(file, str):
            self.skipped.append((place, "names no file"))
        elif picture not in self._found:  # whatever leads out of the folder is not there either
            self.skipped.append((place, f"there is no picture {_short(file)} in the folder"))
        elif not captions or not isinstance(captions, list):
            self.skipped.append((place, "no caption"))
        else:
            self._add(place, picture, captions)

    def _add(self, place: str, picture: str, captions: list) -> None:
        for caption in captions:
            try:
                self._found[picture][_clean(caption)] = None
            except ValueError as error:
                self.skipped.append((place, _reason(error)))


def _clean(caption: object) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"the caption {_short(caption)} is no text")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"a caption of more than {MAX_CAPTION} characters")
    caption = " ".join(caption.split())
    if not caption:
        raise ValueError("empty caption")
    if "\0" in caption:
        raise ValueError("a NUL character in the caption")
    caption.encode()  # a UnicodeEncodeError for what was no UTF-8
    return caption


def _open_table(path: Path) -> TextIO:
    try:
        _check_file(path, MAX_TABLE_BYTES)
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be used ({_reason(error)}): mend it or remove it") from error


def _columns(rows: csv.DictReader, path: Path) -> list[str]:
    try:
        return list(rows.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{path} cannot be used ({error}): its first row has to name file and caption") from error


def _check_file(path: Path, limit: int) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise ValueError("not a regular file")
    if status.st_size > limit:
        raise ValueError(f"longer than {limit} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    return getattr(error, "strerror", None) or str(error)


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else text[:100] + "…"
