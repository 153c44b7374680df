"""Writes the world to disk in the formats that LLaVA reads, beside copies of the two base models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from llava_kit.errors import DataError, Problem

from .words import DESCRIBE, caption, exam, place_image, questions
from .world import CANVAS, COLOURS, DIGIT_WORDS, Mark, Scene, box_of, render, sample_scene

VERSION = 1
"""Raised whenever the same config would make different files; folders of older versions are made anew."""

FOLDER = "handwriting"
MANIFEST = "manifest.json"
_QUESTIONS_PER_SCENE = 2
_CAPTIONS_PER_SCENE = 2
_MOST_SCENES = 100_000
_TRAINING, _HELD_OUT = "train", "held_out"
_MADE = {"images", "annotations", "captions.json", "instruct.json", "questions.jsonl", "clip", "llama", MANIFEST}

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HandwritingConfig:
    scenes: int = 3000
    """Training scenes, each with one caption for stage one and up to seven questions for stage two."""

    held_out: int = 250
    """Scenes of digits never seen in training, with two questions each."""

    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("scenes", 1), ("held_out", 1), ("seed", 0)):
            value = getattr(self, name)
            most = 2**31 - 1 if name == "seed" else _MOST_SCENES
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")


def build_handwriting(config: HandwritingConfig) -> Handwriting:
    return Handwriting(config)


class Handwriting:
    """Makes `root/handwriting`.  It is written beside its place and renamed when whole, so it is never half there."""

    def __init__(self, config: HandwritingConfig) -> None:
        self.config = config

    def run(self, root: Path, progress: Progress) -> None:
        """Make the folder, or find that it is there.

        Raises:
            DataError: `root/handwriting` holds something else, or what was written does not check out.
        """
        target = root / FOLDER
        complaint = self._complaint(target)
        if complaint is None:
            progress(f"{target} is already complete")
            return
        if target.exists():
            _refuse_foreign(target)
            progress(f"{complaint}, making it anew")
        making = root / f".{FOLDER}.making-{os.getpid()}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try:
            self._make(making, progress)
            if (fault := self._complaint(making)) is not None:
                raise DataError(Problem(str(making), f"what was just written is not right: {fault}", "check the disk"))
            shutil.rmtree(target, ignore_errors=True)
            making.rename(target)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        _sweep(root)
        progress(f"{self.config.scenes} training and {self.config.held_out} held-out scenes in {target}")

    def _make(self, folder: Path, progress: Progress) -> None:
        (folder / "images").mkdir()
        (folder / "annotations").mkdir()
        scenes = self._draw(_TRAINING, self.config.scenes)
        held_out = self._draw(_HELD_OUT, self.config.held_out)
        for title, some in ((_TRAINING, scenes), (_HELD_OUT, held_out)):
            progress(f"drawing {len(some)} {title.replace('_', '-')} scenes")
            for place, scene in enumerate(some):
                render(scene).save(folder / "images" / image_name(title, place))
        progress("writing captions, boxes and questions")
        _write_json(folder / "annotations" / "captions.json", coco_captions(scenes, self._rng("coco")))
        _write_json(folder / "annotations" / "instances.json", coco_instances(scenes))
        _write_json(folder / "captions.json", caption_samples(scenes, self._rng("captions")))
        _write_json(folder / "instruct.json", instruct_samples(scenes, self._rng("instruct")))
        lines = (json.dumps(row) for row in question_rows(held_out, self._rng("questions")))
        (folder / "questions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        copy_base_models(folder)
        manifest = self._identity() | {"files": _digests(folder)}
        _write_json(folder / MANIFEST, manifest)

    def _draw(self, title: str, count: int) -> list[Scene]:
        """Each scene has a generator of its own, so a longer list begins with the shorter one."""
        place = (_TRAINING, _HELD_OUT).index(title)
        return [
            sample_scene(np.random.default_rng([self.config.seed, place, number]), held_out=title == _HELD_OUT)
            for number in range(count)
        ]

    def _rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *hashlib.sha256(purpose.encode()).digest()[:4]])

    def _identity(self) -> dict[str, Any]:
        return {"version": VERSION, "config": asdict(self.config), "base": _base_digest()}

    def _complaint(self, folder: Path) -> str | None:
        """What keeps the folder from being what this config makes, or None."""
        if not folder.exists():
            return f"{folder} is missing"
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            listed = manifest.pop("files")
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{folder} is incomplete"
        if manifest != self._identity():
            return f"{folder} was made for other settings"
        found = _digests(folder)
        wrong = sorted(name for name in listed if found.get(name) != listed[name])
        return f"{folder / wrong[0]} is missing or damaged" if wrong else None


def image_name(title: str, place: int) -> str:
    return f"{title}_{place:06d}.png"


def caption_samples(scenes: Iterable[Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """LLaVA JSON of stage one: an instruction to describe, and the caption."""
    return [
        _sample("caption", place, [(place_image(str(rng.choice(DESCRIBE)), rng), caption(scene, rng))])
        for place, scene in enumerate(scenes)
    ]


def instruct_samples(scenes: Iterable[Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """LLaVA JSON of stage two: several questions about each picture."""
    samples = []
    for place, scene in enumerate(scenes):
        turns = [(question.text, question.answer) for question in questions(scene, rng)]
        turns[0] = (place_image(turns[0][0], rng), turns[0][1])
        samples.append(_sample("instruct", place, turns))
    return samples


def _sample(kind: str, place: int, turns: list[tuple[str, str]]) -> dict[str, Any]:
    spoken = [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": f"{kind}_{place:06d}", "image": image_name(_TRAINING, place), "conversations": spoken}


def question_rows(scenes: Iterable[Scene], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Held-out questions with exact answers."""
    asked = [
        (place, question) for place, scene in enumerate(scenes) for question in exam(scene, rng, _QUESTIONS_PER_SCENE)
    ]
    return [
        {
            "question_id": number,
            "image": image_name(_HELD_OUT, place),
            "text": question.text,
            "answer": question.answer,
            "category": question.category,
        }
        for number, (place, question) in enumerate(asked)
    ]


