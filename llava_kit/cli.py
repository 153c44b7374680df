"""The command line: parse, call, print.

What is heavy is imported inside the verbs, so that ``--help`` and ``recipes`` answer at once.
"""

from __future__ import annotations

import itertools
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llava_kit.cli_checkpoints import export_checkpoint, import_checkpoint
from llava_kit.cli_output import Debug, Json, Output, output_of
from llava_kit.errors import DataError, ModelError, Problem, RecipeError, nearest
from llava_kit.failures import TerminatedError, run_guarded
from llava_kit.printing import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from llava_kit.chat import Answer
    from llava_kit.recipe import Recipe

app = typer.Typer(help="Visual instruction tuning with every part replaceable.", no_args_is_help=False)
recipes_app = typer.Typer(help="The recipes that come with the package.")
plugins_app = typer.Typer(help="The installed plugins.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(plugins_app, name="plugins")
app.command("import")(import_checkpoint)
app.command("export")(export_checkpoint)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or the name of a shipped one.")
]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a run or a checkpoint.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")]


def _load(recipe: str, overrides: Sequence[str] | None) -> Recipe:
    from llava_kit.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


# --- training --------------------------------------------------------------------------------------------------------


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run folder; made if missing.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and what does not fit; do nothing.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The same recipe with tiny random parts, a few steps.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepare the data, train every stage, evaluate, and write a report."""
    with output_of(as_json) as output:
        loaded = _load(recipe, overrides)
        if dry_run:
            _show_plan(loaded, output, with_recipe=True)
            return
        from llava_kit import run as runs
        from llava_kit.record import RunRecord

        folder = runs.train(loaded, run_folder=run, resume=resume, smoke=smoke, console=output.console)
        plain = {"run": str(folder), "report": str(folder / "report.html"), "scores": RunRecord.open(folder).summary}
        done = f"smoke run passed: {folder}" if smoke else f"chat:   llava-kit chat {folder} --image PICTURE"
        output.result(plain, lambda console: console.out(done, highlight=False))


def _show_plan(recipe: Recipe, output: Output, *, with_recipe: bool) -> None:
    """What a recipe would do, and everything in it that does not fit.

    Raises:
        RecipeError: something does not fit.
        DataError: data is there, but broken.
    """
    from llava_kit.inspection import check_parts, data_problems, inspect_recipe, render

    inspection = inspect_recipe(recipe)
    wrong_data = data_problems(recipe, prepared=False)
    problems = check_parts(recipe, inspection) + wrong_data
    plain = inspection.to_dict() | {"problems": [vars(problem) for problem in problems]}

    def show(console: Console) -> None:
        if with_recipe:
            console.out(_as_yaml(recipe), highlight=False)
        for part in render(inspection):
            console.print(part)

    output.result(plain | ({"recipe": recipe.to_dict()} if with_recipe else {}), show)
    if problems:
        raise DataError(problems) if problems == wrong_data else RecipeError(problems)


def _show(shown: RenderableType, console: Console) -> None:
    console.print(shown)


def _as_yaml(recipe: Recipe) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(recipe.to_dict()))


# --- looking before training -----------------------------------------------------------------------------------------


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or the folder of a run.")],
    overrides: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Parts, shapes, tokens per image, steps, memory and FLOPs, without loading weights."""
    from llava_kit.recipe_yaml import shipped_recipes

    with output_of(as_json) as output:
        recipe = Path(target) / "recipe.yaml"
        if recipe.is_file():
            target = str(recipe)
        elif Path(target).is_dir() and target not in shipped_recipes():
            raise ModelError(Problem(target, "no run folder: it has no recipe.yaml", "give a recipe or a run folder"))
        _show_plan(_load(target, overrides), output, with_recipe=False)


