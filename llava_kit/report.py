"""What a run leaves for people: ``report.html``, the model card, and the table at the end of the terminal.

Everything is read back from the run folder, so each can be written again at any time, also of a run without an
evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_kit.record import Pace, RunRecord, component_name, duration, mapping

if TYPE_CHECKING:
    from rich.table import Table


def write_report(run_folder: Path) -> Path:
    """Write ``report.html``: one page that needs no other file and no network.

    Raises:
        ModelError: there is no such folder.
    """
    from llava_kit.report_page import render

    return _write(run_folder / "report.html", render(RunRecord.open(run_folder)))


def write_model_card(run_folder: Path) -> Path:
    """Write ``README.md``: what was trained from what, on which data, how well it does, and how to talk to it.

    Raises:
        ModelError: there is no such folder.
    """
    return _write(run_folder / "README.md", model_card(RunRecord.open(run_folder)))


def summary_table(run_folder: Path) -> Table:
    """The scores as a table for the terminal, a row per metric and a column per stage; without scores, the losses."""
    from rich.markup import escape
    from rich.table import Table

    run = RunRecord.open(run_folder)
    table = Table(title=escape(run.name), title_justify="left")
    if not run.scores:
        return _loss_table(run, table)
    table.add_column("benchmark")
    table.add_column("metric")
    for stage in run.scored_stages:
        table.add_column(f"after {escape(stage)}", justify="right")
    table.add_column("questions", justify="right")
    previous = ""
    for row in run.scores:
        name = row.benchmark if row.benchmark != previous else ""
        count = f"{row.count:,}" if name and row.count is not None else ""
        values = [row.text(stage) for stage in run.scored_stages]
        label = f"  {row.label}" if row.is_part else row.label
        table.add_row(escape(name), escape(label), *values, count)
        previous = row.benchmark
    return table


def _loss_table(run: RunRecord, table: Table) -> Table:
    table.add_column("stage")
    for heading in ("steps", "last loss", "time"):
        table.add_column(heading, justify="right")
    for stage, steps in run.steps.items():
        pace = Pace.of(steps)
        table.add_row(stage, f"{pace.steps:,}", f"{steps[-1]['loss']:.3f}", duration(pace.seconds))
    return table


def model_card(run: RunRecord) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    front = "---\nlibrary_name: llava-kit\npipeline_tag: image-text-to-text\ntags:\n- llava\n---\n"
    parts = [
        f"{front}\n# {_plain(run.name)}",
        "A vision-language model trained with llava-kit by visual instruction tuning.",
        _parts(run),
        _training(run),
        _card_scores(run),
        f"## Use\n\n```\nllava-kit chat {run.folder.resolve().name} --image picture.png\n```\n\n"
        "`recipe.yaml` is the recipe as it ran, `environment.json` the versions it ran with, and `report.html` shows "
        "the loss curves and sample answers.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _parts(run: RunRecord) -> str:
    slots = mapping(run.recipe.get("model"))
    rows = [(part.replace("_", " "), component_name(slot), _settings(slot)) for part, slot in slots.items()]
    return f"## Parts\n\n{_table(('part', 'plugin', 'settings'), rows)}" if rows else ""


def _settings(slot: Any) -> str:
    values = {key: value for key, value in mapping(slot).items() if key != "name" and value is not None}
    return ", ".join(f"{key}: {value}" for key, value in values.items())


def _training(run: RunRecord) -> str:
    rows = []
    for name, stage in mapping(run.recipe.get("stages")).items():
        pace = Pace.of(run.steps.get(str(name), ()))
        trained = mapping(mapping(stage).get("trainable")) or mapping(stage).get("trainable") or {}
        sources = ", ".join(_source(key, source) for key, source in mapping(mapping(stage).get("data")).items())
        ran = f"{pace.steps:,} steps, {pace.samples:,} samples, {duration(pace.seconds)}" if pace.steps else "–"
        rows.append((str(name), ", ".join(map(str, trained)).replace("_", " "), sources, ran))
    return f"## Training\n\n{_table(('stage', 'trained', 'data', 'ran'), rows)}" if rows else ""


def _source(name: str, source: Any) -> str:
    samples = mapping(source).get("samples")
    return f"{name} ({samples:,} samples)" if isinstance(samples, int) else str(name)


def _card_scores(run: RunRecord) -> str:
    if not run.scores:
        return ""
    rules = mapping(run.recipe.get("evaluate"))
    stages = run.scored_stages
    rows = [
        (
            row.benchmark,
            component_name(rules.get(row.benchmark, "?")),
            row.label,
            *(row.text(stage) for stage in stages),
            "" if row.count is None else f"{row.count:,}",
        )
        for row in run.scores
    ]
    heads = ("benchmark", "rule", "metric", *(f"after {stage}" for stage in stages), "questions")
    return f"## Scores\n\n{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would take for mark-up."""
    one_line = " ".join(text.split())
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`")):
        one_line = one_line.replace(sign, written)
    return one_line


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(path)
