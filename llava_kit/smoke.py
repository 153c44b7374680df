"""The same recipe with small random parts: model, data, trainer and saving on a CPU, nothing downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llava_kit.errors import Problem, RecipeError
from llava_kit.recipe import ModelParts, Recipe, Saving, Slot, Source, Stage, Validation

STEPS = 4
BATCH = 4


def smoke_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` with parts of the same kinds made small and random below ``folder``, and a few steps a stage.

    Raises:
        RecipeError: a part's config has no ``tiny(folder)``.
    """
    problems: list[Problem] = []

    def tiny(slot: Slot, key: str) -> Slot:
        if not hasattr(slot.config, "tiny"):
            hint = f"{slot.component.plugin} must give its config a method tiny(folder)"
            problems.append(Problem(key, f"'{slot.name}' has no small stand-in", hint))
            return slot
        return replace(slot, config=slot.config.tiny(folder))

    parts = ModelParts(
        vision_encoder=tiny(recipe.model.vision_encoder, "model.vision_encoder"),
        connector=recipe.model.connector,
        language_model=tiny(recipe.model.language_model, "model.language_model"),
    )
    stages = {name: _small_stage(name, stage, tiny) for name, stage in recipe.stages.items()}
    if problems:
        raise RecipeError(problems)
    small = replace(recipe, model=parts, stages=stages, prepare={}, evaluate={}, workers=0, trackers=())
    return replace(small, saving=Saving(every=2, keep=1))


def _small_stage(name: str, stage: Stage, tiny: object) -> Stage:
    data: dict[str, Source] = {}
    for key, source in stage.data.items():
        small = tiny(source.format, f"stages.{name}.data.{key}.format")  # type: ignore[operator]
        data[key] = replace(source, format=small, samples=None)
    return replace(
        stage,
        data=data,
        samples=None,
        epochs=None,
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=2,
        precision="fp32",
        schedule=replace(stage.schedule, warmup_steps=None),
        validation=Validation(every=2, samples=2, pictures=1),
    )
