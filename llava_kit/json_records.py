"""Records of a JSON array or of JSON lines, read one by one: only their places in the file are kept in memory.

An index is two numbers a record, which processes share without copying; a record is parsed when it is asked for.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any, BinaryIO

from llava_kit.errors import DataError, MissingDataError, Problem, SampleError

CHUNK = 1 << 22
"""Bytes read at once."""
NEAR_END = 64
"""An error this close to the end of what was read may only mean that the rest is missing."""
BOM = b"\xef\xbb\xbf"


class JsonRecords:
    """The records of a file that ``keep`` is true for, in their order.

    Args:
        path: a JSON array of records, or a file with one record per line; its first sign tells which.
        keep: chooses records; those that cannot be parsed are kept, so that they are counted and named when read.

    Raises:
        DataError: the file cannot be read or is broken as a whole; the message names file, line and column.
    """

    def __init__(self, path: Path, keep: Callable[[Any], bool] = lambda _: True) -> None:
        self.path = path
        self._starts, self._sizes = array("q"), array("q")
        try:
            with path.open("rb") as file:
                self._stamp = _stamp(file)
                for start, size, record in _scan(file, path):
                    if isinstance(record, JSONDecodeError) or keep(record):
                        self._starts.append(start)
                        self._sizes.append(size)
        except FileNotFoundError as error:
            raise MissingDataError(Problem(str(path), "the data cannot be read: there is no such file")) from error
        except OSError as error:
            raise DataError(Problem(str(path), f"the data cannot be read: {error.strerror or error}")) from error

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        """One parsed record.

        Raises:
            SampleError: it is not valid JSON or not UTF-8.
            DataError: the file has changed since it was indexed.
            IndexError: there is none.
        """
        start, size = self._starts[index], self._sizes[index]
        try:
            with self.path.open("rb") as file:
                if _stamp(file) != self._stamp:
                    what = "the file was changed while it was in use"
                    raise DataError(Problem(str(self.path), what, "start again, so that it is read anew"))
                file.seek(start)
                raw = file.read(size)
        except OSError as error:
            raise DataError(Problem(str(self.path), f"the data cannot be read: {error.strerror or error}")) from error
        try:
            return json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            what = f"not UTF-8: byte 0x{raw[error.start]:02x} is no text"
            raise SampleError(Problem(locate(self.path, start + error.start), what)) from error
        except (JSONDecodeError, RecursionError) as error:
            raise SampleError(self._broken_line(raw, start, error)) from error

    def _broken_line(self, raw: bytes, start: int, error: JSONDecodeError | RecursionError) -> Problem:
        if isinstance(error, RecursionError):
            return Problem(locate(self.path, start), "broken JSON: nested too deeply")
        offset = start + len(error.doc[: error.pos].encode("utf-8"))
        torn = start + len(raw) == self._stamp[0]  # without a line end: writing was interrupted
        hint = "the last line is torn; the file is incomplete" if torn else ""
        return Problem(locate(self.path, offset), f"broken JSON: {error.msg}", hint)


def locate(path: Path, offset: int) -> str:
    """``file:line:column`` of a byte."""
    line, line_start, at = 1, 0, 0
    with path.open("rb") as file:
        while at < offset and (chunk := file.read(min(CHUNK, offset - at))):
            newlines = chunk.count(b"\n")
            if newlines:
                line += newlines
                line_start = at + chunk.rfind(b"\n") + 1
            at += len(chunk)
        file.seek(line_start)
        column = len(file.read(offset - line_start).decode("utf-8", "replace")) + 1
    return f"{path}:{line}:{column}"


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


Found = tuple[int, int, Any]
"""Place of a record, its bytes, and the record, or the error where a line cannot be parsed."""


def _scan(file: BinaryIO, path: Path) -> Iterator[Found]:
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    file.seek(start)
    while (sign := file.read(1)) and sign in b" \t\r\n":
        pass
    place = file.tell() - 1
    if not sign:
        raise DataError(Problem(str(path), "the file is empty", "it must hold a JSON array or JSON lines"))
    if sign == b"[":
        return _scan_array(file, path, file.tell())
    if sign == b"{":
        file.seek(start)
        return _scan_lines(file, path, start)
    what = f"broken JSON: it begins with {sign!r}"
    raise DataError(Problem(locate(path, place), what, "it must hold a JSON array or JSON lines, in UTF-8"))


def _scan_lines(file: BinaryIO, path: Path, start: int) -> Iterator[Found]:
    failures, parsed = [], 0
    for line in file:
        text = line.strip()
        if text:
            record = _parse_line(text)
            if isinstance(record, JSONDecodeError):
                failures.append((start + len(line) - len(line.lstrip()) + record.pos, record))
            else:
                parsed += 1
            yield start, len(line), record
        start += len(line)
    if failures and not parsed:
        offset, error = failures[0]
        hint = "a file with one object must be an array, [{…}]"
        raise DataError(Problem(locate(path, offset), f"broken JSON: {error.msg}", hint))


def _parse_line(text: bytes) -> Any:
    try:
        return json.loads(text.decode("latin-1"))
    except JSONDecodeError as error:
        return error
    except RecursionError:
        return JSONDecodeError("nested too deeply", "", 0)


class _Window:
    """A sliding part of a file, a sign per byte: as Latin-1 every byte is one, and JSON's structure is ASCII anyway."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.file = file
        self.text = ""
        self.base = start
        """Place in the file of the text's first sign."""
        self.at = 0
        self.ended = False

    @property
    def place(self) -> int:
        return self.base + self.at

    def read_on(self, size: int = CHUNK) -> None:
        """Forget what is behind, and read more."""
        more = self.file.read(size)
        self.ended = not more
        self.text = self.text[self.at :] + more.decode("latin-1")
        self.base, self.at = self.base + self.at, 0

    def next_sign(self) -> str:
        """The next sign that is not white space, which it steps behind; empty at the end."""
        while True:
            while self.at < len(self.text):
                sign = self.text[self.at]
                self.at += 1
                if sign not in " \t\r\n":
                    return sign
            if self.ended:
                return ""
            self.read_on()


