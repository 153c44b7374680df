from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_kit.errors import DataError
from llava_kit.recipe import load_recipe
from llava_kit_plugins.llava_json import LlavaJson, LlavaJsonConfig
from llava_kit_plugins.scienceqa import ScienceQa, ScienceQaConfig, conversation

MAGNETS: dict[str, Any] = {
    "question": "Will these magnets attract  or repel?",
    "choices": ["attract", "repel"],
    "answer": 1,
    "hint": "Two magnets are shown.",
    "image": "image.png",
    "lecture": "Poles that are the same repel.",
    "solution": "Look at the poles.\nThey are the same.",
    "split": "train",
}
CAPITAL: dict[str, Any] = {
    "question": "What is the capital?",
    "choices": ["Bern", "Basel", "Chur"],
    "answer": 0,
    "hint": "",
    "image": None,
    "lecture": "",
    "solution": "",
    "split": "train",
}
OPTIONS = "Options: (A) attract (B) repel"
ASKED = f"Will these magnets attract or repel?\nContext: Two magnets are shown.\n{OPTIONS}"
LECTURE, SOLUTION = MAGNETS["lecture"], MAGNETS["solution"]


@pytest.mark.parametrize(
    ("wording", "asked", "answered"),
    [
        ("QCM-LEPA", ASKED, f"LECTURE: {LECTURE}\nSOLUTION: {SOLUTION}\n###\nANSWER: B."),
        ("QCM-LEA", ASKED, f"{LECTURE} {SOLUTION} The answer is B."),
        ("QCM-ALE", ASKED, f"The answer is B. BECAUSE: {LECTURE} {SOLUTION}"),
        ("QCM-A", ASKED, "The answer is B."),
        (
            "CQM-A",
            f"Context: Two magnets are shown.\nQuestion: Will these magnets attract or repel?\n{OPTIONS}",
            "The answer is B.",
        ),
    ],
)
def test_wordings(wording: str, asked: str, answered: str) -> None:
    assert conversation(MAGNETS, wording) == (asked, answered)


@pytest.mark.parametrize(
    ("wording", "answered"),
    [("QCM-LEPA", "###\nANSWER: A."), ("QCM-LEA", "The answer is A."), ("QCM-ALE", "The answer is A.")],
)
def test_what_is_empty_leaves_no_trace(wording: str, answered: str) -> None:
    asked = "What is the capital?\nContext: N/A\nOptions: (A) Bern (B) Basel (C) Chur"
    assert conversation(CAPITAL, wording) == (asked, answered)


def write(root: Path, problems: dict[str, Any], splits: dict[str, list[str]] | None = None) -> Path:
    folder = root / "scienceqa"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems), "utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits or {"train": list(problems)}), "utf-8")
    for pid, problem in problems.items():
        if isinstance(problem, dict) and problem.get("image") == "image.png":
            (folder / "images" / "train" / pid).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(folder / "images" / "train" / pid / "image.png")
    return folder


def test_what_is_written_can_be_trained_on(tmp_path: Path) -> None:
    folder = write(tmp_path, {"7": MAGNETS, "12": CAPITAL}, {"train": ["12", "7"], "minitrain": ["7"]})
    told: list[str] = []
    preparation = ScienceQa(ScienceQaConfig(splits=("train", "minitrain")))
    preparation.run(tmp_path, told.append)
    assert told == ["train: 2 questions, 1 with a picture", "minitrain: 1 questions, 1 with a picture"]
    records = json.loads((folder / "train-QCM-LEPA.json").read_text("utf-8"))
    assert [record["id"] for record in records] == ["12", "7"]
    assert records[1]["image"] == "7/image.png"
    assert records[1]["conversations"][0]["value"] == f"{ASKED}\n<image>"
    data = LlavaJson(LlavaJsonConfig(path=str(folder / "train-QCM-LEPA.json"), images=str(folder / "images" / "train")))
    assert [len(sample.images) for sample in data] == [0, 1]
    assert not any(sample.notes for sample in data)


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, {"7": MAGNETS})
    ScienceQa(ScienceQaConfig()).run(tmp_path, lambda _: None)
    made = folder / "train-QCM-LEPA.json"
    before = made.stat().st_mtime_ns, made.stat().st_ino
    ScienceQa(ScienceQaConfig()).run(tmp_path, lambda _: None)
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == before
    made.write_text("torn", "utf-8")
    ScienceQa(ScienceQaConfig()).run(tmp_path, lambda _: None)
    assert len(json.loads(made.read_text("utf-8"))) == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": 2}, "problem 7: answer must be the number of a choice, 0 to 1, got 2"),
        ({"answer": "B"}, "problem 7: answer must be the number of a choice, 0 to 1, got 'B'"),
        ({"choices": ["one"]}, "problem 7: must have from 2 to 26 choices"),
        ({"question": " "}, "problem 7: has no question"),
        ({"lecture": 3}, "problem 7: lecture must be text"),
        ({"image": "../7.png"}, "problem 7: image must be a file name, got '../7.png'"),
        ({"image": "other.png"}, "problem 7: its picture "),
    ],
)
def test_wrong_problems_are_named_by_their_id(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"7": MAGNETS | change, "8": CAPITAL})
    with pytest.raises(DataError) as caught:
        ScienceQa(ScienceQaConfig()).run(tmp_path, lambda _: None)
    assert complaint in str(caught.value)
    assert "problem 8" not in str(caught.value)
    assert not (folder / "train-QCM-LEPA.json").exists()


def test_missing_files_splits_and_problems_are_named(tmp_path: Path) -> None:
    preparation = ScienceQa(ScienceQaConfig(splits=("val",)))
    with pytest.raises(DataError, match=r"problems\.json: this file is missing; get it from ScienceQA's own"):
        preparation.run(tmp_path, lambda _: None)
    folder = write(tmp_path, {"7": CAPITAL})
    with pytest.raises(DataError, match=r"pid_splits\.json: has no split 'val'"):
        preparation.run(tmp_path, lambda _: None)
    write(tmp_path, {"7": CAPITAL}, {"val": ["9"]})
    with pytest.raises(DataError, match="problem 9: is missing"):
        preparation.run(tmp_path, lambda _: None)
    (folder / "problems.json").write_text("{", "utf-8")
    with pytest.raises(DataError, match=r"problems\.json: cannot be read: "):
        preparation.run(tmp_path, lambda _: None)
    with pytest.raises(ValueError, match=r"splits must be some of train, val, test, .*, got dev"):
        ScienceQaConfig(splits=("dev",))


@pytest.mark.parametrize(
    ("overrides", "made"),
    [([], "train-QCM-LEPA.json"), (["prepare.conversations.format=QCM-ALE"], "train-QCM-ALE.json")],
)
def test_the_recipe_reads_what_its_preparation_writes(overrides: list[str], made: str) -> None:
    recipe = load_recipe("scienceqa", overrides)
    assert recipe.prepare["conversations"].name == "scienceqa_data"
    config = recipe.stages["scienceqa"].data["questions"].format.config
    assert config.path == f"{recipe.data_root}/scienceqa/{made}"
