from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_kit import json_records
from llava_kit.contracts import ImageSlot, Turn
from llava_kit.errors import DataError, SampleError
from llava_kit.json_records import JsonRecords
from llava_kit_plugins.llava_json import LlavaJson, LlavaJsonConfig

ASK = {"from": "human", "value": "<image>\nWhat is this?"}
TELL = {"from": "gpt", "value": "A cat."}
GOOD = {"id": "s1", "image": "a.png", "conversations": [ASK, TELL]}


def open_records(folder: Path, records: Any, **settings: Any) -> LlavaJson:
    (folder / "images").mkdir(exist_ok=True)
    path = folder / "chat.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return LlavaJson(LlavaJsonConfig(path=str(path), images=str(folder / "images"), **settings))


def conversation(*values: str, **rest: Any) -> dict[str, Any]:
    """A record of alternating messages."""
    messages = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    return {"id": "s1", **rest, "conversations": messages}


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_sample(tmp_path: Path) -> None:
    data = open_records(tmp_path, [GOOD])
    assert len(data) == 1
    sample = data[0]
    assert (sample.id, sample.notes) == ("s1", ())
    assert sample.images == (tmp_path / "images" / "a.png",)
    assert sample.turns == (
        Turn("human", (ImageSlot(0), "\nWhat is this?")),
        Turn("assistant", ("A cat.",)),
    )


@pytest.mark.parametrize(
    ("written", "front", "as_written"),
    [
        ("<image>\nWhat?", (ImageSlot(0), "\nWhat?"), (ImageSlot(0), "\nWhat?")),
        (" What?\n<image>", (ImageSlot(0), "\nWhat?"), (" What?\n", ImageSlot(0))),
        ("Is <image> it? ", (ImageSlot(0), "\nIs  it?"), ("Is ", ImageSlot(0), " it? ")),
        ("<image>", (ImageSlot(0),), (ImageSlot(0),)),
    ],
)
def test_where_the_image_stands(written: str, front: Any, as_written: Any, tmp_path: Path) -> None:
    record = conversation(written, "Yes.", image="a.png")
    assert open_records(tmp_path, [record])[0].turns[0].parts == front
    assert open_records(tmp_path, [record], image_position="as_written")[0].turns[0].parts == as_written


def test_several_images_stay_where_they_are(tmp_path: Path) -> None:
    record = conversation("<image> or <image>?", "Yes.", "And\n<image>", "No.", image=["a.png", "b.png", "c.png"])
    sample = open_records(tmp_path, [record])[0]
    assert sample.turns[0].parts == (ImageSlot(0), " or ", ImageSlot(1), "?")
    assert sample.turns[2].parts == (ImageSlot(2), "\nAnd")
    assert [path.name for path in sample.images] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("rest", [{}, {"image": None}, {"model": ""}])
def test_text_only(rest: dict[str, Any], tmp_path: Path) -> None:
    sample = open_records(tmp_path, [conversation(" Hi.\n", "Hello.", **rest)])[0]
    assert (sample.images, sample.turns[0].parts) == ((), (" Hi.\n",))


def test_a_placeholder_in_an_answer_is_text_and_noted(tmp_path: Path) -> None:
    sample = open_records(tmp_path, [conversation("<image>\nQ", "See <image>.", image="a.png")])[0]
    assert sample.turns[1].parts == ("See <image>.",)
    assert sample.notes == ("<image> in an answer is read as ordinary text",)


def test_what_is_repaired_is_noted(tmp_path: Path) -> None:
    messages = [
        {"from": "gpt", "value": "Welcome."},
        {"from": "user", "value": "a\ud800b"},
        {"from": "assistant", "value": "Yes."},
        {"from": "human", "value": "And?"},
    ]
    sample = open_records(tmp_path, [{"conversations": messages}])[0]
    assert sample.id == "record 0"
    assert sample.turns == (Turn("human", ("a\ufffdb",)), Turn("assistant", ("Yes.",)))
    assert sample.notes == (
        "it has no id; its number is used",
        "'user' is read as 'human'",
        "signs that are no text (lone surrogates) were replaced",
        "'assistant' is read as 'gpt'",
        "it begins with an answer, which is left out",
        "its last question has no answer and is left out",
    )


def test_choosing_by_the_number_of_questions(tmp_path: Path) -> None:
    records = [conversation("1", "2"), conversation("1", "2", "3", "4"), {"id": "broken", "conversations": 7}]
    assert len(open_records(tmp_path, records)) == 3
    for turns, length in (("single", 2), ("multi", 4)):
        chosen = open_records(tmp_path, records, turns=turns)
        assert [len(chosen), len(chosen[0].turns)] == [2, length]
        with pytest.raises(SampleError, match="sample 'broken'"):  # what cannot be counted is not lost
            chosen[1]


