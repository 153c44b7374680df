"""Runs as checkpoints of others: imported, trained, exported, and the same to stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Tiny, hf_rows, tiny, write_base, write_hf, write_lora, write_original, write_projector
from parts import picture, sample
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration
from world import write_world

from llava_kit import exporting, load_model, train
from llava_kit.chat import answer_batch
from llava_kit.checkpoint import RunFolder
from llava_kit.cli import run as command
from llava_kit.contracts import GenerateOptions, Unsupported
from llava_kit.errors import ModelError, RecipeError
from llava_kit.exporting import export_model
from llava_kit.importing import import_checkpoint
from llava_kit.interop import LoadedModel, read_model
from llava_kit.layout_hf import hf_config
from llava_kit.recipe import load_recipe

LAYOUTS: dict[str, tuple[Callable[[Tiny, Path], Path], str, int]] = {
    "original v1, .bin": (write_original, "linear", 0),
    "original v1.5, safetensors": (lambda model, folder: write_original(model, folder, pickled=False), "mlp", 0),
    "projector of stage one": (write_projector, "linear", 0),
    "LoRA": (write_lora, "mlp", 0),
    "llava-hf": (write_hf, "mlp", hf_rows()),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def stock_and_own(loaded: LoadedModel, export: Path, folder: Path) -> tuple[float, list[str]]:
    """Largest difference of logits, and both greedy texts, on the same picture and words."""
    stock = LlavaForConditionalGeneration.from_pretrained(export, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export)
    image = picture(folder / "seen.png", 1)
    asked = sample("a", [image], "What is this?")
    batch = loaded.collator.prompts([asked]).batch
    assert batch is not None
    image_id = stock.config.image_token_id
    ids = [token for one in loaded.collator.encode(asked, reply=True).tokens.ids for token in expanded(one, image_id)]
    given = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": batch.images[0].pixels_NCHW,
    }
    lm = loaded.model.language_model
    with torch.no_grad():
        own = lm.logits(lm.hidden(loaded.model.embeds(batch)))[0]
        theirs = stock(**given).logits[0][:, : own.shape[1]]
        new = stock.generate(**given, do_sample=False, max_new_tokens=8)[0, len(ids) :]
    (answer,) = answer_batch(loaded.model, loaded.collator, [asked], GenerateOptions(max_new_tokens=8))
    text = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return float((own - theirs).abs().max()), [text, getattr(answer, "text", str(answer))]


def expanded(token: int, image_id: int) -> list[int]:
    return [image_id] * 16 if token == -200 else [token]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_import_train_two_steps_export(recipe: Path, tmp_path: Path, layout: str) -> None:
    """And stock transformers gives the same logits and greedy text."""
    write, projector, rows = LAYOUTS[layout]
    model = tiny(projector, extra_rows=rows)
    changes = ["stages.tune.steps=2", "stages.tune.validation.every=0", "evaluate={}"]
    folder = write(model, tmp_path / "x")
    run = import_checkpoint(folder, tmp_path / "run", changes, recipe=recipe, after="align")
    before = read_model(run)
    train(run / "recipe.yaml", run_folder=run, resume=True, console=Console(quiet=True))
    after = load_model(run)
    assert after.stage == "tune"
    pairs = zip(before.model.connector.parameters(), after.model.connector.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    parity = export_model(run, tmp_path / "out", to="hf")
    assert parity.max_difference <= 1e-5
    difference, texts = stock_and_own(after, tmp_path / "out", tmp_path)
    assert difference <= 1e-5
    assert texts[0] == texts[1]


def test_hub_to_run_to_hub_is_byte_identical(tmp_path: Path) -> None:
    model = tiny("mlp", extra_rows=hf_rows())
    source = write_hf(model, tmp_path / "x")
    export_model(import_checkpoint(source, tmp_path / "run"), tmp_path / "out", to="hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


@pytest.fixture(scope="module")
def linear_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A v1 checkpoint in the hub's layout."""
    folder = tmp_path_factory.mktemp("linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAVA_KIT_CACHE", str(folder / "cache"))
        export_model(write_original(tiny("linear"), folder / "x"), folder / "out", to="hf")
    return folder / "out"


@pytest.mark.parametrize("to", ["hf", "llava"])
def test_linear_to_export_to_import_is_bit_identical(tmp_path: Path, linear_export: Path, to: Any) -> None:
    model, out = tiny("linear"), linear_export
    if to == "llava":
        out = tmp_path / "out"
        export_model(write_original(model, tmp_path / "x"), out, to=to)
    back = read_model(import_checkpoint(out, tmp_path / "run"))
    assert back.recipe.model.connector.name == "linear"
    connector: Any = back.model.connector
    assert torch.equal(connector.final.weight, model.projector.weight)
    assert torch.equal(connector.final.bias, model.projector.bias)
    lm: Any = back.model.language_model
    for name, tensor in model.lm.state_dict().items():
        assert torch.equal(lm.lm.state_dict()[name][: len(tensor)], tensor), name


