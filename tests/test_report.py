"""The report of a run, from a run folder made by hand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from llava_kit.charts import Chart, nice_ticks, short, smooth
from llava_kit.errors import ModelError
from llava_kit.record import Answer as Said
from llava_kit.record import Pace, Question, RunRecord, duration, read_rows
from llava_kit.report import summary_table, write_model_card, write_report
from llava_kit.report_page import choose, picture

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & \"quoted\""

RECIPE = """\
name: two-stages
model:
  vision_encoder: {name: clip, model: ViT-L-14}
  connector: {name: linear}
  language_model: {name: causal_lm, model: 'a|b<i>'}
stages:
  align:
    trainable: {connector: ['*']}
    data: {captions: {format: llava_json, samples: 595375}}
  tune:
    trainable: {connector: ['*'], language_model: ['*']}
    data: {chat: {format: llava_json, samples: null}}
evaluate:
  held_out: {name: exact_match}
"""


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages, with everything a report shows, and hostile texts wherever data or model give texts."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": HOSTILE}}))
    steps = [
        {"stage": stage, "step": step, "loss": 8 / step, "samples": 32, "tokens": 1000, "seconds": 0.5}
        for stage in ("align", "tune")
        for step in range(1, 21)
    ]
    validations = [{"stage": "align", "step": step, "validation_loss": 9 / step} for step in (10, 20)]
    write_jsonl(folder / "metrics.jsonl", steps + validations)
    write_data_report(folder)
    image = folder / "image.png"
    Image.new("RGB", (48, 48), (200, 30, 30)).save(image)
    write_evaluation(folder, image)
    (folder / "tune" / "pictures").mkdir(parents=True)
    Image.new("RGB", (400, 300)).save(folder / "tune" / "pictures" / "p.png")
    moments = [
        {"step": step, "id": "p", "image": "p.png", "question": "what?", "reference": "a cat", "answer": answer}
        for step, answer in ((0, HOSTILE), (20, "a cat"))
    ]
    write_jsonl(folder / "tune" / "pictures.jsonl", moments)
    return folder


def write_data_report(folder: Path) -> None:
    reasons = {HOSTILE: {"count": 2, "ids": ["s1", "<b>s2"], "first_path": "images/<x>.png"}}
    report = {
        "align": {"seen": 642, "used": 640, "truncated": 3, "reasons": reasons},
        "tune": {"seen": 640, "used": 640},
    }
    (folder / "data_report.json").write_text(json.dumps(report))


def write_evaluation(folder: Path, image: Path) -> None:
    scores = {
        "align": {"accuracy": 0.5, "accuracy_shuffled_images": 0.25, "count": 2},
        "tune": {"accuracy": 1.0, "accuracy_shuffled_images": 0.25, "accuracy_colour": 0.875, "count": 2},
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "summary.json").write_text(json.dumps({"held_out": scores}))

    def row(key: str, answer: str, accuracy: float, group: str = "") -> dict[str, Any]:
        question = {"question": f"what is {key}?", "images": [str(image)], "reference": "seven", "category": ""}
        return {"id": key, "group": group, **question, "answer": answer, "values": {"accuracy": accuracy}}

    control = row("q1", "CONTROL", 0.0, "shuffled_images")
    first, last = [row("q1", HOSTILE, 0.0), row("q2", "seven", 1.0)], [row("q1", "seven", 1.0), row("q2", "one", 0.0)]
    write_jsonl(folder / "evaluation" / "held_out-align.jsonl", [*first, control])
    write_jsonl(folder / "evaluation" / "held_out-tune.jsonl", [*last, control])


class Page(HTMLParser):
    """Collects the tags of a page and checks that they are closed in order."""

    VOID = ("meta", "img", "br", "line", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def words(text: str) -> str:
    """A page's text without its mark-up."""
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_the_page_is_whole_and_needs_nothing_else(run: Path) -> None:
    text = write_report(run).read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert not page.all("script") and not page.all("link")
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "default-src 'none'" in text
    assert "url(" not in text and "@import" not in text