def test_it_is_a_sequence_that_travels_to_other_processes(tmp_path: Path) -> None:
    data = open_records(tmp_path, [conversation(str(number), "a") | {"id": number} for number in range(5)])
    copy = pickle.loads(pickle.dumps(data))
    assert [sample.id for sample in copy] == ["0", "1", "2", "3", "4"]
    assert copy[-1].id == "4"
    assert [sample.id for sample in data[1:3]] == ["1", "2"]
    with pytest.raises(IndexError):
        data[5]
    assert len(pickle.dumps(data)) < 2000  # places, no records


# --- bad records -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"conversations": None}, "wrong record: conversations must be a list of messages, found nothing"),
        ({"conversations": []}, "wrong record: conversations must be a list of messages, found an empty list"),
        ({"conversations": [ASK, 5]}, "wrong record: conversations[1] must be an object, found a number"),
        (
            {"conversations": [ASK, {"from": "gpt", "value": ["x"]}]},
            "wrong record: conversations[1].value must be text, found a list",
        ),
        (
            {"conversations": [ASK, {"from": "system", "value": "x"}]},
            "wrong record: conversations[1].from must be 'human' or 'gpt', found 'system'",
        ),
        (
            {"conversations": [{"value": "x"}]},
            "wrong record: conversations[0].from must be 'human' or 'gpt', found nothing",
        ),
        ({"conversations": [ASK, TELL, TELL]}, "wrong turns: human and gpt must alternate, found human, gpt, gpt"),
        ({"conversations": [TELL]}, "wrong turns: there is no question with an answer"),
        ({"conversations": [ASK]}, "wrong turns: there is no question with an answer"),
        ({"image": 5}, "wrong record: image must be a path, found a number"),
        ({"image": {"path": "a.png"}}, "wrong record: image must be a path, found an object"),
        ({"image": ["a.png", True]}, "wrong record: image[1] must be a path, found true or false"),
        ({"image": "../a.png"}, "the path leads out of the image folder: '../a.png'"),
        (
            {"image": ["a.png", "b.png"]},
            "placeholder mismatch: 1 place for 2 images",
        ),
        ({"image": None}, "placeholder mismatch: 1 place for 0 images"),
        (
            {"conversations": [{"from": "human", "value": "What?"}, TELL]},
            "placeholder mismatch: 0 places for 1 image",
        ),
    ],
)
def test_bad_records_are_named(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    data = open_records(tmp_path, [GOOD | change])
    with pytest.raises(SampleError) as error:
        data[0]
    problem = error.value.problems[0]
    assert (problem.where, problem.what) == (f"{tmp_path / 'chat.json'}, sample 's1'", complaint)


def test_a_record_without_conversations_or_that_is_no_object(tmp_path: Path) -> None:
    data = open_records(tmp_path, [{"id": 7}, "text", 12, 13.5])
    with pytest.raises(SampleError, match="sample '7': wrong record: conversations is missing"):
        data[0]
    for place, kind in ((1, "text"), (2, "a number"), (3, "a number")):
        with pytest.raises(SampleError, match=f"record {place}: wrong record: it must be an object, found {kind}"):
            data[place]


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_lines_with_one_broken_line(tmp_path: Path) -> None:
    lines = [
        json.dumps(conversation("ü", "1")),
        "",
        '{"id": "2", "conversations": [,]}',
        json.dumps(conversation("q", "3")),
    ]
    data = open_records(tmp_path, "\n".join(lines) + "\n")
    assert [data[0].turns[1].text, data[2].turns[1].text] == ["1", "3"]
    with pytest.raises(SampleError) as error:
        data[1]
    assert str(error.value) == f"{tmp_path / 'chat.json'}:3:31: broken JSON: Expecting value"


def test_a_torn_last_line_is_named_as_such(tmp_path: Path) -> None:
    data = open_records(tmp_path, json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:40])
    assert data[0].id == "s1"
    with pytest.raises(SampleError, match=r"chat.json:2:\d+: broken JSON: .*; the last line is torn"):
        data[1]


