"""Checkpoints of others as run folders: parts under ``parts/``, a recipe that points to them, finished stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_kit.checkpoint import RunFolder, read_json, write_json
from llava_kit.contracts import Unsupported
from llava_kit.environment import describe_environment
from llava_kit.errors import ModelError, Problem, RecipeError, nearest
from llava_kit.layout_hf import is_hf, read_hf
from llava_kit.layout_llava import PROJECTOR_FILES, is_llava, read_llava
from llava_kit.parts import KINDS, TOKENIZER_FILES, Checkpoint, refuse
from llava_kit.recipe import ModelParts, Recipe, Slot, load_recipe
from llava_kit.registry import default_registry
from llava_kit.weights import write_shards

if TYPE_CHECKING:
    from torch import nn

RECIPE = "llava_v1"
"""Whose stages and template a checkpoint gets that nobody says more about."""
PARTS = "parts"


def read_checkpoint(path: Path, base: str | None = None, vision_tower: str | None = None) -> Checkpoint:
    """A checkpoint in any known layout, told by what the folder holds and never by its name.

    Raises:
        ModelError: it is none, or it is damaged.
    """
    folder = path.parent if path.name in PROJECTOR_FILES else path
    if not folder.is_dir():
        raise ModelError(
            Problem(str(path), "there is no such folder", "llava-kit train makes one, by default under runs/")
        )
    if not (folder / "config.json").is_file():
        what = "is no run folder (recipe.yaml) and no checkpoint (config.json)"
        raise ModelError(
            Problem(str(path), what, "give a run folder, or a LLaVA in the original's or the hub's layout")
        )
    config = read_json(folder / "config.json")
    if is_hf(config):
        return read_hf(folder)
    if is_llava(config):
        return read_llava(folder, base, vision_tower)
    what = f"is no LLaVA: a model of type {config.get('model_type')!r} without keys of LLaVA"
    raise ModelError(Problem(str(folder / "config.json"), what))


def import_checkpoint(
    source: str | Path,
    run_folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    recipe: str | Path = RECIPE,
    after: str | None = None,
    base: str | None = None,
    vision_tower: str | None = None,
) -> Path:
    """Make a run folder of a checkpoint: it can be talked to, and training goes on with the recipe's next stage.

    Args:
        recipe: whose stages the run has; its model is replaced by the checkpoint's parts.
        after: the stage the checkpoint stands after, by default the last; ``none`` lets all stages train.

    Raises:
        ModelError: the checkpoint cannot be read, or no plugin can carry it out.
        RecipeError: the recipe is wrong, has no such stage, or the folder holds a run already.
    """
    run = RunFolder(Path(run_folder))
    plan = load_recipe(recipe, overrides)
    finished = _finished_stages(plan, after)
    if run.recipe.exists():
        raise RecipeError(Problem(str(run.path), "this folder holds a run already", "give another one"))
    checkpoint = read_checkpoint(Path(source), base, vision_tower)
    with run.locked():
        target = run.path / PARTS
        temporary = run.path / f".tmp-{PARTS}"
        for folder in (temporary, target):  # what an interrupted import left
            shutil.rmtree(folder, ignore_errors=True)
        try:
            _write_configs(checkpoint, temporary)
            _verify(checkpoint, choose_parts(temporary))
            for component, part in checkpoint.parts.items():
                write_shards(temporary / component, {name: one.read for name, one in part.tensors.items()})
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        plan = replace(plan, name=_name(plan, run), model=choose_parts(target.resolve()))
        facts = {"steps": 0, "trained": {}, "imported": {"layout": checkpoint.layout, "from": str(source)}}
        for stage in finished:
            run.finish_stage(stage, {}, facts)
        write_json(run.path / "environment.json", describe_environment())
        plan.save(run.recipe)
    return run.path


def _name(recipe: Recipe, run: RunFolder) -> str:
    own = "".join(c if c.isalnum() or c in "-_" else "_" for c in run.path.resolve().name).lstrip("-_")
    return own or recipe.name


def _finished_stages(recipe: Recipe, after: str | None) -> list[str]:
    stages = list(recipe.stages)
    if after == "none":
        return []
    if after is not None and after not in stages:
        raise RecipeError(Problem("--after", f"the recipe has no stage '{after}'", nearest(after, [*stages, "none"])))
    return stages[: stages.index(after) + 1] if after else stages


def _write_configs(checkpoint: Checkpoint, folder: Path) -> None:
    for component, part in checkpoint.parts.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(part.config, indent=2, default=str), "utf-8")
    for name in TOKENIZER_FILES:
        if (checkpoint.tokenizer / name).is_file():
            shutil.copy(checkpoint.tokenizer / name, folder / "language_model" / name)


def choose_parts(folder: Path) -> ModelParts:
    """For each part, the registered component that can carry it out; every one of its kind is asked.

    Raises:
        ModelError: none can; why not is in the message.
    """
    slots, problems = {}, []
    registry = default_registry()
    for component, kind in KINDS.items():
        reasons = []
        for name in registry.names(kind):
            entry = registry.get(kind, name)
            read: Any = getattr(entry.config, "from_hf", None)
            config = read(folder / component) if read is not None else Unsupported("it reads no checkpoints")
            if not isinstance(config, Unsupported):
                slots[component] = Slot(entry, config)
                break
            reasons.append(f"{name}: {config.reason}")
        else:
            hint = "; ".join(reasons)
            problems.append(Problem(f"the checkpoint's {component}", f"no plugin of {kind} can carry it out", hint))
    refuse(problems)
    return ModelParts(**slots)


def _verify(checkpoint: Checkpoint, parts: ModelParts) -> None:
    """Hold names and shapes against what the components want, before a single weight is copied.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; or there are more tokens than rows for them.
    """
    with torch.device("meta"):
        vision: Any = parts.vision_encoder.build()
        text: Any = parts.language_model.build()
        connector: Any = parts.connector.build(in_dim=vision.embed_dim, out_dim=text.embed_dim)
    problems: list[Problem] = []
    for component, built in (("vision_encoder", vision), ("connector", connector), ("language_model", text)):
        wanted = {name: tuple(tensor.shape) for name, tensor in described(component, built)[1].items()}
        problems += _differences(checkpoint, component, wanted)
    tokenizer_rows = text.tokenizer
    rows = next(
        (one for name, one in checkpoint.parts["language_model"].tensors.items() if "embed_tokens" in name), None
    )
    if rows is not None and len(tokenizer_rows) > rows.shape[0]:
        what = f"has {len(tokenizer_rows)} tokens, the embedding {rows.shape[0]} rows"
        problems.append(Problem(f"{checkpoint.tokenizer / 'tokenizer.json'} and {rows.where}", f"the tokenizer {what}"))
    refuse(problems)


def _differences(checkpoint: Checkpoint, component: str, wanted: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    found = checkpoint.parts[component].tensors
    problems = [
        Problem(str(checkpoint.folder), f"lacks a tensor of the {component}: '{name}'")
        for name in wanted
        if name not in found
    ]
    for name, one in found.items():
        if name not in wanted:
            problems.append(Problem(one.where, f"the {component} has no such tensor", nearest(name, list(wanted)[:50])))
        elif one.shape != wanted[name]:
            what = f"has shape {list(one.shape)}, the config makes {list(wanted[name])}"
            problems.append(Problem(one.where, what))
    return problems


def described(component: str, built: nn.Module) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
    """A component in the hub's layout.

    Raises:
        ModelError: it has none; the reason is the component's own.
    """
    write: Any = getattr(built, "to_hf", None)
    if write is None:
        what = f"{type(built).__name__} has no to_hf, so it cannot be written in another layout"
        raise ModelError(Problem(f"model.{component}", what))
    written: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]] | Unsupported = write()
    if isinstance(written, Unsupported):
        raise ModelError(Problem(f"model.{component}", f"cannot be written in another layout: {written.reason}"))
    return written
