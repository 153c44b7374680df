"""Reads a run folder back: scores, curves, answers, pictures and data report, for whoever presents them.

Files that a run did not make (it may not have evaluated anything) read as empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import yaml  # type: ignore[import-untyped]

from llava_kit.errors import ModelError, Problem

Row: TypeAlias = dict[str, Any]

_LABELS = {
    "accuracy_shuffled_images": "with shuffled images",
    "failed": "questions that could not be asked",
}


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One line of the score table: a metric of a benchmark, by stage."""

    benchmark: str
    metric: str
    values: dict[str, float]
    count: int | None
    """Questions it was measured on, where that is known."""

    @property
    def label(self) -> str:
        if self.is_part:
            return self.metric.removeprefix("accuracy_").replace("_", " ")
        return _LABELS.get(self.metric, self.metric.replace("_", " "))

    @property
    def is_part(self) -> bool:
        """Whether this is the accuracy of one category of the questions."""
        return self.metric.startswith("accuracy_") and not self.is_control

    @property
    def is_control(self) -> bool:
        """Whether this is what the model scores without seeing the right pictures."""
        return "shuffled" in self.metric

    def share(self, stage: str) -> float | None:
        """The value where it is an accuracy between 0 and 1, else ``None``."""
        value = self.values.get(stage)
        return value if value is not None and self.metric.startswith("accuracy") and 0 <= value <= 1 else None

    def text(self, stage: str) -> str:
        """The value as people read it: accuracies in per cent, a dash where there is none."""
        value, share = self.values.get(stage), self.share(stage)
        if value is None or not math.isfinite(value):
            return "–"
        return f"{value:.4g}" if share is None else f"{100 * share:.1f} %"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said after a stage, and its score where the benchmark gave one (1.0 is right)."""

    text: str
    value: float | None

    @property
    def verdict(self) -> str:
        """``right``, ``wrong``, ``partly`` or an empty string."""
        if self.value is None:
            return ""
        return "right" if self.value >= 1 else "wrong" if self.value <= 0 else "partly"


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a benchmark, and the answers by stage."""

    id: str
    category: str
    text: str
    reference: str
    images: tuple[Path, ...]
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        """Whether the last stage that was asked got it right."""
        return bool(self.answers) and list(self.answers.values())[-1].verdict == "right"


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A fixed picture and what the model said about it as it learned."""

    id: str
    question: str
    reference: str
    image: Path
    moments: dict[tuple[str, int], str] = field(default_factory=dict)
    """Answers by stage and step."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a stage ran: sums over its steps."""

    steps: int
    samples: int
    tokens: int
    seconds: float

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Pace:
        def total(key: str) -> float:
            return math.fsum(number for row in rows if (number := _number(row.get(key))) is not None)

        samples, tokens = int(total("samples")), int(total("tokens"))
        return cls(steps=len(rows), samples=samples, tokens=tokens, seconds=total("seconds"))


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder, each read when it is first asked for."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> RunRecord:
        """Raises:
        ModelError: there is no such folder.
        """
        if not folder.is_dir():
            raise ModelError(Problem(str(folder), "no such run folder", "give the folder that `train` made"))
        return cls(folder)

    @cached_property
    def recipe(self) -> Row:
        """The resolved recipe as plain containers."""
        try:
            return mapping(yaml.safe_load(self.recipe_text))
        except yaml.YAMLError:
            return {}

    @property
    def recipe_text(self) -> str:
        path = self.folder / "recipe.yaml"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @cached_property
    def environment(self) -> Row:
        return self._json("environment.json")

    @cached_property
    def data_report(self) -> Row:
        return self._json("data_report.json")

    @cached_property
    def summary(self) -> Row:
        """``{benchmark: {stage: {metric: value}}}``."""
        return self._json("evaluation", "summary.json")

    @cached_property
    def steps(self) -> dict[str, list[Row]]:
        """The training steps by stage."""
        return self._metrics("loss")

    @cached_property
    def validations(self) -> dict[str, list[Row]]:
        """The validation losses by stage."""
        return self._metrics("validation_loss")

    @cached_property
    def stages(self) -> list[str]:
        """Every stage there is a trace of, in the order they ran."""
        scored = (mapping(stages) for stages in self.summary.values())
        groups = [mapping(self.recipe.get("stages")), self.steps, *scored]
        return list(dict.fromkeys(str(stage) for group in groups for stage in group))

    @cached_property
    def scores(self) -> list[ScoreRow]:
        """The score table, benchmark by benchmark; how many questions there were stands beside every metric."""
        rows = []
        for benchmark, by_stage in self.summary.items():
            stages = {stage: mapping(metrics) for stage, metrics in mapping(by_stage).items()}
            counts = [count for metrics in stages.values() if (count := _number(metrics.get("count"))) is not None]
            for metric in dict.fromkeys(metric for metrics in stages.values() for metric in metrics):
                numbers = {stage: _number(metrics.get(metric)) for stage, metrics in stages.items()}
                values = {stage: number for stage, number in numbers.items() if number is not None}
                if values and metric != "count" and (metric != "failed" or any(values.values())):
                    row = ScoreRow(benchmark=benchmark, metric=metric, values=values, count=None)
                    whole = counts and not row.is_part
                    rows.append(replace(row, count=int(counts[-1])) if whole else row)
        return rows

    @property
    def scored_stages(self) -> list[str]:
        """The columns of the score table."""
        return [stage for stage in self.stages if any(stage in row.values for row in self.scores)]

    def questions(self, benchmark: str) -> list[Question]:
        """The questions of a benchmark and their answers by stage; controls (rows of a group) are left out."""
        questions: dict[str, Question] = {}
        for stage in self.stages:
            for row in read_rows(self.folder / "evaluation" / f"{benchmark}-{stage}.jsonl"):
                if row.get("group"):
                    continue
                question = questions.setdefault(str(row.get("id")), _question(row))
                said = row.get("answer", row.get("error", ""))
                question.answers[stage] = Answer(text=str(said), value=_main_value(row.get("values")))
        return list(questions.values())

    def timelines(self) -> list[Timeline]:
        """The fixed pictures, each with its answers through all stages."""
        timelines: dict[tuple[str, str], Timeline] = {}
        for stage in self.stages:
            for row in read_rows(self.folder / stage / "pictures.jsonl"):
                key, question = str(row.get("id")), str(row.get("question", ""))
                image = self.folder / stage / "pictures" / Path(str(row.get("image", ""))).name
                reference = str(row.get("reference", ""))
                new = Timeline(id=key, question=question, reference=reference, image=image)
                timeline = timelines.setdefault((key, question), new)
                timeline.moments[stage, int(_number(row.get("step")) or 0)] = str(row.get("answer", ""))
        return list(timelines.values())

    def _metrics(self, key: str) -> dict[str, list[Row]]:
        by_stage: dict[str, dict[float, Row]] = {}
        for row in read_rows(self.folder / "metrics.jsonl"):
            step = _number(row.get("step"))
            if step is not None and _is_number(row.get(key)):
                by_stage.setdefault(str(row.get("stage", "")), {})[step] = row
        return {stage: [rows[step] for step in sorted(rows)] for stage, rows in by_stage.items()}

    def _json(self, *parts: str) -> Row:
        try:
            return mapping(json.loads(self.folder.joinpath(*parts).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file.  A line that is none is passed over: the last is cut where a run was killed."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def mapping(value: Any) -> Row:
    """``value`` when it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def component_name(slot: Any) -> str:
    """The plugin's name in a slot of a resolved recipe, which is a mapping or the name alone."""
    return str(slot.get("name", "?")) if isinstance(slot, dict) else str(slot)


def duration(seconds: float) -> str:
    """A time span as people say it: ``4.1 s``, ``4 min 10 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _question(row: Row) -> Question:
    images = row.get("images")
    return Question(
        id=str(row.get("id")),
        category=str(row.get("category") or ""),
        text=str(row.get("question", "")),
        reference=str(row.get("reference", "")),
        images=tuple(Path(str(image)) for image in images) if isinstance(images, list) else (),
    )


def _main_value(values: Any) -> float | None:
    """The value that says right or wrong: ``accuracy`` where there is one, else the first."""
    numbers = {key: value for key, value in mapping(values).items() if _is_number(value)}
    return _number(numbers.get("accuracy", next(iter(numbers.values()), None)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None
