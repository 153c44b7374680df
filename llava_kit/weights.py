"""Finds model folders, on disk or on the hub, and makes safetensors of pickled weights without running their code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_kit.errors import ModelError, Problem, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja", "merges.txt", "vocab.txt"]
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
NOTE = "converted_from.json"
TEMPORARY = ".tmp-"
SHARD_BYTES = 5_000_000_000


def cache_folder() -> Path:
    """Where converted weights are kept: ``LLAVA_KIT_CACHE``, else ``llava_kit`` in the user's cache."""
    if own := os.environ.get("LLAVA_KIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_kit"


def find_model_folder(name: str, revision: str | None, where: str, *, offline: bool) -> Path | None:
    """The folder of a model named by path or hub name; fetched from the hub unless ``offline``.

    Returns ``None`` where ``offline`` and the model is not on this machine.

    Raises:
        ModelError: the path does not exist, or the hub does not give the model.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        if offline:
            return None
        hint = "a local folder must exist; run the recipe's prepare steps first; a hub name reads owner/name"
        raise ModelError(Problem(f"{where}.model", f"there is no folder '{name}'", hint))
    return _from_hub(name, revision, where, offline=offline)


def _from_hub(name: str, revision: str | None, where: str, *, offline: bool) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, local_files_only=offline))
        if not offline and not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=PICKLED)
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        what = f"'{name}' is not in the hub's cache and the hub is out of reach"
        hint = f"fetch it where there is a connection and set {where}.model to its folder"
        raise ModelError(Problem(f"{where}.model", what, hint)) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"'{name}' cannot be had from the hub: {' '.join(str(error).split())[:200]}"
        hint = f"check name, revision and access rights, or set {where}.model to a local folder"
        raise ModelError(Problem(f"{where}.model", what, hint)) from error
    return folder


def safetensors_folder(folder: Path) -> Path:
    """``folder`` itself if it holds safetensors, else a converted copy in the cache (made once).

    Pickled weights are read with ``weights_only=True`` only: code in them is refused, not run.

    Raises:
        ModelError: there are no weights, a shard is missing, damaged or holds more than tensors.
        ResourceError: the disk is too full for the copy.
    """
    if any(folder.glob("*.safetensors")):
        _refuse_missing_shards(folder, folder / "model.safetensors.index.json")
        return folder
    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards:
        raise ModelError(Problem(str(folder), "there are no weights", "expected *.safetensors or pytorch_model*.bin"))
    _refuse_missing_shards(folder, folder / "pytorch_model.bin.index.json")
    target = cache_folder() / "converted" / _identity(shards)
    if not (target / NOTE).is_file():
        _convert(folder, shards, target)
    return target


def _refuse_missing_shards(folder: Path, index: Path) -> None:
    if not index.is_file():
        return
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(Problem(str(index), f"the index cannot be read: {error!r}")) from error
    problems = [Problem(str(folder / name), "this shard is missing") for name in names if not (folder / name).is_file()]
    if problems:
        raise ModelError(problems)


def _identity(shards: list[Path]) -> str:
    """Names the conversion of exactly these files, without reading gigabytes: real path, size and time of change."""
    facts = [(str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _convert(folder: Path, shards: list[Path], target: Path) -> None:
    needed = sum(shard.stat().st_size for shard in shards)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        what = f"converting {folder} to safetensors needs {needed:,} bytes, {free:,} are free"
        raise ResourceError(Problem(str(target.parent), what, "free some space or set LLAVA_KIT_CACHE"))
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        work = Path(temporary) / "model"
        work.mkdir()
        weight_map: dict[str, str] = {}
        sources: list[dict[str, Any]] = []
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(_convert_shard(shard, work / name), name)
            with shard.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sources.append({"file": str(shard), "bytes": shard.stat().st_size, "sha256": digest})
        index = {"metadata": {"total_size": needed}, "weight_map": weight_map}
        (work / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        for extra in folder.glob("*.json"):
            if not extra.name.endswith(".index.json"):
                shutil.copy(extra, work / extra.name)
        (work / NOTE).write_text(json.dumps(sources, indent=2), "utf-8")
        work.replace(target)


def _convert_shard(shard: Path, target: Path) -> list[str]:
    from safetensors.torch import save_file

    tensors = read_pickled(shard)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, target, {"format": "pt"})
    return list(tensors)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickled file; code in it is refused, not run.

    Raises:
        ModelError: the file is damaged or holds more than tensors.
    """
    import pickle  # only for the name of the error that torch's safe reader raises

    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = "holds more than tensors and was not opened further"
        raise ModelError(Problem(str(path), what, "get the weights as safetensors")) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ModelError(Problem(str(path), f"is damaged: {' '.join(str(error).split())[:200]}")) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ModelError(Problem(str(path), "is not a mapping of names to tensors"))
    return tensors


# --- tensors in files, read one at a time ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: where it is, its shape, and how to read it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{self.file}: {self.name}"


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder, by name.

    Raises:
        ModelError: there are no weights, a file is missing or damaged, or lacks what its index promises.
    """
    readable = safetensors_folder(folder)
    note = readable / NOTE
    files = [readable / name for name in sorted(set(_index(readable / "model.safetensors.index.json").values()))]
    files = files or sorted(readable.glob("*.safetensors"))
    # Messages name the files that the user gave, not their converted copies.
    shown = [Path(source["file"]) for source in json.loads(note.read_text("utf-8"))] if note.is_file() else files
    stem = "pytorch_model.bin" if note.is_file() else "model.safetensors"
    promised = _index(folder / f"{stem}.index.json")
    found: dict[str, Stored] = {}
    for path, original in zip(files, shown, strict=True):
        inside = stored_in_file(path)
        found |= {name: replace(one, file=original) for name, one in inside.items()}
        lacking = [name for name, file in promised.items() if file == original.name and name not in inside]
        if lacking:
            raise ModelError([Problem(f"{original}: {name}", "the index names it here, it is not") for name in lacking])
    return found


def _index(path: Path) -> dict[str, str]:
    """Which file holds which tensor; empty where there is no index."""
    if not path.is_file():
        return {}
    weight_map: dict[str, str] = json.loads(path.read_text("utf-8"))["weight_map"]
    return weight_map


def stored_in_file(path: Path) -> dict[str, Stored]:
    """Every tensor of one file, safetensors or pickled.

    Raises:
        ModelError: the file is damaged or holds more than tensors.
    """
    if path.suffix != ".safetensors":
        tensors = read_pickled(path)
        return {n: Stored(file=path, name=n, shape=tuple(t.shape), read=lambda t=t: t) for n, t in tensors.items()}  # type: ignore[misc]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(Problem(str(path), f"is damaged: {error}")) from error

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return {n: Stored(file=path, name=n, shape=shape, read=partial(read, n)) for n, shape in shapes.items()}


def write_shards(folder: Path, tensors: Mapping[str, Callable[[], Tensor]], limit: int = SHARD_BYTES) -> None:
    """Write tensors as ``model.safetensors``, or as numbered shards of about ``limit`` bytes with an index.

    Each is read when it is written, so no more than one shard is in memory.

    Raises:
        ResourceError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    held = 0

    def flush() -> None:
        save_file(batch, folder / f"{TEMPORARY}{len(shards)}", {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    try:
        for name, read in tensors.items():
            tensor = read().detach().cpu().contiguous()
            if batch and held + tensor.nbytes > limit:
                flush()
                held = 0
            batch[name] = tensor
            held += tensor.nbytes
        flush()
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):
            raise
        raise ResourceError(Problem(str(folder), "the disk is full", "free some space")) from error
    count = len(shards)
    if count == 1:
        (folder / f"{TEMPORARY}0").replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        target = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        (folder / f"{TEMPORARY}{number}").replace(folder / target)
        weight_map |= dict.fromkeys(names, target)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
