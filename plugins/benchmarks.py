"""Benchmarks on local question files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_kit import hookimpl
from llava_kit.contracts import Example, Score
from llava_kit.errors import DataError, Problem

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

SHUFFLED = "shuffled_images"


@dataclass(frozen=True, kw_only=True)
class ExactMatchConfig:
    """Questions with one right answer each.

    The file has one JSON object a line: ``question_id``, ``image`` (file name below ``images``), ``text``, ``answer``
    and optionally ``category``.
    """

    questions: str
    images: str
    shuffled: bool = True
    """Ask everything a second time with images exchanged: what is left is what the words alone give away."""
    seed: int = 0
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


class ExactMatch:
    """Right when the answer equals the reference, but for case, spacing and one full stop at the end."""

    def __init__(self, config: ExactMatchConfig) -> None:
        self.config = config
        self.max_new_tokens = config.max_new_tokens

    def examples(self) -> Sequence[Example]:
        """All questions, then all of them again with exchanged images."""
        questions = _read_questions(Path(self.config.questions), Path(self.config.images))
        return questions + (self._with_exchanged_images(questions) if self.config.shuffled else [])

    def _with_exchanged_images(self, questions: list[Example]) -> list[Example]:
        """Every image is replaced by another one of the set, the same for all questions about it."""
        images = sorted({example.images for example in questions})
        random.Random(self.config.seed).shuffle(images)
        other = dict(zip(images, images[1:] + images[:1], strict=True))
        return [replace(example, images=other[example.images], group=SHUFFLED) for example in questions]

    def score(self, example: Example, answer: str) -> Score:
        """``accuracy`` 1 or 0."""
        right = _normalise(answer) == _normalise(example.reference)
        return Score(example=example, answer=answer, values={"accuracy": float(right)})

    def summarise(self, scores: Sequence[Score]) -> dict[str, float]:
        """Mean accuracy, that of the control, the number of questions, and the mean of every category."""
        plain = [score for score in scores if not score.example.group]
        control = [score for score in scores if score.example.group == SHUFFLED]
        summary = {"accuracy": _mean(plain), "count": float(len(plain))}
        if control:
            summary["accuracy_shuffled_images"] = _mean(control)
        for category in sorted({score.example.category for score in plain} - {""}):
            of_category = [score for score in plain if score.example.category == category]
            summary[f"accuracy_{category}"] = _mean(of_category)
        return summary


def _mean(scores: Sequence[Score]) -> float:
    return sum(score.values["accuracy"] for score in scores) / len(scores) if scores else 0.0


def _normalise(answer: str) -> str:
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def _read_questions(path: Path, images: Path) -> list[Example]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem(str(path), f"the questions cannot be read: {error}")) from error
    examples, problems = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line), images))
            except (ValueError, KeyError, TypeError) as error:
                problems.append(Problem(f"{path}:{number}", f"is no question: {error!r}", "see ExactMatchConfig"))
    if not examples and not problems:
        problems.append(Problem(str(path), "there are no questions"))
    if problems:
        raise DataError(problems)
    return examples


def _example(row: dict[str, Any], images: Path) -> Example:
    return Example(
        id=str(row["question_id"]),
        question=str(row["text"]),
        images=(images / row["image"],) if row.get("image") else (),
        reference=str(row["answer"]),
        category=str(row.get("category", "")),
    )


def build_exact_match(config: ExactMatchConfig) -> ExactMatch:
    """The benchmark; its file is read when the examples are asked for."""
    return ExactMatch(config)


@hookimpl
def register_benchmarks(register: Register) -> None:
    """``exact_match``"""
    register("exact_match", build_exact_match, ExactMatchConfig)
