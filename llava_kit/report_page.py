"""The report of a run as one HTML page: no script, no outside file, every text from data or model escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from llava_kit.charts import Chart, smooth
from llava_kit.errors import SampleError
from llava_kit.images import load_image
from llava_kit.recipe import Limits
from llava_kit.record import Answer, Pace, Question, RunRecord, Timeline, component_name, duration, mapping
from llava_kit.report_style import CSS

_PICTURES = 18
"""Held-out pictures shown of each benchmark."""
_QUESTIONS = 4
"""Questions shown about one of them."""
_LONGEST = 600
"""Characters of an answer before it is cut."""
_IDS = 200
"""Ids listed under one reason for setting samples aside."""
_SIDE, _SMALL = 360, 128
"""Longest side of a picture in the page, and up to which it is shown pixel by pixel."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(run: RunRecord) -> str:
    """The whole page.  Parts the run has no files for are left out."""
    sections = [
        ("scores", "Scores", _scores(run)),
        ("learning", "Learning", _curves(run)),
        ("speed", "Speed", _speed(run)),
        ("pictures", "Held-out pictures", "".join(_answered(run, benchmark) for benchmark in run.summary)),
        ("time", "Watching it learn", _timelines(run)),
        ("data", "Data", _data(run)),
        ("environment", "Environment", _environment(run)),
    ]
    present = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in present)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>{part}</section>' for anchor, title, part in present)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} – training report</title><style>{CSS}</style></head><body>"
        f'<header><p class="eyebrow">Training report</p><h1>{escape(run.name)}</h1>{_lede(run)}<nav>{links}</nav>'
        f"</header><main>{body}</main><footer>Written by llava-kit from the files of this run folder.</footer>"
        "</body></html>\n"
    )


def _lede(run: RunRecord) -> str:
    parts = mapping(run.recipe.get("model"))
    named = [f"<strong>{escape(component_name(parts[key]))}</strong>" for key in parts]
    seconds = sum(Pace.of(rows).seconds for rows in run.steps.values())
    stages = " then ".join(f"<em>{escape(stage)}</em>" for stage in run.stages)
    sentence = (
        " → ".join(named)
        + (f", trained in {stages}" if stages else "")
        + (f" in {duration(seconds)}." if seconds else ".")
    )
    return f'<p class="lede">{sentence}</p>' if named or stages else ""


# --- scores, curves, speed -------------------------------------------------------------------------------------------


def _scores(run: RunRecord) -> str:
    if not run.scores:
        return ""
    head = "".join(f'<th class="number">after {escape(stage)}</th>' for stage in run.scored_stages)
    rows, previous = [], ""
    for row in run.scores:
        title = f"<strong>{escape(row.benchmark)}</strong><br>" if row.benchmark != previous else ""
        count = f' <span class="note">{row.count:,} questions</span>' if title and row.count is not None else ""
        cells = "".join(_score_cell(row.text(stage), row.share(stage)) for stage in run.scored_stages)
        kind = "control" if row.is_control else "part" if row.is_part else "whole"
        rows.append(f'<tr class="{kind}"><th>{title}{escape(row.label)}{count}</th>{cells}</tr>')
        previous = row.benchmark
    note = (
        '<p class="note">The control asks the same questions about other pictures: what is scored there was guessed '
        "from the words alone.</p>"
        if any(row.is_control for row in run.scores)
        else ""
    )
    table = f'<table class="scores wide"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll">{table}</div>{note}'


def _score_cell(text: str, share: float | None) -> str:
    bar = "" if share is None else f'<span class="bar"><i style="width:{100 * share:.1f}%"></i></span>'
    return f'<td class="number">{text}{bar}</td>'


