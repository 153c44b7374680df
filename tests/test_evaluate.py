from __future__ import annotations

import json
from pathlib import Path

import pytest
from parts import picture, tiny_collator, tiny_model

from llava_kit.checkpoint import RunFolder
from llava_kit.contracts import Example
from llava_kit.errors import DataError, RecipeError
from llava_kit.evaluate import chosen, evaluate_stage, run_benchmark
from llava_kit_plugins.benchmarks import ExactMatch, ExactMatchConfig


class Fixed(ExactMatch):
    """Questions made in the test."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__(ExactMatchConfig(questions="", images="", max_new_tokens=2))
        self._examples = examples

    def examples(self) -> list[Example]:
        return self._examples


def test_a_question_with_a_broken_picture_is_a_failed_item(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    good = Example(id="1", question="What?", images=(picture(tmp_path / "a.png", 1),), reference="x")
    bad = Example(id="2", question="What?", images=(tmp_path / "missing.png",), reference="x")
    told: list[tuple[int, int]] = []
    scores, rows, summary = run_benchmark(model, tiny_collator(model), Fixed([good, bad]), lambda *n: told.append(n))
    assert [score.example.id for score in scores] == ["1"]
    assert "missing.png" in rows[1]["error"] and "answer" not in rows[1]
    assert (summary["count"], summary["failed"]) == (1.0, 1.0)
    assert told == [(2, 2)]
    with pytest.raises(DataError, match=r"no question could be asked: .*missing.png"):
        run_benchmark(model, tiny_collator(model), Fixed([bad]), lambda *_: None)


class Slot:
    def __init__(self, benchmark: ExactMatch) -> None:
        self.build = lambda: benchmark


def test_results_of_stages_stand_side_by_side(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    benchmark = Fixed([Example(id="1", question="What?", reference="x")])
    for stage in ("align", "tune"):
        slots = {"held_out": Slot(benchmark)}
        evaluate_stage(RunFolder(tmp_path), stage, model, tiny_collator(model), slots, lambda *_: None)  # type: ignore[arg-type]
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["held_out"]["align"] == summary["held_out"]["tune"]
    (row,) = (tmp_path / "evaluation" / "held_out-tune.jsonl").read_text().splitlines()
    assert {"id", "question", "reference", "answer", "values"} <= set(json.loads(row))


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(RecipeError, match=r"the recipe evaluates no 'held'; did you mean 'held_out'?"):
        chosen({"held_out": None}, ["held"], Path("run"))  # type: ignore[dict-item]
    with pytest.raises(RecipeError, match="the recipe evaluates nothing"):
        chosen({}, None, Path("run"))
