"""Downloads over http(s) that go on where they ended."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import urlsplit

from llava_kit.errors import DataError, Problem, ResourceError

from .files import State, one_line, readable, size_of

Progress: TypeAlias = Callable[[str], None]

TIMEOUT = 30.0
"""Seconds without a byte before a connection counts as dead."""
PAUSE = 2.0
"""Seconds before a broken download goes on; doubled while nothing arrives."""
_TRIES = 5
"""Failures in a row, without a byte between them, before a download is given up."""
_CHUNK = 1 << 20


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http(s), never from https to http nor to anything else."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme not in {urlsplit(req.full_url).scheme, "https"}:
            raise DataError(Problem(req.full_url, f"redirects to {newurl}, which is not followed"))
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: Mapping[str, str], method: str = "GET") -> Any:
    sent = {"User-Agent": "llava-kit", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(url, headers=sent, method=method)  # noqa: S310 - the config allows http(s) only
    return urllib.request.build_opener(_SameScheme).open(request, timeout=TIMEOUT)


def remote_size(url: str) -> int:
    """The size a server gives for a file; 0 where it gives none or does not answer (fetching will say why)."""
    try:
        with _open(url, {}, method="HEAD") as response:
            return int(response.headers.get("Content-Length") or 0)
    except (OSError, http.client.HTTPException, ValueError):
        return 0


def download(url: str, path: Path, state: State, progress: Progress) -> None:
    """Fetch ``url`` into ``path``, going on from ``<path>.part``; only complete files ever appear under ``path``.

    A source that does not answer at all is given up at once, one that breaks off only when nothing more arrives.

    Raises:
        DataError: the server does not have the file.
        ResourceError: no connection.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures, answered = part_of(path), 0, False
    while True:
        before = size_of(part)
        try:
            if _receive(url, part, path.name, state, progress):
                part.replace(path)
                return
            answered, what = True, "the connection ended early"
        except urllib.error.HTTPError as error:
            answered, what = True, f"the server answers {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(Problem(url, what)) from error
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            what = f"cannot be reached: {one_line(error)}"
        arrived = size_of(part) > before
        failures = 1 if arrived else failures + 1
        if failures == _TRIES or not (answered or arrived):
            here = f"{readable(size_of(part))} are here and the next run goes on from there" if size_of(part) else ""
            raise ResourceError(Problem(url, what, here))
        progress(f"{path.name}: {what}; trying again")
        time.sleep(PAUSE * 2 ** (failures - 1))


def _receive(url: str, part: Path, name: str, state: State, progress: Progress) -> bool:
    """One request, from where the part ends; whether the file is complete now."""
    offset, version = size_of(part), state.get("partial", name)
    # If-Range: when the file has changed at its source, the server sends all of it and not a rest that does not fit.
    headers = {"Range": f"bytes={offset}-"} | ({"If-Range": version} if version else {}) if offset else {}
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") == f"bytes */{offset}":
            return True
        part.unlink()  # longer than the file itself: not a part of it
        return False
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
            part.unlink()
            return False
        offset = offset if resumed else 0
        state.update("partial", name, _version(response.headers))
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length and length.isdigit() else None
        with part.open("ab" if resumed else "wb") as out:
            _copy(response, out, name, offset, total, progress)
    return total is None or size_of(part) == total


def _copy(response: IO[bytes], out: IO[bytes], name: str, done: int, total: int | None, progress: Progress) -> None:
    said = time.monotonic()
    while True:
        try:
            chunk = response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(one_line(error)) from error  # an OSError of `out` is a matter of the disk
        if not chunk:
            return
        out.write(chunk)
        done += len(chunk)
        if time.monotonic() - said > 1:
            said = time.monotonic()
            progress(f"{name}: {readable(done)}" + (f" of {readable(total)}" if total else ""))


def _version(headers: Message) -> str | None:
    """What ``If-Range`` may name: a strong entity tag, else the date of the last change."""
    tag = headers["ETag"]
    return tag if tag and not tag.startswith("W/") else headers["Last-Modified"]


def part_of(path: Path) -> Path:
    """Where an unfinished download of ``path`` is kept."""
    return path.with_name(path.name + ".part")