def _scan_array(file: BinaryIO, path: Path, start: int) -> Iterator[Found]:
    window = _Window(file, start)
    decoder = JSONDecoder()
    sign = window.next_sign()
    if sign != "]":
        window.at -= len(sign)
        while True:
            record, size = _decode(window, decoder, path)
            yield window.place - size, size, record
            sign = window.next_sign()
            if sign == "]":
                break
            if sign != ",":
                raise _broken(
                    path, window, "expected ',' or ']' between records" if sign else "the array does not end", sign
                )
            sign = window.next_sign()
            window.at -= len(sign)
    if sign := window.next_sign():
        raise _broken(path, window, "text behind the array", sign)


def _decode(window: _Window, decoder: JSONDecoder, path: Path) -> tuple[Any, int]:
    """Parse the record that begins here, and step behind it."""
    size = CHUNK
    while True:
        try:
            record, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:  # else a number may go on
                length, window.at = end - window.at, end
                return record, length
        except JSONDecodeError as error:
            cut_off = error.pos >= len(window.text) - NEAR_END or error.msg.startswith("Unterminated string")
            if window.ended or not cut_off:
                torn = "the file breaks off in a record" if window.ended and cut_off else ""
                problem = Problem(locate(path, window.base + error.pos), f"broken JSON: {error.msg}", torn)
                raise DataError(problem) from error
        except RecursionError as error:
            raise DataError(Problem(locate(path, window.place), "broken JSON: nested too deeply")) from error
        window.read_on(size)
        size *= 2


def _broken(path: Path, window: _Window, what: str, sign: str) -> DataError:
    return DataError(Problem(locate(path, window.place - len(sign)), f"broken JSON: {what}"))
