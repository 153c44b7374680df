"""Models from folders.  What a folder is, is told by what it holds and never by its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kit.chat import Conversation
from llava_kit.checkpoint import WEIGHTS, RunFolder, load_trained
from llava_kit.contracts import GenerateOptions
from llava_kit.data import Collator, make_collator
from llava_kit.errors import ModelError, Problem, nearest
from llava_kit.importing import import_checkpoint
from llava_kit.model import DTYPES, LlavaModel, add_adapters, build_model
from llava_kit.parallel import pick_device
from llava_kit.recipe import Recipe, load_recipe
from llava_kit.weights import cache_folder


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to answer, and what it was made from."""

    model: LlavaModel
    collator: Collator
    recipe: Recipe
    stage: str

    def conversation(self, options: GenerateOptions) -> Conversation:
        """A new conversation."""
        return Conversation(self.model, self.collator, options)


def load_model(
    path: str | Path, stage: str | None = None, overrides: Sequence[str] = (), *, base: str | None = None
) -> LoadedModel:
    """The model of a run folder, or of a checkpoint in any known layout, on the GPU if there is one.

    Args:
        stage: the model after this stage of a run, by default the last finished one.
        base: the language model that a LoRA, a projector or a delta belongs to.

    Raises:
        ModelError: the folder is neither, has no finished stage, or its weights are damaged.
        RecipeError: an override is wrong.
    """
    loaded = read_model(as_run(Path(path), base), stage, overrides)
    ready_to_answer(loaded.model)
    return loaded


def as_run(path: Path, base: str | None = None) -> Path:
    """``path`` if it is a run folder, else a run folder in the cache that the checkpoint there is imported into, once.

    Raises:
        ModelError: there is neither a run nor a checkpoint.
    """
    if (path / "recipe.yaml").is_file():
        return path
    run = cache_folder() / "imported" / _identity(path, base)
    if not (run / "recipe.yaml").is_file():
        import_checkpoint(path, run, base=base)
    return run


def _identity(path: Path, base: str | None) -> str:
    """Names the import of exactly these files, without reading gigabytes: real path, size and time of change."""
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    facts = [(str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in files if one.is_file()]
    return hashlib.sha256(json.dumps([facts, base]).encode()).hexdigest()[:24]


def read_model(path: Path, stage: str | None = None, overrides: Sequence[str] = ()) -> LoadedModel:
    """The model of a run folder as it was saved: on the CPU, every tensor in the dtype it has there.

    Raises:
        ModelError: there is no finished stage, or its weights are damaged.
        RecipeError: an override is wrong.
    """
    run = RunFolder(path)
    recipe = load_recipe(run.recipe, overrides)
    finished = [name for name in recipe.stages if run.finished(name) is not None]
    if stage is not None and stage not in finished:
        raise ModelError(Problem(str(path), f"has no finished stage '{stage}'", nearest(stage, finished)))
    if not finished:
        raise ModelError(Problem(str(path), "no stage of this run is finished", "llava-kit train … --resume goes on"))
    stage = stage or finished[-1]
    model = build_model(recipe)
    for name in list(recipe.stages)[: list(recipe.stages).index(stage) + 1]:
        add_adapters(model, recipe.stages[name], recipe.seed)
    load_trained(model, run.stage(stage) / WEIGHTS)
    model.eval().requires_grad_(False)
    return LoadedModel(model=model, collator=chat_collator(recipe, model), recipe=recipe, stage=stage)


def ready_to_answer(model: LlavaModel) -> None:
    """Put a model where and how it answers: on the GPU in bf16 if there is one, else in fp32."""
    device = pick_device()
    model.to(device, DTYPES["fp32" if device == "cpu" else "bf16"]).eval().requires_grad_(False)


def chat_collator(recipe: Recipe, model: LlavaModel) -> Collator:
    """Makes prompts as the recipe's last stage wrote them: earlier ones may have a template without questions."""
    return make_collator(recipe, model, list(recipe.stages.values())[-1])
