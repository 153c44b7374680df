"""Adapters: what they compute, what trains, what is saved, and that a run with them ends the same after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import tiny_model
from rich.console import Console
from world import write_world

from llava_kit import load_model, train
from llava_kit.checkpoint import load_trained, sha256, trained_tensors
from llava_kit.contracts import GenerateOptions
from llava_kit.errors import ModelError, RecipeError, ResourceError
from llava_kit.exporting import export_model
from llava_kit.inspection import check_parts, inspect_recipe
from llava_kit.model import LlavaModel, add_adapters, set_precision, set_trainable
from llava_kit.recipe import LORA, Lora, load_recipe
from llava_kit_plugins.causal_lm import CausalLmConfig, build_causal_lm

QUIET = Console(quiet=True)
HARNESS = Path(__file__).with_name("killed_run.py")
STAGE_KEYS = """trainable: {connector: all, language_model: lora}
    lora: {r: 2, alpha: 8, dropout: 0.25}"""


class StageStub:
    """What of a stage is looked at here."""

    def __init__(self, **options: Any) -> None:
        self.lora = Lora(**options)
        self.trainable = {"connector": ("*",), "language_model": (LORA,)}


@pytest.fixture
def model(tmp_path: Path) -> LlavaModel:
    return tiny_model(tmp_path)


def adapt(model: LlavaModel, names: set[str] | None = None, **options: Any) -> set[str]:
    stage: Any = StageStub(**options)
    renamed = add_adapters(model, stage, 0)
    set_trainable(model, "tune", stage)
    return {renamed.get(name, name) for name in names or set()}


def test_an_adapter_adds_alpha_over_r_times_its_product(model: LlavaModel) -> None:
    lm: Any = model.language_model
    layer = lm.lm.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    before = layer(x)
    adapt(model, r=2, alpha=8, dropout=0.0)
    layer = lm.lm.model.layers[0].self_attn.q_proj
    assert torch.equal(layer(x), before), "an adapter starts as nothing"
    b = torch.randn(64, 2)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(b)
    expected = before + 8 / 2 * x @ layer.lora_A["default"].weight.T @ b.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_but_the_head_has_one_and_only_they_train(model: LlavaModel) -> None:
    adapt(model)
    trains = {name for name, parameter in model.language_model.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trains}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".lora_" in name for name in trains)
    assert len(trains) == 2 * 7 * 2, "A and B of seven layers in two blocks"
    assert all(parameter.requires_grad for parameter in model.connector.parameters())


def test_the_embedding_is_still_a_table_and_an_adapted_one_is_not(tmp_path: Path, model: LlavaModel) -> None:
    adapt(model)
    assert model.language_model.embedding_table() is not None
    lm: Any = model.language_model
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["embed_tokens"]), lm.lm, adapter_name="more")
    assert model.language_model.embedding_table() is None, "it must be called, so that its adapter counts"


def test_start_values_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first, second = tiny_model(tmp_path / "a"), tiny_model(tmp_path / "b")
    adapt(first)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    adapt(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_names_of_parameters_trained_before_follow(model: LlavaModel) -> None:
    old = {name for name, _ in model.named_parameters()}
    new = adapt(model, old)
    assert new == {name for name, _ in model.named_parameters() if ".lora_" not in name}
    assert len(trained_tensors(model, new)) == len(old), "none is lost when a stage's weights are written"


def test_frozen_weights_are_stored_in_half_and_adapters_in_full(model: LlavaModel) -> None:
    adapt(model)
    set_precision(model, "bf16")
    dtypes = {name: parameter.dtype for name, parameter in model.language_model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".lora_" not in name} == {torch.bfloat16}


def test_merging_changes_nothing_but_the_names(model: LlavaModel) -> None:
    lm: Any = model.language_model
    names = [name for name, _ in lm.named_parameters()]
    adapt(model)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    lm.eval()
    embeds = torch.randn(2, 5, 64)
    expected = lm.hidden(embeds)
    lm.merge_lora()
    assert [name for name, _ in lm.named_parameters()] == names
    torch.testing.assert_close(lm.hidden(embeds), expected, rtol=1e-4, atol=1e-5)
    lm.merge_lora()  # nothing to do


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"targets": ("q_prj",)}, "lora.targets: q_prj: no linear layer of that name; there is down_proj, gate_proj"),
        ({"r": 4}, "other adapters of an earlier stage already"),
    ],
)
def test_what_cannot_be_added_says_why(model: LlavaModel, options: dict[str, Any], complaint: str) -> None:
    if "r" in options:
        adapt(model, r=2)
    with pytest.raises(RecipeError) as caught:
        adapt(model, **options)
    assert complaint in str(caught.value)


def test_a_language_model_without_adapters_is_named(model: LlavaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(model.language_model), "add_lora")
    with pytest.raises(RecipeError, match="CausalLanguageModel cannot have adapters"):
        adapt(model)


def test_without_peft_the_extra_is_named(model: LlavaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ResourceError, match=r"adapters need peft, which is missing; pip install 'llava-kit\[lora\]'"):
        adapt(model)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_world(tmp_path_factory.mktemp("world"))
    text = path.read_text("utf-8").replace("trainable: [connector, language_model]", STAGE_KEYS)
    path.write_text(text.replace("tune:\n", "tune:\n    order: modality_length\n"), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe, run_folder=tmp_path_factory.mktemp("runs") / "whole", console=QUIET)


def test_a_stage_saves_adapters_and_connector_only(run: Path) -> None:
    from safetensors.torch import load_file

    saved = load_file(run / "tune" / "model.safetensors")
    assert all(name.startswith("connector.") or ".lora_" in name for name in saved)
    assert any(name.startswith("connector.") for name in saved)
    assert any(".lora_B" in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    newest = run / "tune" / "checkpoints" / "step-2" / "model.safetensors"
    assert set(load_file(newest)) == set(saved)


def test_a_finished_run_is_loaded_with_its_adapters(run: Path) -> None:
    loaded = load_model(run)
    adapters = {name: p for name, p in loaded.model.named_parameters() if ".lora_B" in name}
    assert any(parameter.abs().sum() > 0 for parameter in adapters.values())
    assert loaded.conversation(GenerateOptions(max_new_tokens=3)).ask("Hello?").new_tokens <= 3
    before = load_model(run, "align")
    assert not any(".lora_" in name for name, _ in before.model.named_parameters())
    with pytest.raises(ModelError, match="the model has no such parameter"):
        load_trained(before.model, run / "tune" / "model.safetensors")


def test_adapters_and_the_stage_s_image_aspect_are_part_of_an_export(recipe: Path, tmp_path: Path) -> None:
    """The parity check holds the exported weights to the run's answers, adapters included."""
    run = train(recipe, ["stages.tune.image_aspect=pad"], run_folder=tmp_path / "run", console=QUIET)
    export_model(run, tmp_path / "out", to="hf")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text("utf-8"))["do_pad"] is True


