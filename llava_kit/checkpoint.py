"""The run folder: atomic saves, checksums, exact resume, one process at a time.

A folder is complete or absent: files are written into a temporary folder, flushed to disk, listed with their SHA-256
in ``MANIFEST.json``, and the folder is renamed into place.  A crash at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llava_kit.errors import ModelError, Problem, ResourceError

MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


# --- durable files ---------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole: a reader sees the old content or the new."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    _sync_file(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON mapping of a run folder or checkpoint.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(Problem(str(path), f"cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise ModelError(Problem(str(path), f"is no JSON: {error}")) from error
    if not isinstance(content, dict):
        raise ModelError(Problem(str(path), "is no JSON mapping"))
    return content


def save_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, and put it in place of ``target`` only when everything is on disk.

    Raises:
        ResourceError: the disk is full; whatever was there before is untouched.
    """
    temporary = target.with_name(f"{TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        files = sorted(path for path in temporary.iterdir())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
        for path in [*files, temporary / MANIFEST]:
            _sync_file(path)
        _sync_folder(temporary)
        if target.exists():  # an invalid one of the same name, refused when it was read
            shutil.rmtree(target)
        temporary.replace(target)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _disk_error(target, error) from error


def _disk_error(target: Path, error: Exception) -> Exception:
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
        return error
    free = shutil.disk_usage(target.parent).free
    what = f"the disk is full, {free:,} bytes are free"
    return ResourceError(Problem(str(target), what, "earlier checkpoints are intact; free some space and --resume"))


def find_damage(folder: Path) -> str:
    """Why a saved folder cannot be trusted; empty when every byte is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        for name, facts in manifest.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {facts['bytes']:,}"
            if sha256(path) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return "" if manifest else f"{MANIFEST} is empty"


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lives."""
    return checkpoints / f"step-{step}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps that have a checkpoint folder, valid or not, newest first."""
    if not checkpoints.is_dir():
        return []
    names = [path.name.removeprefix("step-") for path in checkpoints.glob("step-*")]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_valid(checkpoints: Path) -> tuple[int | None, list[Problem]]:
    """The newest checkpoint whose every byte is right, and why newer ones were passed over."""
    skipped: list[Problem] = []
    for step in list_steps(checkpoints):
        damage = find_damage(step_folder(checkpoints, step))
        if not damage:
            return step, skipped
        skipped.append(Problem(str(step_folder(checkpoints, step)), damage, "passed over"))
    return None, skipped


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` valid checkpoints; damaged ones older than these go too."""
    valid = 0
    for step in list_steps(checkpoints):
        folder = step_folder(checkpoints, step)
        if valid >= keep:
            shutil.rmtree(folder)
        elif not find_damage(folder):
            valid += 1


def trained_tensors(model: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """The named parameters, on the CPU."""
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n in names}


def read_trained(path: Path) -> dict[str, Tensor]:
    """The saved parameters of a stage.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(Problem(str(path), f"cannot be read: {error}")) from error


def load_trained(model: nn.Module, path: Path, expected: set[str] | None = None) -> None:
    """Put saved parameters into the model.

    Args:
        expected: names the file must hold, when they are known.

    Raises:
        ModelError: the file is damaged, a tensor has no place or another shape in this model, or one is missing.
    """
    tensors = read_trained(path)
    parameters = dict(model.named_parameters())
    problems = []
    for name, tensor in tensors.items():
        if name not in parameters:
            problems.append(Problem(f"{path}: {name}", "the model has no such parameter"))
        elif parameters[name].shape != tensor.shape:
            what = f"has shape {list(tensor.shape)}, the model has {list(parameters[name].shape)}"
            problems.append(Problem(f"{path}: {name}", what))
    problems += [Problem(f"{path}: {name}", "is missing") for name in sorted((expected or set()) - set(tensors))]
    if problems:
        raise ModelError(problems)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(parameters[name].device)


def write_training_state(
    folder: Path,
    model: nn.Module,
    trained: set[str],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> None:
    """Everything an exact resume needs: trained weights, optimizer, random streams, and ``state`` as JSON."""
    save_file(trained_tensors(model, trained), folder / WEIGHTS)
    saved = optimizer.state_dict()
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for index, slots in saved["state"].items():
        tensors |= {f"state.{index}.{name}": tensor.cpu().contiguous() for name, tensor in slots.items()}
    save_file(tensors, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(dict(state), indent=2, allow_nan=False), "utf-8")


def read_training_state(
    folder: Path, model: nn.Module, trained: set[str], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`write_training_state` wrote; its JSON part.

    Raises:
        ModelError: the checkpoint does not belong to this model.
    """
    load_trained(model, folder / WEIGHTS, trained)
    tensors = load_file(folder / OPTIMIZER)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        _, index, name = key.split(".", 2)
        slots.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_json(folder / STATE)


# --- the run folder --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run."""

    path: Path

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        return self.path / name

    def checkpoints(self, stage: str) -> Path:
        """The checkpoints of one stage."""
        return self.path / stage / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One row a step."""
        return self.path / "metrics.jsonl"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.  The lock goes with the process, also when it is killed.

        Raises:
            ResourceError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / "run.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            what = "another process is using this run folder"
            raise ResourceError(Problem(str(self.path), what, "wait for it, or choose another --run")) from error
        try:
            yield
        finally:
            lock.release()

    def finish_stage(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a stage's weights, then ``stage.json``, whose presence says that the stage is complete."""
        folder = self.stage(name)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{TEMPORARY}{WEIGHTS}"
        try:
            save_file(dict(tensors), temporary)
            _sync_file(temporary)
            temporary.replace(folder / WEIGHTS)
            write_json(folder / "stage.json", {**facts, "sha256": sha256(folder / WEIGHTS)})
        except (OSError, SafetensorError) as error:
            raise _disk_error(folder, error) from error

    def finished(self, name: str) -> dict[str, Any] | None:
        """What ``stage.json`` says, or ``None`` while the stage is not complete.

        Raises:
            ModelError: the stage is complete but its weights are damaged.
        """
        path = self.stage(name) / "stage.json"
        if not path.is_file():
            return None
        facts = read_json(path)
        weights = self.stage(name) / WEIGHTS
        if not weights.is_file() or sha256(weights) != facts.get("sha256"):
            hint = f"remove {path} to train the stage again"
            raise ModelError(Problem(str(weights), "is missing or does not match its checksum", hint))
        return facts

    def environment(self) -> dict[str, Any]:
        """What the run ran on so far; empty before it began."""
        try:
            known: dict[str, Any] = json.loads((self.path / "environment.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):  # it is written anew in any case
            return {}
        return known

    def note_environment(self, facts: Mapping[str, Any]) -> None:
        """Add to ``environment.json`` what only shows while the run goes on."""
        write_json(self.path / "environment.json", {**self.environment(), **facts})

    def append(self, file: Path, row: Mapping[str, Any]) -> None:
        """Append one JSON row; a line torn by an earlier crash is closed first."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with file.open("a+b") as out:
            if out.tell() and os.pread(out.fileno(), 1, out.tell() - 1) != b"\n":
                out.write(b"\n")
            out.write(line.encode("utf-8"))

    def cut_rows(self, file: Path, stage: str, step: int) -> None:
        """Drop a stage's rows after ``step`` (a resumed run writes them again), and a torn last line."""
        if not file.is_file():
            return
        kept = []
        for line in file.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get("stage") != stage or row["step"] <= step:
                    kept.append(line)
        temporary = file.with_name(f"{TEMPORARY}{file.name}")
        temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        _sync_file(temporary)
        temporary.replace(file)
