"""What a recipe will do, before it does it: sizes, steps, memory and arithmetic, from shapes alone, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from llava_kit.data import choose_preprocess
from llava_kit.errors import DataError, KitError, MissingDataError, ModelError, Problem, RecipeError, ResourceError
from llava_kit.estimates import ImageRows, Memory, blank_views, count, flops, image_rows, memory
from llava_kit.loader import open_sources
from llava_kit.model import COMPONENTS, LlavaModel, add_adapters, build_model_on_meta, set_trainable
from llava_kit.printing import short_bytes, short_count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llava_kit.recipe import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class Part:
    """One component of the model."""

    component: str
    plugin: str
    module: str
    parameters: int
    width: int
    """Of its output."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage in numbers; ``None`` where something it depends on is not known yet."""

    name: str
    samples: int | None
    """Of an epoch, without those held out for validation: counted where the data is there, else as declared."""
    declared: int | None
    """What the recipe says there should be, those held out included."""
    epochs: int | None
    steps: int | None
    warmup: int | None
    batch_size: int
    micro_batch_size: int
    max_length: int
    precision: str
    trainable: dict[str, int] | None = None
    frozen: int | None = None
    memory: Memory | None = None
    flops_per_sample: int | None = None
    """Of one sample of full length with one image, forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The plan of a recipe."""

    name: str
    parts: tuple[Part, ...]
    image: ImageRows | None
    stages: tuple[StagePlan, ...]
    unknown: str = ""
    """Why there are no parts: what they are made from is not there before ``prepare`` has run."""

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON, with sums."""
        plain = asdict(self)
        for stage, row in zip(self.stages, plain["stages"], strict=True):
            row["trainable_total"] = sum(stage.trainable.values()) if stage.trainable is not None else None
            if stage.memory is not None:
                row["memory"]["total"] = stage.memory.total
        return plain


def inspect_recipe(recipe: Recipe) -> Inspection:
    """The plan of a recipe; nothing is loaded and nothing downloaded.

    Raises:
        ModelError: a part cannot be had, and the recipe prepares nothing that it could come from.
        RecipeError: a stage trains what does not exist.
    """
    try:
        model = build_model_on_meta(recipe)
    except ModelError as error:
        if not recipe.prepare:
            raise
        stages = tuple(_plan(name, stage) for name, stage in recipe.stages.items())
        return Inspection(name=recipe.name, parts=(), image=None, stages=stages, unknown=str(error))
    image = image_rows(model)
    return Inspection(
        name=recipe.name,
        parts=_parts(recipe, model),
        image=image,
        stages=tuple(_measured(_plan(name, stage), model, image, stage) for name, stage in recipe.stages.items()),
    )


def _parts(recipe: Recipe, model: LlavaModel) -> tuple[Part, ...]:
    language = model.language_model.embed_dim
    widths = {"vision_encoder": model.vision_encoder.embed_dim, "connector": language, "language_model": language}
    return tuple(
        Part(
            component=name,
            plugin=getattr(recipe.model, name).name,
            module=type(getattr(model, name)).__name__,
            parameters=count(getattr(model, name).parameters()),
            width=widths[name],
        )
        for name in COMPONENTS
    )


def _plan(name: str, stage: Stage) -> StagePlan:
    """What the recipe's numbers say, and the data where it is there."""
    declared, there = _declared(stage), _there(name, stage)
    size = declared if there is None else there
    samples = None if size is None else max(0, size - stage.validation.samples)
    steps = stage.steps if samples is None else stage.total_steps(samples)
    return StagePlan(
        name=name,
        samples=samples,
        declared=declared,
        epochs=stage.epochs,
        steps=steps,
        warmup=None if steps is None else stage.schedule.warmup(steps),
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        max_length=stage.max_length,
        precision=stage.precision,
    )


def _declared(stage: Stage) -> int | None:
    try:
        return stage.epoch_samples()
    except RecipeError:
        return None