def coco_captions(scenes: list[Scene], rng: np.random.Generator) -> dict[str, Any]:
    said = [(place, caption(scene, rng)) for place, scene in enumerate(scenes) for _ in range(_CAPTIONS_PER_SCENE)]
    annotations = [{"id": number, "image_id": place, "caption": text} for number, (place, text) in enumerate(said, 1)]
    return _coco_head(len(scenes)) | {"annotations": annotations}


def coco_instances(scenes: list[Scene]) -> dict[str, Any]:
    """Boxes `[x, y, width, height]`; a category is a colour and a digit, such as `red seven`."""
    categories = [f"{colour} {word}" for colour in COLOURS for word in DIGIT_WORDS]

    def annotation(number: int, place: int, mark: Mark) -> dict[str, Any]:
        box = box_of(mark)
        return {
            "id": number,
            "image_id": place,
            "category_id": categories.index(f"{mark.colour} {mark.word}") + 1,
            "bbox": box.as_list(),
            "area": box.width * box.height,
            "iscrowd": 0,
            "segmentation": [],
        }

    marks = [(place, mark) for place, scene in enumerate(scenes) for mark in scene.marks]
    return _coco_head(len(scenes)) | {
        "annotations": [annotation(number, place, mark) for number, (place, mark) in enumerate(marks, 1)],
        "categories": [
            {"id": number, "name": name, "supercategory": name.split()[1]} for number, name in enumerate(categories, 1)
        ],
    }


def _coco_head(count: int) -> dict[str, Any]:
    images = [
        {"id": place, "file_name": image_name(_TRAINING, place), "width": CANVAS, "height": CANVAS, "license": 1}
        for place in range(count)
    ]
    source = {"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}
    about = {"description": "Scenes of handwritten digits from UCI Optical Recognition of Handwritten Digits"}
    return {"info": about, "licenses": [source], "images": images}


def copy_base_models(folder: Path) -> None:
    with as_file(files(__package__).joinpath("base")) as base:
        for part in ("clip", "llama"):
            shutil.copytree(base / part, folder / part)


def _base_digest() -> str:
    """Changes when a release ships other base models."""
    with as_file(files(__package__).joinpath("base")) as base:
        weights = sorted(base.glob("*/*.safetensors"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below the folder but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _refuse_foreign(folder: Path) -> None:
    strangers = sorted({path.name for path in folder.iterdir()} - _MADE) if folder.is_dir() else [folder.name]
    if strangers:
        what = f"holds {strangers[0]!r}, which is not made here"
        raise DataError(Problem(str(folder), what, "move it away or choose another data_root"))


def _sweep(root: Path) -> None:
    """Remove what killed processes left half-made; an hour is far longer than making takes."""
    for leftover in root.glob(f".{FOLDER}.making-*"):
        if time.time() - leftover.stat().st_mtime > 3600:
            shutil.rmtree(leftover, ignore_errors=True)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
