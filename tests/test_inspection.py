"""The plan of a recipe, from shapes alone."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from surface import record, write_data, write_parts, write_recipe
from torch import nn

from llava_kit import inspection
from llava_kit.errors import ModelError, RecipeError
from llava_kit.estimates import Stack
from llava_kit.inspection import Inspection, check_parts, inspect_recipe
from llava_kit.printing import one_line, printable, short_bytes, short_count
from llava_kit.recipe import Recipe, load_recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    write_data(folder, [record(f"s{number}") for number in range(10)])
    return folder


@pytest.fixture
def recipe(parts: Path) -> Recipe:
    return load_recipe(write_recipe(parts))


def changed(parts: Path, *overrides: str, **stage: Any) -> Recipe:
    return load_recipe(write_recipe(parts, **stage), overrides)


@pytest.fixture(scope="module")
def llava() -> Inspection:
    return inspect_recipe(load_recipe("llava_v1"))


def test_the_real_sizes_are_known_without_weights(llava: Inspection) -> None:
    vision, connector, language = llava.parts
    assert (vision.width, connector.parameters, language.width) == (1024, 4_198_400, 4096)
    assert language.parameters == 6_738_415_616
    assert llava.image is not None
    assert (llava.image.grid, llava.image.prefix, llava.image.tokens) == ((16, 16), 1, 256)
    assert llava.image.pixels == (1, 3, 224, 224)


def test_the_steps_of_the_paper(llava: Inspection) -> None:
    align, instruct = llava.stages
    assert (align.samples, align.steps, align.warmup) == (595_375, 4_652, 140)
    assert (instruct.samples, instruct.epochs, instruct.steps, instruct.warmup) == (157_712, 3, 14_787, 444)


def test_what_trains_and_what_is_frozen(llava: Inspection) -> None:
    align, instruct = llava.stages
    assert align.trainable == {"vision_encoder": 0, "connector": 4_198_400, "language_model": 0}
    assert align.frozen == 303_966_208 + 6_738_415_616
    assert instruct.trainable == {"vision_encoder": 0, "connector": 4_198_400, "language_model": 6_738_415_616}


def test_memory_is_the_sum_of_its_rules(llava: Inspection) -> None:
    align, instruct = (stage.memory for stage in llava.stages)
    assert align is not None and instruct is not None
    # frozen in bf16, the connector in fp32 with autocast's bf16 copy
    assert align.weights == 2 * (303_966_208 + 6_738_415_616) + 6 * 4_198_400
    assert (align.gradients, align.optimizer) == (4 * 4_198_400, 8 * 4_198_400)
    assert instruct.gradients == 4 * (4_198_400 + 6_738_415_616)
    assert instruct.total == sum((instruct.weights, instruct.gradients, instruct.optimizer)) + (
        instruct.activations + instruct.logits
    )
    # 2048 labelled rows of 32,000 values: fp32 logits and their gradients, and the bf16 product
    assert align.logits == 2048 * 32_000 * (4 + 4 + 2)


def test_arithmetic_counts_every_pass(llava: Inspection) -> None:
    align, instruct = llava.stages
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096)
    eye = 2 * 303_966_208 * 257
    bridge = 6 * 4_198_400 * 256
    # forward, backward to the inputs, and the forward again that checkpointing costs; stage two adds the weights' own
    assert align.flops_per_sample == 6 * layers * 2048 + eye + bridge
    assert instruct.flops_per_sample == 8 * layers * 2048 + eye + bridge


def test_activations_of_a_stack() -> None:
    # two layers of 8 × 8 values and no bias: 64 parameters of width 8
    stack = Stack.of(nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2))), 8)
    assert stack == Stack(layers=2, parameters=64, width=8)
    assert stack.bytes_per_token(2, trained=False, checkpointing=False) == 2 * 2 * 8
    assert stack.bytes_per_token(4, trained=True, checkpointing=False) == 4 * 2 * (8 + 32)
    assert stack.bytes_per_token(2, trained=True, checkpointing=True) == 2 * (2 * 8 + 40)


def test_data_that_is_there_is_counted(parts: Path) -> None:
    (stage,) = inspect_recipe(changed(parts, samples=600, validation={"samples": 2})).stages
    assert (stage.declared, stage.samples, stage.steps) == (600, 8, 2)


def test_without_data_the_recipe_counts(parts: Path) -> None:
    missing = "stages.align.data.chat.path=nowhere.json"
    (stage,) = inspect_recipe(changed(parts, missing, samples=600, epochs=2)).stages
    assert (stage.samples, stage.steps) == (600, 300)
    (stage,) = inspect_recipe(changed(parts, missing)).stages
    assert (stage.samples, stage.steps, stage.warmup) == (None, None, None)


def test_nothing_is_loaded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: pytest.fail("weights were read"))
    assert inspect_recipe(recipe).parts[0].parameters > 0


def test_the_plan_as_plain_values(recipe: Recipe) -> None:
    plain = inspect_recipe(recipe).to_dict()
    (stage,) = plain["stages"]
    assert plain["image"]["tokens"] == 16
    assert stage["trainable_total"] == 32 * 64 + 64
    assert stage["memory"]["total"] == sum(size for name, size in stage["memory"].items() if name != "total")


def test_the_plan_fits_a_narrow_terminal(llava: Inspection) -> None:
    out = StringIO()
    for table in inspection.render(llava):
        Console(file=out, width=80).print(table)
    text = out.getvalue()
    for number in ("595,375", "4,652", "140", "14,787", "444", "4,198,400", "6,742,614,016", "256 tokens"):
        assert number in " ".join(text.split()), number
    assert "…" not in text


# --- what does not fit -----------------------------------------------------------------------------------------------


def complaints(recipe: Recipe) -> list[str]:
    return [str(problem) for problem in check_parts(recipe)]


def test_a_good_recipe_has_no_problems(recipe: Recipe) -> None:
    assert complaints(recipe) == []


def test_a_picture_must_leave_room_for_words(parts: Path) -> None:
    (complaint,) = complaints(changed(parts, max_length=16))
    assert "stages.align.max_length: one picture takes 16 rows, which leaves no room for words in 16" in complaint
    assert complaint.endswith("raise it well above 16")


def test_fp16_needs_a_gpu(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (complaint,) = complaints(changed(parts, precision="fp16"))
    assert "precision: fp16 needs a GPU, and there is none; use bf16 or fp32" in complaint


def test_a_template_needs_its_tokens(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_kit_plugins.templates import Vicuna

    monkeypatch.setattr(Vicuna, "required_tokens", lambda _: ("<|other|>",))
    (complaint,) = complaints(changed(parts))
    assert "stages.align.template" in complaint
    assert "needs the special token '<|other|>', which it lacks" in complaint


def test_a_pattern_must_match_something(parts: Path) -> None:
    recipe = changed(parts, trainable={"connector": ["lyers.*"]})
    (complaint,) = complaints(recipe)
    assert "stages.align.trainable.connector: 'lyers.*' matches no parameter" in complaint
    with pytest.raises(RecipeError, match=r"'lyers\.\*' matches no parameter"):
        inspect_recipe(recipe)


def test_a_language_model_must_be_able_to_checkpoint(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_kit_plugins.causal_lm import CausalLanguageModel

    monkeypatch.delattr(CausalLanguageModel, "gradient_checkpointing")
    (complaint,) = complaints(changed(parts, gradient_checkpointing=True))
    assert "gradient_checkpointing: 'causal_lm' cannot do that; set it to false" in complaint


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"out_dim": 7}, "model.connector: gives rows of width 7, the language model reads 64"),
        ({"in_dim": 99}, "model.connector: encoder and connector do not fit together: "),
    ],
)
def test_widths_are_held_against_each_other(recipe: Recipe, wrong: dict[str, int], complaint: str) -> None:
    slot = recipe.model.connector
    build = slot.component.build
    other = replace(slot.component, build=lambda config, **widths: build(config, **(widths | wrong)))
    (found,) = complaints(with_connector(recipe, replace(slot, component=other)))
    assert found.startswith(complaint)


def with_connector(recipe: Recipe, slot: Any) -> Recipe:
    return replace(recipe, model=replace(recipe.model, connector=slot))


def test_an_encoder_must_keep_to_its_layout(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_kit_plugins.clip import ClipEncoder

    forward = ClipEncoder.forward
    monkeypatch.setattr(ClipEncoder, "forward", lambda self, pixels_NCHW: forward(self, pixels_NCHW)[:, 1:])
    (complaint,) = complaints(recipe)
    assert "gives features of shape [1, 16, 32], its layout and embed_dim say [1, 17, 32]" in complaint


def test_all_problems_come_together(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(complaints(changed(parts, max_length=16, precision="fp16"))) == 2


def test_parts_that_are_not_there_are_an_error(parts: Path) -> None:
    recipe = changed(parts, "model.vision_encoder.folder=nowhere")
    with pytest.raises(ModelError, match="nowhere"):
        inspect_recipe(recipe)
    assert len(complaints(recipe)) == 1


def test_parts_that_will_be_prepared_are_unknown(parts: Path) -> None:
    settings = "prepare.more={name: hub_data, folder: x}"
    recipe = changed(parts, "model.vision_encoder.folder=nowhere", settings)
    plan = inspect_recipe(recipe)
    assert plan.parts == () and "nowhere" in plan.unknown
    assert plan.stages[0].steps == 3  # ten samples by four
    assert check_parts(recipe, plan) == []
    out = StringIO()
    for table in inspection.render(plan):
        Console(file=out, width=80).print(table)
    assert "not known before `prepare` has run" in out.getvalue()


def test_numbers_read_well() -> None:
    assert [short_bytes(size) for size in (12, 8448, 655_360_000, 125_900_000_000)] == [
        "12 B",
        "8.4 kB",
        "655.4 MB",
        "125.9 GB",
    ]
    assert [short_count(number) for number in (140, 12_300, 4_198_400, 79.7e12)] == ["140", "12.3 k", "4.2 M", "79.7 T"]


def test_texts_cannot_steer_a_terminal() -> None:
    assert printable("a\x1b[31m\n\tb\u202e") == "a\\x1b[31m\n\tb\\u202e"
    assert one_line("a\n  b\x07") == "a b\\x07"