def _there(name: str, stage: Stage) -> int | None:
    """How many samples the stage's sources really hold; ``None`` where they are not there or cannot be read."""
    try:
        return sum(map(len, open_sources(name, stage).values()))
    except DataError:
        return None  # what is wrong with files that are there is said by data_problems


def _measured(plan: StagePlan, model: LlavaModel, image: ImageRows, stage: Stage) -> StagePlan:
    """The plan with what the shapes of the model add."""
    add_adapters(model, stage, seed=0)
    trainable = set_trainable(model, plan.name, stage)
    values = vars(plan) | {
        "trainable": trainable,
        "frozen": count(model.parameters()) - sum(trainable.values()),
        "memory": memory(model, image, stage, trainable),
        "flops_per_sample": flops(model, image, stage, trainable),
    }
    return StagePlan(**values)


# --- what does not fit -----------------------------------------------------------------------------------------------


def check_parts(recipe: Recipe, inspection: Inspection | None = None) -> list[Problem]:
    """Everything about a recipe's parts that cannot work together.

    Args:
        inspection: the plan, when there is one already.  If its parts are unknown, only the rest is checked; without
            a plan, a part that cannot be built is a problem.
    """
    problems = [problem for name, stage in recipe.stages.items() for problem in _stage_problems(recipe, name, stage)]
    if inspection is not None and inspection.unknown:
        return problems
    try:
        model = build_model_on_meta(recipe)
        problems += _shape_problems(model)
        tokens = image_rows(model).tokens
    except KitError as error:
        return [*error.problems, *problems]
    for name, stage in recipe.stages.items():
        if tokens >= stage.max_length:
            where = recipe.source.where("stages", name, "max_length")
            what = f"one picture takes {tokens} rows, which leaves no room for words in {stage.max_length}"
            problems.append(Problem(where, what, f"raise it well above {tokens}"))
        problems += _part_problems(recipe, model, name, stage)
    return list(dict.fromkeys(problems))


def data_problems(recipe: Recipe, *, prepared: bool) -> list[Problem]:
    """What is wrong with data files as a whole; before the recipe's preparations have run, missing ones are not."""
    problems: list[Problem] = []
    for name, stage in recipe.stages.items():
        try:
            open_sources(name, stage)
        except MissingDataError as error:
            problems += error.problems if prepared or not recipe.prepare else ()
        except DataError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def _stage_problems(recipe: Recipe, name: str, stage: Stage) -> list[Problem]:
    problems = []
    if stage.precision == "fp16" and not torch.cuda.is_available():
        where = recipe.source.where("stages", name, "precision")
        problems.append(Problem(where, "fp16 needs a GPU, and there is none", "use bf16 or fp32"))
    return problems


def _part_problems(recipe: Recipe, model: LlavaModel, name: str, stage: Stage) -> list[Problem]:
    """What a stage asks of the parts that they cannot do."""
    from llava_kit.tokens import check_template

    problems: list[Problem] = []
    try:
        choose_preprocess(model.vision_encoder, stage.image_aspect)
        add_adapters(model, stage, recipe.seed)
        set_trainable(model, name, stage)
    except (RecipeError, ResourceError) as error:
        where = f"stages.{name}."
        problems += [p if p.where.startswith(where) else replace(p, where=where + p.where) for p in error.problems]
    if stage.gradient_checkpointing and not hasattr(model.language_model, "gradient_checkpointing"):
        where = recipe.source.where("stages", name, "gradient_checkpointing")
        problems.append(Problem(where, f"'{recipe.model.language_model.name}' cannot do that", "set it to false"))
    try:
        tokenizer = model.language_model.tokenizer
    except ModelError:  # it comes with the weights, and reading those will say what is wrong
        return problems
    try:
        check_template(stage.template.build(), tokenizer)
    except RecipeError as error:
        where = recipe.source.where("stages", name, "template")
        problems += [Problem(f"{where}: {problem.where}", problem.what, problem.hint) for problem in error.problems]
    return problems


