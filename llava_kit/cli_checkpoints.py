"""The verbs that take checkpoints in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llava_kit.cli_output import Debug, Json, output_of


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A LLaVA in the original's or the hub's layout.")],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to make.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe whose stages the run has.")] = "llava_v1",
    after: Annotated[
        str | None, typer.Option("--after", help="Stage it stands after; the last by default, 'none' trains them all.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Language model that a LoRA, a projector or a delta belongs to.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision-tower", help="Folder of the tower, instead of the one the checkpoint names.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a run folder of somebody's checkpoint: chat with it, train it further, export it."""
    from llava_kit import importing

    with output_of(as_json) as output:
        folder = importing.import_checkpoint(
            checkpoint, run, overrides or (), recipe=recipe, after=after, base=base, vision_tower=vision_tower
        )
        output.result(
            {"run": str(folder)}, lambda console: console.out(f"chat:   llava-kit chat {folder}", highlight=False)
        )


def export_checkpoint(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or a checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    to: Annotated[Literal["hf", "llava"], typer.Option("--to", help="transformers' layout, or the original LLaVA's.")],
    stage: Annotated[
        str | None, typer.Option("--stage", help="The model after this stage; the last by default.")
    ] = None,
    projector_only: Annotated[
        bool, typer.Option("--projector-only", help="With --to llava: mm_projector.bin alone.")
    ] = False,
    projector_form: Annotated[
        Literal["gelu", "identity"] | None,
        typer.Option("--projector-form", help="With --to hf: how one linear layer is written as two."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model in a layout that others read, checked against stock transformers."""
    from llava_kit.exporting import export_model
    from llava_kit.parallel import set_threads

    with output_of(as_json) as output:
        set_threads()
        parity = export_model(
            model, target, to=to, stage=stage, projector_only=projector_only, projector_form=projector_form
        )
        shown = f"{target}: logits within {parity.max_difference:.1e} of stock transformers, same greedy text"
        output.result({"folder": str(target), **vars(parity)}, lambda console: console.out(shown, highlight=False))
