"""Whole runs: both stages, killed and resumed, with wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from world import write_world

from llava_kit import load_model, train
from llava_kit.checkpoint import sha256
from llava_kit.contracts import GenerateOptions
from llava_kit.errors import DataError, DivergedError, ModelError, RecipeError, ResourceError
from llava_kit.losses import next_token_loss
from llava_kit.model import build_model

QUIET = Console(quiet=True)
HARNESS = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train(recipe, run_folder=folder, console=QUIET)


def rows(run: Path) -> Iterator[dict[str, object]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)


def test_a_run_folder_holds_what_was_promised(run: Path) -> None:
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "data_report.json", "report.html", "README.md",
        "align/model.safetensors", "align/stage.json", "tune/model.safetensors", "tune/stage.json",
        "tune/pictures.jsonl", "tune/pictures/0.png", "evaluation/summary.json",
        "evaluation/questions-align.jsonl", "evaluation/questions-tune.jsonl",
    }  # fmt: skip
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert set(summary["questions"]) == {"align", "tune"}
    assert {"accuracy", "accuracy_shuffled_images", "count", "failed"} <= set(summary["questions"]["tune"])
    assert summary["questions"]["tune"]["count"] == 3


def test_the_splice_that_was_chosen_is_written_down(run: Path) -> None:
    expected = {"backend": "auto", "chosen": {"cpu": "reference"}}
    assert json.loads((run / "environment.json").read_text())["splice"] == expected
    saved = run / "align" / "checkpoints" / "step-2" / "state.json"
    assert json.loads(saved.read_text())["splice"] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused without a GPU can run on this one")
def test_a_splice_that_is_not_there_ends_the_run_before_it_begins(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"splice\.backend: 'triton' is not available"):
        train(recipe, ["splice.backend=triton"], run_folder=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_metrics_have_one_row_a_step_and_the_validation_loss(run: Path) -> None:
    steps = [(row["stage"], row["step"]) for row in rows(run) if "loss" in row]
    assert steps == [(stage, step) for stage in ("align", "tune") for step in (1, 2, 3, 4)]
    first = next(rows(run))
    assert set(first) == {
        "stage", "step", "loss", "lr", "grad_norm", "samples", "tokens", "supervised_tokens", "seconds",
    }  # fmt: skip
    assert first["samples"] == 4
    assert [row["step"] for row in rows(run) if "validation_loss" in row] == [2, 4]


def test_only_what_a_stage_trains_changes(run: Path, recipe: Path) -> None:
    from safetensors.torch import load_file

    align, tune = (load_file(run / stage / "model.safetensors") for stage in ("align", "tune"))
    assert set(align) == {"connector.layers.0.weight", "connector.layers.0.bias"}
    assert set(align) < set(tune) and all(name.startswith(("connector.", "language_model.")) for name in tune)


def test_a_finished_run_answers(run: Path) -> None:
    loaded = load_model(run)
    assert loaded.stage == "tune"
    answer = loaded.conversation(GenerateOptions(max_new_tokens=3)).ask("Hello?")
    assert answer.new_tokens <= 3
    assert load_model(run, "align").stage == "align"
    with pytest.raises(ModelError, match=r"has no finished stage 'algn'; did you mean 'align'?"):
        load_model(run, "algn")


@pytest.mark.parametrize(
    "kills", [["align:1"], ["align:4", "tune:1"], ["align:3", "tune:3"], ["tune:2:saved"], ["tune:2:pictures"]]
)
def test_killed_at_any_step_and_resumed_a_run_ends_the_same(
    run: Path, recipe: Path, tmp_path: Path, kills: list[str]
) -> None:
    """kill -9 in either stage; weights and everything measured are byte-identical in the end."""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, HARNESS, recipe, folder, *kills], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * len(kills) + ["0"]
    for stage in ("align", "tune"):
        assert sha256(folder / stage / "model.safetensors") == sha256(run / stage / "model.safetensors")
    assert without_times(folder) == without_times(run)
    for name in ("data_report.json", "evaluation/summary.json", "tune/pictures.jsonl"):
        assert (folder / name).read_text() == (run / name).read_text()


def without_times(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(run)]


def test_the_cut_into_micro_batches_changes_nothing(run: Path, recipe: Path, tmp_path: Path) -> None:
    other = train(recipe, ["stages.align.micro_batch_size=1"], run_folder=tmp_path / "run", console=QUIET)
    for ours, theirs in zip(rows(other), rows(run), strict=True):
        if ours["stage"] == "align":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_loader_processes_change_nothing(run: Path, recipe: Path, tmp_path: Path) -> None:
    other = train(recipe, ["workers=2", "saving.every=0"], run_folder=tmp_path / "run", console=QUIET)
    assert without_times(other) == without_times(run)


def test_bf16_with_checkpointed_activations_learns_the_same(run: Path, recipe: Path, tmp_path: Path) -> None:
    """bf16 keeps 8 bits of every product, so losses agree to about one part in a hundred."""
    changes = [f"stages.{stage}.{change}" for stage in ("align", "tune")
               for change in ("precision=bf16", "gradient_checkpointing=true")]  # fmt: skip
    other = train(recipe, changes, run_folder=tmp_path / "run", console=QUIET)
    for ours, theirs in zip(rows(other), rows(run), strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
            assert ours["loss"] != theirs["loss"], "it was really computed otherwise"


def test_a_folder_with_a_run_is_not_written_over(run: Path, recipe: Path) -> None:
    before = sha256(run / "metrics.jsonl")
    with pytest.raises(RecipeError, match="holds a run already; --resume goes on with it, --run DIR starts another"):
        train(recipe, run_folder=run, console=QUIET)
    with pytest.raises(RecipeError, match=r"stages.tune.optimizer.lr: was 0.001 when this run began, now it is 0.1"):
        train(recipe, ["stages.tune.optimizer.lr=0.1"], run_folder=run, resume=True, console=QUIET)
    assert sha256(run / "metrics.jsonl") == before


def test_a_damaged_checkpoint_is_passed_over_and_named(recipe: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    subprocess.run([sys.executable, HARNESS, recipe, folder, "--stop", "tune:4"], check=True, capture_output=True)
    newest = folder / "tune" / "checkpoints" / "step-2" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(recipe, run_folder=folder, resume=True, console=QUIET)
    assert "step-2: model.safetensors does not match its checksum; passed over" in (folder / "events.jsonl").read_text()
    assert sha256(folder / "tune" / "model.safetensors") == sha256(run / "tune" / "model.safetensors")


def test_a_damaged_finished_stage_is_refused(recipe: Path, run: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(run, tmp_path / "run"))
    with (folder / "tune" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(ModelError, match="does not match its checksum"):
        load_model(folder)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_stops_before_the_weights_change(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    models, calls = [], []
    monkeypatch.setattr("llava_kit.run.build_model", lambda recipe: models.append(build_model(recipe)) or models[0])

    def poisoned(hidden: torch.Tensor, labels: torch.Tensor, logits: object) -> torch.Tensor:
        calls.append({name: p.detach().clone() for name, p in models[0].named_parameters()})
        loss = next_token_loss(hidden, labels, logits)  # type: ignore[arg-type]
        if len(calls) < 6:  # the second micro-batch of the third step
            return loss
        return loss * float("nan") if where == "loss" else loss + (hidden.sum() * 0.0).sqrt()

    monkeypatch.setattr("llava_kit.model.next_token_loss", poisoned)
    with pytest.raises(DivergedError) as caught:
        train(recipe, run_folder=tmp_path / "run", console=QUIET)
    message = str(caught.value)
    assert message.startswith("stage align, step 3: loss ")
    assert "the weights were left as before this step (samples " in message
    assert "lower stages.align.optimizer.lr" in message
    assert all(torch.equal(p, calls[-1][name]) for name, p in models[0].named_parameters())
    assert len(list(rows(tmp_path / "run"))) == 2


def test_broken_images_are_set_aside_counted_and_named(tmp_path: Path) -> None:
    recipe = write_world(tmp_path)
    pictures = sorted(path for path in tmp_path.rglob("*.png"))
    data = next(path for path in tmp_path.glob("**/*.json") if "conversations" in path.read_text())
    records = json.loads(data.read_text())
    victim = next(record for record in records if isinstance(record.get("image"), str))
    broken = next(path for path in pictures if path.name == Path(victim["image"]).name)
    broken.write_bytes(broken.read_bytes()[:60])
    users = [r["id"] for r in records if broken.name in json.dumps(r.get("image", ""))]
    changes = ["stages.align.steps=null", "stages.align.epochs=1", "evaluate={}", "stages.tune.validation.every=0"]
    run = train(recipe, changes, run_folder=tmp_path / "run", console=QUIET)
    report = json.loads((run / "data_report.json").read_text())["align"]
    assert report["seen"] == report["used"] + sum(reason["count"] for reason in report["reasons"].values())
    listed = [sample for reason in report["reasons"].values() for sample in reason["samples"]]
    assert sorted(sample["id"] for sample in listed) == sorted(users)
    assert all(str(broken) in sample["where"] for sample in listed)
    with pytest.raises(DataError, match=r"samples cannot be used, more than the 0 tolerated"):
        train(recipe, [*changes, "limits.max_bad_samples=0"], run_folder=tmp_path / "strict", console=QUIET)


def test_smoke_runs_the_full_size_recipe_with_tiny_parts(tmp_path: Path) -> None:
    run = train("llava_v1", smoke=True, run_folder=tmp_path / "run", console=QUIET)
    assert {row["stage"] for row in rows(run)} == {"align", "instruct"}


def test_the_full_size_recipe_runs_on_tiny_checkpoints_in_the_real_formats(tmp_path: Path) -> None:
    """Vicuna as sharded .bin files, a chat.json, an image folder: only paths, sizes and steps are changed."""
    from test_weights import write_bin

    from llava_kit_plugins.clip import ClipConfig
    from llava_kit_plugins.llava_json import LlavaJsonConfig

    write_bin(tmp_path)
    data = LlavaJsonConfig(path="x", images="x").tiny(tmp_path)
    records = json.loads(Path(data.path).read_text("utf-8"))
    for record in records[::2]:
        record["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "That is all."}]
    Path(data.path).write_text(json.dumps(records), "utf-8")
    changes = [
        "workers=1",
        f"model.vision_encoder.folder={ClipConfig().tiny(tmp_path).folder}",
        f"model.language_model.model={tmp_path / 'language_model'}",
        "model.language_model.architecture=null",
        "prepare={}",
    ]
    for stage, sources in (("align", ["captions"]), ("instruct", ["conversations", "single_turns"])):
        changes += [
            f"stages.{stage}.{change}" for change in ("epochs=null", "steps=2", "batch_size=4", "micro_batch_size=2")
        ]
        for source in sources:
            changes.append(f"stages.{stage}.data.{source}.path={data.path}")
            changes.append(f"stages.{stage}.data.{source}.images={data.images}")
    run = train("llava_v1", changes, run_folder=tmp_path / "run", console=QUIET)
    assert len(list(rows(run))) == 4


def test_data_without_a_usable_sample_is_no_training(tmp_path: Path) -> None:
    recipe = write_world(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text('[{"a": 1}]', "utf-8")
    with pytest.raises(DataError, match="more than the 0 tolerated"):
        train(recipe, [f"stages.align.data.chat.path={bad}"], run_folder=tmp_path / "run", console=QUIET)


def test_changed_data_is_not_resumed_with(tmp_path: Path) -> None:
    recipe = write_world(tmp_path)
    folder = tmp_path / "run"
    subprocess.run([sys.executable, HARNESS, recipe, folder, "--stop", "tune:3"], check=True, capture_output=True)
    data = next(path for path in tmp_path.glob("**/chat.json"))
    data.write_text(data.read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(DataError, match=r"stages.tune.data.chat: the data has changed since this run began"):
        train(recipe, run_folder=folder, resume=True, console=QUIET)


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path: Path) -> None:
    recipe = write_world(tmp_path)
    with pytest.raises(DataError):
        train(recipe, ["stages.align.data.chat.path=nowhere.json"], run_folder=tmp_path / "run", console=QUIET)
    with pytest.raises(ResourceError, match="trackers"):
        train(recipe, ["trackers=[no_such_tracker]"], run_folder=tmp_path / "run", console=QUIET)
    train(recipe, run_folder=tmp_path / "run", console=QUIET)


def test_a_frozen_stage_in_bf16_does_not_round_what_a_later_one_trains(run: Path, recipe: Path, tmp_path: Path) -> None:
    """The language model is stored in bf16 while frozen; the next stage starts from the checkpoint all the same."""
    from safetensors.torch import load_file

    changes = ["stages.align.precision=bf16", "stages.tune.optimizer.lr=1e-12", "stages.tune.steps=1"]
    other = train(recipe, changes, run_folder=tmp_path / "run", console=QUIET)
    tuned = load_file(other / "tune" / "model.safetensors")
    loaded = load_model(run, "align")
    original = {name: p for name, p in loaded.model.named_parameters() if name.startswith("language_model.")}
    for name, parameter in original.items():
        torch.testing.assert_close(tuned[name], parameter.data, rtol=0, atol=1e-9)
    assert any((p - p.bfloat16().float()).abs().max() > 1e-6 for p in original.values()), "bf16 would have shown"


def test_what_an_earlier_stage_trained_is_carried_along_exactly(recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    changes = ["stages.tune.trainable={language_model: all}", "stages.tune.precision=bf16"]
    run = train(recipe, changes, run_folder=tmp_path / "run", console=QUIET)
    aligned, tuned = (load_file(run / stage / "model.safetensors") for stage in ("align", "tune"))
    assert all(torch.equal(aligned[name], tuned[name]) for name in aligned)


def test_a_run_can_be_used_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = tmp_path / "world"
    world.mkdir()
    recipe = write_world(world)
    text = recipe.read_text("utf-8").replace(str(world), "${data_root}")
    recipe.write_text(f"data_root: ./world\n{text}", "utf-8")
    monkeypatch.chdir(tmp_path)
    run = train(recipe, ["stages.tune=null"], run_folder=tmp_path / "run", console=QUIET)
    monkeypatch.chdir("/")
    assert load_model(run).stage == "align"
