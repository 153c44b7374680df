"""ScienceQA as conversations: school questions with a lecture, a worked solution and often a picture.

Reads what ScienceQA publishes (``problems.json``, ``pid_splits.json``, ``images/<split>/<pid>/image.png``) and writes
LLaVA's own format beside it, one file a split, in the wording LLaVA's published conversion has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llava_kit import hookimpl
from llava_kit.errors import DataError, Problem

if TYPE_CHECKING:
    from llava_kit.hookspecs import Register

SPLITS = ("train", "val", "test", "minitrain", "minival", "minitest")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHOWN = 20
"""Problems an error message lists."""


@dataclass(frozen=True, kw_only=True)
class ScienceQaConfig:
    """Which splits to write, and in which wording."""

    folder: str = "scienceqa"
    """Where ScienceQA lies, below the recipe's ``data_root``; the conversations are written there too."""
    format: Literal["QCM-LEPA", "QCM-LEA", "QCM-ALE", "QCM-A", "CQM-A"] = "QCM-LEPA"
    """Question, Context, Multiple choice; then Lecture, Explanation (the solution) and Answer in their order.
    ``LEPA`` sets the answer apart from the reasoning with ``###``; with ``ALE`` the answer comes first."""
    splits: tuple[str, ...] = ("train",)

    def __post_init__(self) -> None:
        wrong = [split for split in self.splits if split not in SPLITS]
        if wrong or not self.splits:
            raise ValueError(f"splits must be some of {', '.join(SPLITS)}, got {', '.join(wrong) or 'none'}")


class ScienceQa:
    """Writes ``<split>-<format>.json`` for every split; a file that is right already is left alone."""

    def __init__(self, config: ScienceQaConfig) -> None:
        self.config = config

    def run(self, root: Path, progress: Callable[[str], None]) -> None:
        """Raises:
        DataError: ScienceQA is not there or not as it should be; problems are named by their id.
        """
        folder = root / self.config.folder
        problems = _read(folder / "problems.json")
        pids_of = _read(folder / "pid_splits.json")
        wrong: list[Problem] = []
        texts: dict[str, str] = {}
        for split in self.config.splits:
            records, counted = [], 0
            for record in _records(folder, split, pids_of, problems, self.config.format):
                if isinstance(record, Problem):
                    wrong.append(record)
                else:
                    records.append(record)
                    counted += "image" in record
            texts[split] = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
            progress(f"{split}: {len(records):,} questions, {counted:,} with a picture")
        if wrong:
            more = [Problem(str(folder), f"{len(wrong) - SHOWN} more problems")] if len(wrong) > SHOWN else []
            raise DataError([*wrong[:SHOWN], *more])
        for split, text in texts.items():
            _write(folder / f"{split}-{self.config.format}.json", text)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        hint = "get it from ScienceQA's own repository, data/scienceqa"
        raise DataError(Problem(str(path), "this file is missing", hint)) from error
    except (ValueError, OSError) as error:
        raise DataError(Problem(str(path), f"cannot be read: {error}")) from error
    if not isinstance(content, dict):
        raise DataError(Problem(str(path), "must hold an object"))
    return content


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text("utf-8") == text:
        return
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _records(
    folder: Path, split: str, pids_of: Mapping[str, Any], problems: Mapping[str, Any], wording: str
) -> Iterator[dict[str, Any] | Problem]:
    """The split's conversations in its order, with a problem in the place of each that cannot be made."""
    pids = pids_of.get(split)
    if not isinstance(pids, list):
        yield Problem(str(folder / "pid_splits.json"), f"has no split '{split}'")
        return
    images = folder / "images" / split.removeprefix("mini")
    for pid in map(str, pids):
        where = f"{folder / 'problems.json'}, problem {pid}"
        problem = problems.get(pid, {})
        complaint = _complaint(problem) if pid in problems else "is missing"
        if complaint:
            yield Problem(where, complaint)
            continue
        question, answer = conversation(problem, wording)
        record: dict[str, Any] = {"id": pid}
        if problem.get("image"):
            name = f"{pid}/{problem['image']}"
            if not (images / name).is_file():
                yield Problem(where, f"its picture {images / name} is missing", "unpack ScienceQA's images there")
                continue
            record["image"] = name
            question += "\n<image>"
        yield record | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _complaint(problem: Any) -> str:
    """What is wrong with a problem; empty when it can be used."""
    if not isinstance(problem, dict):
        return "must be an object"
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(problem.get("question"), str) or not problem["question"].strip():
        return "has no question"
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        return "must have from 2 to 26 choices"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"answer must be the number of a choice, 0 to {len(choices) - 1}, got {answer!r}"
    for key in ("hint", "lecture", "solution", "image"):
        if not isinstance(problem.get(key) or "", str):
            return f"{key} must be text"
    image = problem.get("image") or ""
    return f"image must be a file name, got {image!r}" if Path(image).name != image else ""


def conversation(problem: Mapping[str, Any], wording: str) -> tuple[str, str]:
    """What is asked and what is to be answered."""
    asked, _, answered = wording.partition("-")
    question, context = problem["question"], (problem.get("hint") or "").strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    lines = {
        # LLaVA's conversion takes the word "Question:" away where it comes first.
        "QCM": f"{question}\nContext: {context}\nOptions: {options}\n",
        "CQM": f"Context: {context}\nQuestion: {question}\nOptions: {options}\n",
    }
    return _tidy(lines[asked]), _tidy(_answer(problem, answered))


def _answer(problem: Mapping[str, Any], wording: str) -> str:
    letter = LETTERS[problem["answer"]]
    lecture, solution = (problem.get("lecture") or "").strip(), (problem.get("solution") or "").strip()
    if wording == "LEPA":
        reasons = [f"LECTURE: {lecture}\n"] if lecture else []
        reasons += [f"SOLUTION: {solution}\n"] if solution else []
        return "".join([*reasons, f"###\nANSWER: {letter}."])
    answer = f"The answer is {letter}."
    if wording == "LEA":
        return f"{lecture} {solution} {answer}"
    return f"{answer} BECAUSE: {lecture} {solution}".removesuffix(" BECAUSE:  ") if wording == "ALE" else answer


def _tidy(text: str) -> str:
    return text.replace("  ", " ").strip()


@hookimpl
def register_preparations(register: Register) -> None:
    """``scienceqa_data``"""
    register("scienceqa_data", ScienceQa, ScienceQaConfig)
