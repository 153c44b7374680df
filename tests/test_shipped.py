"""The shipped recipes say what was published, and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from llava_kit import train
from llava_kit.inspection import inspect_recipe
from llava_kit.recipe import load_recipe

QUIET = Console(quiet=True)
STEPS = {
    "llava_v1_5": {"align": (2_181, 66), "instruct": (5_198, 156)},
    "llava_v1_5_13b": {"align": (2_181, 66), "instruct": (5_198, 156)},
    "llava_v1_5_lora": {"align": (2_181, 66), "instruct": (5_198, 156)},
    "llava_lightning": {"align": (4_361, 131), "instruct": (625, 19)},
    "scienceqa": {"align": (4_652, 140), "scienceqa": (4_776, 144)},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_and_warm_up(name: str) -> None:
    found = {}
    for key, stage in load_recipe(name).stages.items():
        steps = stage.total_steps(stage.epoch_samples())
        found[key] = (steps, stage.schedule.warmup(steps))
    assert found == STEPS[name]


@pytest.mark.parametrize("name", ["llava_v1_5", "llava_v1_5_13b", "llava_v1_5_lora"])
def test_llava_1_5_as_published(name: str) -> None:
    recipe = load_recipe(name)
    align, instruct = recipe.stages["align"], recipe.stages["instruct"]
    assert (recipe.model.connector.name, recipe.model.connector.config.depth) == ("mlp", 2)
    assert (align.optimizer.lr, align.batch_size, align.template.name) == (1e-3, 256, "plain")
    assert (align.image_aspect, align.order) == ("crop", "shuffled")
    assert (instruct.batch_size, instruct.template.name, instruct.max_length) == (128, "vicuna_v1", 2048)
    assert (instruct.image_aspect, instruct.order) == ("pad", "modality_length")
    assert (align.optimizer.weight_decay, instruct.optimizer.weight_decay) == (0, 0)
    assert instruct.optimizer.lr == (2e-4 if name.endswith("lora") else 2e-5)


def test_the_lora_recipe_as_published() -> None:
    stage = load_recipe("llava_v1_5_lora").stages["instruct"]
    assert stage.lora is not None
    assert (stage.lora.r, stage.lora.alpha, stage.lora.dropout, stage.lora.targets) == (128, 256, 0.05, ())
    assert stage.optimizer.component_lr == {"connector": 2e-5}
    assert stage.trainable == {"connector": ("*",), "language_model": ("*.lora_*",)}


def test_sizes_of_llava_1_5_without_weights() -> None:
    plan = inspect_recipe(load_recipe("llava_v1_5_lora"))
    assert plan.image is not None
    assert plan.image.tokens == 576
    connector = next(part for part in plan.parts if part.component == "connector")
    assert connector.parameters == 20_979_712
    adapters = (plan.stages[1].trainable or {})["language_model"]
    # r × (rows + columns) of q k v o (4096 + 4096) and gate up down (4096 + 11008), in 32 blocks
    assert adapters == 32 * 128 * (4 * 8192 + 3 * 15104) == 319_815_680


def test_thirteen_billion_without_weights() -> None:
    plan = inspect_recipe(load_recipe("llava_v1_5_13b"))
    assert {part.component: part.parameters for part in plan.parts}["connector"] == 31_467_520


@pytest.mark.parametrize("name", ["llava_v1_5", "llava_v1_5_lora", "llava_lightning", "scienceqa"])
def test_each_runs_with_tiny_parts(name: str, tmp_path: Path) -> None:
    run = train(name, smoke=True, run_folder=tmp_path / "run", console=QUIET)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == [stage for stage in STEPS[name] for _ in range(4)]
