"""Files and what is known about them: safe names, sizes, checksums, room on the disk, and the note beside the data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from llava_kit.errors import Problem, ResourceError


def check_inside(key: str, path: str) -> None:
    """Raises:
    ValueError: ``path`` could lead out of the folder it is meant for.
    """
    parts = PurePosixPath(path.replace("\\", "/"))
    if not path or parts.is_absolute() or ".." in parts.parts or ":" in path or "\0" in path:
        raise ValueError(f"{key}: '{path}' must be a relative path without '..'")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises:
    ResourceError: the disk that ``folder`` is or will be on has less than ``needed`` bytes free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        short = f"{what} needs {readable(needed)}, {readable(free)} are free"
        raise ResourceError(Problem(str(folder), short, "make room, or set data_root to a larger disk"))


def file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def readable(size: float) -> str:
    """A size as people write it: ``6.1 GB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class State:
    """``.hub_data.json``: checksums of complete files, versions of unfinished ones, and what is unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged note costs no more than checking again
            stored = {}
        self.values: dict[str, dict[str, Any]] = stored if isinstance(stored, dict) else {}

    def get(self, kind: str, name: str) -> Any:
        return self.values.get(kind, {}).get(name)

    def update(self, kind: str, name: str, value: Any) -> None:
        if self.get(kind, name) != value:
            self.values.setdefault(kind, {})[name] = value
            partial = self.path.with_name(self.path.name + ".tmp")
            partial.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
            partial.replace(self.path)

    def digest(self, path: Path, name: str) -> str | None:
        """The checksum written down, when the file has not been touched since."""
        known = self.get("files", name) or {}
        about = path.stat()
        return known.get("sha256") if known.get("at") == [about.st_size, about.st_mtime_ns] else None

    def remember(self, path: Path, name: str, digest: str, source: str) -> None:
        about = path.stat()
        at = [about.st_size, about.st_mtime_ns]
        self.update("files", name, {"sha256": digest, "at": at, "source": source})

    def is_unpacked(self, name: str, target: Path) -> bool:
        return self.get("unpacked", name) is not None and target.is_dir()