def test_hostile_texts_stay_texts(run: Path) -> None:
    text = write_report(run).read_text()
    assert "<script" not in text and "<img src=http" not in text and "<b>s2" not in text
    assert text.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 4  # answer, moment, reason, environment
    Page(text)


def test_scores_stand_by_stage(run: Path) -> None:
    text = words(write_report(run).read_text())
    assert "after align after tune" in text
    assert "held_out accuracy 2 questions 50.0 % 100.0 %" in text
    assert "with shuffled images 25.0 % 25.0 %" in text
    assert "colour – 87.5 %" in text


def test_answers_are_joined_over_stages_and_marked(run: Path) -> None:
    (first, second) = RunRecord(run).questions("held_out")
    assert [first.id, second.id] == ["q1", "q2"]
    assert {stage: answer.verdict for stage, answer in first.answers.items()} == {"align": "wrong", "tune": "right"}
    text = words(write_report(run).read_text())
    assert "truth seven after align seven ✓ (right) after tune one ✗ (wrong)" in text
    assert "CONTROL" not in text


def test_small_pictures_keep_their_pixels(run: Path) -> None:
    images = Page(write_report(run).read_text()).all("img")
    assert [(image.get("class"), image["alt"]) for image in images] == [
        ("small", "image.png"),
        (None, "p.png"),
    ]


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_picture_that_cannot_be_read_leaves_a_note(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "<i>.png"
    if content is not None:
        path.write_bytes(content)
    assert picture(path) == '<div class="lost">&lt;i&gt;.png cannot be read</div>'


def test_the_image_of_a_moment_cannot_leave_its_folder(run: Path) -> None:
    rows = [{"step": 0, "id": "x", "image": "../../image.png", "question": "?", "answer": "a"}]
    write_jsonl(run / "tune" / "pictures.jsonl", rows)
    (timeline,) = RunRecord(run).timelines()
    assert timeline.image == run / "tune" / "pictures" / "image.png"


def test_data_and_speed_are_counted(run: Path) -> None:
    text = words(write_report(run).read_text())
    assert "align 642 640 3 2 tune 640 640 0 0" in text
    assert "s1, &lt;b&gt;s2 first: images/&lt;x&gt;.png" in text
    assert "align 20 640 20,000 10.0 s 64 2,000" in text


def test_a_bare_folder_makes_a_report_too(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    Page(text)
    assert f"<h1>{tmp_path.name}</h1>" in text
    assert "<section" not in text
    assert write_model_card(tmp_path).read_text().count("##") == 1


def test_damaged_files_do_not_stop_a_report(run: Path) -> None:
    (run / "environment.json").write_text("{")
    (run / "data_report.json").write_text("[1]")
    (run / "recipe.yaml").write_text("a: [")
    (run / "evaluation" / "summary.json").write_text('{"held_out": {"tune": {"accuracy": NaN}}}')
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"stage": "tune", "step": 21, "loss": NaN}\n{"stage": "tu')
    Page(write_report(run).read_text())


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone: no such run folder; give the folder that `train` made"):
        write_report(tmp_path / "gone")


def test_the_model_card_names_parts_data_scores_and_use(run: Path) -> None:
    card = write_model_card(run).read_text()
    assert card.startswith("---\nlibrary_name: llava-kit\n")
    assert "| vision encoder | clip | model: ViT-L-14 |" in card
    assert "| language model | causal_lm | model: a\\|b&lt;i&gt; |" in card
    assert "| align | connector | captions (595,375 samples) | 20 steps, 640 samples, 10.0 s |" in card
    assert "| tune | connector, language model | chat | 20 steps, 640 samples, 10.0 s |" in card
    assert "| held_out | exact_match | accuracy | 50.0 % | 100.0 % | 2 |" in card
    assert "llava-kit chat run --image picture.png" in card


def test_the_table_for_the_terminal(run: Path) -> None:
    out = StringIO()
    Console(file=out, width=100).print(summary_table(run))
    lines = [re.sub(r"[│┃\s]+", " ", line).strip() for line in out.getvalue().splitlines()]
    assert "held_out accuracy 50.0 % 100.0 % 2" in lines
    assert "with shuffled images 25.0 % 25.0 %" in lines


def test_questions_are_chosen_so_that_both_kinds_show() -> None:
    def ask(picture: int, number: int, right: bool) -> Question:
        said = {"tune": Said(text="", value=float(right))}
        where = (Path(f"{picture}.png"),)
        return Question(id=f"{picture}.{number}", category="", text="", reference="", images=where, answers=said)

    asked = [ask(n, 0, right=True) for n in range(100)] + [ask(7, n, right=n > 3) for n in range(1, 8)]
    chosen = choose(asked)
    assert len(chosen) == 18
    assert [question.id for question in chosen[0]] == ["7.0", "7.1", "7.2", "7.4"]  # two right, two wrong, in order
    assert [question.id for question in chosen[1]] == ["0.0"]


def test_a_row_without_a_verdict_is_not_marked() -> None:
    assert Said(text="x", value=None).verdict == ""
    assert Said(text="x", value=0.4).verdict == "partly"


# --- charts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 9.3, [0, 2, 4, 6, 8, 10]),
        (1, 4652, [0, 1000, 2000, 3000, 4000, 5000]),
        (0, 12, [0, 2.5, 5, 7.5, 10, 12.5]),
        (3, 3, [3, 4, 5, 6]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_the_average_starts_at_the_first_point() -> None:
    # weight ½: 4; (½·½·4 + ½·2)/(½·½ + ½) = 2/0.75; points that are not finite are left out
    points = [(1.0, 4.0), (2.0, float("nan")), (3.0, 2.0)]
    assert smooth(points, weight=0.5) == [(1.0, 4.0), (3.0, pytest.approx(2 / 0.75))]


def test_numbers_on_axes_are_short() -> None:
    assert [short(value) for value in (0, 0.25, 2500, 12_000, 595_375, 2e6)] == [
        "0",
        "0.25",
        "2500",
        "12k",
        "595.375k",
        "2M",
    ]


def test_a_chart_of_nothing_is_nothing() -> None:
    assert Chart(title="x", x_label="step", raw=[(1.0, float("inf"))]).svg() == ""


def test_a_chart_places_points_by_their_values() -> None:
    svg = Chart(title="<t>", x_label="step", line=[(0, 0), (10, 5)], points=[(5, 2.5)]).svg()
    assert "<title>&lt;t&gt;</title>" in svg
    # 440 × 250 with margins left 46, right 12, top 12, bottom 34: from (46, 216) to (428, 12)
    assert '<path class="line" d="M46.0 216.0l382.0 -204.0"/>' in svg
    assert '<circle class="points" cx="237.0" cy="114.0" r="3.2"/>' in svg


def test_long_series_are_thinned() -> None:
    svg = Chart(title="t", x_label="step", raw=[(float(n), 1.0) for n in range(15_000)]).svg()
    assert svg.count("l") < 500


# --- small things ----------------------------------------------------------------------------------------------------


def test_time_spans_read_well() -> None:
    assert [duration(seconds) for seconds in (4.06, 59.2, 250, 11_100)] == [
        "4.1 s",
        "59.2 s",
        "4 min 10 s",
        "3 h 05 min",
    ]


def test_pace_leaves_out_what_is_no_number() -> None:
    rows = [{"samples": 2, "tokens": 10, "seconds": 1.5}, {"samples": None, "tokens": float("nan"), "seconds": 0.5}]
    assert Pace.of(rows) == Pace(steps=2, samples=2, tokens=10, seconds=2.0)


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[2]\n{"a": ')
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"a": 1}]
