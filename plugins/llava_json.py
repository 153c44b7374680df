"""LLaVA's own data format: conversations in a JSON array or in JSON lines, images in a folder.

A record is ``{"id": …, "image": path or list of paths (or absent), "conversations": [{"from": "human" | "gpt",
"value": text}, …]}``, and ``<image>`` in a human's text is the place of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from llava_kit import hookimpl
from llava_kit.contracts import ImageSlot, Sample, Turn
from llava_kit.errors import DataError, MissingDataError, Problem, SampleError
from llava_kit.images import resolve_image
from llava_kit.json_records import JsonRecords
from llava_kit.tokens import without_surrogates

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

Role = Literal["human", "assistant"]

PLACEHOLDER = "<image>"
ROLES: dict[str, Role] = {"human": "human", "gpt": "assistant", "user": "human", "assistant": "assistant"}
ALIASES = ("user", "assistant")
TINY_SAMPLES = 24


@dataclass(frozen=True, kw_only=True)
class LlavaJsonConfig:
    """A file of conversations and a folder of images."""

    path: str
    """The JSON array or JSON lines."""
    images: str = ""
    """Folder the records' image paths are relative to; by default the file's own."""
    turns: Literal["any", "single", "multi"] = "any"
    """Take conversations of one question, of several, or both."""
    image_position: Literal["front", "as_written"] = "front"
    """Put the image of a message before its words, as LLaVA does, or leave it where the record has it."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a file")

    @property
    def image_folder(self) -> Path:
        return Path(self.images) if self.images else Path(self.path).parent

    def tiny(self, folder: Path) -> LlavaJsonConfig:
        """The same settings over a few made-up samples, written under ``folder``."""
        target = folder / "llava_json" / self.turns
        write_tiny(target, self.turns)
        return replace(self, path=str(target / "chat.json"), images=str(target / "images"))


