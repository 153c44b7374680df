"""What preview and check-data show of samples, good and bad."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from surface import record, write_data, write_parts, write_recipe

from llava_kit.contracts import IGNORE, IMAGE_TOKEN
from llava_kit.errors import DataError, ModelError, RecipeError
from llava_kit.preview import Preview, check_data, preview, render, render_check
from llava_kit.recipe import Recipe, load_recipe

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def recipe_over(parts: Path, records: list[dict[str, Any]], **stage: Any) -> Recipe:
    write_data(parts, records)
    return load_recipe(write_recipe(parts, **stage))


def shown(renderable: Any, width: int = 100) -> str:
    out = StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


def one(parts: Path, only: dict[str, Any], **stage: Any) -> Preview:
    (found,) = preview(recipe_over(parts, [only], **stage), "align", 5)
    return found


def test_ids_and_labels_before_images_take_their_rows(parts: Path) -> None:
    found = one(parts, record("s1", answer="red"))
    assert found.id == "s1" and found.source == "chat[0]"
    assert found.input_ids.count(IMAGE_TOKEN) == 1
    assert len(found.labels) == len(found.input_ids)
    # one token a character: " red" and the end token are learned
    assert [label for label in found.labels if label != IGNORE] == found.input_ids[-5:]
    assert found.expanded_length == len(found.input_ids) - 1 + 16
    assert found.truncated is False and found.problems == []
    assert list(found.to_dict()) == ["id", "input_ids", "labels", "expanded_length", "truncated", "problems"]


def test_spans_are_the_whole_conversation_in_order(parts: Path) -> None:
    found = one(parts, record("s1", answer="red"))
    assert [(span.kind, span.text) for span in found.spans] == [
        ("context", f"<s> {SYSTEM} USER: "),
        ("image", "‹image ×16›"),
        ("context", "\nwhat? ASSISTANT:"),
        ("trained", " red</s>"),
    ]
    assert sum(span.rows for span in found.spans) == found.expanded_length


def test_what_is_cut_off_is_shown_as_such(parts: Path) -> None:
    whole = one(parts, record("s1", answer="a long answer"))
    found = one(parts, record("s1", answer="a long answer"), max_length=whole.expanded_length - 5)
    assert found.truncated and found.expanded_length == whole.expanded_length - 5
    assert found.input_ids == whole.input_ids[:-5]
    assert [span.text for span in found.spans if span.kind == "cut off"] == ["swer</s>"]
    text = shown(render(found))
    assert "5 cut off" in text and "swer</s>" in " ".join(text.split())


def test_samples_come_in_the_order_of_the_file_from_every_source_in_turn(parts: Path) -> None:
    write_data(parts / "other", [record("x1", "hi")])
    write_data(parts, [record(f"s{number}", "hi") for number in range(3)])
    path = str(parts / "chat.json")
    other = str(parts / "other" / "chat.json")
    data = {"one": {"format": "llava_json", "path": path}, "two": {"format": "llava_json", "path": other}}
    recipe = load_recipe(write_recipe(parts, data=data))
    assert [found.id for found in preview(recipe, "align", 99)] == ["s0", "x1", "s1", "s2"]
    assert [found.id for found in preview(recipe, "align", 2)] == ["s0", "x1"]


def test_a_sample_that_cannot_be_used_says_why(parts: Path) -> None:
    found = one(parts, record("s1", image="gone.jpg"))
    assert found.input_ids == [] and found.expanded_length == 0
    (problem,) = found.problems
    assert "gone.jpg: there is no such image" in problem
    assert "there is no such image" in " ".join(shown(render(found)).split())


def test_the_footer_counts_rows(parts: Path) -> None:
    found = one(parts, record("s1", answer="red"))
    text = shown(render(found))
    context = found.expanded_length - 16 - 5
    assert f"{found.expanded_length} rows: 5 trained  {context} context  16 image" in text


def test_hostile_texts_do_not_reach_the_terminal(parts: Path) -> None:
    text = shown(render(one(parts, record("s1", "hi", answer="\x1b[31mred [bold]x[/bold]"))), 400)
    assert "\x1b" not in text and "\\x1b[31mred [bold]x[/bold]" in text


def test_unknown_stages_are_named(parts: Path) -> None:
    recipe = recipe_over(parts, [record("s1")])
    with pytest.raises(RecipeError, match=r"--stage: the recipe has no stage 'alin'; did you mean 'align'\?"):
        list(preview(recipe, "alin", 1))


@pytest.mark.parametrize(
    ("override", "error"),
    [("model.vision_encoder.folder=nowhere", ModelError), ("stages.align.data.chat.path=nowhere.json", DataError)],
)
def test_what_is_not_prepared_yet_is_said(parts: Path, override: str, error: type[Exception]) -> None:
    write_data(parts, [record("s1")])
    settings = "prepare.more={name: hub_data, folder: x}"
    with pytest.raises(error, match=r"`llava-kit train` prepares it first \(more\)"):
        list(preview(load_recipe(write_recipe(parts), [override, settings]), "align", 1))
    with pytest.raises(error) as caught:
        list(preview(load_recipe(write_recipe(parts), [override]), "align", 1))
    assert "prepares" not in str(caught.value)


# --- all of the data -------------------------------------------------------------------------------------------------

BAD = [
    record("fine"),
    record("missing", image="gone.jpg"),
    record("broken", image="broken.jpg"),
    record("long", "x" * 300),
    record("hi", "hi", "hello"),
]


def test_every_sample_is_accounted_for(parts: Path) -> None:
    (parts / "images").mkdir(exist_ok=True)
    (parts / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    check = check_data(recipe_over(parts, BAD), Console(file=StringIO()))
    account = check.stages["align"]
    assert (account.seen, account.used) == (5, 2)
    assert {sample["id"] for sample in account.samples} == {"missing", "broken", "long"}
    assert check.to_dict()["align"]["tolerated"] == 1
    text = " ".join(shown(render_check(check), 200).split())
    assert "align │ 5 │ 2 │ 0 │ 3 │ 1" in text
    assert re.search(r"missing: \S*gone.jpg: there is no such image", text)


def test_more_than_the_recipe_tolerates_is_an_error(parts: Path) -> None:
    recipe = recipe_over(parts, BAD)
    check = check_data(recipe, Console(file=StringIO()))
    with pytest.raises(DataError, match=r"align.data: 3 of 5 samples cannot be used; the recipe tolerates 1: mend"):
        check.refuse_over_limits()
    generous = load_recipe(write_recipe(parts), ["limits.max_bad_fraction=0.6"])
    check_data(generous, Console(file=StringIO())).refuse_over_limits()  # 3 of 5


def test_cut_samples_are_counted(parts: Path) -> None:
    length = one(parts, record("s1", answer="a long answer")).expanded_length
    recipe = recipe_over(parts, [record("s1", answer="a long answer"), record("s2", "hi")], max_length=length - 1)
    assert check_data(recipe, Console(file=StringIO())).stages["align"].truncated == 1
