"""A recipe from preparation to report: the story of ``llava-kit train``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from llava_kit import inspection
from llava_kit.checkpoint import WEIGHTS, RunFolder, load_trained, newest_valid, write_json
from llava_kit.data import Quarantine, make_collator, write_data_report
from llava_kit.environment import describe_environment
from llava_kit.errors import Problem, RecipeError
from llava_kit.evaluate import evaluate_stage, read_summary
from llava_kit.interop import chat_collator
from llava_kit.loader import StageData
from llava_kit.model import LlavaModel, build_model, set_precision, set_trainable
from llava_kit.parallel import make_accelerator, pick_device, set_threads
from llava_kit.recipe import Recipe, load_recipe
from llava_kit.registry import default_registry
from llava_kit.report import summary_table, write_model_card, write_report
from llava_kit.smoke import smoke_recipe
from llava_kit.splice_dispatch import DISPATCHER, describe_choice
from llava_kit.trainer import Trainer, out_of_memory
from llava_kit.watch import StageObserver, progress_bar

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llava_kit.recipe import Stage

MAY_CHANGE = ("evaluate", "limits", "saving", "trackers", "workers", "prepare")
"""What a resumed run may do differently: none of it changes the weights."""


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    run_folder: str | Path | None = None,
    resume: bool = False,
    smoke: bool = False,
    console: Console | None = None,
) -> Path:
    """Carry out a recipe: prepare, all stages, evaluation, report.  The run folder.

    Args:
        recipe: a loaded recipe, or what :func:`llava_kit.load_recipe` takes together with ``overrides``.
        run_folder: by default ``runs/`` and the recipe's name.
        resume: go on with an interrupted run; the result is the one it would have had without the interruption.
        smoke: the same recipe with tiny random parts and a few steps, by default in a temporary folder.

    Raises:
        KitError: one of its kinds, each with its exit code.
    """
    console = console or Console(stderr=True)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    if smoke and run_folder is None:
        run_folder = Path(tempfile.mkdtemp(prefix=f"llava-kit-smoke-{recipe.name}-"))
    run = RunFolder(Path(run_folder or Path("runs") / recipe.name))
    set_threads()
    with run.locked():
        if smoke:
            recipe = smoke_recipe(recipe, run.path / "smoke")
        _open_run(run, recipe, resume)
        _prepare(recipe, console)
        _check(recipe)
        _train_stages(run, recipe, resume, console)
        run.note_environment({"splice": describe_choice()})
        write_model_card(run.path)
        report = write_report(run.path)
    if read_summary(run):
        console.print(summary_table(run.path))
    console.print(f"report: {report}", highlight=False)
    return run.path


def _open_run(run: RunFolder, recipe: Recipe, resume: bool) -> None:
    """Make a new run folder, or make sure that the one to resume is of this recipe.

    Raises:
        RecipeError: the folder holds a run already, or one of another recipe.
        ResourceError: it wants a backend of the splice that cannot run here.
    """
    chosen = run.environment().get("splice", {}).get("chosen", {}) if resume else {}
    DISPATCHER.configure(recipe.splice.backend, torch.device(pick_device()), chosen)
    if run.recipe.is_file():
        if not resume:
            hint = "--resume goes on with it, --run DIR starts another"
            raise RecipeError(Problem(str(run.path), "this folder holds a run already", hint))
        _refuse_changes(run, recipe)
    temporary = run.recipe.with_name(f".tmp-{run.recipe.name}")
    recipe.save(temporary)
    temporary.replace(run.recipe)
    plugins = [
        {"name": p.name, "package": p.package, "version": p.version}
        for p in default_registry().plugins
        if not p.failure
    ]
    facts = {"plugins": plugins, "splice": describe_choice()}
    write_json(run.path / "environment.json", describe_environment() | facts)


def _refuse_changes(run: RunFolder, recipe: Recipe) -> None:
    before, now = (dict(_leaves(r.to_dict())) for r in (load_recipe(run.recipe), recipe))
    problems = [
        Problem(
            key,
            f"was {before.get(key)!r} when this run began, now it is {now.get(key)!r}",
            "start another run with --run, or take the change back",
        )
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in MAY_CHANGE
    ]
    if problems:
        raise RecipeError(problems)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _prepare(recipe: Recipe, console: Console) -> None:
    for name, slot in recipe.prepare.items():

        def progress(message: str, name: str = name) -> None:
            console.print(f"prepare {name}: {message}", highlight=False)

        slot.build().run(Path(recipe.data_root), progress)


def _check(recipe: Recipe) -> None:
    """Hold the parts against each other, now that their files are here, before any weight is read."""
    problems = inspection.check_parts(recipe)
    if problems:
        raise RecipeError(problems)


def _train_stages(run: RunFolder, recipe: Recipe, resume: bool, console: Console) -> None:
    console.print("reading the model", highlight=False)
    model = build_model(recipe)
    trained: set[str] = set()
    for index, (name, stage) in enumerate(recipe.stages.items()):
        facts = run.finished(name) if resume else None
        if facts is not None:
            # The same conversions as when it was trained, so that what follows starts from the same bits.
            set_trainable(model, name, stage)
            set_precision(model, stage.precision)
            trained |= load_trained(model, run.stage(name) / WEIGHTS)
            console.print(f"stage {name}: finished already", highlight=False)
        else:
            accelerator = make_accelerator(stage.precision, recipe.trackers, str(run.path))
            trained |= _train_stage(run, recipe, index, name, stage, model, trained, resume, accelerator, console)
            accelerator.end_training()
        if not _is_evaluated(run, recipe, name):
            _evaluate(run, recipe, name, model, console)


def _train_stage(
    run: RunFolder,
    recipe: Recipe,
    index: int,
    name: str,
    stage: Stage,
    model: LlavaModel,
    trained_before: set[str],
    resume: bool,
    accelerator: Accelerator,
    console: Console,
) -> set[str]:
    """Train one stage and write its weights; the names of all parameters trained so far."""
    run.stage(name).mkdir(exist_ok=True)
    counts = set_trainable(model, name, stage)
    set_precision(model, stage.precision)
    model.to(accelerator.device)
    trained = trained_before | {n for n, p in model.named_parameters() if p.requires_grad}
    shown = ", ".join(f"{component} {count:,}" for component, count in counts.items() if count)
    console.print(f"stage {name}: trains {shown} parameters", highlight=False)
    if stage.gradient_checkpointing:
        model.set_gradient_checkpointing(True)
    collator = make_collator(recipe, model, stage)
    data = StageData(recipe, name, stage, collator)
    for warning in data.warnings:
        console.print(f"stage {name}: {warning}", highlight=False)
    torch.manual_seed(recipe.seed + index)
    quarantine = Quarantine(recipe.limits, data.size)
    accelerator.init_trackers("tensorboard")
    with progress_bar(console) as bar:
        observer = StageObserver(
            console, bar, accelerator, run, name, stage, model, collator, chat_collator(recipe, model), data.held_out()
        )
        trainer = Trainer(
            accelerator=accelerator,
            model=model,
            run=run,
            stage_name=name,
            stage=stage,
            saving=recipe.saving,
            total_steps=data.total_steps,
            batches=lambda start: data.batches(start, accelerator.process_index, accelerator.num_processes),
            quarantine=quarantine,
            observer=observer,
            trained=trained,
        )
        began = time.perf_counter()
        observer.resumed(newest_valid(run.checkpoints(name))[0] or 0 if resume else 0)
        try:
            steps = trainer.train(resume)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise out_of_memory(name, error) from error
    if stage.gradient_checkpointing:
        model.set_gradient_checkpointing(False)
    facts = {"steps": data.total_steps, "trained": counts, "data": quarantine.to_dict()}
    if steps == data.total_steps:
        facts["seconds"] = round(time.perf_counter() - began, 3)
    run.finish_stage(name, model, trained, facts)
    write_data_report(run.path / "data_report.json", name, quarantine)
    return trained


def _is_evaluated(run: RunFolder, recipe: Recipe, stage: str) -> bool:
    summary = read_summary(run)
    return all(stage in summary.get(benchmark, {}) for benchmark in recipe.evaluate)


def _evaluate(run: RunFolder, recipe: Recipe, stage: str, model: LlavaModel, console: Console) -> None:
    with progress_bar(console) as bar:
        tasks = {name: bar.add_task(f"evaluate {name}", total=None, facts="") for name in recipe.evaluate}

        def progress(name: str, done: int, total: int) -> None:
            bar.update(tasks[name], completed=done, total=total)

        evaluate_stage(run, stage, model, chat_collator(recipe, model), recipe.evaluate, progress)
