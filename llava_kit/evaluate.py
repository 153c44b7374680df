"""Benchmarks over a model: ask, score, summarise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_kit.chat import answer_batch, question_turn
from llava_kit.checkpoint import RunFolder, write_json
from llava_kit.contracts import Benchmark, Example, GenerateOptions, Sample, Score
from llava_kit.errors import DataError, Problem, RecipeError, SampleError, nearest

if TYPE_CHECKING:
    from llava_kit.data import Collator
    from llava_kit.model import LlavaModel
    from llava_kit.recipe import Slot

BATCH = 32
Summary = dict[str, dict[str, dict[str, float]]]


def run_benchmark(
    model: LlavaModel, collator: Collator, benchmark: Benchmark, progress: Callable[[int, int], None]
) -> tuple[list[Score], list[dict[str, Any]], dict[str, float]]:
    """Scores, one row per question for the record, and the summary.

    A question whose image cannot be used is a failed item: it has a row with the reason and no score.

    Raises:
        DataError: no question could be asked.
    """
    examples = list(benchmark.examples())
    options = GenerateOptions(max_new_tokens=benchmark.max_new_tokens)
    scores, rows = [], []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        prompts = [Sample(id=e.id, turns=(question_turn(e.question, len(e.images)),), images=e.images) for e in part]
        for example, answer in zip(part, answer_batch(model, collator, prompts, options), strict=True):
            if isinstance(answer, SampleError):
                rows.append(_row(example) | {"error": str(answer)})
                continue
            score = benchmark.score(example, answer.text)
            scores.append(score)
            rows.append(_row(example) | {"answer": answer.text, "values": dict(score.values)})
        progress(min(start + BATCH, len(examples)), len(examples))
    if not scores:
        reason = rows[0]["error"] if rows else "it has no questions"
        raise DataError(Problem("evaluation", f"no question could be asked: {reason}"))
    return scores, rows, benchmark.summarise(scores) | {"failed": float(len(examples) - len(scores))}


def _row(example: Example) -> dict[str, Any]:
    return {
        "id": example.id,
        "group": example.group,
        "category": example.category,
        "question": example.question,
        "images": [str(image) for image in example.images],
        "reference": example.reference,
    }


def evaluate_stage(
    run: RunFolder,
    stage: str,
    model: LlavaModel,
    collator: Collator,
    benchmarks: dict[str, Slot],
    progress: Callable[[str, int, int], None],
) -> Summary:
    """Run benchmarks on the model as it is after ``stage`` and put the results into the run folder."""
    folder = run.path / "evaluation"
    folder.mkdir(exist_ok=True)
    summary = read_summary(run)
    for name, slot in benchmarks.items():

        def report(done: int, total: int, name: str = name) -> None:
            progress(name, done, total)

        _, rows, values = run_benchmark(model, collator, slot.build(), report)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}-{stage}.jsonl").write_text("".join(lines), "utf-8")
        summary.setdefault(name, {})[stage] = values
        write_json(folder / "summary.json", summary)
    return summary


def read_summary(run: RunFolder) -> Summary:
    """``{benchmark: {stage: {metric: value}}}`` as far as it has been measured."""
    path = run.path / "evaluation" / "summary.json"
    summary: Summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return summary


def chosen(benchmarks: dict[str, Slot], names: Sequence[str] | None, where: Path) -> dict[str, Slot]:
    """The named entries of a recipe's ``evaluate``, or all.

    Raises:
        RecipeError: there is none of that name.
    """
    unknown = [name for name in names or () if name not in benchmarks]
    if unknown:
        problems = [
            Problem(str(where), f"the recipe evaluates no '{name}'", nearest(name, list(benchmarks)))
            for name in unknown
        ]
        raise RecipeError(problems)
    if not benchmarks:
        raise RecipeError(Problem(str(where), "the recipe evaluates nothing", "add an entry under 'evaluate'"))
    return {name: benchmarks[name] for name in names or benchmarks}


def evaluate_run(
    path: str | Path,
    names: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
    stage: str | None = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Summary:
    """Run benchmarks of a finished run's recipe on its model; the summary, which is in the run folder too.

    Args:
        path: the run folder.
        names: entries of the recipe's ``evaluate``; all of them by default.
        overrides: changes to the recipe, e.g. ``evaluate.held_out.questions=…``.
        stage: the stage whose model to take; the last one by default.
    """
    from llava_kit.interop import load_model

    loaded = load_model(path, stage, overrides)
    run = RunFolder(Path(path))
    benchmarks = chosen(loaded.recipe.evaluate, names, run.recipe)
    with run.locked():
        return evaluate_stage(run, loaded.stage, loaded.model, loaded.collator, benchmarks, progress)
