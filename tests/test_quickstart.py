"""The quickstart as a newcomer runs it, at its full size: the promise of the README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    kit(folder, "train", "quickstart")
    return folder


def kit(folder: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "llava_kit", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_held_out_accuracy_is_what_the_readme_says_or_better(folder: Path) -> None:
    summary = json.loads((folder / "runs" / "quickstart" / "evaluation" / "summary.json").read_text("utf-8"))
    aligned, tuned = summary["held_out"]["align"], summary["held_out"]["instruct"]
    assert aligned["count"] == tuned["count"] == 500
    assert aligned["accuracy"] >= 0.60, "the language model was never trained on a picture"
    assert tuned["accuracy"] >= 0.80
    assert max(aligned["accuracy_shuffled_images"], tuned["accuracy_shuffled_images"]) < 0.35


def test_the_report_shows_pictures_with_answers_after_both_stages(folder: Path) -> None:
    page = (folder / "runs" / "quickstart" / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") > 20
    assert "after align" in page and "after instruct" in page


def test_it_answers_a_question_about_a_picture_it_has_not_seen(folder: Path) -> None:
    rows = (folder / "data" / "handwriting" / "questions.jsonl").read_text("utf-8").splitlines()
    colours = [row for row in map(json.loads, rows) if row["category"] == "colour"][:5]
    right = 0
    for row in colours:
        picture = f"data/handwriting/images/{row['image']}"
        answer = json.loads(kit(folder, "chat", "runs/quickstart", "--image", picture, "-m", row["text"], "--json"))
        right += answer["text"] == row["answer"]
    assert right >= 4


def test_check_data_finds_nothing_wrong(folder: Path) -> None:
    report = json.loads(kit(folder, "check-data", "quickstart", "--json"))
    assert {name: stage["used"] for name, stage in report.items()} == {"align": 3000, "instruct": 3000}
    assert not any(stage["reasons"] for stage in report.values())