def _shape_problems(model: LlavaModel) -> list[Problem]:
    """Send one picture of no content through encoder and connector and look at the shapes."""
    views = blank_views(model)
    layout = views.layout
    expected = (layout.tiles, layout.rows_per_tile, model.vision_encoder.embed_dim)
    try:
        features_NPK = model.vision_encoder(views.pixels_NCHW.to("meta"))
        if tuple(features_NPK.shape) != expected:
            what = f"gives features of shape {list(features_NPK.shape)}, its layout and embed_dim say {list(expected)}"
            return [Problem("model.vision_encoder", what)]
        if getattr(model.connector, "needs_text", False):
            return []
        if not getattr(model.connector, "per_token", False):
            features_NPK = features_NPK[:, layout.prefix_tokens :]
        hidden = model.connector.hidden(features_NPK, layout)
        out = hidden if model.connector.final is None else model.connector.final(hidden)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Problem("model.connector", f"encoder and connector do not fit together: {reason}")]
    if out.shape[-1] != model.language_model.embed_dim:
        what = f"gives rows of width {out.shape[-1]}, the language model reads {model.language_model.embed_dim}"
        return [Problem("model.connector", what)]
    return []


# --- for people ------------------------------------------------------------------------------------------------------


def render(inspection: Inspection) -> list[RenderableType]:
    """The plan as tables for the terminal."""
    from rich.text import Text

    shown: list[RenderableType] = []
    if inspection.unknown:
        shown.append(Text(f"The parts are not known before `prepare` has run: {inspection.unknown}"))
    else:
        shown.append(_parts_table(inspection))
    shown.append(_stages_table(inspection.stages))
    if inspection.parts:
        note = "Memory and FLOPs are for sequences of full max_length, one device and no sharding: an upper bound."
        shown.append(Text(note, style="dim"))
    return shown


def _parts_table(inspection: Inspection) -> RenderableType:
    from rich.table import Table

    caption = ""
    if (image := inspection.image) is not None:
        size = " × ".join(map(str, image.pixels))
        grid = f"{image.tiles} × {image.grid[0]} × {image.grid[1]} patches"
        caption = f"one picture: {size} values, {grid}, {image.prefix} prefix rows dropped, {image.tokens} tokens"
    table = Table(title=f"Parts of {inspection.name}", caption=caption, title_justify="left", caption_justify="left")
    for heading in ("component", "plugin", "module"):
        table.add_column(heading)
    table.add_column("parameters", justify="right")
    table.add_column("width", justify="right")
    for part in inspection.parts:
        table.add_row(part.component, part.plugin, part.module, f"{part.parameters:,}", f"{part.width:,}")
    return table


def _stages_table(stages: Sequence[StagePlan]) -> RenderableType:
    """A column for every stage, so that numbers have room on a narrow terminal."""
    from rich.table import Table

    table = Table(title="Stages", title_justify="left")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    for name in ("samples", "epochs", "steps", "warmup", "batch_size", "micro_batch_size", "max_length", "precision"):
        label = {"warmup": "warm-up steps"}.get(name, name.replace("_", " "))
        table.add_row(label, *(_known(getattr(stage, name)) for stage in stages))
    table.add_section()
    for component in COMPONENTS:
        counts = [None if stage.trainable is None else stage.trainable[component] for stage in stages]
        table.add_row(f"trains {component}", *("–" if count == 0 else _known(count) for count in counts))
    sums = [None if stage.trainable is None else sum(stage.trainable.values()) for stage in stages]
    table.add_row("trains in all", *map(_known, sums))
    table.add_row("frozen", *(_known(stage.frozen) for stage in stages))
    needs = [stage.memory for stage in stages if stage.memory is not None]
    if needs:
        table.add_section()
        for label in ("weights", "gradients", "optimizer", "activations", "logits", "total"):
            table.add_row(f"memory: {label}", *(short_bytes(getattr(need, label)) for need in needs))
        table.add_row("FLOPs a sample", *(short_count(stage.flops_per_sample or 0) for stage in stages))
    return table


def _known(value: int | str | None) -> str:
    return "?" if value is None else value if isinstance(value, str) else f"{value:,}"
