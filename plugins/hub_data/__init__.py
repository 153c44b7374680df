"""Fetches published data: files of a hub repository, files behind URLs, zip archives unpacked beside them.

Everything can be stopped and started again at any moment: downloads go on where they ended, archives unpack the
members that are missing, and what is complete is noted in ``.hub_data.json`` and not looked at twice.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from llava_kit import hookimpl
from llava_kit.errors import DataError, KitError, Problem, ResourceError

from .archives import unzip
from .downloads import Progress, download, part_of, remote_size
from .files import State, check_inside, file_digest, one_line, readable, require_space, size_of

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

STATE = ".hub_data.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KINDS = ("dataset", "model", "space")


@dataclass(frozen=True, kw_only=True)
class HubDataConfig:
    """What to fetch, from where, into which folder."""

    folder: str
    """Where the files go, below the recipe's ``data_root``."""
    repo: str | None = None
    """Repository on the Hugging Face hub, ``owner/name``."""
    repo_type: str = "dataset"
    revision: str | None = None
    """Commit, tag or branch of the repository; a commit keeps a recipe reproducible."""
    files: tuple[str, ...] = ()
    """Files of the repository."""
    urls: tuple[str, ...] = ()
    """Further files, each kept under the last part of its URL."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Checksums by file name.  Those of other files are written down when they are first fetched."""
    unpack: dict[str, str] = field(default_factory=dict)
    """Zip archives among the files, and the sub-folder each is unpacked into (``.`` for the folder itself)."""
    free_gb: float = 0.0
    """Disk space in GB that must be free before the first byte is fetched, unpacked files included."""

    def __post_init__(self) -> None:
        check_inside("folder", self.folder)
        if self.repo_type not in _KINDS:
            raise ValueError(f"repo_type must be one of {', '.join(_KINDS)}, got '{self.repo_type}'")
        if bool(self.repo) != bool(self.files):
            raise ValueError("repo and files belong together: the repository, and which of its files to fetch")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not url_name(url):
                raise ValueError(f"urls must be http(s) addresses that end in a file name, got '{url}'")
        names = [*self.files, *map(url_name, self.urls)]
        for name in names:
            check_inside("files", name)
        if len(set(names)) < len(names):
            raise ValueError("two of the files have the same name")
        for key, named in (("sha256", self.sha256), ("unpack", self.unpack)):
            for name in named:
                if name not in names:
                    raise ValueError(f"{key}: '{name}' is not among the files; there is {', '.join(names) or 'none'}")
        for name, digest in self.sha256.items():
            if not re.fullmatch("[0-9a-f]{64}", digest):
                raise ValueError(f"sha256 of '{name}' must be 64 hexadecimal digits in lower case")
        for name, target in self.unpack.items():
            check_inside("unpack", target)
            if not name.endswith(".zip"):
                raise ValueError(f"unpack: '{name}' is no .zip archive")
        if not 0 <= self.free_gb < 1e6:
            raise ValueError(f"free_gb must be between 0 and a million, got {self.free_gb}")


def url_name(url: str) -> str:
    """The file name a URL ends in."""
    return unquote(urlsplit(url).path.rpartition("/")[2])


