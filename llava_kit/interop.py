"""Models from folders.  What a folder is, is told by what it holds and never by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_kit.chat import Conversation
from llava_kit.checkpoint import WEIGHTS, RunFolder, load_trained
from llava_kit.contracts import GenerateOptions
from llava_kit.data import Collator, make_collator
from llava_kit.errors import ModelError, Problem, nearest
from llava_kit.model import DTYPES, LlavaModel, add_adapters, build_model
from llava_kit.parallel import pick_device
from llava_kit.recipe import Recipe, load_recipe


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


def load_model(path: str | Path, stage: str | None = None, overrides: Sequence[str] = ()) -> LoadedModel:
    """The model of a run folder after ``stage`` (by default the last finished one), on the GPU if there is one.

    Raises:
        ModelError: the folder is no run folder, has no finished stage, or its weights are damaged.
        RecipeError: an override is wrong.
    """
    run = RunFolder(Path(path))
    if not run.recipe.is_file():
        what = "is no run folder: it has no recipe.yaml" if run.path.is_dir() else "there is no such folder"
        raise ModelError(Problem(str(path), what, "llava-kit train makes one, by default under runs/"))
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
    ready_to_answer(model)
    return LoadedModel(model=model, collator=chat_collator(recipe, model), recipe=recipe, stage=stage)


def ready_to_answer(model: LlavaModel) -> None:
    """Put a model where and how it answers: on the GPU in bf16 if there is one, else in fp32."""
    device = pick_device()
    model.to(device, DTYPES["fp32" if device == "cpu" else "bf16"]).eval().requires_grad_(False)


def chat_collator(recipe: Recipe, model: LlavaModel) -> Collator:
    """Makes prompts as the recipe's last stage wrote them: earlier ones may have a template without questions."""
    return make_collator(recipe, model, list(recipe.stages.values())[-1])
