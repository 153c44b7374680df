"""Looks at data through the eyes of training: every token of a sample, and every sample that cannot be used."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from llava_kit.contracts import IGNORE, IMAGE_TOKEN, Sample
from llava_kit.data import Collator, Encoded, Quarantine, make_collator
from llava_kit.errors import DataError, MissingDataError, ModelError, Problem, RecipeError, SampleError, nearest
from llava_kit.loader import load, open_sources
from llava_kit.model import build_model_on_meta
from llava_kit.order import Position
from llava_kit.printing import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from transformers import PreTrainedTokenizerBase

    from llava_kit.recipe import Recipe, Stage

Kind = Literal["trained", "context", "image", "cut off"]
STYLES: dict[Kind, str] = {
    "trained": "bold green",
    "context": "",
    "image": "reverse cyan",
    "cut off": "dim strike red",
}
_AT_ONCE = 8
"""Samples read between two looks at the progress."""
_SHOWN = 20
"""Ids listed under a reason on the terminal."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Neighbouring tokens of one kind, and their text."""

    kind: Kind
    text: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One sample as it is trained: ids and labels before images take their rows, one ``IMAGE_TOKEN`` for each."""

    id: str
    source: str
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    expanded_length: int = 0
    truncated: bool = False
    problems: list[str] = field(default_factory=list)
    spans: tuple[Span, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The row of ``preview --json``."""
        names = ("id", "input_ids", "labels", "expanded_length", "truncated", "problems")
        return {name: getattr(self, name) for name in names}


def preview(recipe: Recipe, stage_name: str, count: int) -> Iterator[Preview]:
    """The first samples of a stage: from every source in turn, in the order of its file.

    Raises:
        RecipeError: there is no such stage, or its parts do not fit.
        ModelError: a part of the model cannot be had.
        DataError: the data cannot be read.
    """
    stage = _stage(recipe, stage_name)
    with _naming_preparations(recipe):
        model = build_model_on_meta(recipe)
        collator = make_collator(recipe, model, stage)
        sources = open_sources(stage_name, stage)
    positions = (Position(name, at) for at in itertools.count() for name in sources if at < len(sources[name]))
    total = sum(map(len, sources.values()))
    for position in itertools.islice(positions, min(count, total)):
        yield _look(position, sources[position.source], collator, model.language_model.tokenizer)


def _stage(recipe: Recipe, name: str) -> Stage:
    if name not in recipe.stages:
        raise RecipeError(Problem("--stage", f"the recipe has no stage '{name}'", nearest(name, list(recipe.stages))))
    return recipe.stages[name]


@contextlib.contextmanager
def _naming_preparations(recipe: Recipe) -> Iterator[None]:
    """Say of a part or file that is missing that the recipe's preparations would make it."""
    try:
        yield
    except (ModelError, MissingDataError) as error:
        if not recipe.prepare:
            raise
        hint = f"`llava-kit train` prepares it first ({', '.join(recipe.prepare)})"
        problems = [replace(p, hint="; ".join(filter(None, [p.hint, hint]))) for p in error.problems]
        raise type(error)(problems) from error


def _look(
    position: Position, samples: Sequence[Sample], collator: Collator, tokenizer: PreTrainedTokenizerBase
) -> Preview:
    name = f"{position.source}[{position.index}]"
    try:
        sample = samples[position.index]
    except SampleError as error:
        return Preview(id=name, source=name, problems=[str(problem) for problem in error.problems])
    try:
        encoded = collator.encode(sample)
    except SampleError as error:
        problems = [*sample.notes, *(str(problem) for problem in error.problems)]
        return Preview(id=sample.id, source=name, problems=problems)
    return Preview(
        id=sample.id,
        source=name,
        input_ids=encoded.tokens.ids,
        labels=encoded.tokens.labels,
        expanded_length=encoded.sequence.length,
        truncated=encoded.truncated,
        problems=list(sample.notes),
        spans=tuple(_spans(encoded, collator, tokenizer)),
    )


