"""Unpacks zip archives that strangers made."""

from __future__ import annotations

import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from llava_kit.errors import DataError, Problem

from .files import check_inside, one_line, readable, require_space

_CHUNK = 1 << 20
_EXPANSION = 200
"""An archive of text or pictures does not grow more than this when it is unpacked; a bomb does."""


def unzip(archive: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Unpack every member that is not there yet.

    Raises:
        DataError: the archive is damaged, or has members that no honest archive has.
        ResourceError: there is no room for what is missing.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            _refuse_hostile(archive, members)
            missing = [member for member in members if not _is_there(target / member.filename, member)]
            require_space(target, sum(member.file_size for member in missing), f"unpacking {archive.name}")
            said = time.monotonic()
            for count, member in enumerate(missing):
                path = target / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, _CHUNK)
                if time.monotonic() - said > 1:
                    said = time.monotonic()
                    progress(f"unpacking {archive.name}: {count:,} of {len(missing):,} files")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        hint = "delete it to fetch it again"
        raise DataError(Problem(str(archive), f"is damaged: {one_line(error)}", hint)) from error


def _refuse_hostile(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Stop before anything is written: members that leave the folder, links, encrypted members, bombs."""
    problems = []
    for member in members:
        what = _objection(member)
        if what:
            problems.append(Problem(f"{archive}:{member.filename!r}", what))
    size = archive.stat().st_size
    if sum(member.compress_size for member in members) > size:
        problems.append(Problem(str(archive), "its members overlap"))
    if (unpacked := sum(member.file_size for member in members)) > _EXPANSION * size:
        problems.append(Problem(str(archive), f"would grow from {readable(size)} to {readable(unpacked)}"))
    if problems:
        shown = problems[:10]
        raise DataError([Problem(p.where, p.what, "nothing was unpacked; get the archive elsewhere") for p in shown])


def _objection(member: zipfile.ZipInfo) -> str:
    try:
        check_inside("member", member.filename)
    except ValueError:
        return "would be written outside the folder"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "is a link or a device"
    return "is encrypted" if member.flag_bits & 1 else ""


def _is_there(path: Path, member: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != member.file_size:
        return False
    checksum = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum == member.CRC
