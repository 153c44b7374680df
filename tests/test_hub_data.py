"""The preparation that fetches published data, against a server on the loopback interface."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from llava_kit.errors import DataError, ResourceError
from llava_kit_plugins.hub_data import HubData, HubDataConfig, downloads
from llava_kit_plugins.hub_data.files import readable

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `drop_after` ends every answer after so many bytes, `refuse_range` ignores the header Range."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.drop_after: int | None = None
        self.refuse_range = False
        self.tag = '"one"'
        self.requests: list[tuple[str, str, str | None]] = []
        self.failures: list[int] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [wanted for method, _, wanted in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, wanted))
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            self.end_headers()
            return
        if self.command == "GET" and self.server.failures:
            self.send_error(self.server.failures.pop(0))
            return
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = self._start(wanted, content)
        if start is None:
            return
        self.send_header("ETag", self.server.tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:][: self.server.drop_after])

    def _start(self, wanted: str | None, content: bytes) -> int | None:
        unchanged = self.headers.get("If-Range") in (None, self.server.tag)
        if not wanted or self.server.refuse_range or not unchanged:
            self.send_response(200)
            return 0
        start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return None
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        return start

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def run(root: Path, **settings: Any) -> list[str]:
    """Run the preparation into `root/set`; what it said."""
    said: list[str] = []
    HubData(HubDataConfig(folder="set", **settings)).run(root, said.append)
    return said


def archive(members: dict[str, bytes | None]) -> bytes:
    """A zip with these members; `None` makes a symbolic link to /etc/passwd."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if content is None:
                info.external_attr = 0o120777 << 16
            out.writestr(info, content if content is not None else "/etc/passwd")
    return packed.getvalue()


# --- downloads -------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_checked_and_noted(server: Server, tmp_path: Path) -> None:
    server.files["/a%20b.bin"] = CONTENT
    run(tmp_path, urls=(server.url("/a%20b.bin"),))
    assert (tmp_path / "set" / "a b.bin").read_bytes() == CONTENT
    noted = json.loads((tmp_path / "set" / ".hub_data.json").read_text())
    assert noted["files"]["a b.bin"]["sha256"] == DIGEST
    assert noted["files"]["a b.bin"]["source"] == server.url("/a%20b.bin")


def test_a_second_run_asks_nobody(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    urls = (server.url("/a.bin"),)
    run(tmp_path, urls=urls)
    asked = len(server.requests)
    assert run(tmp_path, urls=urls) == []
    assert len(server.requests) == asked


def test_a_broken_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.drop_after = 40_000  # 102,400 bytes in three answers
    said = run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})
    assert server.ranges == [None, "bytes=40000-", "bytes=80000-"]
    assert (tmp_path / "set" / "a.bin").read_bytes() == CONTENT
    assert said.count("a.bin: the connection ended early; trying again") == 2


def test_a_killed_download_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin.part").write_bytes(CONTENT[:1000])
    run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})
    assert server.ranges == ["bytes=1000-"]
    assert not (tmp_path / "set" / "a.bin.part").exists()


def test_a_complete_part_is_taken_as_it_is(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin.part").write_bytes(CONTENT)
    run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})
    assert server.ranges == ["bytes=102400-"]


def test_a_part_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin.part").write_bytes(CONTENT + b"x")
    run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})
    assert server.ranges == ["bytes=102401-", None]