def _spans(encoded: Encoded, collator: Collator, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """The whole conversation, the part that was cut off included, in runs of one kind."""
    kept = len(encoded.tokens.ids)
    ids = collator.encoder(collator.template.render(encoded.sample.turns, False)).ids
    labels = encoded.tokens.labels
    kinds: list[Kind] = [
        "cut off" if at >= kept else "image" if id_ == IMAGE_TOKEN else "context" if labels[at] == IGNORE else "trained"
        for at, id_ in enumerate(ids)
    ]
    rows = iter([image.rows for image in encoded.sequence.images])
    start = text_start = 0  # text is decoded from the image before it on: alone, a token would lose its space
    for end in range(1, len(ids) + 1):
        if end < len(ids) and kinds[end] == kinds[start] != "image" and ids[end] != IMAGE_TOKEN:
            continue
        if ids[start] == IMAGE_TOKEN:
            width = next(rows, 0)
            yield Span(kind=kinds[start], text=f"‹image ×{width}›" if width else "‹image›", rows=width or 1)
            text_start = end
        else:
            before, whole = (_decode(tokenizer, ids[text_start:to]) for to in (start, end))
            yield Span(kind=kinds[start], text=whole[len(before) :], rows=end - start)
        start = end


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def render(shown: Preview) -> RenderableType:
    """A sample for the terminal: coloured by what becomes of each token, with counts below."""
    from rich.panel import Panel
    from rich.text import Text

    body = Text()
    for span in shown.spans:
        body.append(printable(span.text), style=STYLES[span.kind])
    for problem in shown.problems:
        body.append(("\n" if body else "") + printable(problem), style="yellow")
    counts = {kind: sum(span.rows for span in shown.spans if span.kind == kind) for kind in STYLES}
    footer = Text(f"{shown.expanded_length} rows: ")
    for kind, count in counts.items():
        if count or kind == "trained":
            footer.append(f"{count} {kind}", style=STYLES[kind]).append("  ")
    title = Text(printable(f"{shown.source}  id {shown.id}"))
    return Panel(body, title=title, subtitle=footer, title_align="left", subtitle_align="left")


# --- all of the data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """The account of every sample of every stage."""

    stages: dict[str, Quarantine]

    def to_dict(self) -> dict[str, Any]:
        """``{stage: account}`` as in ``data_report.json``, with how many unusable samples the recipe tolerates."""
        return {name: account.to_dict() | {"tolerated": account.tolerated} for name, account in self.stages.items()}

    def refuse_over_limits(self) -> None:
        """Raises:
        DataError: a stage has more unusable samples than the recipe's limits allow.
        """
        problems = []
        for name, account in self.stages.items():
            if len(account.samples) > account.tolerated:
                what = f"{len(account.samples):,} of {account.total:,} samples cannot be used"
                hint = f"the recipe tolerates {account.tolerated}: mend the data, or raise limits.max_bad_samples and"
                problems.append(Problem(f"stages.{name}.data", what, f"{hint} limits.max_bad_fraction"))
        if problems:
            raise DataError(problems)


def check_data(recipe: Recipe, console: Console) -> DataCheck:
    """Read every sample of every stage with its images, as training would.

    Raises:
        RecipeError: the parts do not fit.
        ModelError: a part of the model cannot be had.
        DataError: a source cannot be read at all.
    """
    with _naming_preparations(recipe):
        model = build_model_on_meta(recipe)
    return DataCheck(stages={name: _check_stage(recipe, name, make_collator(recipe, model, stage), console)
                             for name, stage in recipe.stages.items()})  # fmt: skip


def _check_stage(recipe: Recipe, name: str, collator: Collator, console: Console) -> Quarantine:
    from rich.progress import track

    with _naming_preparations(recipe):
        sources = open_sources(name, recipe.stages[name])
    positions = [Position(source, index) for source, samples in sources.items() for index in range(len(samples))]
    groups = [positions[start : start + _AT_ONCE] for start in range(0, len(positions), _AT_ONCE)]
    everything = replace(recipe.limits, max_bad_samples=len(positions), max_bad_fraction=1.0)
    account = Quarantine(everything, len(positions))
    loaded = load(groups, sources, collator, workers=recipe.workers)
    description = f"stage {name}"
    shown = track(loaded, description, total=len(groups), console=console, disable=not console.is_terminal)
    for micro in shown:
        account.add(micro)
    account.limits = recipe.limits
    return account


def render_check(check: DataCheck) -> RenderableType:
    """The account for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", title="Data", title_justify="left")
    for heading in ("samples", "usable", "cut off", "unusable", "tolerated"):
        table.add_column(heading, justify="right")
    lines: list[RenderableType] = [table]
    for name, account in check.stages.items():
        numbers = (account.seen, account.used, account.truncated, account.seen - account.used, account.tolerated)
        table.add_row(name, *(f"{number:,}" for number in numbers))
        for reason, entry in account.reasons.items():
            lines.append(Text(f"{name}: {printable(reason)} ({entry['count']:,})", style="yellow"))
            for one in entry["samples"][:_SHOWN]:
                lines.append(Text(printable(f"  {one['id']}: {one['where']}: {one['what']}")))
            if len(entry["samples"]) > _SHOWN:
                lines.append(Text(f"  … and {len(entry['samples']) - _SHOWN:,} more", style="dim"))
    return Group(*lines)
