"""Captions of a folder of images: .txt files of the same stem, and captions.csv and captions.jsonl at any depth."""

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
FILE_COLUMNS = ("file", "file_name")  # the second as in Hugging Face's imagefolder
MAX_CAPTION = 65_536  # characters of a caption, bytes of a .txt
MAX_TABLE_BYTES = 256 << 20


class FolderCaptions:
    """All captions of the images in a folder, in the order .txt, csv, jsonl, without duplicates per image.

    A .txt holds one caption per line. captions.csv has a header row with the columns file (or file_name) and caption.
    captions.jsonl has one object per line with the same keys; its caption is a string or a list of strings. Paths in a
    table are relative to its own folder, and an image may have several rows. Whitespace is collapsed to single spaces.
    ``skipped`` lists unusable entries as (name, reason); a line of a table has a name like "captions.csv:7".

    Args:
        root: the folder.
        files: posix paths of its files, relative to ``root``.
        images: those of ``files`` that are images.

    Raises:
        UserError: a table cannot be opened, or a csv lacks the column names.
    """

    def __init__(self, root: Path, files: Iterable[str], images: Iterable[str]) -> None:
        self.root = root
        self.skipped: list[tuple[str, str]] = []
        self._found: dict[str, dict[str, None]] = {image: {} for image in images}  # dicts as ordered sets
        names = sorted(files)
        self._read_texts([name for name in names if name.lower().endswith(".txt")])
        for kind, read in zip(TABLES, (self._read_csv, self._read_jsonl), strict=True):
            for name in names:
                if posixpath.basename(name) == kind:
                    read(name)

    def of(self, image: str) -> tuple[str, ...]:
        """The captions of an image, given by its relative path; empty if there are none."""
        return tuple(self._found[image])

    def _read_texts(self, names: list[str]) -> None:
        stems: dict[str, list[str]] = {}
        for image in self._found:
            stems.setdefault(os.path.splitext(image)[0], []).append(image)
        for name in names:
            images = stems.get(os.path.splitext(name)[0])
            try:
                if not images:
                    raise ValueError("caption without an image")
                _check_file(self.root / name, MAX_CAPTION)
                lines = (self.root / name).read_text(encoding="utf-8-sig").splitlines()
                captions = [line for line in lines if line.strip()]
                if not captions:
                    raise ValueError("empty")
            except (ValueError, OSError) as error:
                self.skipped.append((name, _reason(error)))
                continue
            for image in images:
                self._add(name, image, captions)

    def _read_csv(self, name: str) -> None:
        with _open_table(self.root / name) as file:
            rows = csv.DictReader(file, strict=True)
            columns = _columns(rows, self.root / name)
            column = next((column for column in FILE_COLUMNS if column in columns), None)
            if column is None or "caption" not in columns:
                found = ", ".join(map(_short, columns)) or "nothing"
                raise UserError(f"the first row of {self.root / name} holds {found}: it must name the columns file "
                                "and caption, separated by a comma")
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
        image = posixpath.normpath(posixpath.join(posixpath.dirname(table), file)) if isinstance(file, str) else None
        if None in row:
            self.skipped.append((place, "more values than columns: quote captions that hold a comma"))
        elif not file or not isinstance(file, str):
            self.skipped.append((place, "names no file"))
        elif image not in self._found:  # this includes paths that lead out of the folder
            self.skipped.append((place, f"there is no image {_short(file)} in the folder"))
        elif not captions or not isinstance(captions, list):
            self.skipped.append((place, "no caption"))
        else:
            self._add(place, image, captions)

    def _add(self, place: str, image: str, captions: list) -> None:
        for caption in captions:
            try:
                self._found[image][_clean(caption)] = None
            except ValueError as error:
                self.skipped.append((place, _reason(error)))


def _clean(caption: object) -> str:
    if not isinstance(caption, str):
        raise ValueError(f"the caption {_short(caption)} is not a string")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"a caption of more than {MAX_CAPTION} characters")
    caption = " ".join(caption.split())
    if not caption:
        raise ValueError("empty caption")
    if "\0" in caption:
        raise ValueError("a NUL character in the caption")
    caption.encode()  # raises UnicodeEncodeError if it was not UTF-8
    return caption


def _open_table(path: Path) -> TextIO:
    try:
        _check_file(path, MAX_TABLE_BYTES)
        return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be used ({_reason(error)}): fix it or remove it") from error


def _columns(rows: csv.DictReader, path: Path) -> list[str]:
    try:
        return list(rows.fieldnames or [])
    except csv.Error as error:
        raise UserError(f"{path} cannot be used ({error}): its first row must name file and caption") from error


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
