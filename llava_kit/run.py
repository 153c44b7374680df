"""A recipe from preparation to report: the story of ``llava-kit train``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from llava_kit import inspection
from llava_kit.checkpoint import (
    WEIGHTS,
    RunFolder,
    load_trained,
    read_json,
    read_trained,
    trained_tensors,
    write_json,
)
from llava_kit.data import Quarantine, make_collator, write_data_report
from llava_kit.environment import describe_environment
from llava_kit.errors import DataError, Problem, RecipeError
from llava_kit.evaluate import evaluate_stage, read_summary
from llava_kit.interop import chat_collator, ready_to_answer
from llava_kit.loader import StageData
from llava_kit.model import LlavaModel, add_adapters, build_model, set_precision, set_trainable
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

    from llava_kit.data import Collator
    from llava_kit.recipe import Stage

MAY_CHANGE = ("evaluate.", "saving.", "trackers.", "workers.", "limits.max_bad_samples.", "limits.max_bad_fraction.")
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
        _check(run, recipe)
        _record_run(run, recipe)
        _train_stages(run, recipe, resume, console)
        run.note_environment({"splice": describe_choice()})
        write_model_card(run.path)
        report = write_report(run.path)
    if read_summary(run):
        console.print(summary_table(run.path))
    console.print(f"report: {report}", highlight=False)
    return run.path


def _open_run(run: RunFolder, recipe: Recipe, resume: bool) -> None:
    """Make sure that the folder is new, or that it is a run of this recipe which is to go on.

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


def _record_run(run: RunFolder, recipe: Recipe) -> None:
    """Write what is run, and on what."""
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
        if before.get(key) != now.get(key) and not f"{key}.".startswith(MAY_CHANGE)
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


def _check(run: RunFolder, recipe: Recipe) -> None:
    """Hold the parts against each other, now that their files are here, before any weight is read."""
    problems = inspection.check_parts(recipe)
    if problems:
        raise RecipeError(problems)
    if wrong := inspection.data_problems(recipe, prepared=True):
        raise DataError(wrong)
    for stage in recipe.stages.values():
        make_accelerator(stage.precision, recipe.trackers, str(run.path))


def _train_stages(run: RunFolder, recipe: Recipe, resume: bool, console: Console) -> None:
    """Train what is not trained yet, and evaluate after each stage.

    Every stage starts from the weights the recipe names and the file of the stage before, so neither the precision of
    an earlier stage nor an interruption changes what it starts from.
    """
    before: Path | None = None
    for index, (name, stage) in enumerate(recipe.stages.items()):
        weights = run.stage(name) / WEIGHTS
        model = None
        if resume and run.finished(name) is not None:
            console.print(f"stage {name}: finished already", highlight=False)
        else:
            model = _model_after(recipe, index, before, console)
            StageRun(run, recipe, index, name, stage, model, console).carry_out(before, resume)
        if not _is_evaluated(run, recipe, name):
            model = model or _model_after(recipe, index + 1, weights, console)
            _evaluate(run, recipe, name, model, console)
        before = weights


def _model_after(recipe: Recipe, stages: int, weights: Path | None, console: Console) -> LlavaModel:
    """The model as it is after the first ``stages`` stages, whose last one wrote ``weights``."""
    console.print("reading the model", highlight=False)
    model = build_model(recipe)
    for stage in list(recipe.stages.values())[:stages]:
        add_adapters(model, stage, recipe.seed)
    if weights is not None:
        load_trained(model, weights)
    return model


