"""What is said about a scene: captions, questions with exact answers, and the map of words that stands for a picture.

Everything here follows from the marks and their boxes.  `conversation` writes turns in the `vicuna_v1` format, which
the language model is trained on and which both stages of the quickstart use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .world import COLOURS, DIGIT_WORDS, Box, Mark, Scene, box_of, cell_map

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = "<image>"
EMPTY_CELL = "."
COUNT_WORDS = ("zero", "one", "two", "three")
CATEGORIES = ("colour", "digit", "place", "count", "presence")

_SHARES = {"colour": 0.39, "digit": 0.39, "place": 0.08, "count": 0.06, "presence": 0.08}
"""How often a held-out question is of each kind.  Guessing does best on counts and presence, so they are few."""

_APART = 6.0
"""Pixels between two centres before anyone may be asked which is further left."""

DESCRIBE = (
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
)
NAMES = ("{colour} {digit}", "{digit} in {colour}")
_COLOUR_ASKED = (
    "What colour is the {digit}?",
    "Which colour is the {digit} written in?",
    "What is the colour of the {digit}?",
)
_DIGIT_ASKED = (
    "Which digit is {colour}?",
    "What is the {colour} digit?",
    "Which digit is written in {colour}?",
)
_COUNT_ASKED = ("How many digits are there?", "How many digits does the picture show?")
_CAPTIONS: dict[int, tuple[str, ...]] = {
    1: ("{a}.", "A picture of {a}.", "Just {a}.", "There is {a}."),
    2: ("{a} and {b}.", "Two digits: {a} and {b}.", "There are {a} and {b}.", "A picture of {a} and {b}."),
    3: ("{a}, {b} and {c}.", "Three digits: {a}, {b} and {c}.", "There are {a}, {b} and {c}."),
}
_PLACED_CAPTIONS: dict[int, tuple[str, ...]] = {
    1: (),
    2: ("{a} to the left of {b}.", "{b} to the right of {a}."),
    3: ("From left to right: {a}, {b} and {c}.", "{b} between {a} and {c}."),
}


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    category: str


def caption(scene: Scene, rng: np.random.Generator, names: Sequence[str] = NAMES) -> str:
    """A sentence that names every mark of the scene and nothing else; `names` are the ways to name one mark."""
    name = str(rng.choice(names))
    named = {
        key: _with_article(name.format(colour=mark.colour, digit=mark.word))
        for key, mark in zip("abc", scene.marks, strict=False)
    }
    patterns = _CAPTIONS[len(named)] + (_PLACED_CAPTIONS[len(named)] if _in_a_row(scene) else ())
    text = str(rng.choice(patterns)).format(**named)
    return text[0].upper() + text[1:]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun.startswith(("orange", "eight")) else f"a {noun}"


def _in_a_row(scene: Scene) -> bool:
    """Whether nobody could doubt which mark is further left."""
    centres = [box_of(mark).centre_x for mark in scene.marks]
    return all(right - left >= _APART for left, right in itertools.pairwise(centres))


def questions(scene: Scene, rng: np.random.Generator, limit: int = 7) -> list[Question]:
    """Up to `limit` different questions in random order; presence is always asked, then bindings come first."""
    drawn = [_presence(scene, rng)]
    drawn += [_colour(mark, rng) for mark in scene.marks] + [_digit(mark, rng) for mark in scene.marks]
    others = [_count(scene, rng), _presence(scene, rng), *_places(scene, rng)]
    rng.shuffle(others)
    if len(drawn) >= limit:  # leave a place for one question of another kind
        others, rest = others[:1], drawn[1:]
        rng.shuffle(rest)
        drawn = [drawn[0], *rest[: limit - 2]]
    unique = list({question.text: question for question in [*drawn, *others]}.values())[:limit]
    rng.shuffle(unique)
    return unique


def exam(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Held-out questions: `count` different ones, their kinds drawn by the fixed shares."""
    asked: dict[str, Question] = {}
    while len(asked) < count:
        kind = str(rng.choice(list(_SHARES), p=list(_SHARES.values())))
        question = _of_kind(kind, scene, rng)
        if question is not None:
            asked.setdefault(question.text, question)
    return list(asked.values())


