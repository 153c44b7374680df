from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parts import picture, tiny_collator, tiny_model

from llava_kit.chat import Conversation, answer_batch, question_turn
from llava_kit.contracts import GenerateOptions, Generation, ImageSlot, Sample, Turn
from llava_kit.errors import SampleError
from llava_kit.model import LlavaModel


@pytest.fixture
def model(tmp_path: Path) -> LlavaModel:
    return tiny_model(tmp_path).eval()


def says(model: LlavaModel, monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[Any]:
    """Let the model write these texts; the batches it is asked with."""
    batches: list[Any] = []
    encode = model.language_model.tokenizer

    def generate(batch: Any, options: GenerateOptions) -> Generation:
        batches.append(batch)
        ids = [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
        return Generation(ids=ids, finish_reason=["stop"] * len(ids))

    monkeypatch.setattr(model, "generate", generate)
    return batches


def test_a_question_is_written_as_in_training_data() -> None:
    assert question_turn("Why?", 0) == Turn("human", ("Why?",))
    assert question_turn("Why?", 1) == Turn("human", (ImageSlot(0), "\nWhy?"))
    assert question_turn("Why?", 2, first_image=1) == Turn("human", (ImageSlot(1), "\n", ImageSlot(2), "\nWhy?"))


def test_a_conversation_remembers_and_forgets(
    model: LlavaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = says(model, monkeypatch, " A cat.</s>")
    conversation = Conversation(model, tiny_collator(model), GenerateOptions())
    assert conversation.ask("What?", [picture(tmp_path / "a.png", 1)]).text == "A cat."
    first = batches[0].plan.lengths[0]
    conversation.ask("Sure?")
    assert batches[1].plan.lengths[0] > first + len("What? A cat.")
    assert batches[1].images[0].pixels_NCHW.shape[0] == 1, "the picture is still there"
    conversation.reset()
    conversation.ask("What?")
    assert batches[2].images == ()


def test_a_picture_that_cannot_be_read_leaves_the_conversation_as_it_was(model: LlavaModel, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    conversation = Conversation(model, tiny_collator(model), GenerateOptions(max_new_tokens=2))
    with pytest.raises(SampleError, match=r"broken.png"):
        conversation.ask("What?", [broken])
    assert (conversation.turns, conversation.images) == ([], [])


def test_one_bad_prompt_costs_one_answer(model: LlavaModel, tmp_path: Path) -> None:
    good = Sample(id="x", turns=(question_turn("Hello?", 0),))
    bad = Sample(id="x", turns=(question_turn("What?", 1),), images=(tmp_path / "missing.png",))
    answers = answer_batch(model, tiny_collator(model), [good, bad, good], GenerateOptions(max_new_tokens=2))
    assert isinstance(answers[1], SampleError) and "missing.png" in str(answers[1])
    assert answers[0].text == answers[2].text  # type: ignore[union-attr]


def test_an_answer_ends_at_the_stop_text(model: LlavaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    says(model, monkeypatch, " Yes ### Human: no")
    prompt = Sample(id="x", turns=(question_turn("Hello?", 0),))
    (answer,) = answer_batch(model, tiny_collator(model), [prompt], GenerateOptions(stop=("###",)))
    assert answer.text == "Yes"  # type: ignore[union-attr]


def test_a_conversation_that_is_too_long_says_so(model: LlavaModel) -> None:
    conversation = Conversation(model, tiny_collator(model, max_length=30), GenerateOptions())
    with pytest.raises(SampleError, match="the conversation is too long"):
        conversation.ask("A question of many more letters than thirty?")
