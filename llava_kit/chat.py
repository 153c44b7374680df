"""A conversation over a model; the command line and the evaluation ask through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_kit.contracts import GenerateOptions, ImageSlot, Sample, Turn
from llava_kit.data import batch_to
from llava_kit.errors import SampleError

if TYPE_CHECKING:
    from llava_kit.data import Collator
    from llava_kit.model import LlavaModel


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote, and what it took."""

    text: str
    finish_reason: str
    prompt_tokens: int
    """Rows of the prompt, image rows included."""
    new_tokens: int
    seconds: float


def question_turn(text: str, images: int, first_image: int = 0) -> Turn:
    """A human turn as in training data: its images, each on a line of its own, then the words."""
    parts: list[str | ImageSlot] = []
    for index in range(images):
        parts += [ImageSlot(first_image + index), "\n"]
    if parts:
        parts[-1] = f"\n{text}"
    return Turn("human", tuple(parts or [text]))


def answer_batch(
    model: LlavaModel, collator: Collator, prompts: Sequence[Sample], options: GenerateOptions
) -> list[Answer | SampleError]:
    """An answer to every prompt, in their order; a prompt that cannot be used gets its reason instead.

    ``prompts`` are samples whose last turn is the human's.
    """
    began = time.perf_counter()
    results: dict[str, Answer | SampleError] = {}
    numbered = [replace(prompt, id=f"{prompt.id} ({index})") for index, prompt in enumerate(prompts)]
    micro = collator.prompts(numbered)
    for rejected in micro.rejected:
        results[rejected.id] = rejected.error
    if micro.batch is not None:
        batch = batch_to(micro.batch, next(model.parameters()).device)
        options = replace(options, stop=tuple({*options.stop, *collator.template.stop}))
        training = model.training
        model.eval()
        generation = model.generate(batch, options)
        model.train(training)
        seconds = time.perf_counter() - began
        tokenizer = model.language_model.tokenizer
        for id_, ids, reason, length in zip(
            batch.ids, generation.ids, generation.finish_reason, batch.plan.lengths, strict=True
        ):
            results[id_] = Answer(
                text=_clean(str(tokenizer.decode(ids, skip_special_tokens=True)), options.stop),
                finish_reason=reason,
                prompt_tokens=length,
                new_tokens=len(ids),
                seconds=seconds,
            )
    return [results[prompt.id] for prompt in numbered]


def _clean(text: str, stops: Sequence[str]) -> str:
    """The answer up to its stop text, without the space that templates put in front of it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text.strip()


class Conversation:
    """Remembers what was said, and asks with all of it."""

    def __init__(self, model: LlavaModel, collator: Collator, options: GenerateOptions) -> None:
        self.model, self.collator, self.options = model, collator, options
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.turns: list[Turn] = []
        self.images: list[Path] = []

    def ask(self, text: str, images: Sequence[Path] = ()) -> Answer:
        """The model's answer; it joins the conversation.

        Raises:
            SampleError: an image cannot be read; the conversation is as before.
            RecipeError: the conversation is longer than the model was trained for.
        """
        turn = question_turn(text, len(images), first_image=len(self.images))
        all_images = (*self.images, *images)
        prompt = Sample(id="chat", turns=(*self.turns, turn), images=all_images)
        (answer,) = answer_batch(self.model, self.collator, [prompt], self.options)
        if isinstance(answer, SampleError):
            raise answer
        self.turns += [turn, Turn("assistant", (answer.text,))]
        self.images = list(all_images)
        return answer