def _of_kind(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    mark = scene.marks[rng.integers(len(scene.marks))]
    if kind == "colour":
        return _colour(mark, rng)
    if kind == "digit":
        return _digit(mark, rng)
    if kind == "count":
        return _count(scene, rng)
    if kind == "presence":
        return _presence(scene, rng)
    places = _places(scene, rng)
    return places[rng.integers(len(places))] if places else None


def _colour(mark: Mark, rng: np.random.Generator) -> Question:
    return Question(str(rng.choice(_COLOUR_ASKED)).format(digit=mark.word), mark.colour, "colour")


def _digit(mark: Mark, rng: np.random.Generator) -> Question:
    return Question(str(rng.choice(_DIGIT_ASKED)).format(colour=mark.colour), mark.word, "digit")


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question(str(rng.choice(_COUNT_ASKED)), COUNT_WORDS[len(scene.marks)], "count")


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    """ "Is there ...", answered yes as often as no."""
    present = bool(rng.random() < 0.5)
    if rng.random() < 0.5:
        shown = [mark.word for mark in scene.marks]
        absent = [word for word in DIGIT_WORDS if word not in shown]
        word = str(rng.choice(shown if present else absent))
        return Question(f"Is there {_with_article(word)}?", _yes(present), "presence")
    shown = [mark.colour for mark in scene.marks]
    absent = [name for name in COLOURS if name not in shown]
    return Question(f"Is anything {rng.choice(shown if present else absent)}?", _yes(present), "presence")


def _yes(present: bool) -> str:
    return "yes" if present else "no"


def _places(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about left and right, where the boxes leave no doubt."""
    found: list[Question] = []
    boxes = [box_of(mark) for mark in scene.marks]
    for side, mark, clear in _ends(scene.marks, boxes):
        if clear:
            text, answer = (
                (f"Which digit is furthest {side}?", mark.word)
                if rng.random() < 0.5
                else (f"What colour is the digit furthest {side}?", mark.colour)
            )
            found.append(Question(text, answer, "place"))
    pairs = [
        (one, other)
        for (one, box), (other, beside) in itertools.permutations(zip(scene.marks, boxes, strict=True), 2)
        if abs(box.centre_x - beside.centre_x) >= _APART
    ]
    if pairs:
        one, other = pairs[rng.integers(len(pairs))]
        answer = "left" if scene.marks.index(one) < scene.marks.index(other) else "right"
        found.append(Question(f"Is the {one.word} left or right of the {other.word}?", answer, "place"))
    return found


def _ends(marks: Sequence[Mark], boxes: Sequence[Box]) -> list[tuple[str, Mark, bool]]:
    if len(marks) < 2:
        return []
    centres = [box.centre_x for box in boxes]
    return [
        ("left", marks[0], centres[1] - centres[0] >= _APART),
        ("right", marks[-1], centres[-1] - centres[-2] >= _APART),
    ]


def map_words(scene: Scene) -> list[str]:
    """The scene in text: one word per cell, row by row, `red7` where a red seven is and `.` where nothing is."""
    return [EMPTY_CELL if mark is None else f"{mark.colour}{mark.digit}" for mark in cell_map(scene)]


def smudge(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The same map, less certain, as patches are: cells go missing, show only a colour or a digit, or mistake it."""
    smudged = list(words)
    fate = rng.random(len(words))
    for cell, word in enumerate(words):
        if word == EMPTY_CELL:
            continue
        if fate[cell] < 0.08:
            smudged[cell] = EMPTY_CELL
        elif fate[cell] < 0.16:
            smudged[cell] = word[:-1]
        elif fate[cell] < 0.22:
            smudged[cell] = DIGIT_WORDS[int(word[-1])]
        elif fate[cell] < 0.26:
            smudged[cell] = f"{word[:-1]}{rng.integers(10)}"
    return smudged


def place_image(text: str, rng: np.random.Generator) -> str:
    """The first human turn: the picture before or after what is said about it."""
    return f"{IMAGE}\n{text}" if rng.random() < 0.5 else f"{text}\n{IMAGE}"


def conversation(turns: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Turns (human, assistant) in the `vicuna_v1` format, as pieces of text and whether each one is learned."""
    pieces: list[tuple[str, bool]] = []
    lead = f"{SYSTEM} "
    for human, reply in turns:
        pieces += [(f"{lead}USER: {human} ASSISTANT:", False), (f" {reply}</s>", True)]
        lead = ""
    return pieces
