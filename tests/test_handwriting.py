"""The handwriting world: what it shows, what it says about it, and what it writes to disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_kit.errors import DataError
from llava_kit_plugins import handwriting
from llava_kit_plugins.handwriting import preparation, words, world

BASE = Path(handwriting.__file__).parent / "base"
SMALL = handwriting.HandwritingConfig(scenes=12, held_out=6, seed=3)


def scenes(count: int, *, held_out: bool = False) -> Iterator[tuple[world.Scene, np.random.Generator]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield world.sample_scene(rng, held_out=held_out), rng


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("handwriting")
    handwriting.build_handwriting(SMALL).run(root, lambda line: None)
    return root / "handwriting"


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


# The world


def test_held_out_scans_are_never_in_training_scenes() -> None:
    total = len(world.load_scans(held_out=False)) + len(world.load_scans(held_out=True))
    first_held_out = total - world.HELD_OUT_SCANS
    assert total == 1797
    assert all(mark.scan < first_held_out for scene, _ in scenes(300) for mark in scene.marks)
    assert all(mark.scan >= first_held_out for scene, _ in scenes(300, held_out=True) for mark in scene.marks)


def test_a_mark_is_drawn_from_a_scan_of_its_digit() -> None:
    labels = np.concatenate([world.load_scans(held_out=kept).labels for kept in (False, True)])
    for kept in (False, True):
        assert all(labels[mark.scan] == mark.digit for scene, _ in scenes(50, held_out=kept) for mark in scene.marks)


def test_the_same_seed_gives_the_same_world() -> None:
    for (one, one_rng), (other, other_rng) in zip(scenes(20), scenes(20), strict=True):
        assert one == other
        assert np.array_equal(world.render_array(one), world.render_array(other))
        assert words.questions(one, one_rng) == words.questions(other, other_rng)


def test_scenes_have_one_to_three_marks_of_different_digit_and_colour() -> None:
    counts = set()
    for scene, _ in scenes(200):
        counts.add(len(scene.marks))
        assert (
            len({mark.digit for mark in scene.marks}) == len({mark.colour for mark in scene.marks}) == len(scene.marks)
        )
    assert counts == {1, 2, 3}


def test_boxes_enclose_the_ink_and_hold_nothing_else() -> None:
    for scene, _ in scenes(100):
        pixels = world.render_array(scene).astype(int)
        strong = np.abs(pixels - np.array(scene.background)).max(-1) > 60
        boxed = np.zeros_like(strong)
        for mark in scene.marks:
            box = world.box_of(mark)
            inside = np.s_[box.y : box.y + box.height, box.x : box.x + box.width]
            assert strong[inside].any()
            assert not boxed[inside].any() or len(scene.marks) > 1
            boxed[inside] = True
        assert not (strong & ~boxed).any()


def test_the_map_shows_every_mark_where_its_ink_is() -> None:
    for scene, _ in scenes(100):
        cells = world.cell_map(scene)
        assert len(cells) == 36
        for mark in scene.marks:
            box = world.box_of(mark)
            places = [place for place, found in enumerate(cells) if found == mark]
            assert places
            for place in places:
                row, column = divmod(place, world.CELLS)
                assert box.x < (column + 1) * world.PATCH and column * world.PATCH < box.x + box.width
                assert box.y < (row + 1) * world.PATCH and row * world.PATCH < box.y + box.height


# What is said about it


def test_captions_name_exactly_the_marks() -> None:
    named = re.compile(rf"({'|'.join(world.COLOURS)}) ({'|'.join(world.DIGIT_WORDS)})")
    turned = re.compile(rf"({'|'.join(world.DIGIT_WORDS)}) in ({'|'.join(world.COLOURS)})")
    for scene, rng in scenes(300):
        text = words.caption(scene, rng).lower()
        found = [*named.findall(text), *((colour, word) for word, colour in turned.findall(text))]
        assert sorted(found) == sorted((mark.colour, mark.word) for mark in scene.marks), text


def independent_answer(text: str, facts: list[tuple[str, str, float]]) -> str:
    """The answer from boxes alone: `facts` are (colour, digit, centre), in any order."""
    asked = re.findall(r"[a-z]+", text.lower())
    named = [fact for fact in facts if fact[0] in asked or fact[1] in asked]
    if "how" in asked:
        return ["zero", "one", "two", "three"][len(facts)]
    if "furthest" in asked:
        named = [(min if "left" in asked else max)(facts, key=lambda fact: fact[2])]
    elif "or" in asked:
        first, second = sorted(named, key=lambda fact: asked.index(fact[1]))
        return "left" if first[2] < second[2] else "right"
    elif asked[0] == "is":
        return "yes" if named else "no"
    (only,) = named
    return only[0] if "colour" in asked else only[1]


def test_answers_follow_from_the_boxes() -> None:
    seen = set()
    for scene, rng in scenes(300):
        facts = [(mark.colour, mark.word, world.box_of(mark).centre_x) for mark in scene.marks]
        for question in [*words.questions(scene, rng), *words.exam(scene, rng, 2)]:
            assert independent_answer(question.text, facts) == question.answer, (question, facts)
            seen.add(question.category)
    assert seen == set(words.CATEGORIES)


def test_guessing_without_the_picture_fails() -> None:
    """The best fixed answer to each question text, chosen with hindsight, stays far below 35 %."""
    asked: dict[str, list[str]] = {}
    for scene, rng in scenes(1500, held_out=True):
        for question in words.exam(scene, rng, 2):
            asked.setdefault(question.text, []).append(question.answer)
    best = sum(max(answers.count(one) for one in set(answers)) for answers in asked.values())
    assert best / sum(map(len, asked.values())) < 0.30


def test_conversation_is_the_vicuna_v1_format() -> None:
    pieces = words.conversation([("Hi", "Hello"), ("Bye", "Farewell")])
    assert "".join(text for text, _ in pieces) == (
        f"{words.SYSTEM} USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT: Farewell</s>"
    )
    assert [text for text, learned in pieces if learned] == [" Hello</s>", " Farewell</s>"]


# What is written to disk


def test_the_folder_holds_what_recipes_read(made: Path) -> None:
    captions, instruct = read(made / "captions.json"), read(made / "instruct.json")
    assert isinstance(captions, list) and isinstance(instruct, list)
    assert len(captions) == len(instruct) == SMALL.scenes
    for sample in [*captions, *instruct]:
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(turn["value"].count("<image>") for turn in turns) == turns[0]["value"].count("<image>") == 1
        with Image.open(made / "images" / sample["image"]) as image:
            assert image.mode == "RGB" and image.size == (world.CANVAS, world.CANVAS)
    rows = [json.loads(line) for line in (made / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * SMALL.held_out
    assert {row["image"] for row in rows}.isdisjoint(sample["image"] for sample in captions)
    assert all((made / "images" / row["image"]).is_file() and row["answer"] for row in rows)


def test_annotations_are_in_coco_layout(made: Path) -> None:
    instances, captions = read(made / "annotations" / "instances.json"), read(made / "annotations" / "captions.json")
    assert isinstance(instances, dict) and isinstance(captions, dict)
    assert {"info", "licenses", "images", "annotations", "categories"} <= instances.keys()
    names = {category["id"]: category["name"] for category in instances["categories"]}
    images = {image["id"]: image for image in instances["images"]}
    assert len(names) == 80 and len(images) == SMALL.scenes
    for found in instances["annotations"]:
        x, y, width, height = found["bbox"]
        image = images[found["image_id"]]
        assert 0 <= x < x + width <= image["width"] and 0 <= y < y + height <= image["height"]
        said = [note["caption"] for note in captions["annotations"] if note["image_id"] == image["id"]]
        assert said and all(word in text.lower() for text in said for word in names[found["category_id"]].split())


def test_a_second_run_changes_nothing_and_says_so(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    lines: list[str] = []
    handwriting.build_handwriting(SMALL).run(made.parent, lines.append)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert len(lines) == 1 and "already complete" in lines[0]


@pytest.mark.parametrize("broken", ["manifest.json", "images/train_000003.png", "clip/open_clip_config.json"])
def test_a_half_made_folder_is_made_whole_and_the_same(made: Path, tmp_path: Path, broken: str) -> None:
    shutil.copytree(made, tmp_path / "handwriting")
    (tmp_path / "handwriting" / broken).write_bytes(b"cut sh")
    handwriting.build_handwriting(SMALL).run(tmp_path, lambda line: None)
    again = {path.relative_to(tmp_path / "handwriting"): path for path in (tmp_path / "handwriting").rglob("*.*")}
    assert {path.relative_to(made) for path in made.rglob("*.*")} == again.keys()
    assert all((made / name).read_bytes() == path.read_bytes() for name, path in again.items())


def test_other_settings_make_another_world(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "handwriting")
    handwriting.build_handwriting(handwriting.HandwritingConfig(scenes=5, held_out=2)).run(tmp_path, lambda line: None)
    assert len(list((tmp_path / "handwriting" / "images").iterdir())) == 7


def test_a_failure_leaves_what_was_there(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path / "handwriting")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(preparation, "copy_base_models", full)
    with pytest.raises(OSError, match="No space"):
        handwriting.build_handwriting(handwriting.HandwritingConfig(scenes=5)).run(tmp_path, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["handwriting"]
    assert read(tmp_path / "handwriting" / "manifest.json") == read(made / "manifest.json")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "handwriting").mkdir()
    (tmp_path / "handwriting" / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape("'thesis.tex'")):
        handwriting.build_handwriting(SMALL).run(tmp_path, lambda line: None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"scenes": 0}, "scenes must be from 1 to 100000, got 0"),
        ({"held_out": -1}, "held_out must be from 1 to 100000, got -1"),
        ({"seed": -1}, "seed must be from 0 to 2147483647, got -1"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        handwriting.HandwritingConfig(**change)


def test_the_hook_registers_the_preparation() -> None:
    found: list[tuple[object, ...]] = []
    handwriting.register_preparations(lambda name, build, config: found.append((name, build, config)))
    assert found == [("handwriting", handwriting.build_handwriting, handwriting.HandwritingConfig)]


# The base models


def test_base_models_are_small() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 8_000_000


def test_the_eyes_load_with_open_clip() -> None:
    torch = pytest.importorskip("torch")
    open_clip = pytest.importorskip("open_clip")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{BASE / 'clip'}")
    model.eval()
    scene = world.sample_scene(np.random.default_rng(0), digits=[7], colours=["red"])
    pixels = preprocess(world.render(scene))[None]
    found = model.visual.forward_intermediates(
        pixels, indices=[len(model.visual.transformer.resblocks) - 2], stop_early=True, output_fmt="NLC"
    )
    assert found["image_intermediates"][0].shape[:2] == (1, 36)
    texts = [f"A picture of a {colour} {word}." for colour in ("red", "blue") for word in ("seven", "two")]
    tokens = open_clip.get_tokenizer(f"local-dir:{BASE / 'clip'}")(texts)
    with torch.no_grad():
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    assert int((image @ text.T).argmax()) == 0


def test_the_language_model_loads_with_transformers_and_reads_maps() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE / "llama")
    tokenizer = AutoTokenizer.from_pretrained(BASE / "llama")
    assert next(model.parameters()).dtype == torch.float32
    from llava_kit_plugins.handwriting.language import text_accuracy

    assert text_accuracy(model, tokenizer, scenes=20)["all"] > 0.8


@pytest.mark.parametrize(
    "text", ["What colour is it?", " two  spaces\n\tand a tab ", "naïve 漢字 🙂", "<image> red7 A1"]
)
def test_the_tokenizer_returns_any_text(text: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE / "llama")
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_text_is_cut_where_the_picture_goes() -> None:
    transformers = pytest.importorskip("transformers")
    from llava_kit_plugins.handwriting.language import encode

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE / "llama")
    pieces = words.conversation([("<image>\nWhat colour is the two?", "red"), ("Is there a nine?", "no")])
    encoded = encode(tokenizer, pieces, ["."] * 35 + ["red2"])
    learned = [label for label in encoded.labels if label >= 0]
    assert tokenizer.convert_ids_to_tokens(learned) == ["▁red", "</s>", "▁no", "</s>"]
    assert tokenizer.convert_ids_to_tokens(encoded.ids[encoded.picture]) == ["▁."] * 35 + ["▁red2"]
    assert tokenizer.convert_ids_to_tokens(encoded.ids[: encoded.picture.start])[-3:] == ["▁USER", ":", "▁"]