@app.command()
def preview(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Which stage; the first by default.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many samples.")] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What exactly is trained: every token of a few samples, and whether it is learned."""
    from llava_kit import preview as previews

    with output_of(as_json) as output:
        loaded = _load(recipe, overrides)
        for sample in previews.preview(loaded, stage or next(iter(loaded.stages)), count):
            output.result(sample.to_dict(), partial(_show, previews.render(sample)))


@app.command("check-data")
def check_data(
    recipe: RecipeArgument, overrides: Overrides = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Read every sample and its images, and list what cannot be used."""
    from llava_kit import preview as previews

    with output_of(as_json) as output:
        report = previews.check_data(_load(recipe, overrides), output.console)
        output.result(report.to_dict(), lambda console: console.print(previews.render_check(report)))
        report.refuse_over_limits()


# --- using a model ---------------------------------------------------------------------------------------------------


@app.command()
def chat(
    model: ModelArgument,
    images: Annotated[list[Path] | None, typer.Option("--image", help="A picture for the first question.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this one question and end.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="The model after this stage; the last by default.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Where drawing starts.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Talk with a model about pictures.  Reads questions from the terminal, or one a line from a pipe."""
    from llava_kit.contracts import GenerateOptions
    from llava_kit.interop import load_model
    from llava_kit.parallel import set_threads
    from llava_kit.talk import HELP, talk, typed_lines

    with output_of(as_json) as output:
        pictures = tuple(images or ())
        _refuse_missing(pictures)
        if message is not None and not message.strip():
            raise RecipeError(Problem("--message", "there is no question in it"))
        try:
            options = GenerateOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        except ValueError as error:
            raise RecipeError(Problem("chat", str(error))) from error
        set_threads()
        conversation = load_model(model, stage).conversation(options)
        person = message is None and sys.stdin.isatty()
        if person:
            print(HELP, file=sys.stderr)
        lines = [message] if message is not None else typed_lines("› ") if person else sys.stdin
        talk(
            conversation,
            iter(lines),
            pictures,
            answered=lambda question, answer: _show_answer(output, question, answer),
            noted=lambda remark: print(remark, file=sys.stderr),
            forgiving=person,
        )


def _refuse_missing(pictures: Sequence[Path]) -> None:
    missing = [Problem(str(path), "there is no such image") for path in pictures if not path.is_file()]
    if missing:
        raise RecipeError(missing)


def _show_answer(output: Output, question: str, answer: Answer) -> None:
    output.result(
        {"question": question, **vars(answer)}, lambda console: console.out(printable(answer.text), highlight=False)
    )


@app.command()
def evaluate(
    model: ModelArgument,
    overrides: Overrides = None,
    on: Annotated[str | None, typer.Option("--on", help="Names under the recipe's 'evaluate', with commas.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="The model after this stage; the last by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a model on benchmarks of its recipe."""
    from llava_kit.evaluate import evaluate_run
    from llava_kit.parallel import set_threads
    from llava_kit.report import summary_table, write_report

    with output_of(as_json) as output:
        set_threads()
        names = [name.strip() for name in on.split(",")] if on is not None else None
        summary = evaluate_run(model, names, overrides or (), stage)
        write_report(model)
        output.result(summary, lambda console: console.print(summary_table(model)))


# --- recipes, plugins, environment -----------------------------------------------------------------------------------


@recipes_app.command("list")
def list_recipes(as_json: Json = False, debug: Debug = False) -> None:
    """Names of the shipped recipes, and what each is for."""
    from llava_kit.recipe_yaml import shipped_recipes

    with output_of(as_json) as output:
        found = [{"name": name, "summary": _summary(_shipped(name))} for name in shipped_recipes()]
        width = max((len(row["name"]) for row in found), default=0)
        lines = "\n".join(f"{row['name']:{width}}  {row['summary']}" for row in found)
        output.result(found, lambda console: console.out(lines, highlight=False))


@recipes_app.command("show")
def show_recipe(name: str, as_json: Json = False, debug: Debug = False) -> None:
    """The text of a shipped recipe."""
    with output_of(as_json) as output:
        text = _shipped(name)
        output.result({"name": name, "text": text}, lambda console: console.out(text.rstrip("\n"), highlight=False))


@recipes_app.command("copy")
def copy_recipe(
    name: str,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder; here by default.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a shipped recipe to a file of your own."""
    with output_of(as_json) as output:
        text = _shipped(name)
        path = destination or Path()
        path = path / f"{name}.yaml" if path.is_dir() else path
        try:
            with path.open("x", encoding="utf-8") as out:
                out.write(text)
        except FileExistsError:
            raise RecipeError(Problem(str(path), "exists already", "give another destination")) from None
        except OSError as error:
            raise RecipeError(Problem(str(path), f"cannot be written: {error.strerror}")) from error
        output.result({"name": name, "path": str(path)}, lambda console: console.out(str(path), highlight=False))


def _shipped(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    from importlib.resources import files

    from llava_kit.recipe_yaml import SHIPPED_PACKAGE, shipped_recipes

    if name not in shipped_recipes():
        raise RecipeError(Problem("recipes", f"there is no recipe '{name}'", nearest(name, shipped_recipes())))
    return (files(SHIPPED_PACKAGE) / f"{name}.yaml").read_text(encoding="utf-8")


def _summary(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in comment).partition(". ")[0].rstrip(".")


@plugins_app.command("list")
def list_plugins(as_json: Json = False, debug: Debug = False) -> None:
    """Who provides what, from which package and version, and which plugins failed."""
    with output_of(as_json) as output:
        from llava_kit.plugin_list import describe_plugins, plugin_table

        found = describe_plugins()
        output.result(found, lambda console: console.print(plugin_table(found)))


@app.command()
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, machine and devices, for bug reports."""
    from llava_kit.environment import describe_environment

    with output_of(as_json) as output:
        found = describe_environment()
        flat = {key: value for key, value in found.items() if key != "packages"} | found.get("packages", {})
        lines = "\n".join(f"{key:16}{'–' if value in (None, []) else value}" for key, value in flat.items())
        output.result(found, lambda console: console.out(lines, highlight=False))


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; its exit status."""
    command = typer.main.get_command(app)
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")  # what libraries tell their own developers

    def carry_out() -> None:
        with command.make_context("llava-kit", list(arguments) or ["--help"]) as context:
            command.invoke(context)

    return run_guarded(carry_out, as_json="--json" in arguments, debug=debug)


def _terminate(*_: object) -> None:
    raise TerminatedError


def main() -> None:
    """The console entry."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))