@pytest.mark.parametrize("kills", [["tune:1"], ["align:3", "tune:3"]])
def test_killed_and_resumed_a_run_with_adapters_and_dropout_ends_the_same(
    run: Path, recipe: Path, tmp_path: Path, kills: list[str]
) -> None:
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, HARNESS, recipe, folder, *kills], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * len(kills) + ["0"]
    assert sha256(folder / "tune" / "model.safetensors") == sha256(run / "tune" / "model.safetensors")
    assert (folder / "tune" / "pictures.jsonl").read_text() == (run / "tune" / "pictures.jsonl").read_text()


def test_half_precision_trains_looks_on_and_answers(recipe: Path, tmp_path: Path) -> None:
    """Frozen weights in bf16, adapters and connector in fp32; pictures are answered without autocast."""
    folder = train(recipe, ["stages.tune.precision=bf16"], run_folder=tmp_path / "run", console=QUIET)
    assert (folder / "tune" / "pictures.jsonl").read_text("utf-8").count("\n") >= 2
    assert load_model(folder).stage == "tune"


def test_the_plan_counts_adapters(recipe: Path) -> None:
    plan = inspect_recipe(load_recipe(recipe)).stages[1]
    # Width 64, between 128: q k v o have 64 + 64, gate up down 64 + 128 rows and columns, times r = 2, two blocks.
    assert plan.trainable is not None
    assert plan.trainable["language_model"] == 2 * 2 * (4 * 128 + 3 * 192)


def test_mistakes_in_the_recipe(recipe: Path) -> None:
    for change, complaint in (
        ("stages.tune.lora=null", "trainable.language_model is 'lora'; add a section 'lora', such as {r: 128}"),
        ("stages.tune.trainable=[connector]", "lora is given, but trainable.language_model is not 'lora'"),
        ("stages.tune.lora.r=0", "stages.tune.lora: r must be at least 1, got 0"),
        ("stages.tune.lora.dropout=1", "dropout must be from 0 to below 1"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe, [change])
        assert complaint in str(caught.value)
    problems = check_parts(load_recipe(recipe, ["stages.tune.image_aspect=pda"]))
    assert "stages.tune.image_aspect: the vision encoder knows no 'pda'" in "\n".join(map(str, problems))
    problems = check_parts(load_recipe(recipe, ["stages.tune.lora.targets=[q_prj]"]))
    assert "stages.tune.lora.targets: q_prj: no linear layer" in "\n".join(map(str, problems))


# --- four bits -------------------------------------------------------------------------------------------------------


def test_four_bits_without_bitsandbytes_or_gpu_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CausalLmConfig(model="a/b", architecture={"model_type": "llama"}, quantize="nf4").tiny(tmp_path)
    assert config.quantize is None, "the small stand-in is whole: a smoke run needs no GPU"
    four = CausalLmConfig(model=config.model, quantize="nf4")
    monkeypatch.setattr("llava_kit_plugins.causal_lm.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"four bits need bitsandbytes, .*'llava-kit\[qlora\]'"):
        build_causal_lm(four)
    monkeypatch.setattr("llava_kit_plugins.causal_lm.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="four bits need a GPU"):
        build_causal_lm(four)


@pytest.mark.gpu
def test_adapters_train_beside_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = CausalLmConfig(model="a/b", architecture={"model_type": "llama"}).tiny(tmp_path)
    lm = build_causal_lm(CausalLmConfig(model=config.model, quantize="nf4"))
    model = tiny_model(tmp_path)
    model.language_model = lm
    adapt(model)
    model.cuda()
    lm.hidden(torch.randn(1, 4, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