@dataclass(frozen=True)
class StageRun:
    """One stage of a run."""

    run: RunFolder
    recipe: Recipe
    index: int
    name: str
    stage: Stage
    model: LlavaModel
    console: Console

    def carry_out(self, before: Path | None, resume: bool) -> None:
        """Train the stage and write its weights, with those that earlier stages trained and this one does not."""
        self.run.stage(self.name).mkdir(exist_ok=True)
        renamed = add_adapters(self.model, self.stage, self.recipe.seed)
        counts = set_trainable(self.model, self.name, self.stage)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        earlier = read_trained(before) if before is not None else {}
        carried = {renamed.get(name, name): tensor for name, tensor in earlier.items()}
        accelerator = make_accelerator(self.stage.precision, self.recipe.trackers, str(self.run.path))
        set_precision(self.model, self.stage.precision)
        self.model.to(accelerator.device)
        shown = ", ".join(f"{component} {count:,}" for component, count in counts.items() if count)
        self._say(f"trains {shown} parameters")
        collator = make_collator(self.recipe, self.model, self.stage)
        data = StageData(self.recipe, self.name, self.stage, collator)
        for warning in data.warnings:
            self._say(warning)
        self._hold_data_to(data.fingerprint(), resume)
        quarantine = Quarantine(self.recipe.limits, data.size)
        torch.manual_seed(self.recipe.seed + self.index)
        seconds = self._train(accelerator, collator, data, quarantine, trained, resume)
        write_data_report(self.run.path / "data_report.json", self.name, quarantine)
        facts = {"steps": data.total_steps, "trained": counts, "data": quarantine.to_dict(), "seconds": seconds}
        self.run.finish_stage(self.name, carried | trained_tensors(self.model, trained), facts)

    def _train(
        self,
        accelerator: Accelerator,
        collator: Collator,
        data: StageData,
        quarantine: Quarantine,
        trained: set[str],
        resume: bool,
    ) -> float:
        """The stage's steps; seconds they took, those before an interruption not counted."""
        accelerator.init_trackers("tensorboard")
        self.model.set_gradient_checkpointing(self.stage.gradient_checkpointing)
        questions = chat_collator(self.recipe, self.model)
        began = time.perf_counter()
        with progress_bar(self.console) as bar:
            observer = StageObserver(
                self.console, bar, accelerator, self.run, self.name, self.stage, self.model, collator, questions,
                quarantine, data.held_out(),
            )  # fmt: skip
            trainer = Trainer(
                accelerator=accelerator,
                model=self.model,
                run=self.run,
                stage_name=self.name,
                stage=self.stage,
                saving=self.recipe.saving,
                total_steps=data.total_steps,
                batches=data.batches,
                quarantine=quarantine,
                observer=observer,
                trained=trained,
                say=self._say,
                compatibility=self.recipe.compatibility,
            )
            try:
                trainer.train(resume)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise out_of_memory(self.name, error) from error
        self.model.set_gradient_checkpointing(False)
        accelerator.end_training()
        return round(time.perf_counter() - began, 3)

    def _hold_data_to(self, fingerprint: dict[str, Any], resume: bool) -> None:
        """Refuse to go on with other data than the stage began with.

        Raises:
            DataError: a source has changed.
        """
        path = self.run.stage(self.name) / "data.json"
        if resume and path.is_file():
            began = read_json(path)
            problems = [
                Problem(
                    f"stages.{self.name}.data.{source}",
                    "the data has changed since this run began",
                    "start another run with --run, or restore the data",
                )
                for source, facts in fingerprint.items()
                if began.get(source) != facts
            ]
            if problems:
                raise DataError(problems)
        write_json(path, fingerprint)

    def _say(self, text: str) -> None:
        self.console.print(f"stage {self.name}: {text}", highlight=False)


def _is_evaluated(run: RunFolder, recipe: Recipe, stage: str) -> bool:
    summary = read_summary(run)
    return all(stage in summary.get(benchmark, {}) for benchmark in recipe.evaluate)


def _evaluate(run: RunFolder, recipe: Recipe, stage: str, model: LlavaModel, console: Console) -> None:
    ready_to_answer(model)
    with progress_bar(console) as bar:
        tasks = {name: bar.add_task(f"evaluate {name}", total=None, facts="") for name in recipe.evaluate}

        def progress(name: str, done: int, total: int) -> None:
            bar.update(tasks[name], completed=done, total=total)

        evaluate_stage(run, stage, model, chat_collator(recipe, model), recipe.evaluate, progress)
