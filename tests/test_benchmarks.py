from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_kit.errors import DataError
from llava_kit_plugins.benchmarks import SHUFFLED, ExactMatch, ExactMatchConfig, build_exact_match


def write(folder: Path, *rows: dict[str, object]) -> ExactMatch:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_exact_match(ExactMatchConfig(questions=str(path), images=str(folder / "images")))


def question(number: int, image: str, answer: str = "red", category: str = "colour") -> dict[str, object]:
    return {"question_id": number, "image": image, "text": "What?", "answer": answer, "category": category}


def test_every_question_is_asked_with_its_image_and_with_another(tmp_path: Path) -> None:
    benchmark = write(tmp_path, question(1, "a.png"), question(2, "b.png"), question(3, "c.png"), question(4, "a.png"))
    examples = benchmark.examples()
    plain, control = examples[:4], examples[4:]
    assert [e.images[0].name for e in plain] == ["a.png", "b.png", "c.png", "a.png"]
    assert {e.group for e in plain} == {""} and {e.group for e in control} == {SHUFFLED}
    assert all(a.images != b.images for a, b in zip(plain, control, strict=True)), "nobody keeps an own image"
    assert control[0].images == control[3].images, "questions about one image stay together"
    assert benchmark.examples() == examples, "the same each time"


@pytest.mark.parametrize(
    ("answer", "right"),
    [("red", 1.0), (" Red. ", 1.0), ("RED", 1.0), ("dark  red", 0.0), ("red..", 0.0), ("", 0.0), ("redd", 0.0)],
)
def test_the_rule_forgives_case_spacing_and_one_full_stop(tmp_path: Path, answer: str, right: float) -> None:
    benchmark = write(tmp_path, question(1, "a.png"))
    assert benchmark.score(benchmark.examples()[0], answer).values == {"accuracy": right}


def test_the_summary_by_hand(tmp_path: Path) -> None:
    rows = [
        question(1, "a.png"),
        question(2, "b.png"),
        question(3, "a.png", "2", "count"),
        question(4, "b.png", "3", "count"),
    ]
    benchmark = write(tmp_path, *rows)
    answers = ["red", "red", "2", "1", "red", "blue", "1", "1"]
    scores = [benchmark.score(e, a) for e, a in zip(benchmark.examples(), answers, strict=True)]
    expected = {
        "accuracy": 0.75, "count": 4.0, "accuracy_shuffled_images": 0.25, "accuracy_colour": 1.0, "accuracy_count": 0.5,
    }  # fmt: skip
    assert benchmark.summarise(scores) == expected
    assert benchmark.summarise(scores[::-1]) == expected, "the order of the scores does not matter"


def test_wrong_lines_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 1}\nnot json\n\n' + json.dumps(question(1, "a.png")) + "\n")
    with pytest.raises(DataError) as caught:
        build_exact_match(ExactMatchConfig(questions=str(path), images="x")).examples()
    first, second = caught.value.problems
    assert first.where == f"{path}:1" and "KeyError('text')" in first.what
    assert second.where == f"{path}:2"


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions.jsonl: the questions cannot be read"):
        build_exact_match(ExactMatchConfig(questions=str(tmp_path / "questions.jsonl"), images="x")).examples()
    with pytest.raises(DataError, match="there are no questions"):
        write(tmp_path).examples()