class HubData:
    """The preparation: fetch, verify, unpack; nothing where everything is there already."""

    def __init__(self, config: HubDataConfig) -> None:
        self.config = config

    def run(self, root: Path, progress: Progress) -> None:
        """Bring the folder below ``root`` to completeness.

        Raises:
            DataError: a file is not the one expected, does not exist at its source, or is a hostile archive.
            ResourceError: no connection, or the disk is too small.
        """
        from filelock import FileLock

        folder = root / self.config.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".hub_data.lock"):  # a second process waits and then finds everything there
                self._run(folder, State(folder / STATE), progress)
        except OSError as error:
            if error.errno not in _FULL:
                raise ResourceError(Problem(str(folder), f"cannot be written: {error}")) from error
            free = readable(shutil.disk_usage(folder).free)
            hint = "make room and run the same command again; it goes on where it stopped"
            raise ResourceError(Problem(str(folder), f"the disk is full, {free} are free", hint)) from error

    def _run(self, folder: Path, state: State, progress: Progress) -> None:
        wanted = self._sources()
        unpacked = {name for name in self.config.unpack if state.is_unpacked(name, folder / self.config.unpack[name])}
        missing = {name: url for name, url in wanted.items() if name not in unpacked and not (folder / name).is_file()}
        if missing:
            self._check_space(folder, missing)
        for name, url in wanted.items():
            if name in unpacked:
                continue
            if name in missing:
                self._fetch(folder, name, url, state, progress)
            self._verify(folder / name, name, url, state, progress)
            if name in self.config.unpack:
                unzip(folder / name, folder / self.config.unpack[name], progress)
                state.update("unpacked", name, self.config.unpack[name])

    def _sources(self) -> dict[str, str]:
        """Where each file comes from, for messages and, without a repository, for fetching."""
        hub = {name: f"hub:{self.config.repo}/{name}" for name in self.config.files}
        return hub | {url_name(url): url for url in self.config.urls}

    def _check_space(self, folder: Path, missing: Mapping[str, str]) -> None:
        sizes = [remote_size(url) - size_of(part_of(folder / name)) for name, url in missing.items() if is_url(url)]
        # What an earlier, interrupted run has fetched and unpacked takes no more room.
        here = sum(size_of(path) for path in folder.rglob("*"))
        needed = max(sum(max(size, 0) for size in sizes), int(self.config.free_gb * 1e9) - here)
        require_space(folder, needed, f"fetching {', '.join(missing)}")

    def _fetch(self, folder: Path, name: str, url: str, state: State, progress: Progress) -> None:
        progress(f"fetching {name} from {url}")
        try:
            if is_url(url):
                download(url, folder / name, state, progress)
            else:
                self._fetch_from_hub(folder, name)
        except KitError as error:
            by_hand = f"run again where there is a connection, or put the file at {folder.resolve() / name} by hand"
            problems = [Problem(p.where, p.what, "; ".join(filter(None, [p.hint, by_hand]))) for p in error.problems]
            raise type(error)(problems) from error

    def _fetch_from_hub(self, folder: Path, name: str) -> None:
        import huggingface_hub
        from huggingface_hub import errors

        config = self.config
        where = f"hub:{config.repo}/{name}"
        assert config.repo is not None  # noqa: S101 - files and repo come together, see HubDataConfig
        try:
            huggingface_hub.hf_hub_download(
                config.repo, name, repo_type=config.repo_type, revision=config.revision, local_dir=folder
            )
        except errors.LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but it means: no connection
            raise ResourceError(Problem(where, "the hub cannot be reached")) from error
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
            at = f" at revision {config.revision}" if config.revision else ""
            hint = "check the name and, for gated data, that you are logged in (`hf auth login`)"
            raise DataError(Problem(where, f"the hub has no such {config.repo_type} or file{at}", hint)) from error
        except errors.HFValidationError as error:
            raise DataError(Problem(where, one_line(error))) from error
        except _network_errors() as error:
            if getattr(error, "errno", None) in _FULL:
                raise
            raise ResourceError(Problem(where, f"the hub cannot be reached: {one_line(error)}")) from error

    def _verify(self, path: Path, name: str, url: str, state: State, progress: Progress) -> None:
        """Hold a file to its checksum once; without one, write down what it has."""
        expected = self.config.sha256.get(name)
        digest = state.digest(path, name)
        if digest is None:
            progress(f"checking {name}")
            digest = file_digest(path)
        if expected is not None and digest != expected:
            hint = f"delete it to fetch it again from {url}, or correct sha256 in the recipe"
            raise DataError(Problem(str(path), f"has SHA-256 {digest}, expected {expected}", hint))
        state.remember(path, name, digest, url)


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and whatever the HTTP client raises that this version of the hub's library is built on."""
    from huggingface_hub import errors

    bases = tuple(base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (*bases, getattr(errors, "XetDownloadError", OSError))


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


@hookimpl
def register_preparations(register: Register) -> None:
    register("hub_data", HubData, HubDataConfig)
