"""Rendered conversations as token ids and labels; the only place where masks are made.

A conversation is cut at its images into chunks, and each chunk is tokenised as a string of its own (the tokenizer's
start tokens stand in front of the first only).  Special tokens of the template cut a chunk into runs; a run is encoded
as one string, whatever it says, and a token is learned if its characters reach into a learned segment.  Nothing is
ever found again by splitting text, so ids and labels cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_kit.contracts import IGNORE, IMAGE_TOKEN, ImageSlot, Segment, Template, Turn
from llava_kit.errors import Problem, RecipeError, SampleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("USER: hi", "hi", "[INST] hi", "### Human: hi", "<b>hi</b>", "9 hi")
SENTINELS = ("\n", "\t", "\r", "|", "~", "\x02")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A conversation as the model reads it, before images take their rows.

    ``ids`` has one ``IMAGE_TOKEN`` per image; ``labels`` is as long, not shifted, ``IGNORE`` where nothing is learned.
    """

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> list[int]:
        """The ids that are learned, in their order."""
        return [label for label in self.labels if label != IGNORE]


def without_surrogates(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate, which no tokenizer can read."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _Run:
    """Text between two special tokens, and which of its characters are learned."""

    def __init__(self) -> None:
        self.text = ""
        self.flags = bytearray()

    def add(self, text: str, trained: bool) -> None:
        self.text += text
        self.flags.extend(bytes([trained]) * len(text))

    def is_trained(self, start: int, end: int) -> bool:
        if end <= start:  # a piece without characters of its own belongs to what follows
            start = min(start, len(self.flags) - 1)
            end = start + 1
        return self.flags.find(1, start, end) >= 0


class Encoder:
    """A tokenizer and what was learned about its behaviour; turns segments into :class:`Tokens`.  Picklable.

    Raises:
        RecipeError: the tokenizer gives no character offsets, or treats text behind a special token in a way that
            cannot be reproduced without letting text imitate special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            hint = "use one with a tokenizer.json, or that transformers can convert"
            raise _unfit(tokenizer, "it gives no character offsets, which labels are made from", hint)
        self.tokenizer = tokenizer
        self.special = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        longest_first = sorted(self.special, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self.start = self._learn_start()
        """Ids the tokenizer puts in front of every text (BOS), or none."""
        self.sentinel = self._learn_sentinel()
        """Put in front of text behind a special token, and taken off again, where the start of a string is special."""
        self._sentinel_ids = self._encode(self.sentinel)[0]

    def __call__(self, segments: Sequence[Segment]) -> Tokens:
        """The ids and labels of rendered segments.

        Raises:
            SampleError: text behind a special token cannot be told from the sentinel.
        """
        ids = list(self.start)
        labels = [IGNORE] * len(ids)
        run, behind_special = _Run(), False

        def close_run() -> None:
            nonlocal run
            if run.text:
                run_ids, spans = self._encode_behind(run.text) if behind_special else self._encode(run.text)
                ids.extend(run_ids)
                pairs = zip(run_ids, spans, strict=True)
                labels.extend(index if run.is_trained(*span) else IGNORE for index, span in pairs)
                run = _Run()

        for segment in segments:
            if segment.kind == "image":
                close_run()
                ids.append(IMAGE_TOKEN)
                labels.append(IGNORE)
                behind_special = False
                continue
            for piece in self._pieces(segment):
                special = self.special.get(piece) if segment.kind == "control" else None
                if special is None:
                    run.add(without_surrogates(piece), segment.trained)
                    continue
                close_run()
                ids.append(special)
                labels.append(special if segment.trained else IGNORE)
                behind_special = True
        close_run()
        return Tokens(ids=ids, labels=labels)

    def _pieces(self, segment: Segment) -> list[str]:
        """Control text cut at its special tokens; literal text as it is."""
        if segment.kind == "control" and self._cut:
            return [piece for piece in self._cut.split(segment.text) if piece]
        return [segment.text]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans of a string of its own, in which nothing is a special token."""
        found = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _encode_behind(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same for text that stands behind a special token."""
        ids, spans = self._encode(self.sentinel + text)
        skip, shift = len(self._sentinel_ids), len(self.sentinel)
        if ids[:skip] != self._sentinel_ids:
            raise SampleError(Problem("", f"the tokenizer joins {text[:20]!r} with {self.sentinel!r} in front of it"))
        return ids[skip:], [(max(start - shift, 0), max(end - shift, 0)) for start, end in spans[skip:]]

    def _learn_start(self) -> list[int]:
        plain = self._encode(PROBES[0])[0]
        whole = list(self.tokenizer(PROBES[0], add_special_tokens=True, verbose=False)["input_ids"])
        for begin in range(len(whole) - len(plain) + 1):
            if whole[begin : begin + len(plain)] == plain:
                return whole[:begin]
        raise _unfit(self.tokenizer, "its ids change when it adds its special tokens", "check its post-processor")

    def _learn_sentinel(self) -> str:
        """Nothing where text behind a special token is tokenised like a string of its own, else a text that helps."""
        special = next(iter(self.special), None)
        if special is None:
            return ""
        behind = {probe: self._ids_behind(special, probe) for probe in PROBES}
        for sentinel in ("", *SENTINELS):
            first = self._encode(sentinel)[0]
            fits = all(self._encode(sentinel + probe)[0] == first + ids for probe, ids in behind.items())
            if fits and all(
                self._encode(sentinel + space + "hi")[0][: len(first)] == first for space in (" ", "\n", "\n\n")
            ):
                return sentinel
        raise _unfit(
            self.tokenizer, f"text behind {special!r} is tokenised unlike any other text", "use another tokenizer"
        )

    def _ids_behind(self, special: str, text: str) -> list[int]:
        found = self.tokenizer(special + text, add_special_tokens=False, split_special_tokens=False, verbose=False)
        return list(found["input_ids"])[1:]


def tokenize(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The ids and labels of rendered segments.  To tokenise many, build an :class:`Encoder` once."""
    return Encoder(tokenizer)(segments)


# --- does it fit? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Tokens cut to a length: with ``images`` images they take ``length`` rows of what was ``full_length``."""

    tokens: Tokens
    images: int
    length: int
    full_length: int

    @property
    def truncated(self) -> bool:
        return self.length < self.full_length


def fit(tokens: Tokens, image_rows: Sequence[int], max_length: int) -> Fitted:
    """Cut the tail that does not fit into ``max_length`` rows, images counted with their rows, never through an image.

    Raises:
        SampleError: nothing is left to learn, or the images are not as many as the ids say.
    """
    if tokens.ids.count(IMAGE_TOKEN) != len(image_rows):
        what = f"the conversation has {tokens.ids.count(IMAGE_TOKEN)} images, but {len(image_rows)} were given"
        raise SampleError(Problem("", what))
    rows = iter(image_rows)
    widths = [next(rows) if index == IMAGE_TOKEN else 1 for index in tokens.ids]
    kept = length = 0
    for width in widths:
        if length + width > max_length:
            break
        length += width
        kept += 1
    cut = Tokens(ids=tokens.ids[:kept], labels=tokens.labels[:kept])
    if all(label == IGNORE for label in cut.labels[1:]):  # nothing stands in front of the first token to predict it
        if kept == len(widths):
            raise SampleError(Problem("", "nothing to learn: the conversation has no trained text"))
        what = f"nothing to learn: the answer begins behind row {max_length} of {sum(widths)}"
        raise SampleError(Problem("", what, "raise max_length or shorten the sample"))
    return Fitted(tokens=cut, images=cut.ids.count(IMAGE_TOKEN), length=length, full_length=sum(widths))


# --- start-up self-test ----------------------------------------------------------------------------------------------

ANSWERS = ("two red cats", "yes")


def check_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Make sure that a template and a tokenizer fit, and give back the encoder.

    Raises:
        RecipeError: with every reason why they do not.
    """
    encoder = Encoder(tokenizer)
    problems: list[Problem] = []
    where = _name(tokenizer)
    if tokenizer.eos_token_id is None:
        problems.append(Problem(where, "it has no end token", "set eos_token in its tokenizer_config.json"))
    for token in template.required_tokens():
        if token not in encoder.special:
            hint = "choose another template, or a tokenizer that has it"
            problems.append(Problem(where, f"the template needs the special token {token!r}, which it lacks", hint))
    if not problems:
        try:
            problems = [Problem(where, what) for what in _try_out(template, encoder)]
        except ValueError as error:
            problems = [Problem("template", f"it cannot write a question with an image and its answer: {error}")]
    if problems:
        raise RecipeError(problems)
    return encoder


def _try_out(template: Template, encoder: Encoder) -> list[str]:
    """Write and tokenise a small conversation, and say what is wrong with the result."""
    answer = ANSWERS[0]
    question = Turn("human", (ImageSlot(0), "\nhow many?"))
    prompt = encoder(template.render([question], reply=True))
    tokens = encoder(template.render([question, Turn("assistant", (answer,))], reply=False))
    said = str(encoder.tokenizer.decode(tokens.trained))
    wrong: list[str] = []
    if tokens.ids.count(IMAGE_TOKEN) != 1:
        wrong.append(f"the template writes {tokens.ids.count(IMAGE_TOKEN)} images where the question has 1")
    if _squeeze(answer) not in _squeeze(said):
        wrong.append(f"the answer {answer!r} comes back from its ids as {said!r}")
    if not any(_squeeze(stop) in _squeeze(said) for stop in template.stop):
        wrong.append(f"nothing that is learned ends an answer: {said!r} has none of {list(template.stop)}")
    if tokens.ids[: len(prompt.ids)] != prompt.ids:
        wrong.append("the prompt is tokenised unlike the beginning of the training text")
    forged = encoder([Segment(kind="text", text="".join(encoder.special))])
    if set(forged.ids[len(encoder.start) :]) & set(encoder.special.values()) - {encoder.tokenizer.unk_token_id}:
        wrong.append("text that looks like a special token becomes one")
    return wrong


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def _unfit(tokenizer: PreTrainedTokenizerBase, what: str, hint: str) -> RecipeError:
    return RecipeError(Problem(_name(tokenizer), what, hint))