def test_a_record_that_is_not_utf_8(tmp_path: Path) -> None:
    open_records(tmp_path, [GOOD])
    raw = json.dumps([GOOD, GOOD | {"id": "s2"}], indent=0).encode().replace(b'"s2"', b'"s\xff"')
    (tmp_path / "chat.json").write_bytes(raw)
    data = LlavaJson(LlavaJsonConfig(path=str(tmp_path / "chat.json"), images=str(tmp_path / "images")))
    assert data[0].id == "s1"
    with pytest.raises(SampleError, match=r"chat.json:\d+:9: not UTF-8: byte 0xff is no text"):
        data[1]


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert open_records(tmp_path, "\ufeff" + json.dumps([GOOD]))[0].id == "s1"
    assert open_records(tmp_path, "\ufeff" + json.dumps(GOOD))[0].id == "s1"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "chat.json: the file is empty"),
        (" \n ", "chat.json: the file is empty"),
        ("[]", "chat.json: the file has no samples"),
        ("hello", "chat.json:1:1: broken JSON: it begins with b'h'; it must hold a JSON array or JSON lines"),
        (
            '[{"id": 1},\n {"id": 2',
            "chat.json:2:10: broken JSON: Expecting ',' delimiter; the file breaks off in a record",
        ),
        ('[{"id": 1},\n {"id": "2', "chat.json:2:9: broken JSON: Unterminated string starting at; the file breaks off"),
        ('[{"id": 1}', "chat.json:1:11: broken JSON: the array does not end"),
        ('[{"id": 1},', "chat.json:1:12: broken JSON: Expecting value"),
        ('[{"id": 1}\n{"id": 2}]', "chat.json:2:1: broken JSON: expected ',' or ']' between records"),
        ('[{"ü": 1}, {"id": 2}] x', "chat.json:1:23: broken JSON: text behind the array"),
        ('[{"id": 1}, {"id" 2},' + " " * 99 + "]", "chat.json:1:19: broken JSON: Expecting ':' delimiter"),
        ('{\n "id": 1\n}', "chat.json:1:2: broken JSON: .*; a file with one object must be an array"),
        ("[" * 100_000, "broken JSON: nested too deeply"),
    ],
)
def test_broken_files_are_named_with_line_and_column(content: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=complaint):
        open_records(tmp_path, content)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such data"):
        LlavaJson(LlavaJsonConfig(path=str(tmp_path / "x" / "chat.json")))
    with pytest.raises(DataError, match=r"chat.json: the data cannot be read: there is no such file"):
        LlavaJson(LlavaJsonConfig(path=str(tmp_path / "chat.json")))
    open_records(tmp_path, [GOOD])
    with pytest.raises(DataError, match="pictures: there is no such image folder; it belongs to"):
        LlavaJson(LlavaJsonConfig(path=str(tmp_path / "chat.json"), images=str(tmp_path / "pictures")))
    with pytest.raises(DataError, match="the file has no samples of multi turns"):
        open_records(tmp_path, [GOOD], turns="multi")
    with pytest.raises(ValueError, match="path must name a file"):
        LlavaJsonConfig(path="")


def test_a_file_that_changes_underneath_is_noticed(tmp_path: Path) -> None:
    data = open_records(tmp_path, [GOOD])
    (tmp_path / "chat.json").write_text(json.dumps([GOOD, GOOD]))
    with pytest.raises(DataError, match="the file was changed while it was in use"):
        data[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_records_are_found_wherever_reading_stops(
    chunk: int, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    records = [{"a": 'x"]}\\', "b": [1, {"ü": "😀"}]}, 12345, "text, ]", [], None, {"n": -1.5e3}, 7]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8")
    found = JsonRecords(path)
    assert [found[place] for place in range(len(found))] == records
    numbers = JsonRecords(path, keep=lambda record: isinstance(record, int))
    assert [numbers[place] for place in range(len(numbers))] == [12345, 7]


# --- the small stand-in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "length"), [("any", 2), ("single", 2), ("multi", 4)])
def test_the_small_stand_in(turns: Any, length: int, tmp_path: Path) -> None:
    config = LlavaJsonConfig(path="elsewhere.json", turns=turns, image_position="as_written").tiny(tmp_path)
    assert (config.turns, config.image_position) == (turns, "as_written")
    samples = list(LlavaJson(config))
    assert 16 <= len(samples) <= 32
    assert {len(sample.turns) for sample in samples} == {length}
    assert {len(sample.images) for sample in samples} == ({1, 2} if turns == "any" else {0, 1, 2})
    for sample in samples:
        for path in sample.images:
            assert Image.open(path).size > (16, 16)
    assert os.path.commonpath([config.path, str(tmp_path)]) == str(tmp_path)