class LlavaJson(Sequence[Sample]):
    """The samples of a file.  Records are parsed and checked when they are asked for; a bad one is a SampleError."""

    def __init__(self, config: LlavaJsonConfig) -> None:
        if not config.image_folder.is_dir():
            what = "there is no such image folder" if Path(config.path).exists() else "there is no such data"
            raise MissingDataError(Problem(str(config.image_folder), what, f"it belongs to {config.path}"))
        self.config = config
        self.records = JsonRecords(Path(config.path), keep=self._has_wanted_turns)
        if not len(self.records):
            wanted = "samples" if config.turns == "any" else f"samples of {config.turns} turns"
            raise DataError(Problem(config.path, f"the file has no {wanted}"))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the file, which tells a resumed run whether its data is still the same."""
        with Path(self.config.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        record = self.records[index]
        number = index % len(self)
        if not isinstance(record, dict):
            where = f"{self.config.path}, record {number}"
            raise SampleError(Problem(where, f"wrong record: it must be an object, found {_kind(record)}"))
        return _Reader(self.config, record, number).sample()

    def _has_wanted_turns(self, record: Any) -> bool:
        """Records without countable turns are kept: reading them says what is wrong."""
        messages = record.get("conversations") if isinstance(record, dict) else None
        if self.config.turns == "any" or not isinstance(messages, list):
            return True
        roles = [ROLES.get(str(message.get("from"))) for message in messages if isinstance(message, dict)]
        return (roles.count("human") > 1) == (self.config.turns == "multi")


class _Reader:
    """Checks one record and makes a sample of it; what is repaired on the way is noted."""

    def __init__(self, config: LlavaJsonConfig, record: dict[str, Any], number: int) -> None:
        self.config = config
        self.record = record
        self.notes: list[str] = []
        given = record.get("id")
        self.id = without_surrogates(str(given)) if isinstance(given, (str, int)) else f"record {number}"
        if not isinstance(given, (str, int)):
            self._note("it has no id; its number is used")

    def sample(self) -> Sample:
        messages = self._alternating(self._messages())
        images = self._images()
        places = sum(text.count(PLACEHOLDER) for role, text in messages if role == "human")
        if places != len(images):
            what = f"placeholder mismatch: {_count(places, 'place')} for {_count(len(images), 'image')}"
            raise self._error(what, f"each image needs one {PLACEHOLDER} in a human's message")
        turns, first = [], 0
        for role, text in messages:
            turn = self._turn(role, text, first)
            first += sum(isinstance(part, ImageSlot) for part in turn.parts)
            turns.append(turn)
        return Sample(id=self.id, turns=tuple(turns), images=images, notes=tuple(dict.fromkeys(self.notes)))

    def _messages(self) -> list[tuple[Role, str]]:
        found = self.record.get("conversations")
        if not isinstance(found, list) or not found:
            state = (
                "is missing"
                if "conversations" not in self.record
                else f"must be a list of messages, found {_kind(found)}"
            )
            raise self._error(f"wrong record: conversations {state}")
        return [self._message(message, f"conversations[{place}]") for place, message in enumerate(found)]

    def _message(self, message: Any, field: str) -> tuple[Role, str]:
        if not isinstance(message, dict):
            raise self._error(f"wrong record: {field} must be an object, found {_kind(message)}")
        speaker, text = message.get("from"), message.get("value")
        if not isinstance(speaker, str) or speaker not in ROLES:
            shown = repr(speaker) if isinstance(speaker, str) else _kind(speaker)
            raise self._error(f"wrong record: {field}.from must be 'human' or 'gpt', found {shown}")
        if not isinstance(text, str):
            raise self._error(f"wrong record: {field}.value must be text, found {_kind(text)}")
        if speaker in ALIASES:
            self._note(f"'{speaker}' is read as '{'human' if speaker == 'user' else 'gpt'}'")
        if without_surrogates(text) != text:
            self._note("signs that are no text (lone surrogates) were replaced")
        return ROLES[speaker], without_surrogates(text)

    def _alternating(self, messages: list[tuple[Role, str]]) -> list[tuple[Role, str]]:
        """Questions and answers in turn; an answer to nothing in front and a question without answer behind are cut."""
        if messages[0][0] == "assistant":
            self._note("it begins with an answer, which is left out")
            messages = messages[1:]
        if messages and messages[-1][0] == "human":
            self._note("its last question has no answer and is left out")
            messages = messages[:-1]
        if not messages:
            raise self._error("wrong turns: there is no question with an answer")
        for place, (role, _) in enumerate(messages):
            if (role == "human") != (place % 2 == 0):
                order = ", ".join("human" if role == "human" else "gpt" for role, _ in messages[:8])
                raise self._error(f"wrong turns: human and gpt must alternate, found {order}")
        return messages

    def _images(self) -> tuple[Path, ...]:
        found = self.record.get("image")
        names = [] if found is None else found if isinstance(found, list) else [found]
        paths = []
        for place, name in enumerate(names):
            if not isinstance(name, str):
                field = f"image[{place}]" if isinstance(found, list) else "image"
                raise self._error(f"wrong record: {field} must be a path, found {_kind(name)}")
            try:
                paths.append(resolve_image(self.config.image_folder, name))
            except SampleError as error:
                problem = error.problems[0]
                raise self._error(f"{problem.what}: {name!r}", problem.hint) from error
        return tuple(paths)

    def _turn(self, role: Role, text: str, first: int) -> Turn:
        """The message with image slots, counted from ``first``, for its placeholders."""
        pieces = text.split(PLACEHOLDER)
        if role == "assistant" or len(pieces) == 1:
            if len(pieces) > 1:
                self._note(f"{PLACEHOLDER} in an answer is read as ordinary text")
            return Turn(role, (text,))
        if len(pieces) == 2 and self.config.image_position == "front":
            words = "".join(pieces).strip()
            return Turn(role, (ImageSlot(first), f"\n{words}") if words else (ImageSlot(first),))
        parts: list[str | ImageSlot] = [pieces[0]]
        for place, piece in enumerate(pieces[1:]):
            parts += [ImageSlot(first + place), piece]
        return Turn(role, tuple(part for part in parts if part != ""))

    def _note(self, note: str) -> None:
        self.notes.append(note)

    def _error(self, what: str, hint: str = "") -> SampleError:
        return SampleError(Problem(f"{self.config.path}, sample '{self.id}'", what, hint))


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)] if value != [] else "an empty list"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


# --- a small stand-in ------------------------------------------------------------------------------------------------

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


def write_tiny(folder: Path, turns: str) -> None:
    """Samples with one image, and one with two; where turns are chosen, also one of text only.

    A file that takes any turns has none of text only: templates that keep nothing but the image refuse those.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = [_tiny_record(folder, number, turns == "multi") for number in range(TINY_SAMPLES - 2)]
    first, second = records[0], records[1]
    question = {"from": "human", "value": "<image>\n<image>\nWhich colours are these?"}
    answer = {"from": "gpt", "value": "Red and green."}
    rest = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}] if turns == "multi" else []
    both = [first["image"], second["image"]]
    records.append({"id": "two-images", "image": both, "conversations": [question, answer, *rest]})
    if turns == "any":
        records.append(_tiny_record(folder, TINY_SAMPLES - 2, False))
    else:
        greeting = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
        records.append({"id": "text-only", "conversations": [*greeting, *rest]})
    (folder / "chat.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def _tiny_record(folder: Path, number: int, multi: bool) -> dict[str, Any]:
    from PIL import Image

    name = f"{number:03d}.png"
    colour, value = list(COLOURS.items())[number % len(COLOURS)]
    picture = Image.new("RGB", (40 + 4 * (number % 5), 56 - 4 * (number % 3)), value)
    picture.save(folder / "images" / name)
    question = "What colour is this?\n<image>" if number % 2 else "<image>\nWhat colour is this?"
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {colour}."}]
    if multi:
        messages += [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes."}]
    return {"id": f"tiny-{number}", "image": name, "conversations": messages}


@hookimpl
def register_data_formats(register: Register) -> None:
    register("llava_json", LlavaJson, LlavaJsonConfig)