def _curves(run: RunRecord) -> str:
    figures, validated = [], False
    for stage, rows in run.steps.items():
        raw = [(float(row["step"]), float(row["loss"])) for row in rows]
        points = [(float(row["step"]), float(row["validation_loss"])) for row in run.validations.get(stage, ())]
        line = smooth(raw, weight=0.9 if len(raw) < 500 else 0.98)
        chart = Chart(title=f"Loss of {stage} by step", x_label="step", raw=raw, line=line, points=points).svg()
        ends = [
            f"{series[-1][1]:.3f} {name}" for series, name in ((line, "at the end"), (points, "held out")) if series
        ]
        caption = f"{escape(stage)} <span>loss, {', '.join(ends)}</span>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" if chart else "")
        validated = validated or bool(points)
    if not any(figures):
        return ""
    key = '<span class="key raw"></span>each step &ensp; <span class="key"></span>smoothed'
    key += ' &ensp; <span class="key points"></span>held-out samples' if validated else ""
    return f'<div class="charts">{"".join(figures)}</div><p class="note">{key}</p>'


def _speed(run: RunRecord) -> str:
    rows = []
    for stage, steps in run.steps.items():
        pace = Pace.of(steps)
        rates = [f"{amount / pace.seconds:,.0f}" if pace.seconds else "–" for amount in (pace.samples, pace.tokens)]
        rows.append((stage, f"{pace.steps:,}", f"{pace.samples:,}", f"{pace.tokens:,}", duration(pace.seconds), *rates))
    heads = ("stage", "steps", "samples", "tokens", "time", "samples/s", "tokens/s")
    return table(heads, rows) if rows else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, escaped; every column but the first holds numbers."""
    body = "".join(_line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{_line("th", heads)}</thead><tbody>{body}</tbody></table></div>'


def _line(tag: str, texts: Sequence[str]) -> str:
    first, *numbers = (escape(text) for text in texts)
    cells = "".join(f'<{tag} class="number">{number}</{tag}>' for number in numbers)
    return f"<tr><{tag}>{first}</{tag}>{cells}</tr>"


# --- pictures --------------------------------------------------------------------------------------------------------


def _answered(run: RunRecord, benchmark: str) -> str:
    questions = run.questions(benchmark)
    chosen = choose(questions)
    if not chosen:
        return ""
    cards = "".join(_card(group[0].images, map(_asked, group)) for group in chosen)
    shown = sum(map(len, chosen))
    note = (
        f"{shown:,} of the {len(questions):,} questions of {escape(benchmark)}, picked so that right and wrong answers "
        "both show; the scores above count all of them."
    )
    return f'<p class="note">{note}</p><div class="cards">{cards}</div>'


def choose(questions: Sequence[Question]) -> list[list[Question]]:
    """Questions worth showing, by picture: faultless pictures and others in turn, and in each both kinds of answer."""
    by_picture: dict[tuple[Path, ...] | str, list[Question]] = {}
    for question in questions:
        by_picture.setdefault(question.images or question.id, []).append(question)
    groups = list(by_picture.values())
    faultless = [group for group in groups if all(question.is_right for question in group)]
    others = [group for group in groups if not all(question.is_right for question in group)]
    mixed = [group for pair in zip_longest(others, faultless) for group in pair if group is not None]
    return [_some(group) for group in mixed[:_PICTURES]]


def _some(group: list[Question]) -> list[Question]:
    wrong = [question for question in group if not question.is_right]
    right = [question for question in group if question.is_right]
    pairs = chain.from_iterable(zip_longest(right, wrong))
    kept = [question for question in pairs if question is not None][:_QUESTIONS]
    return [question for question in group if question in kept]


def _asked(question: Question) -> str:
    answers = [(f"after {stage}", _verdict(answer)) for stage, answer in question.answers.items()]
    return _exchange(question.text, question.reference, answers)


def _verdict(answer: Answer) -> str:
    mark = {"right": "✓", "wrong": "✗", "partly": "≈"}.get(answer.verdict, "")
    spoken = f' <span aria-hidden="true">{mark}</span><span class="hidden">({answer.verdict})</span>' if mark else ""
    return f'<span class="{answer.verdict}">{_cut(answer.text)}{spoken}</span>'


def _exchange(question: str, reference: str, answers: Iterable[tuple[str, str]]) -> str:
    """A question, the true answer, and given answers, whose texts are escaped already."""
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{answer}</dd>" for label, answer in answers)
    truth = f"<dt>truth</dt><dd>{_cut(reference)}</dd>" if reference else ""
    return f'<div class="asked"><p>{_cut(question)}</p><dl>{truth}{rows}</dl></div>'


def _timelines(run: RunRecord) -> str:
    cards = [_card((timeline.image,), [_moments(timeline)]) for timeline in run.timelines()]
    note = '<p class="note">The same pictures, asked again and again while the model was trained.</p>'
    return f'{note}<div class="cards">{"".join(cards)}</div>' if cards else ""


def _moments(timeline: Timeline) -> str:
    answers = [(f"{stage}, step {step:,}", _cut(answer)) for (stage, step), answer in timeline.moments.items()]
    return _exchange(timeline.question, timeline.reference, answers)


def _card(images: Sequence[Path], exchanges: Iterable[str]) -> str:
    seen = f'<div class="seen">{"".join(map(picture, images))}</div>' if images else ""
    return f'<article class="card">{seen}<div>{"".join(exchanges)}</div></article>'


def picture(path: Path) -> str:
    """An ``<img>`` with the file inside it, made smaller where it is large; a note where it cannot be read."""
    try:
        image = load_image(path, Limits())
    except SampleError:
        return f'<div class="lost">{escape(path.name)} cannot be read</div>'
    small = max(image.size) <= _SMALL
    kind = ' class="small"' if small else ""
    image.thumbnail((_SIDE, _SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "PNG" if small else "JPEG", quality=85)
    data = base64.b64encode(encoded.getvalue()).decode("ascii")
    return f'<img{kind} alt="{escape(path.name)}" src="data:image/{"png" if small else "jpeg"};base64,{data}">'


def _cut(text: str) -> str:
    """The text escaped, and shortened where it is very long."""
    return escape(text if len(text) <= _LONGEST else text[:_LONGEST] + " …") or '<span class="note">(nothing)</span>'


# --- data and environment --------------------------------------------------------------------------------------------


def _data(run: RunRecord) -> str:
    accounts = list(_accounts(run.data_report, ""))
    rows, lists = [], []
    for name, account in accounts:
        reasons = {str(reason): mapping(about) for reason, about in mapping(account.get("reasons")).items()}
        aside = sum(int(about.get("count", 0)) for about in reasons.values())
        counts = [int(account.get(key) or 0) for key in ("seen", "used", "truncated")]
        rows.append((name or "all", *(f"{count:,}" for count in (*counts, aside))))
        lists += [_set_aside(name, reason, about) for reason, about in reasons.items()]
    if not rows:
        return ""
    note = "" if lists else '<p class="note">No sample was set aside.</p>'
    return table(("source", "seen", "used", "cut off", "set aside"), rows) + note + "".join(lists)


def _accounts(report: Any, name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """The mappings that say how many samples were seen, however deep they are nested, by their path of keys."""
    if "seen" in mapping(report):
        yield name, report
        return
    for key, inner in mapping(report).items():
        yield from _accounts(inner, f"{name} / {key}" if name else str(key))


def _set_aside(name: str, reason: str, about: dict[str, Any]) -> str:
    ids = about.get("ids")
    listed = [str(one) for one in ids] if isinstance(ids, list) else []
    more = f" and {len(listed) - _IDS:,} more" if len(listed) > _IDS else ""
    first = about.get("first_path")
    where = f"<br>first: <code>{escape(str(first))}</code>" if first else ""
    summary = f"{escape(name)}: {escape(reason)} ({about.get('count', len(listed)):,})"
    body = f"<code>{escape(', '.join(listed[:_IDS]))}</code>{more}{where}"
    return f'<details><summary>{summary}</summary><p class="note">{body}</p></details>'


def _environment(run: RunRecord) -> str:
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _flat(run.environment))
    facts = f"<dl>{rows}</dl>" if rows else ""
    recipe = f"<details><summary>The resolved recipe</summary><pre>{escape(run.recipe_text)}</pre></details>"
    return facts + (recipe if run.recipe_text else "")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys and texts."""
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(str, value)))]
    return [(prefix, str(value))]
