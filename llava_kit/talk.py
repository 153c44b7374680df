"""A conversation in the terminal, or over a pipe: one question a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llava_kit.errors import KitError, Problem, RecipeError

if TYPE_CHECKING:
    from llava_kit.chat import Answer

HELP = "/image FILE shows a picture with the next question, /new begins anew, an empty line ends"


class Conversation(Protocol):
    """What is talked to: :class:`llava_kit.chat.Conversation`."""

    def ask(self, text: str, images: Sequence[Path] = ()) -> Answer: ...
    def reset(self) -> None: ...


def talk(
    conversation: Conversation,
    lines: Iterator[str],
    images: Sequence[Path],
    *,
    answered: Callable[[str, Answer], None],
    noted: Callable[[str], None],
    forgiving: bool,
) -> None:
    """Ask every line as a question until they end; lines that begin with ``/`` are commands.

    Args:
        images: shown with the first question.
        answered: is given each question and its answer.
        noted: is given remarks about commands.
        forgiving: whether a mistake (a picture that cannot be read) is a remark; otherwise it ends the conversation.

    Raises:
        KitError: a mistake, unless forgiving.
    """
    shown = list(images)
    for line in lines:
        text = line.strip()
        try:
            if text.startswith("/"):
                _obey(text, conversation, shown, noted)
            elif text:
                answered(text, conversation.ask(text, tuple(shown)))
                shown.clear()
            elif forgiving:
                return
        except KitError as error:
            if not forgiving:
                raise
            shown.clear()
            noted(str(error))


def _obey(text: str, conversation: Conversation, shown: list[Path], noted: Callable[[str], None]) -> None:
    command, _, rest = text.partition(" ")
    if command == "/new":
        conversation.reset()
        shown.clear()
        noted("a new conversation")
    elif command == "/image" and rest.strip():
        path = Path(rest.strip()).expanduser()
        if not path.is_file():
            raise RecipeError(Problem(str(path), "there is no such image"))
        shown.append(path)
        noted(f"{path.name} goes with the next question")
    else:
        raise RecipeError(Problem(text, "no such command", HELP))


def typed_lines(prompt: str) -> Iterator[str]:
    """What a person types, with editing and history where the terminal has them; ends with the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(file=sys.stderr)
            return