def test_the_files_of_both_generations(linear_export: Path) -> None:
    out = linear_export
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "README.md",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json", "llava_kit.json",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000.0
    for part in (config, text, config["vision_config"]):
        assert part["dtype"] == part["torch_dtype"] == "float32"
    assert config["projector_hidden_act"] == "gelu" and text["vocab_size"] % 64 == 0
    tokens = json.loads((out / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokens["added_tokens_decoder"][str(config["image_token_index"])]["content"] == "<image>"
    assert "vision_tower.vision_model.embeddings.class_embedding" in load_file(out / "model.safetensors")
    card = (out / "README.md").read_text()
    assert "largest difference of logits: " in card and "greedy text: the same" in card
    assert "written as two with GELU" in card


def test_a_run_with_parts_of_its_own(recipe: Path, tmp_path: Path) -> None:
    """An open_clip tower, and a language model whose head is its embedding."""
    model = tiny("linear")
    text = LlamaConfig(**{**model.lm.config.to_dict(), "tie_word_embeddings": True})
    model.lm = LlamaForCausalLM(text)
    plan = load_recipe(recipe, [f"model.language_model.model={write_base(model, tmp_path / 'base')}"])
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.finish_stage("align", {}, {})
    plan.save(run.recipe)
    export_model(run.path, tmp_path / "out", to="hf")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "language_model.model.embed_tokens.weight" in names and "language_model.lm_head.weight" not in names
    difference, texts = stock_and_own(load_model(run.path), tmp_path / "out", tmp_path)
    assert difference <= 1e-5 and texts[0] == texts[1]


def test_the_identity_form_is_for_transformers_only(tmp_path: Path) -> None:
    export_model(write_original(tiny("linear"), tmp_path / "x"), tmp_path / "out", to="hf", projector_form="identity")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["projector_hidden_act"] == "linear"
    assert "for transformers only" in (tmp_path / "out" / "README.md").read_text()


def test_projector_only(tmp_path: Path) -> None:
    model = tiny("mlp")
    export_model(write_original(model, tmp_path / "x"), tmp_path / "out", to="llava", projector_only=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "mm_projector.bin", "README.md", "llava_kit.json",
    }  # fmt: skip
    state = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        f"model.mm_projector.{name}": tensor.shape for name, tensor in model.projector.state_dict().items()
    }


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ({"vision_feature_layer": -3}, "logits differ by"),
        ({"image_token_index": 10**6}, "stock transformers cannot use the export"),
    ],
)
def test_a_failed_parity_check_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(exporting, "hf_config", lambda *args, **kwargs: hf_config(*args, **kwargs) | damage)
    with pytest.raises(ModelError) as caught:
        export_model(write_original(tiny("mlp"), tmp_path / "x"), tmp_path / "out", to="hf")
    assert complaint in str(caught.value) and caught.value.code == 4
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_what_a_layout_cannot_hold_is_refused_with_the_reason(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_kit_plugins.connectors import PerTokenConnector

    folder = write_original(tiny("linear"), tmp_path / "x")
    run = import_checkpoint(folder, tmp_path / "run")
    deep_run = import_checkpoint(folder, tmp_path / "deep")
    text = (deep_run / "recipe.yaml").read_text()
    weights = tmp_path / "deep" / "parts" / "connector"
    (deep_run / "recipe.yaml").write_text(
        text.replace(f"name: linear\n    weights: {weights}", "name: mlp\n    depth: 3")
    )
    with pytest.raises(
        ModelError, match="has a projector of two layers, this one is 'mlp3x_gelu'; --to llava can hold"
    ):
        export_model(deep_run, tmp_path / "out", to="hf")
    monkeypatch.setattr(PerTokenConnector, "to_hf", lambda self: Unsupported("it has a reason"))
    with pytest.raises(ModelError, match="cannot be written in another layout: it has a reason"):
        export_model(run, tmp_path / "out", to="hf")
    monkeypatch.delattr(PerTokenConnector, "to_hf")
    with pytest.raises(ModelError, match="PerTokenConnector has no to_hf"):
        export_model(run, tmp_path / "out", to="llava")
    with pytest.raises(RecipeError, match="--projector-only is for --to llava"):
        export_model(run, tmp_path / "out", to="hf", projector_only=True)
    with pytest.raises(RecipeError, match="exists already"):
        export_model(run, tmp_path, to="hf")
    assert not (tmp_path / "out").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_original(tiny("mlp"), tmp_path / "x")
    run, out = tmp_path / "run", tmp_path / "out"
    assert command(["import", str(folder), str(run), "--after", "align", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run)}
    assert command(["export", str(run), str(out), "--to", "llava", "--projector-only"]) == 0
    assert "of stock transformers, same greedy text" in capsys.readouterr().out
    assert command(["import", str(tmp_path), str(tmp_path / "other")]) == 4
    assert "error[4]" in capsys.readouterr().err
