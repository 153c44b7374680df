"""``compatibility: original``: each difference, on and off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from parts import numbered, picture, sample, tiny_collator, tiny_model
from rich.console import Console
from world import write_world

from llava_kit import train
from llava_kit.contracts import Turn
from llava_kit.data import MicroBatch, make_collator
from llava_kit.errors import RecipeError
from llava_kit.recipe import load_recipe
from llava_kit_plugins.templates import Vicuna, VicunaConfig

QUIET = Console(quiet=True)
ALL = ("no_clipping", "micro_batch_mean", "mismatch")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def run(recipe: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of the first stage, all of whose steps are the same size."""
    changes = ["evaluate={}", "stages.tune=null", "stages.align.optimizer.max_grad_norm=1e-3"]
    made = train(recipe, [*changes, *overrides], run_folder=folder, console=QUIET)
    return [json.loads(line) for line in (made / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_what_the_key_takes(recipe: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe).compatibility == ()
    original = load_recipe(recipe, ["compatibility=original"])
    assert original.compatibility == ALL
    original.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == original
    assert load_recipe(recipe, ["compatibility=[mismatch]"]).compatibility == ("mismatch",)
    with pytest.raises(RecipeError, match="must be one of no_clipping, micro_batch_mean, mismatch, got 'mismach'"):
        load_recipe(recipe, ["compatibility=[mismach]"])


def test_gradients_are_not_clipped(recipe: Path, tmp_path: Path) -> None:
    clipped = run(recipe, tmp_path / "a")
    free = run(recipe, tmp_path / "b", "compatibility=[no_clipping]")
    null = run(recipe, tmp_path / "c", "stages.align.optimizer.max_grad_norm=null")
    losses = [[row["loss"] for row in rows] for rows in (clipped, free, null)]
    assert losses[1] == losses[2] != losses[0]


def test_the_loss_is_a_mean_of_means(recipe: Path, tmp_path: Path) -> None:
    """Micro-batches with one sample each: the mean of the samples' own means, whatever their lengths."""
    from llava_kit.loader import StageData
    from llava_kit.model import build_model

    loaded = load_recipe(recipe, ["stages.align.micro_batch_size=1"])
    model = build_model(loaded)
    stage = loaded.stages["align"]
    first = next(StageData(loaded, "align", stage, make_collator(loaded, model, stage)).batches(0))
    sums = [(loss.item(), count) for loss, count in (model(micro.batch) for micro in first)]
    assert len({count for _, count in sums}) > 1, "answers of different lengths, else there is no difference"
    pooled = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    of_means = sum(loss / count for loss, count in sums) / len(sums)
    one = "stages.align.micro_batch_size=1"
    assert run(recipe, tmp_path / "a", one)[0]["loss"] == pytest.approx(pooled, rel=1e-5)
    original = run(recipe, tmp_path / "b", one, "compatibility=[micro_batch_mean]")[0]["loss"]
    assert original == pytest.approx(of_means, rel=1e-5)
    assert abs(pooled - of_means) > 1e-4


@pytest.mark.parametrize(
    ("exchange", "drops"),
    [
        (("Why?", "So."), False),
        (("Why?", "So.", "And?", "No."), False),
        (("Why?", "", "And?", "No."), True),
        (("Why?", ""), True),
        (("Why?", "So</s>"), True),
        (("USER: a ASSISTANT: b", "So."), True),
        (("What is <unk>?", "So."), True),
        (("ASSISTANT:", "So."), False),
    ],
)
def test_which_samples_the_original_miscounts(exchange: tuple[str, ...], drops: bool) -> None:
    turns = [Turn("assistant" if place % 2 else "human", (text,)) for place, text in enumerate(exchange)]
    assert Vicuna(VicunaConfig()).original_drops(turns) is drops


def test_miscounted_samples_stay_but_teach_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    model = tiny_model(tmp_path)
    collator = tiny_collator(model)
    image = picture(tmp_path / "a.png", 0)
    samples = numbered(sample("good", [image], "Why?", "So."), sample("bad", [image], "Why?", "So", "<unk>", "No"))
    ours: MicroBatch = collator(samples)
    theirs = replace(collator, drops=collator.template.original_drops)(samples)  # type: ignore[attr-defined]
    assert ours.batch is not None and theirs.batch is not None
    good, bad = ours.batch.plan.label_counts
    assert bad > good > 0
    assert theirs.batch.plan.label_counts == (good, 0)
    assert theirs.batch.plan.lengths == ours.batch.plan.lengths
    assert not theirs.rejected
    loss, count = model(theirs.batch)
    alone, alone_count = model(collator(samples[:1]).batch)
    assert count == alone_count
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    only_bad = replace(collator, drops=collator.template.original_drops)(samples[1:])  # type: ignore[attr-defined]
    assert model(only_bad.batch)[0].item() == 0.0, "no labels, no loss, and no division by nothing"


def test_samples_that_are_too_long_are_not_checked_by_the_original(tmp_path: Path) -> None:
    from dataclasses import replace

    model = tiny_model(tmp_path)
    long = sample("long", [], "What is <unk>?", "So it is. " * 20)
    dropping = Vicuna(VicunaConfig()).original_drops
    for max_length, learned in ((300, True), (2000, False)):
        collator = replace(tiny_collator(model, max_length), drops=dropping)
        assert any(label != -100 for label in collator.encode(long).sequence.tokens.labels) is learned