def test_a_server_without_ranges_sends_everything_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.refuse_range = True
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin.part").write_bytes(b"other bytes")
    run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})
    assert (tmp_path / "set" / "a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_at_its_source_is_not_patched_together(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin.part").write_bytes(b"old" * 100)
    (tmp_path / "set" / ".hub_data.json").write_text(json.dumps({"partial": {"a.bin": '"zero"'}}))
    run(tmp_path, urls=(server.url("/a.bin"),))
    assert server.ranges == ["bytes=300-"]
    assert (tmp_path / "set" / "a.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.failures = [503, 429]
    run(tmp_path, urls=(server.url("/a.bin"),))
    assert len(server.ranges) == 3


def test_a_server_that_stays_broken_is_given_up(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    server.failures = [503] * 9
    with pytest.raises(ResourceError, match="the server answers 503"):
        run(tmp_path, urls=(server.url("/a.bin"),))
    assert len(server.ranges) == 5


def test_a_missing_file_is_named_with_the_way_out(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(tmp_path, urls=(server.url("/gone.bin"),))
    (problem,) = caught.value.problems
    assert problem.where == server.url("/gone.bin")
    assert problem.what == "the server answers 404 Not Found"
    assert problem.hint.endswith(f"put the file at {tmp_path / 'set' / 'gone.bin'} by hand")


def test_no_connection_is_a_matter_of_resources(server: Server, tmp_path: Path) -> None:
    url = server.url("/a.bin").replace(str(server.server_port), "1")
    with pytest.raises(ResourceError, match=r"cannot be reached: .*refused.*by hand"):
        run(tmp_path, urls=(url,))


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.bin", "file:///etc/passwd"])
def test_redirects_stay_within_http(server: Server, tmp_path: Path, target: str) -> None:
    server.redirects["/a.bin"] = target
    with pytest.raises(DataError, match=r"(?i)redirect.* not (followed|allowed)"):
        run(tmp_path, urls=(server.url("/a.bin"),))


def test_a_redirect_within_http_is_followed(server: Server, tmp_path: Path) -> None:
    server.redirects["/a.bin"] = server.url("/b.bin")
    server.files["/b.bin"] = CONTENT
    run(tmp_path, urls=(server.url("/a.bin"),))
    assert (tmp_path / "set" / "a.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_names_both(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = b"something else"
    with pytest.raises(DataError, match=f"has SHA-256 [0-9a-f]{{64}}, expected {DIGEST}; delete it"):
        run(tmp_path, urls=(server.url("/a.bin"),), sha256={"a.bin": DIGEST})


def test_a_file_that_was_tampered_with_is_noticed(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = CONTENT
    settings: dict[str, Any] = {"urls": (server.url("/a.bin"),), "sha256": {"a.bin": DIGEST}}
    run(tmp_path, **settings)
    (tmp_path / "set" / "a.bin").write_bytes(b"x" * len(CONTENT))
    with pytest.raises(DataError, match="expected"):
        run(tmp_path, **settings)


def test_a_file_put_there_by_hand_needs_no_connection(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(CONTENT)
    assert run(tmp_path, urls=("http://127.0.0.1:1/a.bin",), sha256={"a.bin": DIGEST}) == ["checking a.bin"]


# --- room ------------------------------------------------------------------------------------------------------------


def test_the_disk_is_checked_before_the_first_byte(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/a.bin"] = CONTENT
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=102_399))
    with pytest.raises(ResourceError, match=r"fetching a.bin needs 102.4 kB, 102.4 kB are free"):
        run(tmp_path, urls=(server.url("/a.bin"),))
    assert server.ranges == []


def test_free_gb_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=999_999_000))
    settings: dict[str, Any] = {"urls": ("http://127.0.0.1:1/a.bin",), "free_gb": 1.0}
    with pytest.raises(ResourceError, match=r"needs 1.0 GB, 1,000.0 MB are free|needs 1.0 GB, 1000.0 MB are free"):
        run(tmp_path, **settings)
    (tmp_path / "set" / "earlier.bin").write_bytes(b"x" * 1000)
    with pytest.raises(ResourceError, match="cannot be reached"):
        run(tmp_path, **settings)


def test_a_full_disk_says_so(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/a.bin"] = CONTENT

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "_copy", full)
    with pytest.raises(ResourceError, match=r"the disk is full, .* are free; make room and run"):
        run(tmp_path, urls=(server.url("/a.bin"),))


def test_sizes_read_well() -> None:
    sizes = [readable(size) for size in (999, 102_400, 13_510_573_713)]
    assert sizes == ["999 B", "102.4 kB", "13.5 GB"]


# --- archives --------------------------------------------------------------------------------------------------------


def test_an_archive_is_unpacked_once(server: Server, tmp_path: Path) -> None:
    server.files["/i.zip"] = archive({"a/1.txt": b"one", "2.txt": b"two"})
    settings: dict[str, Any] = {"urls": (server.url("/i.zip"),), "unpack": {"i.zip": "images"}}
    run(tmp_path, **settings)
    assert (tmp_path / "set/images/a/1.txt").read_bytes() == b"one"
    (tmp_path / "set/i.zip").unlink()  # to save room
    (tmp_path / "set/images/2.txt").unlink()
    assert run(tmp_path, **settings) == []
    assert not (tmp_path / "set/images/2.txt").exists()


def test_unpacking_goes_on_where_it_was_killed(server: Server, tmp_path: Path) -> None:
    server.files["/i.zip"] = archive({"1.txt": b"one", "2.txt": b"two", "3.txt": b"three"})
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    (images / "1.txt").write_bytes(b"one")
    (images / "2.txt").write_bytes(b"t")
    (images / "3.txt").write_bytes(b"THREE")
    before = (images / "1.txt").stat().st_mtime_ns
    run(tmp_path, urls=(server.url("/i.zip"),), unpack={"i.zip": "images"})
    assert [(images / f"{n}.txt").read_bytes() for n in (1, 2, 3)] == [b"one", b"two", b"three"]
    assert (images / "1.txt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"../evil.txt": b"x"}, "would be written outside the folder"),
        ({"/evil.txt": b"x"}, "would be written outside the folder"),
        ({"a\\..\\..\\evil.txt": b"x"}, "would be written outside the folder"),
        ({"link": None}, "is a link or a device"),
        ({"big.txt": b"0" * 3_000_000}, "would grow from .* to 3.0 MB"),
    ],
)
def test_hostile_archives_are_refused_before_anything_is_written(
    server: Server, tmp_path: Path, members: dict[str, bytes | None], complaint: str
) -> None:
    server.files["/i.zip"] = archive({"good.txt": b"good", **members})
    with pytest.raises(DataError, match=f"{complaint}; nothing was unpacked"):
        run(tmp_path, urls=(server.url("/i.zip"),), unpack={"i.zip": "images"})
    assert not (tmp_path / "set/images").exists()
    assert not list(tmp_path.rglob("evil*"))


def test_a_damaged_archive_is_named(server: Server, tmp_path: Path) -> None:
    server.files["/i.zip"] = archive({"1.txt": b"one"})[:-30]
    with pytest.raises(DataError, match=r"i\.zip: is damaged: .*; delete it to fetch it again"):
        run(tmp_path, urls=(server.url("/i.zip"),), unpack={"i.zip": "images"})


# --- the hub ---------------------------------------------------------------------------------------------------------

HUB: dict[str, Any] = {"repo": "owner/name", "files": ("chat.json",), "revision": "abc"}


def test_hub_files_go_to_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(repo: str, name: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        calls.append((repo, name, repo_type, revision))
        (local_dir / name).write_bytes(CONTENT)
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    run(tmp_path, sha256={"chat.json": DIGEST}, **HUB)
    run(tmp_path, sha256={"chat.json": DIGEST}, **HUB)
    assert calls == [("owner/name", "chat.json", "dataset", "abc")]


def test_offline_the_hub_message_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError) as caught:
        run(tmp_path, **HUB)
    (problem,) = caught.value.problems
    assert problem.where == "hub:owner/name/chat.json"
    assert problem.what == "the hub cannot be reached"
    assert str(tmp_path / "set" / "chat.json") in problem.hint


@pytest.mark.parametrize(
    ("raised", "error", "complaint"),
    [
        (EntryNotFoundError("404"), DataError, "the hub has no such dataset or file at revision abc"),
        (TimeoutError("read timed out"), ResourceError, "the hub cannot be reached: read timed out"),
        (OSError(errno.ENOSPC, "full"), ResourceError, "the disk is full"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], complaint: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(error, match=complaint) as caught:
        run(tmp_path, **HUB)
    assert "\n" not in str(caught.value)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"folder": "../x"}, "folder: '../x' must be a relative path without '..'"),
        ({"folder": "/x"}, "folder: '/x' must be a relative path"),
        ({"folder": "x", "repo": "a/b"}, "repo and files belong together"),
        ({"folder": "x", "repo": "a/b", "files": ("a",), "repo_type": "data"}, "repo_type must be one of dataset"),
        ({"folder": "x", "urls": ("ftp://h/a.zip",)}, r"urls must be http\(s\) addresses"),
        ({"folder": "x", "urls": ("http://h/a.zip", "http://g/a.zip")}, "two of the files have the same name"),
        ({"folder": "x", "urls": ("http://h/%2e%2e%2fa.zip",)}, "files: '../a.zip' must be a relative path"),
        ({"folder": "x", "sha256": {"a": DIGEST}}, "sha256: 'a' is not among the files; there is none"),
        ({"folder": "x", "urls": ("http://h/a",), "sha256": {"a": "12"}}, "must be 64 hexadecimal digits"),
        ({"folder": "x", "urls": ("http://h/a",), "unpack": {"a": "b"}}, "unpack: 'a' is no .zip archive"),
        ({"folder": "x", "urls": ("http://h/a.zip",), "unpack": {"a.zip": "/b"}}, "unpack: '/b' must be a relative"),
        ({"folder": "x", "free_gb": float("nan")}, "free_gb must be between 0 and a million, got nan"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        HubDataConfig(**settings)
